"""The oracle's job: what it judges, when it need not, and that only a clean verdict moves TRUSTED."""

import functools
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
from kit import REPOSITORY, TINY_MODEL, scene_samples, write_shard
from rigged import World, fatal_scorer, rigged_scorer

from cluster.oracle.job import judge, oracle
from cluster.oracle.request import OracleRequest
from cluster.oracle.scan import cpus_per_actor, scan_with_actors
from cluster.ray.connect import start_local_ray
from roclip.attacks import scenes
from roclip.config import Config, DataConfig, OracleConfig
from roclip.data.shards import Manifest
from roclip.errors import CheckpointError, DataError
from roclip.model.towers import CONFIG, WEIGHTS, Towers
from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import scan_shards, scan_side_px

TRUSTED, STEP = 100, "step-00000010"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only arm holds a checkpoint that has learned nothing."""
    run = tmp_path_factory.mktemp("run")
    for number in range(4):
        write_shard(run / "shards", number, scene_samples(64 * number, 64, size_px=32))
    Manifest(run / "shards").finish({})
    (run / "origin").mkdir()
    (run / "origin" / "labels.json").write_text(json.dumps({"labels": scenes.LABELS, "templates": ["a {}"]}))
    rendered = [scenes.render(10_000 + index, seed=0, size_px=32) for index in range(TRUSTED)]
    rows = [{"image": scenes.encode(s.image), "mask": scenes.encode(s.mask), "label": s.label} for s in rendered]
    pq.write_table(pa.Table.from_pylist(rows), run / "origin" / "trusted.parquet")
    (run / "tiny.json").write_text(TINY_MODEL)
    write_checkpoint(run, run / "clip" / "checkpoints" / STEP, seed=0)
    (run / "clip" / "checkpoints" / "LATEST").write_text(STEP)
    judge(settings(), run, "clip")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of its own, judged once."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def write_checkpoint(run: Path, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    Towers("tiny", run / "tiny.json").save(folder)
    names = (CONFIG, WEIGHTS)
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def settings(**oracle_settings) -> Config:
    wanted = {"epochs": 1, "reference_frac": 0.6, **oracle_settings}
    return Config(data=DataConfig(scenes=256), oracle=OracleConfig(**wanted))


def read_report(run: Path) -> dict:
    return json.loads((run / "clip" / "oracle" / "report.json").read_text())


def rewrite_verdict(run: Path, verdict: str) -> None:
    """As if the check of this very checkpoint had come to another verdict."""
    (run / "clip" / "oracle" / "report.json").write_text(json.dumps({**read_report(run), "verdict": verdict}))


def test_job_judges_the_latest_checkpoint(run: Path):
    report = read_report(run)
    assert report["verdict"] == "inconclusive"  # neither model nor oracle has learned anything
    assert report["subject"]["checkpoint"] == STEP
    assert (run / "clip" / "oracle" / "report.html").exists()
    assert (run / "segmenter" / "segmenter.json").exists()
    assert not (run / "clip" / "checkpoints" / "TRUSTED").exists()


@pytest.mark.parametrize("verdict", ["suspicious", "poisoned", "inconclusive"])
def test_trusted_stays_away_when_the_verdict_is_not_clean(run: Path, verdict: str):
    rewrite_verdict(run, verdict)
    assert judge(settings(), run, "clip")["verdict"] == verdict
    assert not (run / "clip" / "checkpoints" / "TRUSTED").exists()


def test_trusted_names_the_checkpoint_when_it_is_clean(run: Path):
    rewrite_verdict(run, "clean")
    assert judge(settings(), run, "clip") == {"checkpoint": STEP, "verdict": "clean", "target_labels": []}
    assert (run / "clip" / "checkpoints" / "TRUSTED").read_text() == STEP
    rewrite_verdict(run, "poisoned")
    judge(settings(), run, "clip")
    assert not (run / "clip" / "checkpoints" / "TRUSTED").exists()


def test_trusted_keeps_an_older_checkpoint_when_the_newest_is_not_clean(run: Path):
    (run / "clip" / "checkpoints" / "TRUSTED").write_text("step-00000005")
    rewrite_verdict(run, "poisoned")
    judge(settings(), run, "clip")
    assert (run / "clip" / "checkpoints" / "TRUSTED").read_text() == "step-00000005"


def test_checkpoint_is_judged_again_when_its_weights_or_settings_change(run: Path):
    rewrite_verdict(run, "clean")
    write_checkpoint(run, run / "clip" / "checkpoints" / STEP, seed=1)
    assert judge(settings(), run, "clip")["verdict"] == "inconclusive"
    rewrite_verdict(run, "clean")
    assert judge(settings(alpha=0.05), run, "clip")["verdict"] == "inconclusive"


def test_segmenter_is_trained_once_a_run(run: Path):
    before = (run / "segmenter" / "segmenter.json").stat().st_mtime_ns
    (run / "clip" / "oracle" / "report.json").unlink()
    judge(settings(), run, "clip")
    assert (run / "segmenter" / "segmenter.json").stat().st_mtime_ns == before


def test_given_segmenter_is_used_and_trains_none(run: Path, tmp_path: Path):
    (run / "segmenter").rename(tmp_path / "given")
    judge(settings(weights=str(tmp_path / "given")), run, "clip")
    assert not (run / "segmenter").exists()


def test_trusted_stays_as_it_is_when_a_foreign_folder_is_judged(run: Path, tmp_path: Path):
    write_checkpoint(run, tmp_path / "download", seed=3)
    result = oracle(settings(), run, "download", OracleRequest(str(tmp_path / "download"), in_process=True))
    assert result["checkpoint"] == "download"
    assert (run / "download" / "oracle" / "report.json").exists()
    assert not list(run.glob("*/checkpoints/TRUSTED"))


def test_step_that_is_named_is_judged_beside_the_newest(run: Path):
    verdict = read_report(run)
    assert oracle(settings(), run, "clip", OracleRequest("10", in_process=True))["checkpoint"] == STEP
    beside = json.loads((run / "clip" / f"oracle-{STEP}" / "report.json").read_text())
    assert beside["subject"] == verdict["subject"]
    assert not list(run.glob("*/checkpoints/TRUSTED"))


def test_job_refuses_when_the_checkpoint_was_altered(run: Path):
    weights = run / "clip" / "checkpoints" / STEP / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered since it was saved"):
        judge(settings(), run, "clip")


def test_job_says_what_is_missing(run: Path):
    with pytest.raises(CheckpointError, match="expected a checkpoint, got none"):
        judge(settings(), run, "roclip")
    (run / "origin" / "trusted.parquet").unlink()
    with pytest.raises(DataError, match="expected trusted images"):
        judge(settings(), run, "clip")


@pytest.fixture(scope="module")
def cluster():
    """One Ray for the tests that need it: starting it takes seconds."""
    support = REPOSITORY / "tests" / "support"
    start_local_ray(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": f"{REPOSITORY}:{support}"}},
    )
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_job_says_the_same_to_the_bit_when_one_or_two_actors_look(run: Path, cluster: None):
    in_process, alone = looks(run), read_report(run)
    assert len(in_process) == 4
    for actors in (1, 2):
        shutil.rmtree(run / "clip" / "oracle")
        assert oracle(settings(actors=actors), run, "clip")["verdict"] == "inconclusive"
        assert looks(run) == in_process
        assert {**read_report(run), "numbers": None} == {**alone, "numbers": None}
    before = {path: path.stat().st_mtime_ns for path in (run / "clip" / "oracle").rglob("*.parquet")}
    oracle(settings(actors=3), run, "clip")  # judged before: nobody looks
    assert before == {path: path.stat().st_mtime_ns for path in (run / "clip" / "oracle").rglob("*.parquet")}
    (run / "origin" / "trusted.parquet").unlink()
    with pytest.raises(DataError, match="expected trusted images"):
        oracle(settings(), run, "clip")


def looks(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "clip" / "oracle" / "pass").iterdir()}


@pytest.mark.ray
@pytest.mark.slow
def test_shard_is_tried_again_when_its_actor_was_killed(cluster: None, tmp_path: Path):
    shards = World(tmp_path).clean(60).seal(per_shard=20)
    saved = SavedScans(tmp_path / "looks", "rigged", "", scan_side_px(shards))
    told: list[tuple[int, int]] = []
    scan_with_actors(
        functools.partial(fatal_scorer, tmp_path / "killed", 10),
        shards,
        saved,
        name="oracle:rigged:look",
        actors=1,
        cpus=1,
        gpus=0,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert (tmp_path / "killed").exists()
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert len(scan_shards(rigged_scorer(), shards, lambda *_: None, saved=saved).sha256) == 60


@pytest.mark.parametrize(
    ("nodes", "actors", "cpus"), [([16], 1, 16), ([16], 5, 3), ([16, 16, 8], 4, 8), ([2], 4, 1), ([0.5], 1, 1)]
)
def test_actors_share_the_cpus_of_the_nodes(nodes: list[float], actors: int, cpus: float):
    assert cpus_per_actor(nodes, actors) == cpus


def test_reference_rows_are_not_trained_on(run: Path):
    card = json.loads((run / "segmenter" / "segmenter.json").read_text())
    assert len(card["info"]["reference_rows"]) == round(0.6 * TRUSTED)
    assert np.unique(card["info"]["reference_rows"]).size == 60
