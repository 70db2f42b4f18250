import importlib.util
from pathlib import Path

import pytest
import torch
from kit import TINY_MODEL

from roclip.config import ModelConfig, TrainConfig
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.engine import build_engine
from roclip.training.losses import clip_loss

_spec = importlib.util.spec_from_file_location("ranks_steps", Path(__file__).parent / "ranks_steps.py")
assert _spec is not None
ranks_steps = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_steps)
Case = ranks_steps.Case


def engine_of(folder: Path, pieces: int, **options):
    """An engine at ZeRO 0, whose gradients stay where torch puts them."""
    towers = ranks_steps.build(Case("vit"), folder, **options)
    return build_engine(towers, ranks_steps.settings(Case("vit", 0, pieces=pieces))), towers


def gradients(folder: Path, pieces: int, *, matched: bool = False, **options) -> dict[str, torch.Tensor]:
    engine, towers = engine_of(folder, pieces, **options)
    images, tokens, keep = ranks_steps.problem(1)
    torch.manual_seed(5)
    (image_features, text_features, scale), backward = accumulate.forward(
        engine, images, tokens, pieces=pieces, text_gradient=not matched
    )
    targets = text_features.detach().roll(1, 0) if matched else text_features
    backward(clip_loss(image_features, targets, scale, keep))
    return {name: p.grad.clone() for name, p in towers.clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}], ids=["plain", "checkpointed"])
def test_gradients_in_pieces_match_one_pass(tmp_path, options):
    whole = gradients(tmp_path, 1)
    for pieces in (2, 4):
        parts = gradients(tmp_path, pieces, **options)
        assert parts.keys() == whole.keys()
        assert whole["logit_scale"].abs() > 1e-3
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, atol=1e-6, rtol=1e-4), name


def test_matched_gradients_in_pieces_match_one_pass_and_are_zero_for_the_text_tower(tmp_path):
    whole, parts = (gradients(tmp_path, pieces, matched=True) for pieces in (1, 4))
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, atol=1e-6, rtol=1e-4), name
        if not name.startswith(("visual.", "logit_scale")):
            assert not gradient.any(), name
            assert not parts[name].any(), name
    assert any(gradient.any() for name, gradient in parts.items() if name.startswith("visual."))


def test_second_pass_drops_the_patches_that_the_first_one_dropped(tmp_path):
    """With two patches of sixteen left, other draws would give another gradient."""
    engine, towers = engine_of(tmp_path, 2, force_patch_dropout=0.9)
    images, tokens, _ = ranks_steps.problem(1)
    torch.manual_seed(7)
    with torch.no_grad():
        first = torch.cat([towers(i, t)[0] for i, t in zip(images.chunk(2), tokens.chunk(2), strict=True)])
    after = torch.get_rng_state()
    torch.manual_seed(7)
    (image_features, text_features, scale), backward = accumulate.forward(engine, images, tokens, pieces=2)
    assert torch.equal(image_features, first)
    seen = []
    hook = towers.register_forward_hook(lambda _, __, outputs: seen.append(outputs[0].detach()))
    backward(clip_loss(image_features, text_features, scale))
    hook.remove()
    assert torch.equal(torch.cat(seen), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_running_statistics_count_each_piece_once(tmp_path):
    (tmp_path / "bn.json").write_text(TINY_MODEL)
    torch.manual_seed(0)
    towers = Towers("bn", tmp_path / "bn.json", options=ModelConfig(checkpoint_activations=True)).train()
    engine = build_engine(towers, TrainConfig(global_batch_size=8, grad_accum_steps=2, zero_stage=0))
    images, tokens = torch.rand(8, 3, 64, 64), torch.randint(1, 100, (8, 24))
    outputs, backward = accumulate.forward(engine, images, tokens, pieces=2)
    backward(clip_loss(*outputs))
    assert int(towers.clip.visual.bn1.num_batches_tracked) == 2
    assert int(towers.clip.visual.layer1[0].bn1.num_batches_tracked) == 2
    other = torch.nn.BatchNorm2d(4)
    normal = (images - towers.mean) / towers.std
    for piece in normal.chunk(2):
        other(towers.clip.visual.conv1(piece).detach())
    assert torch.allclose(towers.clip.visual.bn1.running_mean, other.running_mean, atol=1e-6)
    assert torch.allclose(towers.clip.visual.bn1.running_var, other.running_var, atol=1e-6)
