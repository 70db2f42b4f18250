import subprocess
import sys

import numpy as np
import pytest
import torch
from kit import TINY_MODEL, environment

from roclip import checkpoint
from roclip.checkpoint import Cursor
from roclip.config import TrainConfig
from roclip.engine import build_engine
from roclip.errors import CheckpointError
from roclip.model import Encoder, Towers
from roclip.pool import CaptionPool


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
    checkpoint.save(folder, engine, towers, {"pool": pool}, Cursor(3, 1, 3, 12, "plain"), keep=2)
    return folder, engine, towers, pool


def test_checkpoint_round_trips(saved):
    folder, engine, _, pool = saved
    other = CaptionPool(8, 32)
    assert checkpoint.resume(folder, engine, {"pool": other}) == Cursor(3, 1, 3, 12, "plain")
    assert other.checksum() == pool.checksum()
    assert not list(folder.glob(".*partial"))


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


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "pool.safetensors", "cursor.json"])
def test_altered_file_is_refused_by_name(saved, name):
    folder, engine, _, _ = saved
    file = checkpoint.named(folder, "LATEST") / name
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=name):
            checkpoint.resume(folder, engine, {})
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{name}.*missing"):
            checkpoint.verify(file.parent)
    finally:
        file.write_bytes(before)


def test_only_the_newest_and_the_trusted_are_kept(saved, tmp_path):
    _, engine, towers, _ = saved
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, engine, towers, {}, Cursor(step, 1, step, 0, "plain"), keep=2)
        if step == 1:
            (tmp_path / "TRUSTED").write_text("step-00000001")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (1, 3, 4)]


def test_pointer_to_a_checkpoint_that_is_gone_is_an_error(tmp_path):
    assert checkpoint.named(tmp_path, "LATEST") is None
    (tmp_path / "LATEST").write_text("step-00000009")
    with pytest.raises(CheckpointError, match="step-00000009"):
        checkpoint.named(tmp_path, "LATEST")
