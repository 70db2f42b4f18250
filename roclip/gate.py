"""The agreement gate: pairs whose caption stands badly among the pool's for their image sit plain steps out.

Ours, beyond the paper. RoCLIP protects its matched epochs; in the plain epochs between them, and above all in the
first, an image still learns with its own caption, and a poison is learnt there. But an image shows what it shows: many
captions of the pool are nearer to it than an attacker's caption of something else (`CaptionPool.agreement`). The gate
ranks each global batch by agreement, keeps the ranks of a sample over its visits, and leaves the lowest share out of
the loss, as positives and as negatives. What is not learnt does not come to agree, so it must start early.

Letters: B local batch, G global batch.
"""

import torch
from torch import Tensor

from roclip.distributed import gather, rank


class AgreementGate:
    """Which pairs of a global batch sit the step out, from their agreement now and on earlier visits.

        r_i = (rank of pair i's agreement in the valid global batch) / (its size - 1),  0 the least agreeing
        s_i <- r_i on the first visit, then memory x s_i + (1 - memory) x r_i

    and the floor(share x valid pairs) with the lowest s sit out; the share falls linearly over the epochs, because the
    scores are poor at first and every honest pair left out is a loss. Ranks, not cosines, because the scale of agreement
    grows in training. Every rank keeps the scores of all samples; the answer does not depend on the number of ranks.

    Args:
        memory: From 0 (only this visit counts) to less than 1.
    """

    def __init__(self, memory: float):
        self.memory = memory
        self.scores: dict[int, float] = {}
        """Score by sample id: what training suspects. Low is suspicious."""

    def keep(self, agreement: Tensor, ids: Tensor, valid: Tensor, share: float) -> Tensor:
        """Take one visit of this rank's pairs into the scores and say which of them learn.

        Args:
            agreement: (B,), see `CaptionPool.agreement`.
            ids: (B,) int64 sample ids.
            valid: (B,) bool; other pairs are out already, and are not ranked.
            share: From 0 to 1, of the valid global batch.

        Returns:
            (B,) bool.
        """
        rows = len(agreement)
        agreement, ids = gather(agreement.float()).cpu(), gather(ids).cpu()
        valid = gather(valid.to(torch.uint8)).cpu().bool()
        places = valid.nonzero().squeeze(1)
        order = places[torch.sort(agreement[places], stable=True).indices]
        ranks = torch.arange(len(order), dtype=torch.float64) / max(len(order) - 1, 1)
        scores = []
        for sample, now in zip(ids[order].tolist(), ranks.tolist(), strict=True):
            before = self.scores[sample] if sample in self.scores else now  # noqa: SIM401  (pyright)
            score = self.memory * before + (1 - self.memory) * now
            self.scores[sample] = score
            scores.append(score)
        lowest = torch.sort(torch.tensor(scores, dtype=torch.float64), stable=True).indices
        learns = valid.clone()
        learns[order[lowest[: int(share * len(order))]]] = False
        return learns[rank() * rows : (rank() + 1) * rows]

    def state_dict(self) -> dict[str, Tensor]:
        """The scores, as tensors for a checkpoint."""
        return {
            "ids": torch.tensor(list(self.scores), dtype=torch.int64),
            "scores": torch.tensor(list(self.scores.values()), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.scores = dict(zip(state["ids"].tolist(), state["scores"].tolist(), strict=True))
