"""What Ray costs a training: samples/s under Ray Train against `torchrun -m roclip.training`, the same ranks on the same machine.

Both train the same config on the same shards, in turns, each time in a new run directory; what counts is the samples of all
logged rows, but for the first, which hold the start, by the seconds that they took.

    python tests/bench/ray_cost.py [--quick] [--ranks 2] [--gpus-per-rank 0]
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from bench import measure
from kit import environment, preset, scene_samples, write_shard

from cluster.ray.connect import start_local_ray
from cluster.train.job import train_arm
from roclip.config import environment_defaults, load_config
from roclip.data.shards import Manifest
from roclip.metrics.registry import read_metrics

BAR = 0.97
STARTING_ROWS = 2
CONFIG = """
name: ray-cost
arms: [roclip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 512, neighbours: 8, warmup: 1, match_every: 2}}
train: {{epochs: {epochs}, global_batch_size: {batch}, log_every_steps: 8, checkpoint_every_steps: 64}}
cluster: {{workers: {ranks}, gpus_per_worker: {gpus}}}
"""


def rate(run: Path) -> float:
    rows = read_metrics(run / "roclip" / "metrics.jsonl")[STARTING_ROWS:]
    return statistics.harmonic_mean(row["samples_per_s"] for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpus-per-rank", type=float, default=0)
    arguments = parser.parse_args()
    environment_defaults()
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = Path(name), itertools.count()
        shards = 4 if arguments.quick else 16
        for number in range(shards):
            write_shard(folder / "shards", number, scene_samples(64 * number, 64))
        Manifest(folder / "shards").finish({"urls": 64 * shards})
        path = preset(
            folder,
            CONFIG.format(
                shards=folder / "shards", epochs=6, batch=32, ranks=arguments.ranks, gpus=arguments.gpus_per_rank
            ),
        )
        start_local_ray(
            num_cpus=arguments.ranks + 1,
            include_dashboard=False,
            _system_config={"worker_niceness": 0},  # what else runs on this machine shall slow both alike
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},  # as torchrun sets it
        )

        def ours() -> float:
            run = folder / f"run{next(numbers)}"
            train_arm(load_config(str(path), [f"run_dir={run}"]), "roclip", run)
            return rate(run)

        def torchrun() -> float:
            run = folder / f"run{next(numbers)}"
            subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}",
                    "--standalone", "-m", "roclip.training", str(path), f"run_dir={run}",
                ],
                env=environment(OMP_NUM_THREADS="1"), check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            return rate(run)

        case = f"tiny, batch 32, {arguments.ranks} ranks"
        measure(
            "ray_cost", case, "samples/s", ours, torchrun, BAR, runs=1 if arguments.quick else 5, lower_is_better=False
        )
        ray.shutdown()
