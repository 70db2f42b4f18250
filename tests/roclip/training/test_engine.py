import deepspeed.comm.comm
import pytest
import torch

from roclip.config import TrainConfig
from roclip.errors import ConfigError
from roclip.model.towers import MAX_LOG_SCALE, Towers
from roclip.training.engine import build_engine, clamp_logit_scale, deepspeed_config
from roclip.training.losses import clip_loss

VIT = """{"embed_dim": 16,
 "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
 "text_cfg": {"context_length": 12, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1}}"""


@pytest.fixture
def towers(tmp_path) -> Towers:
    (tmp_path / "engine-vit.json").write_text(VIT)
    torch.manual_seed(0)
    return Towers("engine-vit", tmp_path / "engine-vit.json").train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 32, 32, generator=generator), torch.randint(1, 100, (4, 12), generator=generator)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_logit_scale_is_held_at_ln_100_at_each_zero_stage(towers, stage, precision):
    with torch.no_grad():
        towers.logit_scale.fill_(6.0)
    engine = build_engine(towers, TrainConfig(global_batch_size=4, lr=1e-9, zero_stage=stage, precision=precision))
    clamp_logit_scale(towers)
    assert towers.weights()["logit_scale"].item() == pytest.approx(MAX_LOG_SCALE, rel=4e-3)
    engine.backward(clip_loss(*engine(*batch())))
    engine.step()  # from the optimizer's own copy of the weights
    assert towers.weights()["logit_scale"].item() == pytest.approx(MAX_LOG_SCALE, rel=4e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile's own look at a parameter's view
def test_compiled_towers_keep_their_names_and_their_gradients(towers, tmp_path):
    names = list(towers.clip.state_dict())
    plain = clip_loss(*towers(*batch()))
    expected = dict(
        zip(
            (name for name, _ in towers.clip.named_parameters()),
            torch.autograd.grad(plain, list(towers.clip.parameters())),
            strict=True,
        )
    )
    engine = build_engine(towers, TrainConfig(global_batch_size=4, zero_stage=0, compile=True))
    engine.backward(clip_loss(*engine(*batch())))
    assert list(towers.clip.state_dict()) == names
    for name, parameter in towers.clip.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5, rtol=1e-3), name
    towers.save(tmp_path / "saved")
    again = Towers.load(tmp_path / "saved")
    assert torch.allclose(again.encode_image(batch()[0]), towers.eval().encode_image(batch()[0]), atol=1e-5)


def test_whole_towers_of_zero_3_are_a_copy_that_needs_no_other_rank(towers):
    expected = towers.eval().encode_image(batch()[0]).detach()
    assert towers.whole() is towers
    build_engine(towers, TrainConfig(global_batch_size=4, zero_stage=3))
    whole = towers.whole()
    assert whole is not towers
    assert not any(hasattr(parameter, "ds_id") for parameter in whole.parameters())
    assert torch.allclose(whole.encode_image(batch()[0]), expected, atol=1e-6)


def test_no_collective_is_compiled_that_training_never_calls(towers):
    build_engine(towers, TrainConfig(global_batch_size=4))
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def test_gradient_clipping_is_always_named():
    assert deepspeed_config(TrainConfig(grad_clip_norm=0.0), 2)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16", "zero_stage": 0}, "expected 1 or more, got 0"),
        ({"compile": True, "zero_stage": 3}, "zero_stage to 2 or less"),
        ({"grad_accum_steps": 0}, "train.grad_accum_steps: expected more than 0, got 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
