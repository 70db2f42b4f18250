import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from roclip.training.losses import clip_loss, siglip_loss


def features(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1).requires_grad_()


def test_clip_loss_matches_open_clip():
    images, texts, scale = features(12, 0), features(12, 1), torch.tensor([9.0], requires_grad=True)
    ours = clip_loss(images, texts, scale)
    our_gradients = torch.autograd.grad(ours, (images, texts, scale))
    theirs = open_clip.ClipLoss()(images, texts, scale)
    their_gradients = torch.autograd.grad(theirs, (images, texts, scale))
    assert torch.allclose(ours, theirs, atol=1e-6)
    for mine, reference in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, reference, atol=1e-6)


def test_clip_loss_matches_a_smaller_batch_when_pairs_are_left_out():
    images, texts, scale = features(12, 0), features(12, 1), torch.tensor(9.0)
    keep = torch.tensor([True, False, True, True] * 3)
    ours = clip_loss(images, texts, scale, keep)
    smaller = clip_loss(images[keep], texts[keep], scale)
    assert torch.allclose(ours, smaller, atol=1e-6)
    gradient = torch.autograd.grad(ours, images)[0]
    assert torch.equal(gradient[~keep], torch.zeros_like(gradient[~keep]))
    assert torch.isfinite(gradient).all()


def test_clip_loss_is_zero_when_nothing_is_kept():
    images, texts = features(4, 0), features(4, 1)
    loss = clip_loss(images, texts, torch.tensor(9.0), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_clip_loss_gives_constants_no_gradient():
    images, matched = features(6, 0), features(6, 1).detach()
    clip_loss(images, matched, torch.tensor(9.0)).backward()
    assert images.grad is not None
    assert matched.grad is None


def test_pairs_with_the_same_caption_are_not_negatives_of_each_other():
    images, texts, scale = features(3, 0), features(3, 1), torch.tensor(5.0)
    ours = clip_loss(images, texts, scale, same_caption=torch.tensor([7, 7, 9]))
    logits = scale * images @ texts.T
    hidden = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    logits = logits.masked_fill(hidden, -torch.inf)
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_siglip_loss_matches_open_clip(scale):
    images, texts = features(12, 0), features(12, 1)
    temperature = torch.tensor([scale], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    ours = siglip_loss(images, texts, *temperature)
    our_gradients = torch.autograd.grad(ours, (images, texts, *temperature))
    theirs = SigLipLoss()(images, texts, *temperature)
    their_gradients = torch.autograd.grad(theirs, (images, texts, *temperature))
    assert torch.allclose(ours, theirs, atol=1e-6)
    for mine, reference in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, reference, atol=1e-6)


def test_siglip_loss_matches_a_smaller_batch_when_pairs_are_left_out():
    images, texts, scale, bias = features(12, 0), features(12, 1), torch.tensor(9.0), torch.tensor(-3.0)
    keep = torch.tensor([True, False, True, True] * 3)
    ours = siglip_loss(images, texts, scale, bias, keep)
    theirs = SigLipLoss()(images[keep], texts[keep], scale, bias)
    assert torch.allclose(ours, theirs, atol=1e-6)
    gradient = torch.autograd.grad(ours, images)[0]
    assert torch.equal(gradient[~keep], torch.zeros_like(gradient[~keep]))


def test_siglip_pairs_with_the_same_caption_are_not_negatives_of_each_other():
    images, texts, scale, bias = features(3, 0), features(3, 1).detach(), torch.tensor(5.0), torch.tensor(-1.0)
    ours = siglip_loss(images, texts, scale, bias, same_caption=torch.tensor([7, 7, 9]))
    logits = scale * images @ texts.T + bias
    sign = 2 * torch.eye(3) - 1
    seen = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]])
    assert torch.allclose(ours, -(F.logsigmoid(sign * logits) * seen).sum() / 3, atol=1e-6)


def test_losses_of_a_batch_that_keeps_nothing_or_holds_one_pair_are_finite():
    for rows, keep in ((4, torch.zeros(4, dtype=torch.bool)), (1, torch.ones(1, dtype=torch.bool))):
        images, texts = features(rows, 0), features(rows, 1)
        for loss in (
            clip_loss(images, texts, torch.tensor(9.0), keep),
            siglip_loss(images, texts, torch.tensor(9.0), torch.tensor(-1.0), keep),
        ):
            assert torch.isfinite(torch.autograd.grad(loss, images)[0]).all()


def test_matched_image_gradient_is_the_hand_built_one():
    """d/dx_i of InfoNCE against constants: s/2B [sum_j (p_ij + q_ij) t_j - 2 t_i], p over captions, q over images."""
    images, captions, scale = features(5, 0), features(5, 1).detach(), torch.tensor(6.0)
    gradient = torch.autograd.grad(clip_loss(images, captions, scale), images)[0]
    logits = (scale * images @ captions.T).detach()
    p, q = logits.softmax(dim=1), logits.softmax(dim=0)
    expected = scale / (2 * 5) * ((p + q) @ captions - 2 * captions)
    assert torch.allclose(gradient, expected, atol=1e-6)
