"""The figures of an evaluation, from features: retrieval recall and the linear probe.

Letters: N images, T texts, P pairs, D feature width, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES_AT_ONCE = 1024
"""Bounds the similarities that are in memory."""


def recall(
    image_features: Tensor, text_features: Tensor, pairs: Tensor, ranks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k: the share of queries with at least one of their partners among the k nearest, as CLIP reports it.

    Args:
        image_features: (N, D), unit length.
        text_features: (T, D), unit length.
        pairs: (P, 2) int64, image and text that belong together; each image and each text is in one or more.
        ranks: The k.

    Returns:
        `image_to_text_recall_at_k`, `text_to_image_recall_at_k` and their mean `recall_at_k` for each k. Of equally
        near ones the first counts as nearer, so that a model with constant features finds nothing.
    """
    to_text = partner_ranks(image_features, text_features, pairs)
    to_image = partner_ranks(text_features, image_features, pairs.flip(1))
    both = {}
    for k in ranks:
        forth, back = (to_text < k).float().mean().item(), (to_image < k).float().mean().item()
        both |= {
            f"recall_at_{k}": (forth + back) / 2,
            f"image_to_text_recall_at_{k}": forth,
            f"text_to_image_recall_at_{k}": back,
        }
    return both


def partner_ranks(queries: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:
    """How many keys are nearer than a query's nearest partner, (number of queries,)."""
    ranks = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        similarity = queries[start : start + _QUERIES_AT_ONCE] @ keys.T
        mine = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + len(similarity))]
        partner = torch.zeros_like(similarity, dtype=torch.bool)
        partner[mine[:, 0] - start, mine[:, 1]] = True
        ranks.append(places(similarity, partner))
    return torch.cat(ranks)


def places(scores: Tensor, right: Tensor) -> Tensor:
    """The rank, from 0, of the best right answer in each row of `scores`; of equal scores the first ranks higher."""
    best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
    first = ((scores == best) & right).float().argmax(dim=1, keepdim=True)
    before = torch.arange(scores.shape[1], device=scores.device) < first
    return ((scores > best) | ((scores == best) & before)).sum(dim=1)


def halves(digests: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Rows to train and to test on: copies of one image are in the same half, whatever the order of the rows.

    The distinct images are sorted by digest, which is as good as random; the first half is for training.
    """
    distinct = sorted(set(digests))
    train = set(distinct[: len(distinct) // 2])
    chosen = torch.tensor([digest in train for digest in digests], dtype=torch.bool)
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def linear_probe(features: Tensor, truth: Tensor, digests: Sequence[str], l2: float = 1e-3) -> float | None:
    """Top-1 accuracy of a multinomial logistic regression on frozen features, on images that it was not trained on.

    Args:
        features: (N, D), unit length.
        truth: (N,) class numbers.
        digests: Equal for copies of one image; see `halves`.
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
