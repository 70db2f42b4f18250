import pytest
import torch
from kit import TINY_MODEL

from roclip.config import Config, DataConfig, PoolConfig, RepairConfig, TrainConfig
from roclip.config.schedule import Position
from roclip.data.stream import Batch
from roclip.model.towers import Towers
from roclip.training.method import Clip, Repaired, Roclip, method_of

START = Position(step=0, samples_seen=0, epoch=1, step_in_epoch=0, steps_per_epoch=10)


@pytest.fixture
def towers(tmp_path):
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    return Towers("tiny", tmp_path / "tiny.json")


def batch_of(towers: Towers) -> Batch:
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    tokens = towers.tokenize(["a", "b", "c", "d"])
    return Batch(images, tokens, torch.arange(4), torch.tensor([True, True, False, True]), ())


def never():
    raise AssertionError("nothing to prefill")


def test_clip_trains_each_image_with_its_own_caption(towers, tmp_path):
    method, batch = (
        method_of(Config(DataConfig(shards="none")), "clip", towers, torch.device("cpu"), tmp_path),
        batch_of(towers),
    )
    assert type(method) is Clip
    step = method.step(batch, START, never)
    assert (step.kind, step.tokens is batch.tokens, dict(method.parts)) == ("plain", True, {})
    x, t = torch.randn(2, 4, 32)
    targets = step.targets(x, t, batch.valid)
    assert targets.text_features is t
    assert targets.keep is batch.valid
    assert targets.source_ids is None


def test_roclip_prefills_the_pool_before_a_step_reads_it(towers, tmp_path):
    config = Config(
        DataConfig(shards="none"),
        pool=PoolConfig(size=4, neighbours=0, match_every="1 steps", match_frac=1.0, warmup=0),
    )
    method, batch = method_of(config, "roclip", towers, torch.device("cpu"), tmp_path), batch_of(towers)
    assert type(method) is Roclip
    step = method.step(batch, START, lambda: iter([batch, batch]))
    assert (step.kind, method.metrics()) == ("matched", {"pool_count": 4})
    features = torch.nn.functional.normalize(torch.randn(4, 32), dim=1)
    targets = step.targets(features, features, batch.valid)
    assert targets.source_ids is not None
    assert set(targets.source_ids.tolist()) <= {0, 1, 3}  # sample 2 could not be read
    assert not targets.text_features.requires_grad


@pytest.mark.parametrize("arm", ["clip", "roclip"])
def test_repair_adds_its_losses_to_either_method(towers, tmp_path, arm):
    config = Config(
        DataConfig(shards="none"),
        train=TrainConfig(objective="repair"),
        repair=RepairConfig(in_modal_weight=0.5, distillation_weight=0),
    )
    method = method_of(config, arm, towers, torch.device("cpu"), tmp_path)
    assert type(method) is Repaired
    assert method.second_edit is not None
    assert set(method.parts) == ({"pool", "sample_filter", "neighbours"} if arm == "roclip" else set())
