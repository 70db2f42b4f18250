import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from forked import trainings_of
from kit import TINY_MODEL, preset
from safetensors.torch import load_file

from roclip.config import load_config
from roclip.data.stream import Batch
from roclip.errors import CheckpointError, ConfigError
from roclip.metrics.registry import read_metrics
from roclip.model.towers import WEIGHTS, Towers
from roclip.training.distillation import Distillation
from roclip.training.repair_losses import SECOND_VIEW, RepairLosses, in_modal_loss, push_away_loss

PRESET = """
name: tiny
run_dir: {folder}/run
arms: [clip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
train: {{epochs: 1, global_batch_size: 64, lr: 1e-3, warmup_epochs: 0, log_every_steps: 1}}
"""


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    Towers("tiny", tmp_path / "tiny.json").save(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def config_file(shards, tmp_path):
    return preset(tmp_path, PRESET.format(folder=tmp_path, shards=shards))


def test_in_modal_loss_is_the_mean_of_both_cross_entropies():
    torch.manual_seed(0)
    x, y, t, u = (unit(6, 8) for _ in range(4))
    keep = torch.tensor([True, True, False, True, True, True])

    def nce(a, b):
        logits = 7.0 * a[keep] @ b[keep].T
        rows = [-math.log(math.exp(logits[i, i]) / sum(math.exp(v) for v in logits[i])) for i in range(5)]
        columns = [-math.log(math.exp(logits[i, i]) / sum(math.exp(v) for v in logits[:, i])) for i in range(5)]
        return (sum(rows) + sum(columns)) / 10

    expected = (nce(x, y) + nce(t, u)) / 2
    assert in_modal_loss(x, y, t, u, torch.tensor([7.0]), keep).item() == pytest.approx(expected, rel=1e-5)


def test_push_away_loss_is_minus_the_mean_squared_distance_until_that_is_large():
    torch.manual_seed(0)
    x, before = unit(4, 8).requires_grad_(), unit(4, 8)
    keep = torch.tensor([True, False, True, True])
    distance = sum(((x[i] - before[i]) ** 2).sum().item() for i in (0, 2, 3)) / 3
    loss = push_away_loss(x, before, 4.0, keep)
    assert loss.item() == pytest.approx(-distance, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient[0], -2 / 3 * (x[0] - before[0]).detach())
    assert gradient[1].abs().sum() == 0
    far = push_away_loss(x, before, distance * 0.99, keep)
    assert far.item() == 0
    assert torch.autograd.grad(far, x)[0].abs().sum() == 0


@pytest.mark.parametrize("pieces", [1, 2])
def test_forward_adds_both_terms_to_the_loss_it_is_given(config_file, pretrained, pieces):
    wanted = [
        "train.objective=repair",
        "repair.distillation_weight=0",
        "repair.in_modal_weight=0.5",
        "repair.push_away_weight=0.25",
        f"model.pretrained={pretrained}",
    ]
    config = load_config(config_file, wanted)
    engine = Alone(pretrained)
    repair = RepairLosses(config, 64, torch.device("cpu"))
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    tokens = engine.module.tokenize([f"a red ring number {n}" for n in range(8)])
    edited = engine.module.tokenize([f"ring a red number {n}" for n in range(8)])
    valid = torch.tensor([True] * 7 + [False])
    batch = Batch(images, tokens, torch.arange(8), valid, (), edited=edited)
    pixels = images.float() / 255
    (x, t, scale), backward = repair.forward(engine, pixels, tokens, batch=batch, epoch=3, pieces=pieces)
    assert x.shape == t.shape == (8, 32)
    backward((x * 0).sum())
    measured = engine.gradient()
    with torch.enable_grad():
        second = repair._second_view(batch, 3)
        x, t, scale = engine.module(torch.cat([pixels, second]), torch.cat([tokens, edited]))
        with torch.no_grad():
            x0, t0, _ = Towers.load(pretrained)(pixels, tokens)
        terms = 0.5 * in_modal_loss(x[:8], x[8:], t[:8], t[8:], scale, valid)
        terms = terms + 0.25 * (push_away_loss(x[:8], x0, 2.15, valid) + push_away_loss(t[:8], t0, 2.15, valid))
        terms.backward()
    assert torch.allclose(measured, engine.gradient(), rtol=1e-3, atol=1e-6)
    assert measured.abs().sum() > 0


@pytest.mark.parametrize("pieces", [1, 2])
def test_forward_distils_anchors_and_unlearns_lies(config_file, pretrained, tmp_path, pieces):
    rows = [
        {"sample": "000000000", "role": "anchor", "truths": [], "lies": []},
        {"sample": "000000002", "role": "repaired", "truths": ["a ring"], "lies": ["a star"]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    wanted = [
        "train.objective=repair",
        "repair.distillation_weight=6",
        f"repair.finetune={tmp_path / 'set.parquet'}",
        f"model.pretrained={pretrained}",
    ]
    engine = Alone(pretrained)
    repair = RepairLosses(load_config(config_file, wanted), 64, torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    tokens = engine.module.tokenize([f"a red ring number {n}" for n in range(4)])
    batch = Batch(images, tokens, torch.arange(4), torch.ones(4, dtype=torch.bool), ())
    (x, _, _), backward = repair.forward(engine, images.float() / 255, tokens, batch=batch, epoch=3, pieces=pieces)
    backward((x * 0).sum())
    measured = engine.gradient()
    with torch.enable_grad():
        before = Towers.load(pretrained)
        distillation = Distillation(before, "", str(tmp_path / "set.parquet"), repair.config.seed, 64)
        mixed, stamped, kept = distillation.views(batch, 3)
        clean, triggered = engine.module.encode_image(mixed), engine.module.encode_image(stamped)
        term = distillation.unlearning_loss(engine.module.encode_image(images.float() / 255), batch)
        (6 * distillation.distillation_loss(clean, triggered, mixed, kept) + term).backward()
    assert torch.allclose(measured, engine.gradient(), rtol=1e-3, atol=1e-6)
    assert term > 0


IN_MODAL = ["train.objective=repair", "repair.distillation_weight=0", "repair.in_modal_weight=1"]


class Alone:
    """What `accumulate.forward` needs of an engine, on towers whose weights have moved a little from the pretrained ones."""

    def __init__(self, folder: Path):
        self.module = Towers.load(folder)
        for parameter in self.module.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)

    def __call__(self, *batch: torch.Tensor, text_gradient: bool) -> tuple[torch.Tensor, ...]:
        return self.module(*batch, text_gradient)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass

    def gradient(self) -> torch.Tensor:
        parts = [p.grad.flatten() for p in self.module.parameters() if p.grad is not None]
        self.module.zero_grad()
        return torch.cat(parts)


def test_second_view_is_another_one(config_file):
    repair = RepairLosses(load_config(config_file, IN_MODAL), 64, torch.device("cpu"))
    assert repair.edit is not None
    assert repair.edit.seed == SECOND_VIEW
    assert sorted(repair.edit("one two three four", 3, 1).split()) <= ["four", "one", "three", "two"]


def test_weights_that_nothing_can_be_pushed_away_from_are_refused(config_file):
    with pytest.raises(ConfigError, match=r"Set model\.pretrained"):
        load_config(
            config_file, ["train.objective=repair", "repair.distillation_weight=0", "repair.push_away_weight=0.5"]
        )
    with pytest.raises(ConfigError, match=r"Set model\.pretrained"):
        load_config(config_file, ["model.freeze_bn_stats=true"])


def test_pretrained_weights_of_another_model_are_refused(pretrained, tmp_path):
    (tmp_path / "wide.json").write_text(TINY_MODEL.replace('"width": 8', '"width": 16'))
    with pytest.raises(CheckpointError, match="expected weights of the model wide"):
        Towers("wide", tmp_path / "wide.json").begin_from(pretrained)
    (pretrained / WEIGHTS).write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(CheckpointError, match="refused, expected safetensors"):
        Towers("tiny", tmp_path / "tiny.json").begin_from(pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_training_begins_from_pretrained_weights_and_keeps_their_statistics(config_file, pretrained, tmp_path, stage):
    """Without a learning rate only the statistics of batch norm could change."""
    begin = [f"model.pretrained={pretrained}", "model.lock_text=true", "train.lr=1e-30", f"train.zero_stage={stage}"]
    with trainings_of(config_file) as trainings:
        run = tmp_path / "run"
        frozen = trainings.train(run, *begin, "model.freeze_bn_stats=true", *IN_MODAL)
        assert trainings.end(frozen) == 0, trainings.last_words()
        assert trainings.end(trainings.train(tmp_path / "other", *begin)) == 0
    assert [row["step"] for row in read_metrics(run / "clip" / "metrics.jsonl")] == [1, 2, 3]
    before = load_file(pretrained / WEIGHTS)
    (kept,) = (tmp_path / "run" / "clip" / "checkpoints").glob("step-*3")
    (moved,) = (tmp_path / "other" / "clip" / "checkpoints").glob("step-*3")
    after, other = load_file(kept / WEIGHTS), load_file(moved / WEIGHTS)
    assert all(torch.allclose(before[name], after[name]) for name in before)
    learnt = [name for name in before if not torch.allclose(before[name], other[name])]
    assert learnt
    assert all("running" in name or "batches" in name for name in learnt)
