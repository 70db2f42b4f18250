"""The caption pool: features of random captions in a ring buffer, and the nearest of them for each image.

RoCLIP (arXiv:2303.06854) breaks poisoned pairs by training each image, every few epochs, with the most similar caption of a
large, varying pool instead of its own caption. The pool has captions of what a poisoned image shows, and the attacker's caption
is only one among many.

The pool is GLOBAL: every rank searches the same P captions, whatever the number of ranks. It is either replicated, with each
rank enqueueing the same gathered batch, or, when it is too large for that, sharded: rank r of W then holds the slots s with
s % W == r. Both give the same results, bit for bit (`roclip/defence/search.py` says why). There is no index to rebuild.

Letters: B local batch, G global batch, D feature width, L tokens, P pool size, W ranks, k captions found.
"""

import hashlib
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.defence import search
from roclip.distributed import all_sum, gather, rank, world_size
from roclip.errors import CheckpointError

_PIECE = 4096


class Match(NamedTuple):
    """The nearest caption of the pool for each image."""

    features: Tensor
    """(B, D) float32, the stored text features."""
    similarity: Tensor
    """(B,) float32."""
    slots: Tensor
    """(B,) int64, into `CaptionPool.ids`, `.steps` and `.tokens`."""


class CaptionPool:
    """A ring buffer of P unit-length caption features with exact nearest-neighbour search.

    Args:
        size: P, the number of captions.
        width: D.
        backend: `faiss` (`faiss.knn`, brute force over the ring, and `faiss.knn_gpu`), `torch` (matrix product in
            pieces), or `auto`: the one that rank 0 measures as faster at construction. All give the same bits.
        storage: `fp16` halves the memory; scores are exact sums over the stored values.
        shard_above: Largest size at which the pool is replicated; a larger one is sharded. A rank takes 4 D (fp16: 2 D)
            bytes for each slot that it holds, and 16 + 4 L for every slot.
        context_length: L, to store the captions' tokens, so that a caption can be encoded again; 0 stores none.
        batch: B, for the measurement of backends.
        device: Device that holds and searches the ring.
    """

    def __init__(
        self,
        size: int,
        width: int,
        *,
        backend: Literal["auto", "faiss", "torch"] = "auto",
        storage: Literal["fp32", "fp16"] = "fp32",
        shard_above: int = 1 << 20,
        context_length: int = 0,
        batch: int = 256,
        device: str | torch.device = "cpu",
    ):
        if size < 1 or width < 1:
            raise ValueError(f"CaptionPool: expected size and width of at least 1, got {size} and {width}")
        self.size = size
        self.shards, self.shard = (world_size(), rank()) if size > shard_above else (1, 0)
        dtype = torch.float16 if storage == "fp16" else torch.float32
        self.features = torch.zeros(-(-size // self.shards), width, dtype=dtype, device=device)
        """(P, D), or (ceil(P / W), D) of this rank where the pool is sharded."""
        self.ids = torch.full((size,), -1, dtype=torch.int64, device=device)
        """(P,) sample ids."""
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)
        """(P,) the optimizer step at which each caption was enqueued."""
        self.tokens = torch.zeros(size, context_length, dtype=torch.int32, device=device)
        """(P, L)."""
        self.count = 0
        """Number of slots that hold a caption."""
        self.cursor = 0
        """The slot that is written next."""
        self.backend: search.Backend = (
            search.fastest(size, width, batch, self.features.device, dtype) if backend == "auto" else backend
        )

    @property
    def full(self) -> bool:
        return self.count == self.size

    def enqueue(
        self,
        text_features: Tensor,
        ids: Tensor,
        tokens: Tensor | None = None,
        step: int = 0,
        valid: Tensor | None = None,
    ) -> None:
        """Write this rank's captions, gathered over all ranks, over the oldest ones.

        Args:
            text_features: (B, D), unit length.
            ids: (B,) int64 sample ids.
            tokens: (B, L), required if the pool stores them.
            step: Optimizer steps done, for the captions' age.
            valid: (B,) bool; captions of other pairs are not enqueued.

        Of a global batch larger than the pool the last P captions are kept.
        """
        stores_tokens = bool(self.tokens.shape[1])
        if stores_tokens and tokens is None:
            raise ValueError("this pool stores tokens: expected the captions' tokens in enqueue, got None")
        rows = [self._stored(text_features.detach()), ids]
        if stores_tokens and tokens is not None:
            rows.append(tokens.to(torch.int32))
        device = text_features.device  # of the collectives
        rows = [gather(part.to(device)) for part in rows]
        if valid is not None:
            enter = gather(valid.to(device, torch.uint8)).bool()
            rows = [part[enter] for part in rows]
        added = len(rows[0])
        dropped = max(0, added - self.size)
        slots = (self.cursor + torch.arange(dropped, added, device=self.ids.device)) % self.size
        features, ids, *more = [part[dropped:].to(self.ids.device) for part in rows]
        self.cursor = (self.cursor + added) % self.size
        self.count = min(self.size, self.count + added)
        self.ids[slots], self.steps[slots] = ids, step
        if more:
            self.tokens[slots] = more[0]
        if self.shards > 1:
            mine = slots % self.shards == self.shard
            slots, features = slots[mine] // self.shards, features[mine]
        self.features[slots] = features

    def search(self, queries: Tensor, k: int = 1, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k captions with the largest inner product for each query, best first, ties to the lowest slot.

        Args:
            queries: (B, D), unit length.
            ids: (B,) sample ids; given, captions of a query's own sample are excluded.

        Returns:
            similarity (B, k) float32 and slots (B, k) int64. Empty slots are never returned: with fewer than k captions in the
            pool there are fewer columns. -inf and -1 where `ids` leave fewer than k captions.

        Raises:
            LookupError: the pool is empty.
        """
        self._refuse_empty()
        queries, device = search.snap(queries.detach()), queries.device
        if self.shards > 1:
            queries, ids = gather(queries), None if ids is None else gather(ids.to(device))
        scores, slots = search.nearest(
            queries.to(self.features.device),
            self.features[: self._held()],
            k,
            backend=self.backend,
            query_ids=None if ids is None else ids.to(self.ids.device),
            caption_ids=self.ids[self.shard : self.count : self.shards],
        )
        if self.shards > 1:
            scores, slots = self._best_of_shards(scores, slots, min(k, self.count))
        return scores.float().to(device), slots.to(device)

    def nearest(self, image_features: Tensor, ids: Tensor | None = None) -> Match:
        """The nearest caption of each image (B, D), not its own if `ids` (B,) are given.

        The returned features are constants: the text tower gets no gradient from them (the paper's setting). Raises
        `LookupError` where the pool is empty, or holds only an image's own caption.
        """
        similarity, slots = self.search(image_features, ids=ids)
        if bool((slots < 0).any()):
            raise LookupError("the pool holds only an image's own caption: set a larger pool.size, or pass no ids")
        return Match(self.features_of(slots[:, 0]).to(image_features.device), similarity[:, 0], slots[:, 0])

    def agreement(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Rank of each pair's caption among the pool's for its image: (B,), from 0 (worst) to 1.

            a_i = 1 - |{c in pool: <x_i, c> > <x_i, t_i>}| / |pool|

        An image that shows what its caption says is nearer to that caption than to nearly all of the pool. The scores are
        exact. Raises `LookupError` for an empty pool.
        """
        self._refuse_empty()
        images, texts = search.snap(image_features.detach()), self._stored(text_features.detach())
        if self.shards > 1:
            images, texts = gather(images), gather(texts)
        images, texts = images.to(self.features.device), texts.to(self.features.device)
        own = (images.double() * texts.double()).sum(dim=1)
        nearer = search.count_above(images, self.features[: self._held()], own)
        if self.shards > 1:
            nearer = _own_rows(all_sum(nearer))
        return (1 - nearer.double() / self.count).float().to(image_features.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole pool, as tensors for a checkpoint that any number of ranks can load.

        Every rank must call it. Of a sharded pool rank 0 gets all of it on the CPU, the others get an empty dict.
        """
        features = self.features if self.shards == 1 else self._collect()
        if features is None:
            return {}
        position = torch.tensor([self.count, self.cursor], dtype=torch.int64)
        state = {"features": features, "ids": self.ids, "steps": self.steps, "position": position}
        return {**state, "tokens": self.tokens} if self.tokens.shape[1] else state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises `CheckpointError` for another size, width or context length."""
        expected = (self.size, self.features.shape[1])
        if state["features"].shape != expected:
            raise CheckpointError(
                f"pool: expected features of shape {expected}, got {tuple(state['features'].shape)}. "
                "Resume with the pool.size and the model of the checkpoint."
            )
        if self.tokens.shape[1]:
            tokens = state.get("tokens")
            if tokens is None or tokens.shape != self.tokens.shape:
                raise CheckpointError(
                    f"pool: expected tokens of shape {tuple(self.tokens.shape)}, got "
                    f"{'none' if tokens is None else tuple(tokens.shape)}. "
                    "Resume with the pool.text_gradient and the model of the checkpoint."
                )
            self.tokens.copy_(tokens)
        features = state["features"][self.shard :: self.shards]
        self.features[: len(features)] = features.to(self.features)
        self.ids.copy_(state["ids"])
        self.steps.copy_(state["steps"])
        self.count, self.cursor = (int(value) for value in state["position"])

    def checksum(self) -> str:
        """16 hex digits of a hash of the pool's content, independent of sharding. Of a sharded pool every rank must call it."""
        words = torch.int16 if self.features.dtype == torch.float16 else torch.int32
        odd = torch.arange(1, 2 * self.features.shape[1], 2, device=self.features.device) * 0x9E3779B97F4A7C1
        rows = torch.cat([(p.view(words) * odd).sum(dim=1) for p in self.features.split(_PIECE)])  # wraps around
        if self.shards > 1:
            rows = self._interleave(gather(rows))[: self.size]
        state = hashlib.sha256(f"{self.count} {self.cursor}".encode())
        for part in (rows, self.ids, self.steps, self.tokens):
            state.update(part.cpu().numpy().tobytes())
        return state.hexdigest()[:16]

    def _refuse_empty(self) -> None:
        if not self.count:
            raise LookupError("the caption pool is empty: expected at least one enqueue before a look-up")

    def _stored(self, text_features: Tensor) -> Tensor:
        """Features as the ring stores them. Every float16 is a multiple of 2^-24, and so need not be snapped."""
        return text_features.half() + 0.0 if self.features.dtype == torch.float16 else search.snap(text_features)

    def _held(self) -> int:
        """Number of captions that this rank holds."""
        return len(range(self.shard, self.count, self.shards))

    def _interleave(self, gathered: Tensor) -> Tensor:
        """Rows gathered rank by rank, reordered by slot."""
        return gathered.view(self.shards, -1, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)

    def _best_of_shards(self, scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best results for this rank's queries (B, k), by score, then slot, out of all ranks' results for all queries."""
        padding = (0, k - scores.shape[1])
        slots = torch.where(rows < 0, rows, rows * self.shards + self.shard)
        scores = self._interleave(gather(F.pad(scores, padding, value=-torch.inf))).view(len(scores), -1)
        slots = self._interleave(gather(F.pad(slots, padding, value=-1))).view(len(slots), -1)
        scores, slots = search.best_first(scores, slots, k)
        return _own_rows(scores), _own_rows(slots)

    def features_of(self, slots: Tensor) -> Tensor:
        """Stored features (B, D) of slots (B,), from whichever rank holds them."""
        slots = slots.to(self.features.device)
        if self.shards == 1:
            return self.features[slots].float()
        slots = gather(slots)
        held = (slots % self.shards == self.shard)[:, None]
        return _own_rows(all_sum(torch.where(held, self.features[slots // self.shards].float(), 0.0)))

    def _collect(self) -> Tensor | None:
        """The whole ring on rank 0's CPU, gathered piece by piece; None on the other ranks."""
        rows, width = self.features.shape
        whole = torch.empty(rows * self.shards, width, dtype=self.features.dtype) if rank() == 0 else None
        for start in range(0, rows, _PIECE):
            piece = self._interleave(gather(self.features[start : start + _PIECE]))
            if whole is not None:
                whole[start * self.shards :][: len(piece)] = piece.cpu()
        return None if whole is None else whole[: self.size]


def _own_rows(gathered: Tensor) -> Tensor:
    """This rank's part of (G, …)."""
    rows = len(gathered) // world_size()
    return gathered[rank() * rows : (rank() + 1) * rows]
