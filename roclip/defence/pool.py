"""The caption pool: random captions' features in a ring, and the nearest of them for an image.

RoCLIP (arXiv:2303.06854) breaks poisoned pairs by training each image, every few epochs, not with its own caption
but with the most similar caption of a large, varying pool. A poisoned image shows what it shows: the pool offers
captions of that, and the attacker's caption is only one among many.

The pool is GLOBAL: every rank searches the same P captions, whatever the number of ranks. It is replicated, each rank
enqueueing the same gathered batch, or sharded, when it is too large for that: then rank r of W holds the slots s with
s % W == r. Both give the same answer, bit for bit (`roclip/defence/search.py` says why). There is no index to rebuild.

Letters: B local batch, G global batch, D feature width, L tokens, P pool size, W ranks, k captions found.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.defence import search
from roclip.distributed import all_sum, gather, rank, world_size
from roclip.errors import CheckpointError

_PIECE = 4096


class Match(NamedTuple):
    """The nearest caption of each image."""

    features: Tensor
    """(B, D) float32, as stored."""
    similarity: Tensor
    """(B,) float32."""
    slots: Tensor
    """(B,) int64, into `CaptionPool.ids`, `.steps` and `.tokens`."""


class CaptionPool:
    """A ring buffer of P unit-length caption features with exact nearest-neighbour search.

    Args:
        size: P, captions kept.
        width: D, floats a caption.
        backend: `faiss` (`faiss.knn`, brute force over the ring, and `faiss.knn_gpu`), `torch` (matrix product in
            pieces), or `auto`: the one that rank 0 measures as faster now. All give the same bits.
        storage: `fp16` halves the ring; scores are exact sums over what is stored.
        shard_above: Most captions that each rank holds all of. A rank takes 4 D (fp16: 2 D) bytes for each of its
            slots, and 16 + 4 L for every slot.
        context_length: L, to keep the captions' tokens, so that a found caption can be encoded again; 0 keeps none.
        batch: B, to measure backends with.
        device: Where the ring lives and is searched.
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
        """(P, D); sharded, the (ceil(P / W), D) of this rank."""
        self.ids = torch.full((size,), -1, dtype=torch.int64, device=device)
        """(P,) sample ids."""
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)
        """(P,) the optimizer step at which each caption came in."""
        self.tokens = torch.zeros(size, context_length, dtype=torch.int32, device=device)
        """(P, L)."""
        self.count = 0
        """Slots that hold a caption."""
        self.cursor = 0
        """Slot that is written next."""
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
            ids: (B,) int64, the samples' ids.
            tokens: (B, L), if the pool keeps them.
            step: Optimizer steps done, for the captions' age.
            valid: (B,) bool; captions of other pairs do not enter.

        A global batch larger than the pool keeps its last P captions; the ring wraps without dropping any.
        """
        keeps_tokens = bool(self.tokens.shape[1])
        if keeps_tokens and tokens is None:
            raise ValueError("this pool keeps tokens: expected the captions' tokens in enqueue, got None")
        rows = [self._stored(text_features.detach()), ids]
        if keeps_tokens and tokens is not None:
            rows.append(tokens.to(torch.int32))
        where = text_features.device  # that of the collectives
        rows = [gather(part.to(where)) for part in rows]
        if valid is not None:
            enter = gather(valid.to(where, torch.uint8)).bool()
            rows = [part[enter] for part in rows]
        came = len(rows[0])
        dropped = max(0, came - self.size)
        slots = (self.cursor + torch.arange(dropped, came, device=self.ids.device)) % self.size
        features, ids, *more = [part[dropped:].to(self.ids.device) for part in rows]
        self.cursor = (self.cursor + came) % self.size
        self.count = min(self.size, self.count + came)
        self.ids[slots], self.steps[slots] = ids, step
        if more:
            self.tokens[slots] = more[0]
        if self.shards > 1:
            mine = slots % self.shards == self.shard
            slots, features = slots[mine] // self.shards, features[mine]
        self.features[slots] = features

    def prefill(
        self, batches: Iterable[tuple[Tensor, Tensor]], encode: Callable[[Tensor], Tensor], step: int = 0
    ) -> int:
        """Fill the pool with captions that are encoded now, without gradient, instead of starting from noise.

        Args:
            batches: This rank's (tokens (B, L), ids (B,)), as many on every rank; taken until the pool is full.
            encode: Tokens to unit-length features (B, D).

        Returns:
            Captions in the pool.
        """
        for tokens, ids in batches:
            with torch.no_grad():
                self.enqueue(encode(tokens), ids, tokens, step)
            if self.full:
                break
        return self.count

    def search(self, queries: Tensor, k: int = 1, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k captions with the largest inner product for each query, best first; of equal ones the lowest slot.

        Args:
            queries: (B, D), unit length.
            ids: (B,), to leave out captions of the query's own sample.

        Returns:
            similarity (B, k) float32 and slots (B, k) int64. Empty slots are never returned; with fewer than k
            captions in the pool, all of them are. -inf and -1 where `ids` leave fewer than k.

        Raises:
            LookupError: the pool is empty.
        """
        self._refuse_empty()
        queries, where = search.snap(queries.detach()), queries.device
        if self.shards > 1:
            queries, ids = gather(queries), None if ids is None else gather(ids.to(where))
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
        return scores.float().to(where), slots.to(where)

    def nearest(self, image_features: Tensor, ids: Tensor | None = None) -> Match:
        """The nearest caption of each image, not its own if `ids` are given.

        The feature is a constant: trained against it, the text tower gets no gradient (the paper's setting). Raises
        `LookupError` where the pool is empty, or holds only an image's own caption.
        """
        similarity, slots = self.search(image_features, ids=ids)
        if bool((slots < 0).any()):
            raise LookupError("the pool holds only an image's own caption: set a larger pool.size, or pass no ids")
        return Match(self.features_of(slots[:, 0]).to(image_features.device), similarity[:, 0], slots[:, 0])

    def agreement(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """How well each pair's caption stands among the pool's for its image: (B,), from 0 (worst) to 1.

            a_i = 1 - |{c in pool: <x_i, c> > <x_i, t_i>}| / |pool|

        An image that shows what its caption says is nearer to that caption than to nearly all of the pool. From exact
        scores, in pieces. Raises `LookupError` for an empty pool.
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
        """Everything that a checkpoint needs, as tensors: the whole pool, which any number of ranks loads.

        Of a sharded pool every rank must call it; rank 0 gets the whole on the CPU, the others an empty dict.
        """
        features = self.features if self.shards == 1 else self._collect()
        if features is None:
            return {}
        position = torch.tensor([self.count, self.cursor], dtype=torch.int64)
        state = {"features": features, "ids": self.ids, "steps": self.steps, "position": position}
        return {**state, "tokens": self.tokens} if self.tokens.shape[1] else state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises `CheckpointError` if size, width or tokens are others."""
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
        """16 hex digits of what the pool holds: equal on two ranks, replicated or sharded, when their pools are.

        Of a sharded pool every rank must call it.
        """
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
        """Features as the ring keeps them. Every float16 is a multiple of 2^-24, so that it is snapped already."""
        return text_features.half() + 0.0 if self.features.dtype == torch.float16 else search.snap(text_features)

    def _held(self) -> int:
        """Captions in this rank's rows."""
        return len(range(self.shard, self.count, self.shards))

    def _interleave(self, gathered: Tensor) -> Tensor:
        """Rows of rank 0, then of rank 1, … in the order of their slots."""
        return gathered.view(self.shards, -1, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)

    def _best_of_shards(self, scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """All ranks' answers (G, k) to all queries, reduced by score, then slot, to this rank's queries (B, k)."""
        padding = (0, k - scores.shape[1])
        slots = torch.where(rows < 0, rows, rows * self.shards + self.shard)
        scores = self._interleave(gather(F.pad(scores, padding, value=-torch.inf))).view(len(scores), -1)
        slots = self._interleave(gather(F.pad(slots, padding, value=-1))).view(len(slots), -1)
        scores, slots = search.best_first(scores, slots, k)
        return _own_rows(scores), _own_rows(slots)

    def features_of(self, slots: Tensor) -> Tensor:
        """Stored features (B, D) of this rank's winners, from the ranks that hold them."""
        slots = slots.to(self.features.device)
        if self.shards == 1:
            return self.features[slots].float()
        slots = gather(slots)
        held = (slots % self.shards == self.shard)[:, None]
        return _own_rows(all_sum(torch.where(held, self.features[slots // self.shards].float(), 0.0)))

    def _collect(self) -> Tensor | None:
        """The whole ring on rank 0's CPU, a piece at a time."""
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
