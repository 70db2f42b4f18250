"""The agreement gate: which pairs of a batch are suspected, because their caption stands badly among others for its image.

Ours, beyond the paper. RoCLIP protects its matched epochs; in the plain ones an image learns with its own caption, and a
poison is learnt there. But an image shows what it shows, and many captions suit it better than an attacker's caption of
something else. How badly a pair does is its agreement (`CaptionPool.agreement`, `Witnesses`). The gate ranks each
global batch by it and keeps the ranks of a sample over its visits. What is not learnt does not come to agree, so it must
work from the first step with an own caption on.

Letters: B local batch, G global batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from roclip.distributed import gather, rank


class AgreementGate:
    """Suspects of a global batch, from their agreement now and on earlier visits.

        r_i = mean over the agreements of (rank of pair i in the valid global batch) / (its size - 1),  0 agrees least
        s_i <- r_i on the first visit, then memory x s_i + (1 - memory) x r_i

    and the floor(share x valid pairs) with the lowest s are suspects. Ranks, not values, because the scale of agreement
    grows in training. A long memory, because a poison that slipped through comes to agree, while its first visits do not
    change. Every rank keeps the scores of all samples; the answer does not depend on the number of ranks.

    Args:
        memory: From 0 (only this visit counts) to less than 1.
    """

    def __init__(self, memory: float):
        self.memory = memory
        self.scores: dict[int, float] = {}
        """Score by sample id: what training suspects. Low is suspicious."""

    def suspects(self, agreements: Sequence[Tensor], ids: Tensor, valid: Tensor, share: float) -> Tensor:
        """Take one visit of this rank's pairs into the scores and say which of them are suspected.

        Args:
            agreements: One or more (B,), from different judges.
            ids: (B,) int64 sample ids.
            valid: (B,) bool; other pairs are not ranked, and never suspected.
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
        scores = []
        for sample, now in zip(ids[places].tolist(), ranks.tolist(), strict=True):
            before = self.scores[sample] if sample in self.scores else now  # noqa: SIM401  (pyright)
            self.scores[sample] = self.memory * before + (1 - self.memory) * now
            scores.append(self.scores[sample])
        lowest = torch.sort(torch.tensor(scores, dtype=torch.float64), stable=True).indices
        suspected = torch.zeros_like(valid)
        suspected[places[lowest[: int(share * len(places))]]] = True
        return suspected[rank() * rows : (rank() + 1) * rows].to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """The scores, as tensors for a checkpoint."""
        return {
            "ids": torch.tensor(list(self.scores), dtype=torch.int64),
            "scores": torch.tensor(list(self.scores.values()), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.scores = dict(zip(state["ids"].tolist(), state["scores"].tolist(), strict=True))
