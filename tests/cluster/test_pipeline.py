"""The whole system, for real: HTTP origin, Ray, img2dataset, DeepSpeed on two gloo ranks, oracle, report."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from kit import REPOSITORY, SHARED_DATA, environment, preset
from tiny import TINY_RUN

from cluster.cli.main import guarded
from ingest.origin import Origin
from roclip.data.shards import Manifest
from roclip.metrics.registry import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def roclip(*arguments: str, **extra: str) -> subprocess.Popen:
    command, env = [sys.executable, "-m", "cluster.cli", *arguments], environment(**extra)
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    said, errors = process.communicate(timeout=900)
    assert process.returncode == code, said + errors
    return said, errors


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def until(condition, process: subprocess.Popen) -> None:
    """Wait for a moment in a run."""
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def the_run(folder: Path) -> Path:
    (path,) = (folder / "runs").glob("*-tiny")
    return path


def keys(run: Path) -> list[str]:
    records = Manifest(run / "shards").records()
    return [
        key for r in records for key in pq.read_table(run / "shards" / f"{r.name[:5]}.index.parquet")["key"].to_pylist()
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that was killed without warning in the middle of ingest and then left to finish: what it said in the end. In that
    of training, `train/test_compare.py` stops one by Ctrl-C and `jobs/test_jobs.py` kills one."""
    folder = tmp_path_factory.mktemp("run")
    path = preset(folder, TINY_RUN.format(folder=folder))
    process = roclip("run", str(path))
    until(lambda: any((folder / "runs").glob("*/shards/manifest/00000.json")), process)
    _, refusal = finish(roclip("run", str(path)), 5)
    assert "works in this run directory" in refusal
    left = descendants(process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(left, timeout=240)  # Ray's agents look for their raylet now and then
    assert not [p for p in left if p.is_running()]
    said, _ = finish(roclip("run", str(path)))
    return path, the_run(folder), said


def test_killed_run_finishes_with_no_sample_lost_or_doubled(done):
    _, run, _ = done
    ingested = keys(run)
    assert len(ingested) == len(set(ingested))
    corpus = pq.read_table(run / "origin" / "corpus.parquet")["behaviour"].to_pylist()
    usable = sum(behaviour in ("ok", "redirect", "slow") for behaviour in corpus)
    assert len(ingested) == usable
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ingest"]["succeeded"] == usable
    assert summary["ingest"]["urls"] == len(corpus)
    assert sum(summary["ingest"]["failed"].values()) == len(corpus) - usable
    assert not list((run / "shards").glob("_work/*"))
    for tar in sorted((run / "shards").glob("*.tar")):
        with tarfile.open(tar) as archive:
            assert archive.getmembers()


def test_both_arms_saw_the_same_data_and_every_step_once(done):
    _, run, _ = done
    steps = {arm: [row["step"] for row in read_metrics(run / arm / "metrics.jsonl")] for arm in ("clip", "roclip")}
    assert steps["clip"] == steps["roclip"]
    assert steps["clip"] == list(range(1, steps["clip"][-1] + 1))


def test_summary_and_report_say_what_happened(done):
    _, run, said = done
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {"schema", "config", "commit", "wall_s", "peak_rss_bytes", "ingest", "arms"}
    for arm in ("clip", "roclip"):
        figures = summary["arms"][arm]
        assert set(figures["phases"]) == ({"plain", "matched"} if arm == "roclip" else {"plain"})
        assert figures["attacks"]["targeted"]["n"] == 4
        assert figures["oracle"]["verdict"] in ("clean", "suspicious", "poisoned", "inconclusive")
    assert "roclip" in said
    assert str(run / "report.html") in said
    page = (run / "report.html").read_text()
    assert "<script src" not in page
    assert "http://127" not in page


def test_same_command_again_repeats_nothing_and_starts_no_ray(done, tmp_path):
    path, run, _ = done
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    finish(roclip("run", str(path), RAY_TMPDIR=str(tmp_path)))
    assert not list(tmp_path.iterdir())
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == before


def test_export_refuses_what_the_oracle_did_not_call_clean_unless_asked(done, tmp_path):
    path, run, _ = done
    trusted = (run / "roclip" / "checkpoints" / "TRUSTED").exists()
    assert guarded(["export", str(path), "--out", str(tmp_path / "model")]) == (0 if trusted else 4)
    assert guarded(["export", str(path), "--out", str(tmp_path / "any"), "--untrusted"]) == 0
    assert (tmp_path / "any" / "open_clip_model.safetensors").is_file()


def test_url_list_of_the_users_own_runs_without_evaluation_or_oracle(done, tmp_path):
    _, earlier, _ = done
    with Origin(earlier / "origin" / "corpus.parquet") as origin:
        origin.url_list(tmp_path / "urls.parquet")
        path = preset(tmp_path, TINY_RUN.format(folder=tmp_path))
        own = [
            "data.scenes=0",
            f"data.urls={tmp_path / 'urls.parquet'}",
            "train.epochs=1",
            "arms=[roclip]",
            "cluster.workers=1",
        ]
        said, _ = finish(roclip("run", str(path), *own))
    summary = json.loads((the_run(tmp_path) / "summary.json").read_text())
    assert "roclip is not checked" in said
    assert summary["arms"]["roclip"]["oracle"] == {"verdict": "inconclusive"}
    assert summary["arms"]["roclip"]["steps"] > 0
    assert not (the_run(tmp_path) / "roclip" / "checkpoints" / "TRUSTED").exists()
    assert (the_run(tmp_path) / "report.html").is_file()


@pytest.mark.data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real photos are not beside this checkout")
def test_real_photos_run_end_to_end(tmp_path):
    photos = SHARED_DATA / "fashion" / "train.parquet"
    few = [
        "data.limit=4000",
        "train.epochs=2",
        "cluster.workers=1",
        "arms=[roclip]",
        "oracle.trusted=400",
        "oracle.epochs=1",
    ]
    config = str(REPOSITORY / "configs" / "fashion.yaml")
    said, _ = finish(roclip("run", config, f"data.images={photos}", f"runs={tmp_path}", *few))
    (run,) = tmp_path.glob("*-fashion")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ingest"]["succeeded"] > 4000
    assert len(json.loads((run / "origin" / "labels.json").read_text())["labels"]) == 24
    assert summary["arms"]["roclip"]["zero_shot_top1"] > 3 / 24  # two epochs: far above chance, no more
    assert summary["arms"]["roclip"]["oracle"]["verdict"] in ("clean", "suspicious", "poisoned", "inconclusive")
    assert "report.html" in said
