"""What one look at a run costs that has logged 100,000 steps: the reader of a run against reading the whole log again.

    python tests/bench/run_reader.py [--quick]

Processor time of the monitor's look after one more step was logged; the monitor looks every two seconds.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench import measure

from cluster.monitoring.publisher import follow
from roclip.metrics.registry import METRICS, read_metrics

BAR = 20.0
_NOT_NUMBERS = {"phase": "matched", "step_s_p50": [0.1] * 8, "step_s_p99": [0.2] * 8, "bad_reasons": {"broken": 1}}


def row(step: int) -> dict:
    """A logged step with every metric."""
    numbers = {name: step + 0.123456789 for name in METRICS if name not in _NOT_NUMBERS}
    return {**numbers, **_NOT_NUMBERS, "step": step, "progress": step / 1000}


def main(quick: bool) -> None:
    rows = 10_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "roclip" / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        with path.open("w") as file:
            file.writelines(json.dumps(row(step)) + "\n" for step in range(1, rows + 1))
        look, logged = follow(path.parent, "training"), [rows]

        def one_more() -> None:
            logged[0] += 1
            with path.open("a") as file:
                file.write(json.dumps(row(logged[0])) + "\n")

        def ours() -> float:
            one_more()
            start_s = time.process_time()
            list(look())
            return time.process_time() - start_s

        def whole() -> float:
            one_more()
            start_s = time.process_time()
            every = read_metrics(path)
            {name: value for each in every for name, value in each.items()}
            [sum(each.get(name, 0) for each in every) for name, metric in METRICS.items() if metric.summed]
            return time.process_time() - start_s

        measure("run_reader", f"monitor, {rows:,} rows", "s", ours, whole, BAR, runs=3 if quick else 5)


if __name__ == "__main__":
    main("--quick" in sys.argv)
