"""An experiment for real: origins, Ray, img2dataset, DeepSpeed; stopped, resumed, repeated, enlarged."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from kit import environment, preset

from cluster.cli.main import guarded
from roclip.metrics.registry import read_metrics
from roclip.report.comparison import SHARES

pytestmark = [pytest.mark.slow, pytest.mark.ray]
TINY = """
name: tiny
runs: {folder}/runs
data: {{scenes: 160, faults: false, min_shards: 1}}
attacks: {{targeted: {{images: 2, captions_per_image: 3}}, backdoors: [{{kind: patch, count: 6}}]}}
ingest: {{samples_per_shard: 128, image_size: 64, encode_format: png, encode_quality: 6,
  retry_passes: 0, policy: {{allow_networks: [127.0.0.0/8], robots: false, host_connections: 256, host_requests_per_s: 1.0e6}}}}
model: {{name: tiny}}
pool: {{size: 32}}
train: {{epochs: 2, global_batch_size: 32, lr: 1e-3, log_every_steps: 1, checkpoint_every_steps: 2}}
evaluate: {{size: 40, every: 1}}
oracle: {{trusted: 8}}
seeds: [0, 1]
arms:
  clip: {{method: clip}}
  often: {{set: {{pool: {{neighbours: 0, warmup: 1, match_every: 2, filter_frac: [0.2, 0.2]}}}}}}
"""


def compare(path: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cluster.cli", "compare", str(path), *overrides]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    said, errors = process.communicate(timeout=900)
    assert process.returncode == code, said + errors
    return said, errors


def the_folder(folder: Path) -> Path:
    (path,) = (folder / "runs").glob("*-tiny")
    return path


def weights(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Stopped by Ctrl-C in the middle of training, then left to finish."""
    folder = tmp_path_factory.mktemp("experiment")
    path = preset(folder, TINY.format(folder=folder))
    process = compare(path)
    deadline = time.monotonic() + 600
    while not any(read_metrics(p) for p in (folder / "runs").glob("*-tiny/*/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    left = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, errors = finish(process, 130)
    assert "Ctrl-C" in errors
    psutil.wait_procs(left, timeout=240)  # Ray's agents look for their raylet now and then
    assert not [p for p in left if p.is_running()]
    assert not (the_folder(folder) / "compare.json").exists()
    said, _ = finish(compare(path))
    return path, the_folder(folder), said


def test_all_arms_of_a_corpus_saw_the_same_steps_and_each_seed_has_its_own_data(done):
    _, folder, _ = done
    assert {p.name for p in folder.glob("*-seed*")} == {"data-seed0", "data-seed1"}
    for corpus in folder.glob("*-seed*"):
        logged = {arm: read_metrics(corpus / arm / "metrics.jsonl") for arm in ("clip", "often")}
        assert [row["step"] for row in logged["clip"]] == [row["step"] for row in logged["often"]]
        assert [row["step"] for row in logged["clip"]] == list(range(1, len(logged["clip"]) + 1))
        assert {row["phase"] for row in logged["often"]} == {"plain", "matched"}
        assert not (corpus / "segmenter").exists()
    served = [pq.read_table(folder / f"data-seed{seed}" / "origin" / "corpus.parquet") for seed in (0, 1)]
    assert served[0]["caption"].to_pylist() != served[1]["caption"].to_pylist()


def test_table_matches_the_evaluations(done):
    _, folder, said = done
    result = json.loads((folder / "compare.json").read_text())
    assert [(row["point"], row["arm"], row["seeds"]) for row in result["rows"]] == [
        ("data", "clip", [0, 1]),
        ("data", "often", [0, 1]),
    ]
    for row in result["rows"]:
        lines = [read_metrics(folder / f"data-seed{s}" / row["arm"] / "evaluations.jsonl")[-1] for s in (0, 1)]
        for key in [key for key in SHARES if key in lines[0]]:
            assert row["worst"][key]["by_seed"] == [line[key] for line in lines]
            assert row["worst"][key]["mean"] == pytest.approx(sum(line[key] for line in lines) / 2)
        for name, attack in row["worst"]["attacks"].items():
            assert attack["successes"] == sum(line["attacks"][name]["successes"] for line in lines)
            assert attack["n"] == sum(line["attacks"][name]["n"] for line in lines)
            assert attack["ci95"][0] <= attack["rate"] <= attack["ci95"][1]
        assert row["worst"]["attacks"]["targeted"]["n"] == 4
    assert set(result["rows"][1]["suspects"]) == {"backdoor", "targeted"}
    assert result["points"]["data"]["poisons"]["backdoor"] == 6
    assert (folder / "table.md").read_text() in said
    assert re.search(r"`roclip compare .*`, commit [0-9a-f]{12}(-dirty)?, ", said)
    assert (folder / "frontier.png").is_file()
    assert "often" in (folder / "compare.html").read_text()


def test_same_command_trains_nothing_again(done):
    path, folder, _ = done
    before = weights(folder)
    assert guarded(["compare", str(path)]) == 0
    assert weights(folder) == before


def test_another_arm_trains_only_itself_and_one_that_fails_does_not_stop_it(done):
    path, folder, _ = done
    before = weights(folder)
    wild = ["arms.wild.method=clip", "arms.wild.set.train.lr=1e30"]
    third = ["arms.third.method=clip", "arms.third.set.train.lr=0.002"]
    _, errors = finish(compare(path, *wild, *third, "seeds=[0]"), 7)
    assert "1 of the trainings did not finish" in errors
    assert "data-seed0: training wild: " in errors
    assert {p: t for p, t in weights(folder).items() if p in before} == before
    assert (folder / "data-seed0" / "third" / "checkpoints" / "LATEST").exists()
    result = json.loads((folder / "compare.json").read_text())
    assert [row["arm"] for row in result["rows"]] == ["clip", "often", "third"]


def test_arm_that_began_with_other_settings_is_refused(done, capsys):
    path, _, _ = done
    assert guarded(["compare", str(path), "arms.often.set.pool.size=16"]) == 2
    assert "size: 32 -> size: 16" in capsys.readouterr().err


def test_dry_run_says_what_would_be_trained_and_does_nothing(tmp_path, capsys):
    path = preset(tmp_path, TINY.format(folder=tmp_path))
    assert guarded(["compare", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"corpus data-seed1 +172 URLs, at most 10 steps", said)
    assert re.search(r"trainings +4: 2 corpora x 2 arms", said)
    assert re.search(r"arm often +roclip, matched epochs 2, sample filter", said)
    assert not (tmp_path / "runs").exists()
