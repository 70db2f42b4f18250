"""The contrastive loss over the global batch, from local rows, with pairs left out on demand.

Letters: B local batch, G global batch = B x world size, D feature width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.distributed import all_sum, gather, gather_with_gradient, rank, world_size


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    keep: Tensor | None = None,
    same_caption: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE of the global batch; each rank computes its own rows.

        loss = 1/(2 N) sum_i keep_i [ -log softmax_j(s <x_i, t_j>)_i - log softmax_j(s <t_i, x_j>)_i ],  N = sum keep

    where j runs over the kept pairs of the global batch: a pair that is left out is neither a positive nor a
    negative. The value returned on a rank is its share times the world size, so that the mean over ranks, which
    DeepSpeed takes of the gradients too, is the global loss and its exact gradient.

    In a matched step `text_features` are the matched captions of the pool: constants, and so they get no gradient.

    Args:
        image_features: (B, D), unit length.
        text_features: (B, D), unit length.
        logit_scale: scalar or one element, exp of the learnt log scale s.
        keep: (B,) bool; None keeps all.
        same_caption: (B,) int64, such as the pool slots that a matched step found. Pairs with equal numbers are not
            each other's negatives; None makes all pairs negatives of each other, as in the paper.

    Returns:
        A scalar, in nats; zero (with a graph) if the global batch keeps nothing.

    Source: CLIP (arXiv:2103.00020) fig. 3; equal to `open_clip.ClipLoss(local_loss=True, gather_with_grad=True)`
    when all pairs are kept (tested).
    """
    rows = image_features.shape[0]
    if keep is None:
        keep = torch.ones(rows, dtype=torch.bool, device=image_features.device)
    all_images = gather_with_gradient(image_features)
    all_texts = gather_with_gradient(text_features) if text_features.requires_grad else gather(text_features)
    target = torch.arange(rows, device=image_features.device) + rank() * rows
    hidden = ~gather(keep.to(torch.uint8)).bool().expand(rows, -1)
    if same_caption is not None:
        partners = same_caption[:, None] == gather(same_caption)[None, :]
        partners[torch.arange(rows), target] = False
        hidden = hidden | partners
    scale = logit_scale.reshape(())
    image_logits = (scale * image_features @ all_texts.T).masked_fill(hidden, -torch.inf)
    text_logits = (scale * text_features @ all_images.T).masked_fill(hidden, -torch.inf)
    kept_rows = keep.nonzero().squeeze(1)
    total = F.cross_entropy(image_logits[kept_rows], target[kept_rows], reduction="sum") + F.cross_entropy(
        text_logits[kept_rows], target[kept_rows], reduction="sum"
    )
    kept_globally = all_sum(keep.sum()).clamp(min=1)
    return total * world_size() / (2 * kept_globally)
