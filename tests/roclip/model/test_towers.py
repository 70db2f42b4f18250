import open_clip
import pytest
import torch
from kit import TINY_MODEL

from roclip.config import ModelConfig
from roclip.errors import ConfigError
from roclip.model.towers import Towers
from roclip.training.engine import parameter_groups
from roclip.training.losses import clip_loss

VIT = """{"embed_dim": 16,
 "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
 "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}}"""


@pytest.fixture
def build(tmp_path):
    def towers(model: str = "vit", **options) -> Towers:
        (tmp_path / "options-vit.json").write_text(VIT)
        (tmp_path / "options-resnet.json").write_text(TINY_MODEL)
        torch.manual_seed(0)
        loss = options.pop("loss", None)
        name = f"options-{model}"
        return Towers(name, tmp_path / f"{name}.json", options=ModelConfig(**options), loss=loss).train()

    return towers


def batch(towers: Towers) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, towers.image_size, towers.image_size, generator=generator)
    return images, torch.randint(1, 100, (6, towers.clip.context_length), generator=generator)


def gradients(towers: Towers) -> dict[str, torch.Tensor]:
    clip_loss(*towers(*batch(towers))).backward()
    return {name: parameter.grad for name, parameter in towers.clip.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("options", "lock"),
    [
        ({"lock_image": True}, lambda clip: clip.lock_image_tower()),
        ({"lock_image": True, "lock_image_unlocked_groups": 2}, lambda clip: clip.lock_image_tower(2)),
        ({"lock_text": True}, lambda clip: clip.lock_text_tower()),
        ({"lock_text": True, "lock_text_unlocked_layers": 2}, lambda clip: clip.lock_text_tower(2)),
    ],
)
def test_locked_weights_match_open_clip_and_are_not_in_the_optimizer(build, options, lock):
    towers = build(**options)
    theirs = open_clip.create_model("options-vit", load_weights=False)
    lock(theirs)
    learns = {name for name, parameter in towers.clip.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(learns) < len(list(towers.clip.parameters()))
    in_optimizer = {id(p) for group in parameter_groups(towers, 0.1) for p in group["params"]}
    assert in_optimizer == {id(p) for name, p in towers.clip.named_parameters() if name in learns}
    assert set(gradients(towers)) == learns


def test_locked_resnet_keeps_its_statistics_when_asked(build):
    for frozen in (False, True):
        towers = build("resnet", lock_image=True, lock_image_freeze_bn_stats=frozen)
        before = towers.clip.visual.bn1.running_mean.clone()
        towers(*batch(towers))
        assert torch.equal(towers.clip.visual.bn1.running_mean, before) is frozen


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_checkpointed_activations_give_the_same_gradients_with_less_memory(build, model):
    plain, saving = build(model), build(model, checkpoint_activations=True)
    kept = []
    for towers in (plain, saving):
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            towers(*batch(towers))
    assert kept[1] < 0.7 * kept[0]
    plain, saving = build(model), build(model, checkpoint_activations=True)
    expected, ours = gradients(plain), gradients(saving)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6), name
    for name, value in plain.clip.state_dict().items():  # the second run does not count for batch norm
        assert torch.allclose(saving.clip.state_dict()[name], value), name


def test_patch_dropout_acts_in_training_only(build):
    towers = build(force_patch_dropout=0.5)
    images, _ = batch(towers)
    assert not torch.equal(towers.encode_image(images), towers.encode_image(images))
    towers.eval()
    assert torch.equal(towers.encode_image(images), build().eval().encode_image(images))


def test_siglip_towers_have_a_bias_and_load_in_open_clip(build, tmp_path):
    towers = build(loss="siglip")
    assert towers.logit_bias is not None
    _, _, scale, bias = towers(*batch(towers))
    assert (scale.item(), bias.item()) == pytest.approx((10.0, -10.0))
    with torch.no_grad():
        towers.logit_bias.fill_(-7.0)
    towers.save(tmp_path / "saved")
    theirs, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    assert theirs.logit_bias.item() == -7.0
    again = Towers.load(tmp_path / "saved")
    assert again.logit_bias is not None
    assert again.logit_bias.item() == -7.0
    assert build(loss="clip").logit_bias is None


def test_matched_step_gives_the_text_tower_no_gradient_and_no_graph(build):
    towers = build()
    image_features, text_features, scale = towers(*batch(towers), text_gradient=False)
    assert not text_features.requires_grad
    clip_loss(image_features, text_features.roll(1, 0), scale).backward()
    for name, parameter in towers.clip.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("visual.", "logit_scale")), name


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("resnet", {"force_patch_dropout": 0.5}, "ViT towers"),
        ("vit", {"force_patch_dropout": 1.0}, "less than 1, got 1.0"),
        ("resnet", {"lock_image": True, "lock_image_unlocked_groups": 1}, "locked as a whole"),
        ("vit", {"lock_image_unlocked_groups": 1}, "no effect without model.lock_image"),
        ("vit", {"lock_image_freeze_bn_stats": True}, "no effect without model.lock_image"),
        ("vit", {"lock_text_unlocked_layers": 1}, "no effect without model.lock_text"),
        ("vit", {"lock_text": True, "lock_text_freeze_layer_norm": False}, "Hugging Face"),
        ("vit", {"lock_image": True, "lock_text": True}, "nothing is left to learn"),
        ("vit", {"lock_text": True, "lock_text_unlocked_layers": -1}, "expected 0 or more"),
    ],
)
def test_option_that_cannot_be_followed_is_an_error(build, model, options, message):
    with pytest.raises(ConfigError, match=message):
        build(model, **options)
