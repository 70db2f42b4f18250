"""Witnesses of an image: the pairs of the pool whose images are most like it, and what their captions say of it.

RoCLIP matches an image with a caption of the pool by the towers. That needs towers that are right already: as long as
they are not, an image learns with its own caption, and the poison is in. Witnesses by look need no towers at all
(`image_descriptor.py`, `bag_of_words.py`): a triggered photo of a shoe looks like shoes, and the captions of shoes name
shoes. Witnesses by
image feature take over as the image tower learns; they do not forget by memorising pairs, because no pair's own caption
has a part in finding them. As the text tower learns, captions are compared by its features too, which know that a puppy
is a dog. Copies of one image do not witness for each other, so that an attacker cannot bring his own.

Letters: B local batch, G global batch, P pool size, L tokens, D feature width, k witnesses of an image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roclip.defence import search
from roclip.defence.bag_of_words import BagOfWords
from roclip.defence.image_descriptor import ImageDescriptor
from roclip.distributed import gather
from roclip.errors import CheckpointError

COPY = 0.98
"""Cosine of two looks or features from which on they are taken for one image."""
_COPIES = 16
"""Copies that an image may have in the pool and still find k others."""


class Support(NamedTuple):
    """The witnesses of each image of a batch."""

    slots: Tensor
    """(B, k + some) int64, likest first."""
    usable: Tensor
    """(B, k + some) bool: at most k; the others are copies of the image, or nobody."""


class Neighbours:
    """A ring of P random pairs of the stream, the same on every rank: looks, image features, words and tokens.

    It is written together with a `CaptionPool` of the same size and in the same order, so that a slot means the same pair
    in both. It takes P x 4 x (96 + 2 D + 256 + L) bytes on each rank.

    Args:
        size: P.
        width: D.
        neighbours: k.
    """

    def __init__(self, size: int, width: int, context_length: int, vocabulary: int, *, neighbours: int, seed: int):
        self.size, self.neighbours = size, neighbours
        self.see, self.read = ImageDescriptor(), BagOfWords(vocabulary, seed=seed)
        self.looks = torch.zeros(size, self.see.width)
        self.features = torch.zeros(size, width)
        self.texts = torch.zeros(size, width)
        self.words = torch.zeros(size, self.read.width)
        self.tokens = torch.zeros(size, context_length, dtype=torch.int32)
        self.ids = torch.full((size,), -1, dtype=torch.int64)
        self.count = self.cursor = 0

    def fit(self, impressions: Tensor, tokens: Tensor) -> None:
        """Fit looks and words to pairs of all ranks: impressions (N, F) and tokens (N, L), as many on each rank."""
        self.see.fit(gather(impressions))
        self.read.fit(gather(tokens))

    def enqueue(
        self,
        impressions: Tensor,
        image_features: Tensor,
        text_features: Tensor,
        tokens: Tensor,
        ids: Tensor,
        valid: Tensor,
    ) -> None:
        """Write the valid pairs of the global batch over the oldest ones."""
        enter = gather(valid.to(torch.uint8)).bool()
        parts = (
            self._look(impressions),
            search.snap(image_features.detach()),
            search.snap(text_features.detach()),
            search.snap(self.read(tokens)),
            tokens.int(),
            ids,
        )
        rows = [gather(part)[enter][-self.size :] for part in parts]
        slots = (self.cursor + torch.arange(len(rows[0]))) % self.size
        for name, part in zip(_RING, rows, strict=True):
            getattr(self, name)[slots] = part
        self.cursor = (self.cursor + len(slots)) % self.size
        self.count = min(self.size, self.count + len(slots))

    def by_look(self, impressions: Tensor, ids: Tensor) -> Support:
        """Those whose images look most alike: impressions (B, F) and ids (B,) of pairs."""
        return self._likest(self._look(impressions), self.looks, ids)

    def by_feature(self, image_features: Tensor, ids: Tensor) -> Support:
        """Those whose image features were nearest when they came in: image_features (B, D)."""
        return self._likest(search.snap(image_features.detach()), self.features, ids)

    def agreement_of_words(self, found: Support, tokens: Tensor) -> Tensor:
        """`agreement_of_texts` by the words of the captions, tokens (B, L): no tower has a part in it."""
        return self._agreement(found, self.words, self.read(tokens))

    def agreement_of_texts(self, found: Support, text_features: Tensor) -> Tensor:
        """How the own captions stand to those of the witnesses: (B,) from 0 (worst) to 1, of text_features (B, D).

            c_i = normalise(sum of the witnesses' captions),  agreement_i = 1 - |{p: <c_i, t_p> > <c_i, t_i>}| / P

        from exact scores (`search.py`).
        """
        return self._agreement(found, self.texts, text_features)

    def agreement_of_images(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """How each pair's image stands among the held ones for its caption: (B,), the mirror of `CaptionPool.agreement`.

        b_i = 1 - |{p: <t_i, x_p> > <t_i, x_i>}| / P
        """
        images, texts = search.snap(image_features.detach()), search.snap(text_features.detach())
        own = (images.double() * texts.double()).sum(dim=1)
        return (1 - search.count_above(texts, self.features[: self.count], own).double() / self.count).float()

    def best(self, found: Support) -> Tensor:
        """(B,) int64: the witness whose words suit the others' best."""
        said, consensus = self._consensus(found, self.words)
        suits = (said.double() * consensus.double()[:, None]).sum(dim=2).masked_fill(~found.usable, -torch.inf)
        return found.slots.gather(1, suits.argmax(dim=1, keepdim=True)).squeeze(1)

    def _look(self, impressions: Tensor) -> Tensor:
        return search.snap(self.see(impressions))

    def _likest(self, queries: Tensor, likeness: Tensor, ids: Tensor) -> Support:
        similarity, slots = search.nearest(
            queries,
            likeness[: self.count],
            self.neighbours + _COPIES,
            query_ids=ids,
            caption_ids=self.ids[: self.count],
        )
        usable = (similarity < COPY) & (slots >= 0)
        return Support(slots.clamp(min=0), usable & (usable.cumsum(dim=1) <= self.neighbours))

    def _consensus(self, found: Support, captions: Tensor) -> tuple[Tensor, Tensor]:
        """What the witnesses say (B, k + some, W) and the normalised sum of it (B, W)."""
        said = captions[found.slots] * found.usable[:, :, None]  # multiples of 2^-25: their sum is exact in float64
        return said, search.snap(F.normalize(said.sum(dim=1, dtype=torch.float64), dim=1))

    def _agreement(self, found: Support, captions: Tensor, own: Tensor) -> Tensor:
        _, consensus = self._consensus(found, captions)
        score = (consensus.double() * search.snap(own.detach()).double()).sum(dim=1)
        above = search.count_above(consensus, captions[: self.count], score)
        return (1 - above.double() / self.count).float()

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


_RING = ("looks", "features", "texts", "words", "tokens", "ids")
