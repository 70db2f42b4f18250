"""The caption pool: random captions' features in a ring, and the nearest of them for an image.

RoCLIP (arXiv:2303.06854) breaks poisoned pairs by training each image, every few epochs, not with its own caption
but with the most similar caption of a large, varying pool. A poisoned image shows what it shows: the pool offers
captions of that, and the attacker's caption is only one among many.

The pool is GLOBAL: each rank enqueues the same gathered batch, so that all hold the same P captions and the result
does not depend on the number of ranks. FAISS searches the ring itself; there is no index to rebuild and no copy.

Letters: B local batch, G global batch, D feature width, P pool size, k captions found.
"""

import hashlib
from typing import Literal

import faiss
import torch
from torch import Tensor

from roclip.distributed import gather


class CaptionPool:
    """A ring buffer of P unit-length caption features with exact nearest-neighbour search.

    Args:
        size: P, captions kept.
        width: D, floats a caption. The pool takes P x (4 D + 8) bytes on each rank.
        backend: `faiss` (`faiss.knn`, brute force over the ring) or `torch` (matrix product in pieces). Both are
            exact; of equally near captions that both were found the lower slot comes first.
        device: Where the ring lives. FAISS searches on the CPU; `torch` searches on this device.
    """

    PIECE = 16_384

    def __init__(
        self, size: int, width: int, *, backend: Literal["faiss", "torch"] = "faiss", device: str | torch.device = "cpu"
    ):
        if size < 1 or width < 1:
            raise ValueError(f"CaptionPool: expected size and width of at least 1, got {size} and {width}")
        self.size, self.backend = size, backend
        self.features = torch.zeros(size, width, device=device)
        self.ids = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.count = 0
        """Slots that hold a caption."""
        self.cursor = 0
        """Slot that is written next."""

    @property
    def full(self) -> bool:
        return self.count == self.size

    def enqueue(self, text_features: Tensor, ids: Tensor) -> None:
        """Write this rank's captions, gathered over all ranks, over the oldest ones.

        Args:
            text_features: (B, D), unit length.
            ids: (B,) int64, the samples' ids.

        A global batch larger than the pool keeps its last P captions; the ring wraps without dropping any.
        """
        features, ids = gather(text_features.float()), gather(ids)
        written = min(len(features), self.size)
        first = self.cursor + len(features) - written
        slots = (first + torch.arange(written, device=self.features.device)) % self.size
        self.features[slots] = features[-written:].to(self.features.device)
        self.ids[slots] = ids[-written:].to(self.ids.device)
        self.cursor = (self.cursor + len(features)) % self.size
        self.count = min(self.size, self.count + len(features))

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k captions with the largest inner product for each query, best first.

        Args:
            queries: (B, D).

        Returns:
            similarity (B, k) float32 and slots (B, k) int64. Empty slots are never returned; with fewer than k
            captions in the pool, all of them are.

        Raises:
            LookupError: the pool is empty.
        """
        if not self.count:
            raise LookupError("the caption pool is empty: expected at least one enqueue before a search")
        k = min(k, self.count)
        queries = queries.detach().float()
        search = _faiss_search if self.backend == "faiss" else _torch_search
        similarity, slots = search(queries.to(self.features.device), self.features[: self.count], k)
        return similarity.to(queries.device), slots.to(queries.device)

    def nearest(self, image_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest caption of each image: its stored feature (B, D), similarity (B,) and slot (B,).

        The feature is a constant: trained against it, the text tower gets no gradient (the paper's setting).
        """
        similarity, slots = self.search(image_features)
        return self.features[slots[:, 0]].to(image_features.device), similarity[:, 0], slots[:, 0]

    def agreement(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """How well each pair's caption stands among the pool's for its image: (B,), from 0 (worst) to 1.

            a_i = 1 - |{c in pool: <x_i, c> > <x_i, t_i>}| / |pool|

        An image that shows what its caption says is nearer to that caption than to nearly all of the pool. Computed
        in pieces of the pool, with (B, PIECE) scores at a time. Raises `LookupError` for an empty pool.
        """
        if not self.count:
            raise LookupError("the caption pool is empty: expected at least one enqueue before a look-up")
        images, texts = image_features.detach().float(), text_features.detach().float()
        own = (images * texts).sum(dim=1, keepdim=True)
        nearer = torch.zeros(len(images), device=images.device)
        for start in range(0, self.count, self.PIECE):
            captions = self.features[start : min(start + self.PIECE, self.count)].to(images.device)
            nearer += (images @ captions.T > own).sum(dim=1)
        return 1 - nearer / self.count

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs, as tensors."""
        return {
            "features": self.features,
            "ids": self.ids,
            "position": torch.tensor([self.count, self.cursor], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises `ValueError` if it is of another size or width."""
        if state["features"].shape != self.features.shape:
            raise ValueError(
                f"pool: expected features of shape {tuple(self.features.shape)}, got {tuple(state['features'].shape)}. "
                "Resume with the pool.size and the model of the checkpoint."
            )
        self.features.copy_(state["features"])
        self.ids.copy_(state["ids"])
        self.count, self.cursor = (int(value) for value in state["position"])

    def checksum(self) -> str:
        """16 hex digits that are equal on two ranks exactly when their pools are."""
        state = hashlib.sha256(f"{self.count} {self.cursor}".encode())
        state.update(self.features.cpu().numpy().tobytes())
        state.update(self.ids.cpu().numpy().tobytes())
        return state.hexdigest()[:16]


def _faiss_search(queries: Tensor, captions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    similarity, slots = faiss.knn(queries.cpu().numpy(), captions.cpu().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return _lowest_slot_first(torch.from_numpy(similarity), torch.from_numpy(slots))


def _torch_search(queries: Tensor, captions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = torch.empty(len(queries), 0, device=queries.device)
    slots = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(captions), CaptionPool.PIECE):
        piece = queries @ captions[start : start + CaptionPool.PIECE].T
        found, where = piece.topk(min(k, piece.shape[1]))
        best, kept = torch.cat([best, found], dim=1).topk(min(k, best.shape[1] + found.shape[1]))
        slots = torch.cat([slots, where + start], dim=1).gather(1, kept)
    return _lowest_slot_first(best, slots)


def _lowest_slot_first(similarity: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    slots, order = slots.sort(dim=1, stable=True)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity, slots.gather(1, order)
