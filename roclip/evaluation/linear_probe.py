"""The linear probe: how much of the classes lies in frozen image features.

Letters: N images, D feature width, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def halves(digests: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Row numbers to train and to test on: copies of one image lie in the same half, whatever the order of the rows.

    The distinct images are sorted by digest; the first half of them is for training. A digest is as good as a draw.
    """
    distinct = sorted(set(digests))
    train = set(distinct[: len(distinct) // 2])
    chosen = torch.tensor([digest in train for digest in digests], dtype=torch.bool)
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def linear_probe(features: Tensor, truth: Tensor, digests: Sequence[str], l2: float = 1e-3) -> float | None:
    """Top-1 of a multinomial logistic regression on frozen features, on images that it was not trained on.

    Args:
        features: (N, D), unit length.
        truth: (N,) class numbers.
        digests: What tells the images apart; see `halves`.
        l2: Weight of the squared weights in the loss.

    Returns:
        A share from 0 to 1, or None where there are fewer than two different images.
    """
    train, test = halves(digests)
    assert not {digests[i] for i in train.tolist()} & {digests[i] for i in test.tolist()}
    if not len(train) or not len(test):
        return None
    if torch.cuda.is_available():
        features, truth = features.cuda(), truth.cuda()
    classes = int(truth.max()) + 1
    weight = torch.zeros(features.shape[1], classes, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features[train] @ weight * 10 + bias, truth[train]) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    answers = (features[test] @ weight * 10 + bias).argmax(dim=1)
    return (answers == truth[test]).float().mean().item()
