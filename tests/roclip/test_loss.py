import open_clip
import torch
import torch.nn.functional as F

from roclip.loss import clip_loss


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
