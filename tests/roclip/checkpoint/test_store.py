"""Checkpoints on an object store: a real S3 protocol over loopback, with errors, hanging and short answers."""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict

import fsspec
import pytest
import s3fs
import torch
from ends import logged, until
from forked import trainings_of
from kit import TINY_MODEL, preset, scene_samples, write_shard
from s3 import s3_server
from safetensors.torch import load_file

from roclip import storage
from roclip.checkpoint import checkpoint
from roclip.checkpoint.checkpoint import Cursor
from roclip.checkpoint.store import bring, checkpoint_store
from roclip.config import TrainConfig, load_config
from roclip.config import identity as identity_of
from roclip.errors import CheckpointError, ConfigError
from roclip.model.towers import Towers
from roclip.training.engine import build_engine

FILES = ("cursor.json", "open_clip_model.safetensors", "optimizer.safetensors")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "clip" / "checkpoints"


@pytest.fixture
def store(server, folder):
    return checkpoint_store("s3://bucket/kept", folder)


@pytest.fixture
def objects(server):
    """The store as others see it."""
    return s3fs.S3FileSystem(**server.options, skip_instance_cache=True, use_listings_cache=False)


def write(folder, step):
    """A complete checkpoint that LATEST names, of a few bytes."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    contents = [json.dumps(asdict(Cursor(step, 1, step, 0, "plain"))), f"weights {step}", f"moments {step}"]
    sums = ""
    for name, content in zip(FILES, contents, strict=True):
        (path / name).write_text(content)
        sums += f"{hashlib.sha256(content.encode()).hexdigest()}  {name}\n"
    (path / checkpoint.SUMS).write_text(sums)
    (folder / "LATEST").write_text(path.name)
    return path


def keep_two(found):
    return sorted(found)[:-2]


def steps(objects):
    return sorted(path.rsplit("-", 1)[1].lstrip("0") for path in objects.glob("bucket/kept/run/clip/step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error", "hang", "short"])
def test_what_a_lost_node_had_saved_comes_back(server, folder, store, fault):
    often = {"PUT": 6, "GET": 3} if fault == "error" else {}  # s3fs itself puts five times
    server.fault = lambda method, path, number: (
        fault if number < often.get(method, 1) and path.endswith(("LATEST", "optimizer.safetensors")) else None
    )
    path = write(folder, 3)
    snapshot = folder.parent.parent / "snapshots" / "epoch-00001.json"
    storage.write_atomic(snapshot, "{}")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    store.take(path, keep_two)
    shutil.rmtree(folder.parent.parent)
    bring(folder, checkpoint_store("s3://bucket/kept", folder))
    assert checkpoint.named(folder, "LATEST") == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert snapshot.read_text() == "{}"
    assert sorted(file.name for file in folder.iterdir()) == ["LATEST", path.name]


def test_the_newer_of_the_two_is_taken(server, folder, store):
    bring(folder, store)
    bring(folder, None)
    assert not folder.exists()
    store.take(write(folder, 3), keep_two)
    write(folder, 5)
    bring(folder, store)
    assert checkpoint.named(folder, "LATEST").name == "step-00000005"
    (folder / "LATEST").write_text("step-00000002")  # whose folder is gone
    bring(folder, store)
    assert checkpoint.named(folder, "LATEST").name == "step-00000003"


@pytest.mark.slow
def test_an_upload_that_failed_on_the_way_is_never_resumed_from(server, folder, store, objects, caplog):
    store.take(write(folder, 1), keep_two)
    server.fault = lambda method, path, number: "error" if method == "PUT" and "2/optimizer" in path else None
    with caplog.at_level(logging.WARNING, "roclip"):
        store.take(write(folder, 2), keep_two)
    assert "step-00000002: could not be kept on s3://bucket/kept/run/clip" in caplog.text
    assert steps(objects) == ["1", "2"]
    shutil.rmtree(folder)
    bring(folder, store)
    assert checkpoint.named(folder, "LATEST").name == "step-00000001"
    store.take(write(folder, 3), keep_two)
    assert steps(objects) == ["1", "3"]


def test_what_a_kill_left_of_an_outdated_checkpoint_hinders_no_later_one(folder, store, objects, monkeypatch):
    def killed(path, recursive):  # after an object or so: a store deletes them in an order of its own
        objects.rm(f"{path}/cursor.json")
        raise KeyboardInterrupt

    store.take(write(folder, 1), keep_two)
    store.take(write(folder, 2), keep_two)
    newest = write(folder, 3)
    with monkeypatch.context() as patched:
        patched.setattr(store.root.fs, "rm", killed)
        with pytest.raises(KeyboardInterrupt):
            store.take(newest, keep_two)
    again = checkpoint_store("s3://bucket/kept", folder)
    again.take(write(folder, 4), keep_two)
    assert steps(objects) == ["3", "4"]
    shutil.rmtree(folder)
    bring(folder, again)
    assert checkpoint.named(folder, "LATEST").name == "step-00000004"


@pytest.mark.parametrize("name", FILES)
def test_an_altered_object_is_refused_by_name(monkeypatch, folder, store, objects, name):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    store.take(write(folder, 3), keep_two)
    shutil.rmtree(folder)
    objects.pipe(f"bucket/kept/run/clip/step-00000003/{name}", b"another")
    with pytest.raises(CheckpointError, match=f"{name}: altered"):
        bring(folder, store)
    assert checkpoint.named(folder, "LATEST") is None
    assert not list(folder.glob("step-*"))


@pytest.mark.parametrize("name", ["../../gate", "/tmp/gate", "a/b", "..", ".hidden", "", "SHA256SUMS", "a\\b"])
def test_a_name_that_leads_out_of_the_checkpoint_is_refused(folder, store, objects, name):
    path = write(folder, 3)
    store.take(path, keep_two)
    sums = f"{'0' * 64}  {name}\n"
    objects.pipe("bucket/kept/run/clip/step-00000003/SHA256SUMS", sums.encode())
    (path / "SHA256SUMS").write_text(sums)
    with pytest.raises(CheckpointError, match="plain name of a file"):
        checkpoint.verify(path)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="plain name of a file"):
        bring(folder, store)


@pytest.mark.slow
def test_a_latest_that_leads_elsewhere_and_a_store_that_is_not_there_are_told(server, folder, store, objects):
    store.take(write(folder, 3), keep_two)
    objects.pipe("bucket/kept/run/clip/LATEST", b"../../step-00000003")
    with pytest.raises(CheckpointError, match=r"expected the name of a checkpoint, got '\.\./\.\./step"):
        bring(folder, store)
    server.fault = lambda method, path, number: "error"
    with pytest.raises(CheckpointError, match="expected a store of checkpoints that can be read"):
        bring(folder, store)
    with pytest.raises(ConfigError, match="expected a store that fsspec knows"):
        checkpoint_store("nowhere://bucket/kept", folder)


def test_the_store_keeps_what_is_kept_here(server, folder, store, objects, tmp_path):
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    towers = Towers("tiny", tmp_path / "tiny.json")
    engine = build_engine(towers, TrainConfig(global_batch_size=4))
    writer = checkpoint.Writer(folder, keep=2, keep_every_epochs=2, store=store)
    for step in range(1, 8):  # two steps an epoch
        writer.save(engine, towers, {}, Cursor(step, step // 2 + 1, step % 2, 0, "plain"))
        writer.wait()
        if step == 1:
            (folder / "TRUSTED").write_text("step-00000001")
    assert steps(objects) == [path.name[-1] for path in sorted(folder.glob("step-*"))] == ["1", "4", "6", "7"]


def test_the_setting_is_a_url_and_makes_no_other_run(tmp_path):
    path = preset(tmp_path, "data: {scenes: 64}\nmodel: {name: tiny}\n")
    kept = load_config(path, ["train.checkpoint_store=s3://bucket/kept"])
    assert identity_of(kept) == identity_of(load_config(path))
    for wrong in ("/mnt/kept", "file:///mnt/kept"):
        with pytest.raises(ConfigError, match="expected a store such as"):
            load_config(path, [f"train.checkpoint_store={wrong}"])


@pytest.mark.slow
def test_a_training_whose_node_was_lost_ends_with_the_weights_of_an_undisturbed_one(server, objects, tmp_path):
    for number in range(3):
        write_shard(tmp_path / "shards", number, scene_samples(16 * number, 16))
    text = """
name: tiny
arms: [roclip]
data: {{shards: {folder}/shards, streams: 2, shuffle_buffer: 8}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 16, neighbours: 4}}
train: {{epochs: 2, global_batch_size: 8, log_every_steps: 1, checkpoint_every_steps: 4}}
"""
    config = preset(tmp_path, text.format(folder=tmp_path))
    kept, known = "train.checkpoint_store=s3://bucket/kept", {"FSSPEC_S3": json.dumps(server.options)}
    latest = "bucket/kept/lost/roclip/LATEST"
    server.fault = lambda method, path, number: "error" if method == "PUT" and number % 5 == 1 else None
    with trainings_of(config) as trainings:
        lost = trainings.train(tmp_path / "lost", kept, **known)
        until(lambda: logged(tmp_path / "lost") > 6, trainings.last_words)
        end_of_epoch = b"step-00000006"
        until(lambda: objects.exists(latest) and objects.cat(latest) >= end_of_epoch, trainings.last_words)
        trainings.kill(lost)
        shutil.rmtree(tmp_path / "lost")
        both = trainings.train(tmp_path / "lost", kept, **known), trainings.train(tmp_path / "whole")
        assert [trainings.end(process) for process in both] == [0, 0], trainings.said.read_text()
    ends = [checkpoint.named(tmp_path / name / "roclip" / "checkpoints", "LATEST") for name in ("whole", "lost")]
    assert ends[0].name == ends[1].name == "step-00000012"
    for file in ("open_clip_model", "optimizer", "pool", "sample_filter", "neighbours"):
        whole, resumed = (load_file(end / f"{file}.safetensors") for end in ends)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), file
    assert objects.cat(latest) == b"step-00000012"
