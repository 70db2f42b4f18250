"""The repair's job, from what a check has left to a pointer that moves or does not."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from forked import TRAIN, forks_that_say
from kit import REPOSITORY, TINY_MODEL, scene_samples, write_shard

from cluster.oracle import repair as repair_job
from cluster.oracle.job import brief_of, judge
from cluster.oracle.repair import choose, repair
from cluster.oracle.request import OracleRequest
from cluster.ray.connect import start_local_ray
from roclip.attacks import scenes
from roclip.checkpoint import checkpoint as checkpoints
from roclip.config import (
    Config,
    DataConfig,
    ModelConfig,
    OracleConfig,
    RepairConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from roclip.data.shards import Manifest
from roclip.errors import CheckpointError, DataError
from roclip.found_triggers import Patch, save_triggers
from roclip.model.towers import CONFIG, WEIGHTS, Encoder, Towers
from roclip.oracle.curate import curate, write_plan
from roclip.oracle.scan.scan import scan_shards
from roclip.oracle.scan.scorer import Scorer

STEP, LABEL, HERE = "step-00000010", scenes.LABELS[3], OracleRequest(in_process=True)
PATCH = Patch(target=LABEL, crops=(np.indices((8, 8)).sum(axis=0)[..., None].repeat(3, 2).astype(np.uint8) % 2 * 255,))


def settings(**repair_settings) -> Config:
    repair = {
        "set_frac": 0.2,
        "epochs": 2,
        "steps": 1,
        "lr": 1e-6,  # what the model, which has learned nothing, says by chance stays what it is
        **repair_settings,
    }
    return Config(
        data=DataConfig(scenes=256, streams=4),
        model=ModelConfig(name="tiny"),
        train=TrainConfig(zero_stage=1),
        oracle=OracleConfig(epochs=1, reference_frac=0.6),
        repair=RepairConfig(**repair),
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint, which has learned nothing, was judged; the check's findings are made by hand."""
    run = tmp_path_factory.mktemp("run")
    for number in range(4):
        write_shard(run / "shards", number, scene_samples(64 * number, 64))
    Manifest(run / "shards").finish({})
    (run / "origin").mkdir()
    (run / "origin" / "labels.json").write_text(json.dumps({"labels": scenes.LABELS, "templates": ["a {}"]}))
    rendered = [scenes.render(10_000 + index, seed=0, size_px=64) for index in range(100)]
    rows = [{"image": scenes.encode(s.image), "mask": scenes.encode(s.mask), "label": s.label} for s in rendered]
    pq.write_table(pa.Table.from_pylist(rows), run / "origin" / "trusted.parquet")
    (run / "tiny.json").write_text(TINY_MODEL)
    folder = run / "clip" / "checkpoints"
    torch.manual_seed(0)
    Towers("tiny", run / "tiny.json").save(folder / STEP)
    sums = [
        f"{hashlib.sha256((folder / STEP / name).read_bytes()).hexdigest()}  {name}\n" for name in (CONFIG, WEIGHTS)
    ]
    (folder / STEP / "SHA256SUMS").write_text("".join(sums))
    (folder / "LATEST").write_text(STEP)
    judge(settings(), run, "clip")
    leave_findings(run)
    return run


def leave_findings(run: Path) -> None:
    """As a check would that trusts its oracle: triggers, victims and the set's plan."""
    brief = brief_of(settings(), run, "clip")
    labels, templates, segmenter = brief.case.data.labels, brief.case.data.templates, brief.segmenter
    out = brief.case.out
    scan = scan_shards(
        Scorer(Encoder.load(brief.case.checkpoint), segmenter, labels, templates), run / "shards", _quiet
    )
    seen = scan.observations
    first = seen.named.argmax(axis=1)  # every image has one caption
    agreed = np.eye(len(scenes.LABELS), dtype=bool)[first]
    scan = dataclasses.replace(scan, observations=dataclasses.replace(seen, answer=first, seen=agreed, clear=agreed))
    nobody = np.full(len(first), -1)
    rows = curate(
        scan, nobody, (PATCH,), labels, templates=templates, calibration=segmenter.calibration,
        targets=[LABEL], frac=0.2, stamped_frac=0.4, seed=0,
    )  # fmt: skip
    write_plan(out / "finetune.parquet", rows)
    save_triggers((PATCH,), out / "triggers")


def _quiet(done: float, total: float, text: str) -> None:
    pass


@pytest.fixture
def run(judged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judged, tmp_path / "run"))


def in_a_fork(config: Config, arm: str, folder: Path) -> Path:
    """The ordinary trainer, without Ray."""
    with forks_that_say(folder / "said.txt") as forks:
        assert forks.end(forks.start(TRAIN, folder / "config.yaml")) == 0, forks.said.read_text()
    latest = checkpoints.named(folder / arm / "checkpoints", "LATEST")
    assert latest is not None
    return latest


def never(config: Config, arm: str, folder: Path) -> Path:
    raise AssertionError("trained again")


@pytest.fixture
def a_cluster():
    start_local_ray(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray warns of what it does itself
def test_repair_ends_with_a_trusted_checkpoint_and_does_nothing_twice(run: Path, tmp_path: Path, a_cluster):
    said = []
    result = repair(settings(), run, "clip", say=said.append)
    assert result["accepted"], result["reasons"]
    assert result["samples"] == 51
    assert result["share"] == pytest.approx(51 / 256)
    assert result["roles"] == {"anchor": 31, "stamped": 20, "repaired": 0}
    assert [row["checkpoint"] for row in result["moments"]] == ["step-00000004", "step-00000008"]
    assert len(result["moments"][0]["found"]) == 1
    assert result["after"]["verdict"] == "inconclusive"
    assert json.loads((run / "clip" / "repair" / "oracle" / "report.json").read_text())["verdict"] == "inconclusive"
    assert said
    page = run / "clip" / "oracle" / "report.html"
    before, after = (f"<td>{100 * result[when]['attack']:.1f} %</td>" for when in ("before", "after"))
    assert before + after in page.read_text()
    assert "The repaired checkpoint is TRUSTED" in page.read_text()
    folder = run / "clip" / "checkpoints"
    assert (folder / "TRUSTED").read_text() == "repaired-00000010"
    assert (folder / "LATEST").read_text() == STEP
    assert checkpoints.export(folder / "repaired-00000010", tmp_path / "model") == tmp_path / "model"
    before, after = (Towers.load(folder / name).weights() for name in (STEP, "repaired-00000010"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert all(name.startswith("visual.") or name == "logit_scale" for name in moved)  # the text tower is what it was
    assert not any("running" in name for name in moved)
    shutil.rmtree(folder / "repaired-00000010")
    (folder / "TRUSTED").unlink()
    assert repair(settings(), run, "clip", HERE, train=never) == result
    assert (folder / "TRUSTED").read_text() == "repaired-00000010"
    checkpoints.verify(folder / "repaired-00000010")
    refused = {**result, "accepted": False, "reasons": ["something is left"]}
    (run / "clip" / "repair" / "repair.json").write_text(json.dumps(refused))
    assert not repair(settings(), run, "clip", HERE, train=never)["accepted"]
    assert not (folder / "TRUSTED").exists()
    assert "<li>something is left</li>" in page.read_text()
    with pytest.raises(AssertionError, match="trained again"):
        repair(settings(lr=1e-2), run, "clip", HERE, train=never)
    assert not (run / "clip" / "repair" / "repair.json").exists()


@pytest.mark.slow
def test_repair_goes_on_with_the_set_and_the_training_that_are_there(run: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError, match="trained again"):
        repair(settings(), run, "clip", HERE, train=never)
    record = run / "clip" / "repair" / "shards" / "00000.tar"
    written = record.stat().st_mtime_ns

    def killed(*_: object, **__: object) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(repair_job, "oracle", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(settings(), run, "clip", HERE, train=in_a_fork)
    assert not list(run.glob("clip/checkpoints/TRUSTED"))
    monkeypatch.undo()
    trained = run / "clip" / "repair" / "clip" / "checkpoints" / "step-00000008"
    result = repair(settings(), run, "clip", HERE, train=lambda *_: trained)
    assert result["accepted"]
    assert record.stat().st_mtime_ns == written


def test_repair_config_is_the_run_s_but_for_data_and_length(run: Path):
    config = repair_job.repair_config(settings(), run / "clip" / "checkpoints" / STEP, 51, 48, run / "clip" / "repair")
    assert dump_config(load_config(run / "clip" / "repair" / "config.yaml")) == dump_config(config)
    assert (config.train.global_batch_size, config.train.epochs, config.train.keep_every_epochs) == (16, 2, 1)
    assert config.model.lock_text
    assert config.ingest.image_size == 48  # as the triggers were found, however large the images are stored
    assert config.model.pretrained.endswith(STEP)
    for samples, batch in ((8, 8), (64, 16), (400, 100), (10_000, 128)):
        small = repair_job.repair_config(settings(), run / "clip" / "checkpoints" / STEP, samples, 64, run / "other")
        assert small.train.global_batch_size == batch


def test_last_of_the_good_moments_is_taken():
    assert choose([0.9, 0.01, 0.0, 0.2]) == 2
    assert choose([0.9, 0.2, 0.04, 0.06]) == 2
    assert choose([0.9, 0.2, 0.2, 0.3]) == 2


def test_everything_that_is_left_is_said():
    before = {"attack": 0.9, "top1": 0.9, "zero_shot_top1": 0.9}
    after = {"attack": 0.05, "top1": 0.881, "zero_shot_top1": 0.9, "verdict": "suspicious"}
    assert repair_job._what_is_left(before, after) == []
    after = {
        "attack": 0.06, "top1": 0.87, "zero_shot_top1": 0.8, "verdict": "poisoned", "attacks": {"backdoor": {"rate": 0.5}}
    }  # fmt: skip
    left = repair_job._what_is_left(before, after)
    assert [words.split()[0] for words in left] == ["What", "The", "Zero-shot", "Zero-shot", "The"]


def test_repair_says_what_is_missing(run: Path):
    (run / "clip" / "oracle" / "finetune.parquet").unlink()
    with pytest.raises(DataError, match="the check selects it"):
        repair(settings(), run, "clip", HERE, train=never)
    with pytest.raises(CheckpointError, match="expected a checkpoint, got none"):
        repair(settings(), run, "roclip", HERE, train=never)


def test_repair_without_images_refuses_in_words(run: Path):
    write_plan(run / "clip" / "oracle" / "finetune.parquet", [])
    result = repair(settings(), run, "clip", HERE, train=never)
    assert (result["accepted"], result["samples"]) == (False, 0)
    assert "no image to repair with" in result["reasons"][0]
