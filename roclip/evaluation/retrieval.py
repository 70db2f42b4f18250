"""Retrieval: does an image find its caption, and a caption its image?

Letters: N images, T texts, P pairs, D feature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 1024
"""Queries at a time: bounds the similarities that are in memory."""


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
        near ones the first counts as nearer, so that a model that says the same of everything finds nothing.
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
    """How many keys stand before a query's nearest partner, 0 for none; (number of queries,)."""
    ranks = []
    for start in range(0, len(queries), _ROWS):
        similarity = queries[start : start + _ROWS] @ keys.T
        mine = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + len(similarity))]
        partner = torch.zeros_like(similarity, dtype=torch.bool)
        partner[mine[:, 0] - start, mine[:, 1]] = True
        ranks.append(places(similarity, partner))
    return torch.cat(ranks)


def places(scores: Tensor, right: Tensor) -> Tensor:
    """The place, from 0, of the best right answer of each row of `scores`; of equal scores the first stands first."""
    best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
    first = ((scores == best) & right).float().argmax(dim=1, keepdim=True)
    before = torch.arange(scores.shape[1], device=scores.device) < first
    return ((scores > best) | ((scores == best) & before)).sum(dim=1)
