"""Neighbours of an image: the pairs of the pool whose images are most similar to it, and what their captions say.

RoCLIP matches an image with a caption of the pool by the features of the towers. That presupposes towers that are already
good: until then images are trained with their own captions, and poisoned pairs are learned. Neighbours by image descriptor
(`image_descriptor.py`) need no towers: a photo of a shoe with a trigger on it has shoes for neighbours, and their captions
name shoes. Neighbours by image feature join in as the image tower improves; memorised pairs do not mislead them, since a
pair's own caption has no influence on which neighbours are found. Captions are compared as bags of words (`bag_of_words.py`)
and, as the text tower improves, by text features, which know that a puppy is a dog. Copies of one image are not neighbours
of each other, so that an attacker cannot supply neighbours of his own.

Letters: B local batch, G global batch, P pool size, L tokens, D feature width, F length of a raw descriptor, W width of a
descriptor or bag of words, k neighbours of an image.
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
"""Cosine of two descriptors or features from which two images are taken for copies of one."""
_COPIES = 16
"""Copies that an image may have in the pool without losing any of its k neighbours."""


class Support(NamedTuple):
    """The support set of each image of a batch: its neighbours in the pool."""

    slots: Tensor
    """(B, k + `_COPIES`) int64, most similar first."""
    usable: Tensor
    """(B, k + `_COPIES`) bool, at most k a row; the others are copies of the image or empty slots."""


class Neighbours:
    """A ring of P random pairs of the stream, the same on every rank: descriptors, features, bags of words and tokens.

    It is written together with a `CaptionPool` of the same size and in the same order, so that a slot is the same pair in
    both. It takes P x 4 x (96 + 2 D + 256 + L) bytes on each rank.

    Args:
        size: P.
        width: D.
        neighbours: k.
    """

    def __init__(self, size: int, width: int, context_length: int, vocabulary: int, *, neighbours: int, seed: int):
        self.size, self.neighbours = size, neighbours
        self.descriptor, self.bag_of_words = ImageDescriptor(), BagOfWords(vocabulary, seed=seed)
        self.descriptors = torch.zeros(size, self.descriptor.width)
        self.image_features = torch.zeros(size, width)
        self.text_features = torch.zeros(size, width)
        self.bags = torch.zeros(size, self.bag_of_words.width)
        self.tokens = torch.zeros(size, context_length, dtype=torch.int32)
        self.ids = torch.full((size,), -1, dtype=torch.int64)
        self.count = self.cursor = 0

    def fit(self, raw: Tensor, tokens: Tensor) -> None:
        """Fit descriptor and bag of words to raw descriptors (N, F) and tokens (N, L), gathered over all ranks; N is the same
        on each rank."""
        self.descriptor.fit(gather(raw))
        self.bag_of_words.fit(gather(tokens))

    def enqueue(
        self, raw: Tensor, image_features: Tensor, text_features: Tensor, tokens: Tensor, ids: Tensor, valid: Tensor
    ) -> None:
        """Write the valid pairs of the global batch over the oldest pairs of the ring.

        Args:
            raw: (B, F) raw descriptors.
            image_features, text_features: (B, D), unit length.
            tokens: (B, L).
            ids: (B,) int64 sample ids.
            valid: (B,) bool.
        """
        enter = gather(valid.to(torch.uint8)).bool()
        parts = (
            self._describe(raw),
            search.snap(image_features.detach()),
            search.snap(text_features.detach()),
            search.snap(self.bag_of_words(tokens)),
            tokens.int(),
            ids,
        )
        rows = [gather(part)[enter][-self.size :] for part in parts]
        slots = (self.cursor + torch.arange(len(rows[0]))) % self.size
        for name, part in zip(_RING, rows, strict=True):
            getattr(self, name)[slots] = part
        self.cursor = (self.cursor + len(slots)) % self.size
        self.count = min(self.size, self.count + len(slots))

    def by_descriptor(self, raw: Tensor, ids: Tensor) -> Support:
        """The pairs whose images have the most similar descriptors: raw (B, F) and ids (B,) of the queries."""
        return self._nearest(self._describe(raw), self.descriptors, ids)

    def by_image_feature(self, image_features: Tensor, ids: Tensor) -> Support:
        """The pairs whose image features, as they were when they entered the ring, are nearest to image_features (B, D)."""
        return self._nearest(search.snap(image_features.detach()), self.image_features, ids)

    def bag_of_words_agreement(self, support: Support, tokens: Tensor) -> Tensor:
        """`text_agreement` with bags of words of the captions, tokens (B, L), in place of text features."""
        return self._agreement(support, self.bags, self.bag_of_words(tokens))

    def text_agreement(self, support: Support, text_features: Tensor) -> Tensor:
        """Rank of each own caption, text_features (B, D), among the ring's for the captions of the neighbours: (B,) from 0
        (worst) to 1.

            c_i = normalise(sum of the neighbours' captions),  agreement_i = 1 - |{p: <c_i, t_p> > <c_i, t_i>}| / P

        from exact scores (`search.py`).
        """
        return self._agreement(support, self.text_features, text_features)

    def image_agreement(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Rank of each pair's image among the ring's for its caption: (B,), the mirror of `CaptionPool.agreement`.

        b_i = 1 - |{p: <t_i, x_p> > <t_i, x_i>}| / P
        """
        images, texts = search.snap(image_features.detach()), search.snap(text_features.detach())
        own = (images.double() * texts.double()).sum(dim=1)
        return (1 - search.count_above(texts, self.image_features[: self.count], own).double() / self.count).float()

    def representative(self, support: Support) -> Tensor:
        """(B,) int64: slot of the neighbour whose bag of words has the largest inner product with the mean of them all."""
        bags, mean = self._mean_caption(support, self.bags)
        scores = (bags.double() * mean.double()[:, None]).sum(dim=2).masked_fill(~support.usable, -torch.inf)
        return support.slots.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)

    def _describe(self, raw: Tensor) -> Tensor:
        return search.snap(self.descriptor(raw))

    def _nearest(self, queries: Tensor, keys: Tensor, ids: Tensor) -> Support:
        similarity, slots = search.nearest(
            queries,
            keys[: self.count],
            self.neighbours + _COPIES,
            query_ids=ids,
            caption_ids=self.ids[: self.count],
        )
        usable = (similarity < COPY) & (slots >= 0)
        return Support(slots.clamp(min=0), usable & (usable.cumsum(dim=1) <= self.neighbours))

    def _mean_caption(self, support: Support, captions: Tensor) -> tuple[Tensor, Tensor]:
        """The neighbours' captions (B, k + `_COPIES`, W), zero where unusable, and their normalised sum (B, W)."""
        found = captions[support.slots] * support.usable[:, :, None]  # multiples of 2^-25: exact sums in float64
        return found, search.snap(F.normalize(found.sum(dim=1, dtype=torch.float64), dim=1))

    def _agreement(self, support: Support, captions: Tensor, own: Tensor) -> Tensor:
        _, mean = self._mean_caption(support, captions)
        score = (mean.double() * search.snap(own.detach()).double()).sum(dim=1)
        above = search.count_above(mean, captions[: self.count], score)
        return (1 - above.double() / self.count).float()

    def state_dict(self) -> dict[str, Tensor]:
        """The ring and the fitted descriptor and bag of words, as tensors for a checkpoint."""
        return {
            **{name: getattr(self, name) for name in _RING},
            "position": torch.tensor([self.count, self.cursor]),
            "descriptor_mean": self.descriptor.mean,
            "descriptor_directions": self.descriptor.directions,
            "token_weights": self.bag_of_words.weights,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises `CheckpointError` for a ring of another size or width."""
        for name in _RING:
            expected, got = tuple(getattr(self, name).shape), tuple(state[name].shape)
            if expected != got:
                raise CheckpointError(
                    f"neighbours: expected {name} of shape {expected}, got {got}. "
                    "Resume with the pool.size and the model of the checkpoint."
                )
            setattr(self, name, state[name])
        self.count, self.cursor = (int(value) for value in state["position"])
        self.descriptor.mean, self.descriptor.directions = state["descriptor_mean"], state["descriptor_directions"]
        self.bag_of_words.weights = state["token_weights"]


_RING = ("descriptors", "image_features", "text_features", "bags", "tokens", "ids")
