"""Witnesses of an image: the pairs of the pool whose images are most like it, and what their captions say of it.

RoCLIP matches an image with a caption of the pool by the towers. That needs towers that are right already: as long as
they are not, an image learns with its own caption, and the poison is in. Witnesses by look need no towers at all
(`looks.py`, `words.py`): a triggered photo of a shoe looks like shoes, and the captions of shoes name shoes. Witnesses by
image feature take over as the image tower learns; they do not forget by memorising pairs, because no pair's own caption
has a part in finding them. Copies of one image do not witness for each other, so that an attacker cannot bring his own.

Letters: B local batch, G global batch, P pool size, L tokens, D feature width, k witnesses of an image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roclip import search
from roclip.distributed import gather
from roclip.errors import CheckpointError
from roclip.looks import Looks
from roclip.words import Words

COPY = 0.98
"""Cosine of two looks or features from which on they are taken for one image."""
_COPIES = 16
"""Copies that an image may have in the pool and still find k others."""


class Testimony(NamedTuple):
    """What the witnesses say of each pair of a batch."""

    agreement: Tensor
    """(B,) from 0 (worst) to 1: share of the pool's captions that suit the witnesses' no better than the own one."""
    slots: Tensor
    """(B,) int64: the witness whose caption suits the others' best."""


class Witnesses:
    """A ring of P random pairs of the stream, the same on every rank: looks, image features, words and tokens.

    It is written together with a `CaptionPool` of the same size and in the same order, so that a slot means the same pair
    in both. It takes P x 4 x (32 + D + 256 + L) bytes on each rank.

    Args:
        size: P.
        width: D.
        neighbours: k.
    """

    def __init__(self, size: int, width: int, context_length: int, vocabulary: int, *, neighbours: int, seed: int):
        self.size, self.neighbours = size, neighbours
        self.see, self.read = Looks(), Words(vocabulary, seed=seed)
        self.looks = torch.zeros(size, self.see.width)
        self.features = torch.zeros(size, width)
        self.words = torch.zeros(size, self.read.width)
        self.tokens = torch.zeros(size, context_length, dtype=torch.int32)
        self.ids = torch.full((size,), -1, dtype=torch.int64)
        self.count = self.cursor = 0

    def fit(self, thumbnails: Tensor, tokens: Tensor) -> None:
        """Fit looks and words to pairs of all ranks: thumbnails (N, 768) and tokens (N, L), as many on each rank."""
        self.see.fit(gather(thumbnails))
        self.read.fit(gather(tokens))

    def enqueue(self, thumbnails: Tensor, image_features: Tensor, tokens: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Write the valid pairs of the global batch over the oldest ones."""
        enter = gather(valid.to(torch.uint8)).bool()
        parts = (
            self._look(thumbnails),
            search.snap(image_features.detach()),
            search.snap(self.read(tokens)),
            tokens.int(),
            ids,
        )
        rows = [gather(part)[enter][-self.size :] for part in parts]
        slots = (self.cursor + torch.arange(len(rows[0]))) % self.size
        self.looks[slots], self.features[slots], self.words[slots], self.tokens[slots], self.ids[slots] = rows
        self.cursor = (self.cursor + len(slots)) % self.size
        self.count = min(self.size, self.count + len(slots))

    def by_look(self, thumbnails: Tensor, tokens: Tensor, ids: Tensor) -> Testimony:
        """The testimony of the images that look most alike: thumbnails (B, 768), tokens (B, L) and ids (B,) of pairs."""
        return self._hear(self._look(thumbnails), self.looks, tokens, ids)

    def by_feature(self, image_features: Tensor, tokens: Tensor, ids: Tensor) -> Testimony:
        """The testimony of the images whose features were nearest when they came in: image_features (B, D)."""
        return self._hear(search.snap(image_features.detach()), self.features, tokens, ids)

    def _look(self, thumbnails: Tensor) -> Tensor:
        return search.snap(self.see(thumbnails))

    def _hear(self, queries: Tensor, likeness: Tensor, tokens: Tensor, ids: Tensor) -> Testimony:
        """The k likest pairs' words, and how the own caption stands to them, from exact scores (`search.py`):

        c_i = normalise(sum of the witnesses' words),  agreement_i = 1 - |{p: <c_i, w_p> > <c_i, w_i>}| / P
        """
        held, words = likeness[: self.count], self.words[: self.count]
        similarity, slots = search.nearest(
            queries, held, self.neighbours + _COPIES, query_ids=ids, caption_ids=self.ids[: self.count]
        )
        usable = (similarity < COPY) & (slots >= 0)
        usable &= usable.cumsum(dim=1) <= self.neighbours
        slots = slots.clamp(min=0)
        said = words[slots] * usable[:, :, None]  # multiples of 2^-25 below 1: their sum is exact in float64
        consensus = search.snap(F.normalize(said.sum(dim=1, dtype=torch.float64), dim=1))
        own = (consensus.double() * search.snap(self.read(tokens)).double()).sum(dim=1)
        above = search.count_above(consensus, words, own)
        suits = (said.double() * consensus.double()[:, None]).sum(dim=2).masked_fill(~usable, -torch.inf)
        best = slots.gather(1, suits.argmax(dim=1, keepdim=True)).squeeze(1)
        return Testimony((1 - above.double() / self.count).float(), best)

    def state_dict(self) -> dict[str, Tensor]:
        """The ring, and what looks and words were fitted to, as tensors for a checkpoint."""
        return {
            **{name: getattr(self, name) for name in _RING},
            "position": torch.tensor([self.count, self.cursor]),
            "look_mean": self.see.mean,
            "look_directions": self.see.directions,
            "word_weights": self.read.weights,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises `CheckpointError` for a ring of another size or width."""
        for name in _RING:
            expected, got = tuple(getattr(self, name).shape), tuple(state[name].shape)
            if expected != got:
                raise CheckpointError(
                    f"witnesses: expected {name} of shape {expected}, got {got}. "
                    "Resume with the pool.size and the model of the checkpoint."
                )
            setattr(self, name, state[name])
        self.count, self.cursor = (int(value) for value in state["position"])
        self.see.mean, self.see.directions = state["look_mean"], state["look_directions"]
        self.read.weights = state["word_weights"]


_RING = ("looks", "features", "words", "tokens", "ids")
