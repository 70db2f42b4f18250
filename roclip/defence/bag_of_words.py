"""What a caption says before anything is learned: its rare words, as a vector.

Letters: B captions, L tokens, V vocabulary, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST = 3
"""Captions of the sample that must have a word for it to count: a name that nobody else uses says nothing of others."""


class BagOfWords:
    """Captions to unit vectors of W numbers, whose inner product is large where they share words that few others have.

        words(c) = normalise( sum over the distinct tokens w of c of log(N / df_w) r_w ),  r_w: a random sign vector

    the TF-IDF cosine up to the error of the random projection, about W^-1/2. The counts df come from one sample of N
    captions; a token of all captions (start, end, padding) weighs nothing.
    """

    def __init__(self, vocabulary: int, width: int = 256, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (vocabulary, width), generator=generator, dtype=torch.int8) * 2 - 1
        self.weights = torch.zeros(vocabulary)
        """(V,): log(N / df), 0 for a word that does not count."""

    @property
    def width(self) -> int:
        return self.signs.shape[1]

    def fit(self, tokens: Tensor) -> None:
        """Count in a sample of captions (N, L)."""
        sample, vocabulary = len(tokens), len(self.weights)
        present = torch.zeros(vocabulary, dtype=torch.int64)
        for caption in tokens:
            present[caption.unique()] += 1
        weights = (sample / present.clamp(min=1)).log()
        self.weights = torch.where(present >= min(_FEWEST, math.ceil(sample / 2)), weights, 0.0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to (B, W); a caption without any counted word is the zero vector."""
        ordered = tokens.long().sort(dim=1).values
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        weights = self.weights[ordered].masked_fill(repeated, 0.0)
        return F.normalize(torch.einsum("bl,blw->bw", weights, self.signs[ordered].float()), dim=1)
