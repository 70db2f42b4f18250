"""Contrastive losses over the global batch, computed from local rows, with an option to leave pairs out.

Each rank computes its own rows and returns its share times the world size, so that the mean over ranks, which DeepSpeed also
takes of the gradients, is the global loss and its exact gradient.

In a matched step `text_features` are the stored features of the pool's captions: constants, which get no gradient.
Letters: B local batch, G global batch = B x world size, D feature width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.distributed import gather, gather_with_gradient, rank, world_size


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    keep: Tensor | None = None,
    same_caption: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE of the global batch.

        loss = 1/(2 N) sum_i keep_i [ -log softmax_j(s <x_i, t_j>)_i - log softmax_j(s <t_i, x_j>)_i ],  N = sum keep

    where j runs over the kept pairs of the global batch: a pair that is left out is neither a positive nor a
    negative.

    Args:
        image_features: (B, D), unit length.
        text_features: (B, D), unit length.
        logit_scale: scalar or one element, exp of the learnt log scale s.
        keep: (B,) bool; None keeps all.
        same_caption: (B,) int64, a number for each caption, such as the id of its sample. Pairs with equal numbers are not
            negatives of each other; None makes all pairs negatives of each other, as in the paper.

    Returns:
        A scalar, in nats; zero (with a graph) if the global batch keeps nothing.

    Source: CLIP (arXiv:2103.00020) fig. 3; equal to `open_clip.ClipLoss(local_loss=True, gather_with_grad=True)`
    when all pairs are kept (tested).
    """
    scale = logit_scale.reshape(())
    target = _own_columns(image_features)
    image_logits = scale * image_features @ _all(text_features).T
    text_logits = scale * text_features @ _all(image_features).T
    hidden, kept = _hidden(keep, same_caption, target)
    if hidden is not None:
        if keep is not None:
            hidden = hidden & keep[:, None]  # a row that is left out stays finite, so that its weight 0 makes it 0
        image_logits, text_logits = (logits.masked_fill(hidden, -torch.inf) for logits in (image_logits, text_logits))
    rows = F.cross_entropy(image_logits, target, reduction="none") + F.cross_entropy(
        text_logits, target, reduction="none"
    )
    return (rows if keep is None else rows * keep).sum() * world_size() / (2 * kept)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    keep: Tensor | None = None,
    same_caption: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of the global batch.

        loss = -1/N sum_ij log sigmoid(z_ij (s <x_i, t_j> + b)),  z_ij = 1 for i = j, else -1

    where i and j run over the N kept pairs, except for i != j with the same caption.

    Args:
        logit_scale: scalar or one element, s.
        logit_bias: scalar or one element, b.
        image_features, text_features, keep, same_caption: see `clip_loss`.

    Returns:
        A scalar, in nats; zero (with a graph) if the global batch keeps nothing.

    Source: SigLIP (arXiv:2303.15343) eq. 1; equal to `open_clip.SigLipLoss` when all pairs are kept (tested).
    """
    target = _own_columns(image_features)
    logits = logit_scale.reshape(()) * image_features @ _all(text_features).T + logit_bias.reshape(())
    sign = torch.full_like(logits, -1.0)
    sign[torch.arange(len(target), device=target.device), target] = 1.0
    terms = -F.logsigmoid(sign * logits)
    hidden, kept = _hidden(keep, same_caption, target)
    if hidden is not None:
        terms = terms.masked_fill(hidden, 0.0)
    return (terms if keep is None else terms * keep[:, None]).sum() * world_size() / kept


LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
"""Losses by name, called as `loss(image_features, text_features, logit_scale[, logit_bias], keep=…, same_caption=…)`."""


def _all(features: Tensor) -> Tensor:
    return gather_with_gradient(features) if features.requires_grad else gather(features)


def _own_columns(features: Tensor) -> Tensor:
    """(B,): position of each local row in the global batch."""
    rows = len(features)
    return torch.arange(rows, device=features.device) + rank() * rows


def _hidden(keep: Tensor | None, same_caption: Tensor | None, target: Tensor) -> tuple[Tensor | None, Tensor | int]:
    """(B, G) bool, pairs that are left out as negatives (None where there are none), and the number of kept rows of the G."""
    hidden, kept = None, len(target) * world_size()
    if keep is not None:
        everywhere = gather(keep.to(torch.uint8)).bool()
        hidden, kept = ~everywhere.expand(len(target), -1), everywhere.sum().clamp(min=1)
    if same_caption is not None:
        partners = same_caption[:, None] == gather(same_caption)[None, :]
        partners[torch.arange(len(target), device=target.device), target] = False
        hidden = partners if hidden is None else hidden | partners
    return hidden, kept
