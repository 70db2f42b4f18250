"""The agreement gate: which pairs of a batch are suspected, because their caption stands badly among others for its image.

Ours, beyond the paper. RoCLIP protects its matched epochs; in the plain ones an image learns with its own caption, and a
poison is learnt there. But an image shows what it shows, and many captions suit it better than an attacker's caption of
something else. How badly a pair does is its agreement (`CaptionPool.agreement`, `Witnesses`); what the images of such
pairs have in common is what the scout learns (`suspicion_model.py`). What is not learnt does not come to agree, so the
gate must work
from the first step with an own caption on: it begins with a large share, and lets pairs in as it gets to know them.

Letters: B local batch, G global batch, S image side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from roclip.defence.image_descriptor import pictures as pictures_of
from roclip.defence.suspicion_model import SuspicionModel
from roclip.distributed import gather, rank

_EMPHASIS = 3
"""Power that makes suspicion of a rank: the least agreeing tenth counts for a third of all suspicion."""
_SCOUT_WEIGHT = 2.0
"""The scout against the judges: it has seen all images that share something, they have seen one pair."""


class SampleFilter:
    """Suspects of a global batch, from their agreement now and on earlier visits.

        r_i = mean over the agreements of (rank of pair i in the valid global batch) / (its size - 1),  0 agrees least
        s <- r_i on the first visit, then memory x s + (1 - memory) x r_i,  s: the standing of the picture that i shows
        y_i = (1 - s)^3,  u_i = (y_i + 2 p_i) / 3,  p_i: what the scout expects y of this image to be
        score_i = 1 - (1 - u_i) / sqrt(c),  c: samples seen so far that show the same picture

    and the floor(share x valid pairs) with the largest score are suspects; without a scout, u_i = y_i. Ranks, not values,
    because the scale of agreement grows in training. Copies of a picture have one standing, and must agree the better the
    more they are: a targeted image comes with many captions. Every rank keeps the scores of all samples; the answer does
    not depend on the number of ranks.

    Args:
        memory: From 0 (only this visit counts) to less than 1.
        scout: None asks the judges alone.
    """

    def __init__(self, memory: float, scout: SuspicionModel | None = None):
        self.memory, self.scout = memory, scout
        self.standing: dict[int, float] = {}
        """s by picture."""
        self.copies: dict[int, int] = {}
        """c by picture."""
        self.scores: dict[int, float] = {}
        """What training suspects: score by sample id, at its last visit."""

    def suspects(
        self, agreements: Sequence[Tensor], ids: Tensor, valid: Tensor, images: Tensor, share: float
    ) -> Tensor:
        """Take one visit of this rank's pairs into the scores and say which of them are suspected.

        Args:
            agreements: One or more (B,), from different judges.
            ids: (B,) int64 sample ids.
            valid: (B,) bool; other pairs are not ranked, and never suspected.
            images: (B, 3, S, S) uint8, for the scout.
            share: From 0 to 1, of the valid global batch.

        Returns:
            (B,) bool.
        """
        rows, device = len(ids), ids.device
        ids = gather(ids).cpu()
        valid = gather(valid.to(torch.uint8)).cpu().bool()
        places = valid.nonzero().squeeze(1)
        ranks = torch.zeros(len(places), dtype=torch.float64)
        for agreement in agreements:
            order = torch.sort(gather(agreement.float()).cpu()[places], stable=True).indices
            ranks[order] += torch.arange(len(order), dtype=torch.float64)
        ranks /= len(agreements) * max(len(places) - 1, 1)
        shown = gather(pictures_of(images).to(device)).cpu()[places].tolist()
        samples = ids[places].tolist()
        for sample, picture, now in zip(samples, shown, ranks.tolist(), strict=True):
            self.copies[picture] = self.copies.get(picture, 0) + (sample not in self.scores)
            before = self.standing.get(picture)
            self.standing[picture] = now if before is None else self.memory * before + (1 - self.memory) * now
        scores = (1 - torch.tensor([self.standing[picture] for picture in shown], dtype=torch.float64)) ** _EMPHASIS
        if self.scout:
            scores = (scores + _SCOUT_WEIGHT * self.scout(images, places, scores)) / (1 + _SCOUT_WEIGHT)
        copies = torch.tensor([self.copies[picture] for picture in shown], dtype=torch.float64)
        scores = 1 - (1 - scores) / copies.sqrt()
        self.scores.update(zip(samples, scores.tolist(), strict=True))
        highest = torch.sort(scores, descending=True, stable=True).indices
        suspected = torch.zeros_like(valid)
        suspected[places[highest[: int(share * len(places))]]] = True
        return suspected[rank() * rows : (rank() + 1) * rows].to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Standing and scores, and the scout, as tensors for a checkpoint."""
        return {
            "pictures": torch.tensor(list(self.standing), dtype=torch.int64),
            "standing": torch.tensor(list(self.standing.values()), dtype=torch.float64),
            "copies": torch.tensor([self.copies[picture] for picture in self.standing], dtype=torch.int64),
            "ids": torch.tensor(list(self.scores), dtype=torch.int64),
            "scores": torch.tensor(list(self.scores.values()), dtype=torch.float64),
            **(self.scout.state_dict() if self.scout else {}),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        pictures = state["pictures"].tolist()
        self.standing = dict(zip(pictures, state["standing"].tolist(), strict=True))
        self.copies = dict(zip(pictures, state["copies"].tolist(), strict=True))
        self.scores = dict(zip(state["ids"].tolist(), state["scores"].tolist(), strict=True))
        if self.scout:
            rest = {name: value for name, value in state.items() if "." in name}
            self.scout.load_state_dict(rest)
