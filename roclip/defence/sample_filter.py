"""The sample filter: suspects the pairs of a batch whose caption ranks low among other captions for the image.

Not part of the paper. RoCLIP protects its matched epochs; in plain ones an image is trained with its own caption, and that is
where a poison is learned. But many captions describe an image better than an attacker's caption of something else does. How
well the own caption ranks is a pair's agreement (`CaptionPool.agreement`, `Neighbours`); what the images of low-ranking pairs
have in common is what the suspicion model learns (`suspicion_model.py`). Pairs that are never trained on never come to agree,
so the filter must work from the first plain step on: it starts with a large share of suspects and lets pairs in as its scores
settle.

Letters: B local batch, G global batch, N valid pairs of the global batch, S image side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from roclip.data.ground_truth import write_parquet
from roclip.data.shards import Manifest, read_index, sample_ids
from roclip.defence.image_descriptor import image_hashes
from roclip.defence.suspicion_model import SuspicionModel
from roclip.distributed import gather, rank

_EMPHASIS = 3
"""Exponent that turns a rank into suspicion: the lowest-ranking tenth then has a third of all suspicion."""
_MODEL_WEIGHT = 2.0
"""Weight of the suspicion model relative to the ranks: it has seen all images that share a pattern, a rank is of one pair."""

SUSPECTS_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),  # 1 is the most suspicious
        ("score", pa.float64()),  # suspicion from 0 to 1 at the last visit
        ("id", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
    ]
)


class SampleFilter:
    """Suspects of a global batch, from the agreement of its pairs now and at earlier visits.

        r_i = mean over the agreements of (rank of pair i in the valid global batch) / (N - 1),  0 for the least agreement
        s <- r_i at the first visit, then memory x s + (1 - memory) x r_i,  s: running score of the image of pair i
        y_i = (1 - s)^3,  u_i = (y_i + 2 p_i) / 3,  p_i: the suspicion model's estimate of y_i from the image
        score_i = 1 - (1 - u_i) / sqrt(c),  c: samples with the same image seen so far

    The floor(share x N) pairs with the largest score are suspects; without a suspicion model u_i = y_i. Ranks are used instead
    of values because the scale of agreement grows during training. Copies of an image share one running score, and the more
    copies there are, the better they have to agree: a targeted image comes with many captions. Every rank holds the scores of
    all samples, and the result does not depend on the number of ranks.

    Args:
        memory: From 0, where only the current visit counts, to less than 1.
        suspicion_model: None uses the ranks alone.
    """

    def __init__(self, memory: float, suspicion_model: SuspicionModel | None = None):
        self.memory, self.suspicion_model = memory, suspicion_model
        self.running_scores: dict[int, float] = {}
        """s by image hash."""
        self.copies: dict[int, int] = {}
        """c by image hash."""
        self.scores: dict[int, float] = {}
        """score_i by sample id, at the sample's last visit."""

    def suspects(
        self, agreements: Sequence[Tensor], ids: Tensor, valid: Tensor, images: Tensor, share: float
    ) -> Tensor:
        """Update the scores with one visit of this rank's pairs, and return which of them are suspected.

        Args:
            agreements: One or more (B,), each from another measure.
            ids: (B,) int64 sample ids.
            valid: (B,) bool; other pairs are neither ranked nor suspected.
            images: (B, 3, S, S) uint8, for the suspicion model.
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
        hashes = gather(image_hashes(images).to(device)).cpu()[places].tolist()
        samples = ids[places].tolist()
        for sample, image, score in zip(samples, hashes, ranks.tolist(), strict=True):
            self.copies[image] = self.copies.get(image, 0) + (sample not in self.scores)
            before = self.running_scores.get(image)
            self.running_scores[image] = score if before is None else self.memory * before + (1 - self.memory) * score
        running = torch.tensor([self.running_scores[image] for image in hashes], dtype=torch.float64)
        scores = (1 - running) ** _EMPHASIS
        if self.suspicion_model:
            scores = (scores + _MODEL_WEIGHT * self.suspicion_model(images, places, scores)) / (1 + _MODEL_WEIGHT)
        copies = torch.tensor([self.copies[image] for image in hashes], dtype=torch.float64)
        scores = 1 - (1 - scores) / copies.sqrt()
        self.scores.update(zip(samples, scores.tolist(), strict=True))
        highest = torch.sort(scores, descending=True, stable=True).indices
        suspected = torch.zeros_like(valid)
        suspected[places[highest[: int(share * len(places))]]] = True
        return suspected[rank() * rows : (rank() + 1) * rows].to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Running scores, copies and scores, and the suspicion model's state, as tensors for a checkpoint."""
        return {
            "image_hashes": torch.tensor(list(self.running_scores), dtype=torch.int64),
            "running_scores": torch.tensor(list(self.running_scores.values()), dtype=torch.float64),
            "copies": torch.tensor([self.copies[image] for image in self.running_scores], dtype=torch.int64),
            "ids": torch.tensor(list(self.scores), dtype=torch.int64),
            "scores": torch.tensor(list(self.scores.values()), dtype=torch.float64),
            **(self.suspicion_model.state_dict() if self.suspicion_model else {}),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        hashes = state["image_hashes"].tolist()
        self.running_scores = dict(zip(hashes, state["running_scores"].tolist(), strict=True))
        self.copies = dict(zip(hashes, state["copies"].tolist(), strict=True))
        self.scores = dict(zip(state["ids"].tolist(), state["scores"].tolist(), strict=True))
        if self.suspicion_model:
            self.suspicion_model.load_state_dict({name: value for name, value in state.items() if "." in name})


def write_suspects(path: Path, scores: Mapping[int, float], manifest: Manifest) -> None:
    """Write every sample that has a score (`SampleFilter.scores`) to a parquet with `SUSPECTS_SCHEMA`, most suspicious
    first, for people and for the oracle check."""
    where = {}
    for record in manifest.records():
        index = read_index(manifest.root, record.name, ["key", "id"])
        for sample, key in zip(sample_ids(index), index["key"].to_pylist(), strict=True):
            where[sample] = (key, record.name)
    ranked = sorted((-score, sample) for sample, score in scores.items() if sample in where)
    rows = [
        {"rank": place, "score": -score, "id": sample, "key": where[sample][0], "shard": where[sample][1]}
        for place, (score, sample) in enumerate(ranked, 1)
    ]
    write_parquet(path, pa.Table.from_pylist(rows, schema=SUSPECTS_SCHEMA))
