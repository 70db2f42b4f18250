"""From a loss to training again, and the steps that are done twice: on a Ray cluster of network namespaces, one host each.

Each case trains afresh on two nodes, loses something in mid-epoch, and ends when a step that was not done before is logged.
Seconds are measured against the bar of 60; lost steps against one checkpoint interval. Needs root.

    python tests/bench/recovery.py [--quick] [--cases rank node-back node-gone link driver]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from ends import logged, until
from kit import preset, tiny_shards
from ray_netns import RayNodes, ray_nodes

from roclip.config import environment_defaults

BAR_S, INTERVAL, AT_STEP = 60.0, 5, 12
CONFIG = """
name: recovery
arms: [roclip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 100, neighbours: 8, warmup: 1, match_every: 4}}
train: {{epochs: 100, global_batch_size: 32, checkpoint_every_steps: {interval}, log_every_steps: 1}}
cluster: {{workers: 2}}
"""


def kill_rank(cluster: RayNodes) -> None:
    cluster.processes_of("two", "ray::RayTrain")[0].kill()


def kill_node(cluster: RayNodes) -> None:
    cluster.kill_node("two")


def replace_node(cluster: RayNodes) -> None:
    cluster.kill_node("two")
    cluster.add_node("two")


def cut_link(cluster: RayNodes) -> None:
    cluster.net.cut(cluster.net.hosts["two"])


def mend(cluster: RayNodes) -> None:
    """Both nodes are there and reachable."""
    cluster.net.heal(cluster.net.hosts["two"])
    cluster.kill_node("two")
    cluster.add_node("two")


CASES: dict[str, tuple[str, Callable[[RayNodes], None] | None, tuple[str, ...], bool]] = {
    "rank": ("a rank is killed", kill_rank, (), False),
    "node-back": ("a node is killed, and started again at once", replace_node, (), False),
    "node-gone": ("a node is killed, training goes on with fewer", kill_node, ("cluster.min_workers=1",), True),
    "link": ("a node's link is cut, training goes on with fewer", cut_link, ("cluster.min_workers=1",), True),
    "driver": ("the driver is killed, and the same command given again", None, (), False),
}


def recover(cluster: RayNodes, config: Path, run: Path, lose: Callable[[RayNodes], None] | None, *words: str) -> dict:
    """Seconds from the loss to the first step that was not done before, and the steps that were done twice."""

    def follow(process, condition: Callable[[], bool]) -> None:
        until(condition, lambda: "" if process.poll() is None else process.communicate()[0])

    def resumed_from() -> int | None:
        lines = (run / "roclip" / "log" / "ranks.log").read_text().splitlines()
        starts = [int(line.rsplit(" ", 1)[1]) for line in lines if "ranks from step" in line]
        return starts[1] if len(starts) > 1 else None

    def again(process) -> None:
        follow(process, lambda: resumed_from() is not None)
        follow(process, lambda: logged(run) > reached)

    command = ("train", config, f"run_dir={run}", *words)
    with cluster.roclip(*command) as process:
        follow(process, lambda: logged(run) >= AT_STEP)
        start_s = time.monotonic()
        if lose is not None:
            lose(cluster)
            reached = logged(run)
            again(process)
            return {"s": time.monotonic() - start_s, "steps": reached - (resumed_from() or 0)}
        process.kill()
        process.wait()
    reached = logged(run)
    with cluster.roclip(*command) as process:
        again(process)
        return {"s": time.monotonic() - start_s, "steps": reached - (resumed_from() or 0)}


def say(case: str, unit: str, values: list[float], budget: float) -> None:
    mine = statistics.median(values)
    ratio = budget / mine if mine else float("inf")
    line = {"bench": "recovery", "case": case, "unit": unit, "ours": round(mine, 1), "peer": budget}
    print(json.dumps({**line, "ratio": round(ratio, 2), "bar": 1.0, "runs": len(values)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    environment_defaults()
    with tempfile.TemporaryDirectory() as name, ray_nodes(head_cpus=0) as cluster:
        folder = Path(name)
        config = preset(folder, CONFIG.format(shards=tiny_shards(folder / "shards"), interval=INTERVAL))
        cluster.add_node("one")
        cluster.add_node("two")
        for key in arguments.cases:
            case, lose, words, breaks = CASES[key]
            found = []
            for number in range(1 if arguments.quick else 3):
                found.append(recover(cluster, config, folder / f"{key}{number}", lose, *words))
                if breaks:
                    mend(cluster)
            say(case, "s", [one["s"] for one in found], BAR_S)
            say(case, "steps done twice", [one["steps"] for one in found], INTERVAL)
