"""A golden loss curve: 20 steps on a CPU, plain and matched, gated. A change that should not alter numbers must not.

Regenerate after one that should, and say why in the commit:  PYTHONPATH=tests/support python tests/roclip/training/test_golden.py
"""

import tempfile
from pathlib import Path

import pytest
from forked import trainings_of
from kit import preset, scene_samples, write_shard

from roclip.data.shards import Manifest
from roclip.metrics.registry import read_metrics

GOLDEN = Path(__file__).parents[2] / "golden" / "roclip_loss.txt"
PRESET = """
name: golden
data: {{shards: {folder}/shards, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 64, filter_frac: [0.1, 0.1], match_every: 2}}
train: {{epochs: 4, global_batch_size: 32, lr: 1e-3, log_every_steps: 1}}
"""


def curve(folder: Path) -> list[tuple[int, str, float]]:
    """Step, phase and loss of 20 steps of a training on one thread."""
    for number in range(3):
        write_shard(folder / "shards", number, scene_samples(64 * number, 54))
    Manifest(folder / "shards").finish({})
    with trainings_of(preset(folder, PRESET.format(folder=folder))) as trainings:
        assert trainings.end(trainings.train(folder / "run")) == 0, trainings.said.read_text()
    rows = read_metrics(folder / "run" / "roclip" / "metrics.jsonl")
    return [(row["step"], row["phase"], row["loss"]) for row in rows]


@pytest.mark.slow
def test_loss_curve_is_the_golden_one(tmp_path):
    golden = [line.split() for line in GOLDEN.read_text().splitlines()]
    ours = curve(tmp_path)
    assert [(step, phase) for step, phase, _ in ours] == [(int(step), phase) for step, phase, _ in golden]
    for (step, _, loss), (_, _, expected) in zip(ours, golden, strict=True):
        assert loss == pytest.approx(float(expected), rel=2e-3), f"step {step}"  # other CPUs round otherwise


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text("".join(f"{step} {phase} {loss:.6f}\n" for step, phase, loss in curve(Path(folder))))
