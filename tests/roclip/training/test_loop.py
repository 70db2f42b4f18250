import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from ends import logged, saved, until
from forked import trainings_of
from kit import TINY_MODEL, environment, preset
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from roclip.checkpoint import checkpoint
from roclip.metrics.registry import METRICS, read_metrics
from roclip.model.towers import Towers

PRESET = """
name: tiny
run_dir: {folder}/run
arms: [roclip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 100, neighbours: 8, warmup: 1, filter_frac: [0.1, 0.1], match_every: 4}}
train: {{epochs: 4, global_batch_size: 32, lr: 1e-3, checkpoint_every_steps: 4, log_every_steps: 1}}
"""


@pytest.fixture
def config_file(shards, tmp_path):
    return preset(tmp_path, PRESET.format(folder=tmp_path, shards=shards))


def ended(config_file, *overrides, **extra):
    """Exit code of a training in a fork, and what it said."""
    with trainings_of(config_file) as trainings:
        code = trainings.end(trainings.train(config_file.parent / "run", *overrides, **extra))
    return code, (config_file.parent / "said.txt").read_text()


@pytest.mark.slow
def test_training_that_is_told_to_leave_ends_with_the_weights_of_an_uninterrupted_one(config_file, tmp_path):
    with trainings_of(config_file) as trainings:
        assert trainings.end(trainings.train(tmp_path / "whole")) == 0
        killed = trainings.train(tmp_path / "killed")
        until(lambda: logged(tmp_path / "killed") >= 10, trainings.last_words)  # in the second epoch
        os.kill(killed, signal.SIGTERM)
        assert trainings.end(killed) == 143
        reached = saved(tmp_path / "killed")
        assert logged(tmp_path / "killed") == reached
        assert f"saved at step {reached}" in trainings.said.read_text()
        assert trainings.end(trainings.train(tmp_path / "killed")) == 0
    ends = [checkpoint.named(tmp_path / name / "roclip" / "checkpoints", "LATEST") for name in ("whole", "killed")]
    for file in ("open_clip_model", "pool", "sample_filter", "neighbours"):
        whole, resumed = (load_file(end / f"{file}.safetensors") for end in ends)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), file
    whole, resumed = (read_metrics(tmp_path / name / "roclip" / "metrics.jsonl") for name in ("whole", "killed"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in resumed]
    assert [row["step"] for row in resumed] == list(range(1, 25))
    assert [row["phase"] for row in resumed[::6]] == ["matched", "plain", "plain", "matched"]
    assert [row.get("suspected", 0) for row in resumed] == [0] * 6 + [3] * 12 + [0] * 6
    assert set().union(*resumed) <= set(METRICS)
    ranked = pq.read_table(tmp_path / "killed" / "roclip" / "suspects.parquet").to_pydict()
    assert ranked == pq.read_table(tmp_path / "whole" / "roclip" / "suspects.parquet").to_pydict()
    assert ranked["score"] == sorted(ranked["score"], reverse=True)
    assert ranked["rank"] == list(range(1, len(ranked["id"]) + 1))


@pytest.mark.slow
def test_paper_setting_trains(config_file, tmp_path):
    paper = ["pool.neighbours=0", "pool.filter_frac=[0,0]", "pool.match_every=2", "pool.duplicates=keep"]
    assert ended(config_file, *paper, "pool.update=matched_only", "train.epochs=2")[0] == 0
    rows = read_metrics(tmp_path / "run" / "roclip" / "metrics.jsonl")
    assert [row["phase"] for row in rows[::6]] == ["plain", "matched"]
    assert rows[6]["pool_count"] == 100
    assert 0 < rows[6]["pool_similarity"] <= 1
    assert "suspected" not in rows[0]


@pytest.mark.slow
def test_two_ranks_train_and_resume(config_file, tmp_path):
    with trainings_of(config_file) as trainings:
        first = trainings.train_ranks(tmp_path / "run", 2, "train.epochs=2", "arms=[clip,roclip]")
        assert [trainings.end(rank) for rank in first] == [0, 0]
        more = trainings.train_ranks(tmp_path / "run", 2, "train.epochs=3", "arms=[roclip]")
        assert [trainings.end(rank) for rank in more] == [0, 0]
    for arm, steps in {"clip": 12, "roclip": 18}.items():
        rows = read_metrics(tmp_path / "run" / arm / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_update_or_is_left_out(config_file, tmp_path):
    wild = ["arms=[clip]", "train.epochs=1", "train.lr=1e30"]
    code, said = ended(config_file, *wild)
    assert code == 6
    assert re.search(r"step 2: features not finite, before the update. Samples: 0000\d.tar 0\d+, ", said)
    (told,) = json.loads((tmp_path / "run" / "clip" / "diverged.json").read_text())
    assert told["step"] == 2
    assert len(set(told["samples"])) == 32
    wild.append("train.on_divergence=skip")
    assert ended(config_file, *wild, f"run_dir={tmp_path}/skipped")[0] == 0
    rows = read_metrics(tmp_path / "skipped" / "clip" / "metrics.jsonl")
    assert [row["left_out_steps"] for row in rows] == list(range(6))
    code, said = ended(config_file, *wild, "train.max_left_out=2", f"run_dir={tmp_path}/limited")
    assert code == 6
    assert "step 4: features not finite" in said
    assert "More than train.max_left_out = 2 steps" in said
    weights = load_file(
        checkpoint.named(tmp_path / "skipped" / "clip" / "checkpoints", "LATEST") / "open_clip_model.safetensors"
    )
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.slow
def test_two_ranks_train_on_weighted_sources_of_ready_made_tars(config_file, shards, tmp_path):
    for name, numbers in {"many": (0, 1), "few": (2,)}.items():
        (tmp_path / name).mkdir()
        for number in numbers:
            shutil.copy(shards / f"{number:05d}.tar", tmp_path / name)
    settings = [
        f"data.shards={tmp_path}/many/{{00000..00001}}.tar::{tmp_path}/few",
        "data.upsampling=[0.5,2]",  # an epoch: one shard of two, and the third one twice
        "data.last_batch=pad",
        "train.global_batch_size=39",
        "train.epochs=2",
    ]
    with trainings_of(config_file) as trainings:
        ranks = trainings.train_ranks(tmp_path / "run", 2, *settings)
        assert [trainings.end(rank) for rank in ranks] == [0, 0]
    rows = read_metrics(tmp_path / "run" / "roclip" / "metrics.jsonl")
    assert [(row["step"], row["samples_seen"]) for row in rows[4::5]] == [(5, 192), (10, 384)]
    assert all(row["bad_samples"] == 0 and len(row["step_s_p50"]) == 2 for row in rows)
    assert not list(tmp_path.glob("few/*.parquet"))


@pytest.mark.slow
def test_training_goes_back_and_leaves_the_step_out_when_it_comes_by_again(config_file, tmp_path):
    """The first step blows the weights up, so each later one is wrong: one rollback a step."""
    wild = ["arms=[clip]", "train.epochs=1", "train.lr=1e30", "train.on_divergence=rollback", "train.spike_factor=1e9"]
    code, said = ended(config_file, *wild, "train.max_left_out=3")
    assert code == 6, said
    told = json.loads((tmp_path / "run" / "clip" / "diverged.json").read_text())
    assert [record["step"] for record in told] == [2, 3, 4, 5]
    rows = read_metrics(tmp_path / "run" / "clip" / "metrics.jsonl")
    assert [(row["step"], row["left_out_steps"]) for row in rows] == [(1, 3), (2, 3), (3, 3), (4, 3)]
    assert ended(config_file, *wild)[0] == 0  # from the checkpoint of step 4
    rows = read_metrics(tmp_path / "run" / "clip" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["left_out_steps"] == 5


@pytest.mark.slow
def test_logged_rows_say_where_the_time_goes_and_are_mirrored(config_file, tmp_path):
    mirrored = ["train.epochs=1", "data.loader_workers=1", "train.loggers=[tensorboard,wandb]"]
    code, said = ended(config_file, *mirrored, WANDB_MODE="offline", WANDB_SILENT="true")
    assert code == 0, said
    rows = read_metrics(tmp_path / "run" / "roclip" / "metrics.jsonl")
    assert rows[-1]["eta_s"] == 0
    assert all(row["eta_s"] > 0 for row in rows[:-1])
    assert all(0 < row["step_s_p50"][0] <= row["step_s_p99"][0] for row in rows)
    assert all(0 <= row["data_wait_frac"] <= 1 for row in rows)
    assert all(row["grad_norm"] > 0 and row["bad_reasons"] == {} for row in rows)
    shown = {(name, step): value for name, step, value in scalars(tmp_path / "run" / "roclip" / "tensorboard")}
    assert [shown["loss", row["step"]] for row in rows] == pytest.approx([row["loss"] for row in rows])
    assert list((tmp_path / "run" / "roclip" / "wandb").glob("offline-run-*/*.wandb"))


def scalars(folder):
    """(name, step, value) of every event in TensorBoard's files: records of length, checksum, event, checksum."""
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
            content = content[16 + size :]


@pytest.mark.slow
def test_checkpoints_are_also_made_by_the_clock(config_file, tmp_path):
    settings = ["train.epochs=1", "train.checkpoint_every_s=1e-6", "train.keep_checkpoints=9"]
    assert ended(config_file, "arms=[clip]", *settings)[0] == 0
    steps = sorted(path.name for path in (tmp_path / "run" / "clip" / "checkpoints").glob("step-*"))
    assert steps == [f"step-{step:08d}" for step in range(1, 7)]


def test_error_is_one_line_with_its_exit_code(tmp_path):
    command = [sys.executable, "-m", "roclip.training", str(tmp_path / "missing.yaml")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such config" in done.stderr
    assert "Traceback" not in done.stderr


def test_matched_step_gives_the_text_tower_no_gradient(tmp_path):
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    towers = Towers("tiny", tmp_path / "tiny.json")
    images, tokens = torch.rand(4, 3, 64, 64), towers.tokenize(["a", "b", "c", "d"])
    image_features, text_features, scale = towers(images, tokens, text_gradient=False)
    assert not text_features.requires_grad
    (scale * image_features @ text_features.T).sum().backward()
    text = [p for name, p in towers.named_parameters() if "visual" not in name and "logit_scale" not in name]
    assert text
    assert all(parameter.grad is None for parameter in text)
    assert towers.logit_scale.grad is not None
