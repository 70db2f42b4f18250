import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from kit import TINY_MODEL, environment

from roclip.checkpoint import checkpoint
from roclip.checkpoint.checkpoint import Cursor
from roclip.checkpoint.engine_state import optimizer_state
from roclip.config import TrainConfig
from roclip.defence.pool import CaptionPool
from roclip.errors import CheckpointError
from roclip.model.towers import Encoder, Towers
from roclip.training.engine import build_engine
from roclip.training.losses import clip_loss


def fresh(folder):
    """An engine and towers with other weights."""
    torch.manual_seed(1)
    towers = Towers("tiny", folder / "tiny.json")
    return build_engine(towers, TrainConfig(global_batch_size=4, zero_stage=2)), towers


def optimizer_steps(engine, towers, count):
    for _ in range(count):
        images, tokens = torch.rand(4, 3, 64, 64), towers.tokenize(["a", "b", "c", "d"])
        image_features, text_features, scale = engine(images, tokens)
        engine.backward(clip_loss(image_features, text_features, scale))
        engine.step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a tiny model with a pool, as training saves it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "tiny.json").write_text(TINY_MODEL)
    torch.manual_seed(0)
    towers = Towers("tiny", folder / "tiny.json")
    engine = build_engine(towers, TrainConfig(global_batch_size=4))
    pool = CaptionPool(8, 32)
    pool.enqueue(torch.eye(32)[:5], torch.arange(5))
    writer = checkpoint.Writer(folder, keep=2)
    optimizer_steps(engine, towers, 2)
    writer.save(engine, towers, {"pool": pool}, Cursor(3, 1, 3, 12, "plain"))
    writer.wait()
    return folder, engine, towers, pool


def test_checkpoint_round_trips(saved):
    folder, _, _, pool = saved
    other = CaptionPool(8, 32)
    assert checkpoint.resume(folder, *fresh(folder), {"pool": other}) == Cursor(3, 1, 3, 12, "plain")
    assert other.checksum() == pool.checksum()
    assert not list(folder.glob(".*partial"))


@pytest.mark.slow
def test_export_loads_in_open_clip_in_a_clean_process_with_the_same_features(saved, tmp_path):
    folder, _, towers, _ = saved
    out = checkpoint.export(checkpoint.named(folder, "LATEST"), tmp_path / "model")
    code = f"""
import numpy as np, open_clip, torch
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{out}")
tokens = open_clip.get_tokenizer("local-dir:{out}")(["a red ball", "two trees by the water"])
model.eval()
from PIL import Image
pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
with torch.no_grad():
    image = model.encode_image(preprocess(Image.fromarray(pixels))[None], normalize=True)
    text = model.encode_text(tokens, normalize=True)
np.savez("{tmp_path}/features.npz", image=image, text=text)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "features.npz")
    encoder = Encoder(towers)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.abs(encoder.images([pixels]).numpy() - theirs["image"]).max() < 1e-5
    assert np.abs(encoder.texts(["a red ball", "two trees by the water"]).numpy() - theirs["text"]).max() < 1e-5
    with pytest.raises(CheckpointError, match="empty or new"):
        checkpoint.export(checkpoint.named(folder, "LATEST"), out)


@pytest.mark.parametrize(
    "name", ["open_clip_model.safetensors", "optimizer.safetensors", "pool.safetensors", "cursor.json"]
)
def test_altered_file_is_refused_by_name(saved, name):
    folder, engine, towers, _ = saved
    file = checkpoint.named(folder, "LATEST") / name
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=name):
            checkpoint.resume(folder, engine, towers, {})
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{name}.*missing"):
            checkpoint.verify(file.parent)
    finally:
        file.write_bytes(before)


def test_only_the_newest_those_of_some_epochs_and_the_trusted_are_kept(saved, tmp_path):
    _, engine, towers, _ = saved
    writer = checkpoint.Writer(tmp_path, keep=2, keep_every_epochs=2)
    for step in range(1, 10):  # two steps an epoch
        writer.save(engine, towers, {}, Cursor(step, step // 2 + 1, step % 2, 0, "plain"))
        writer.wait()
        if step == 1:
            (tmp_path / "TRUSTED").write_text("step-00000001")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (1, 4, 8, 9)]


def test_a_later_one_that_a_kill_left_unnamed_does_not_push_out_what_latest_names(saved, tmp_path):
    _, engine, towers, _ = saved
    writer = checkpoint.Writer(tmp_path, keep=1)
    for step in (8, 6, 7):
        if step == 6:
            (tmp_path / "LATEST").unlink()
        writer.save(engine, towers, {}, Cursor(step, 1, step, 0, "plain"))
        writer.wait()
    assert checkpoint.cursor(checkpoint.named(tmp_path, "LATEST")).step == 7
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000007", "step-00000008"]


def test_a_state_goes_to_an_engine_of_another_stage_and_comes_back(saved):
    folder, engine, towers, _ = saved
    others, other_towers = fresh(folder)
    assert checkpoint.resume(folder, others, other_towers, {})
    before, after = optimizer_state(engine), optimizer_state(others)
    assert before.keys() == after.keys()
    assert before["step"] == 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, other_towers.weights()[name]) for name, value in towers.weights().items())


def test_what_is_saved_is_the_state_of_the_call_while_training_goes_on(saved, tmp_path, monkeypatch):
    folder, *_ = saved
    engine, towers = fresh(folder)
    checkpoint.resume(folder, engine, towers, {})
    written, gate = checkpoint.Writer._write, threading.Event()
    monkeypatch.setattr(checkpoint.Writer, "_write", lambda *given: gate.wait(60) and written(*given))
    writer, weights = checkpoint.Writer(tmp_path, keep=1), towers.weights()
    writer.save(engine, towers, {}, Cursor(3, 1, 3, 12, "plain"))
    optimizer_steps(engine, towers, 1)
    assert not (tmp_path / "LATEST").exists()
    gate.set()
    writer.wait()
    saved_weights = Towers.load(checkpoint.named(tmp_path, "LATEST")).weights()
    assert all(torch.equal(weights[name], saved_weights[name]) for name in weights)
    assert not all(torch.equal(weights[name], value) for name, value in towers.weights().items())


def test_what_goes_wrong_in_the_background_is_raised(saved, tmp_path):
    _, engine, towers, _ = saved
    (tmp_path / "file").write_text("")
    writer = checkpoint.Writer(tmp_path / "file", keep=1)
    writer.save(engine, towers, {}, Cursor(3, 1, 3, 12, "plain"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        writer.wait()


def test_pointer_to_a_checkpoint_that_is_gone_is_an_error(tmp_path):
    assert checkpoint.named(tmp_path, "LATEST") is None
    (tmp_path / "LATEST").write_text("step-00000009")
    with pytest.raises(CheckpointError, match="step-00000009"):
        checkpoint.named(tmp_path, "LATEST")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_before_the_first_step_is_a_new_optimizer_with_the_weights(saved, tmp_path, stage):
    folder, *_ = saved

    def engine_of(seed):
        torch.manual_seed(seed)
        towers = Towers("tiny", folder / "tiny.json")
        return build_engine(towers, TrainConfig(global_batch_size=4, zero_stage=stage)), towers

    engine, towers = engine_of(2)
    writer = checkpoint.Writer(tmp_path, keep=1)
    writer.save(engine, towers, {}, Cursor(1, 1, 1, 4, "plain"))  # as when the first step is left out
    writer.wait()
    other, other_towers = engine_of(3)
    assert checkpoint.resume(tmp_path, other, other_towers, {}) == Cursor(1, 1, 1, 4, "plain")
    for ours in ((engine, towers), (other, other_towers)):
        torch.manual_seed(0)
        optimizer_steps(*ours, 2)
    assert all(torch.equal(value, other_towers.weights()[name]) for name, value in towers.weights().items())
