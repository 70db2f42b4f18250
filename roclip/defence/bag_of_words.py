"""Captions as hashed bags of words: TF-IDF vectors that need no training.

Letters: B captions, N captions of a sample, L tokens, V vocabulary, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST = 3
"""Captions of the sample in which a token must occur to get a weight: a rarer one says nothing about other captions."""


class BagOfWords:
    """Captions to unit vectors of W numbers, whose inner product is large for captions that share rare words.

        bag(c) = normalise( sum over the distinct tokens w of c of log(N / df_w) r_w ),  r_w: a random sign vector

    The inner product is the TF-IDF cosine up to the error of the random projection, about W^-1/2. The counts df come from one
    sample of N captions; a token of all captions (start, end, padding) has weight 0.
    """

    def __init__(self, vocabulary: int, width: int = 256, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (vocabulary, width), generator=generator, dtype=torch.int8) * 2 - 1
        self.weights = torch.zeros(vocabulary)
        """(V,): log(N / df), 0 for a token of too few captions."""

    @property
    def width(self) -> int:
        return self.signs.shape[1]

    def fit(self, tokens: Tensor) -> None:
        """Compute the weights from a sample of captions, tokens (N, L)."""
        sample, vocabulary = len(tokens), len(self.weights)
        present = torch.zeros(vocabulary, dtype=torch.int64)
        for caption in tokens:
            present[caption.unique()] += 1
        weights = (sample / present.clamp(min=1)).log()
        self.weights = torch.where(present >= min(_FEWEST, math.ceil(sample / 2)), weights, 0.0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to (B, W); a caption without any weighted token is the zero vector."""
        ordered = tokens.long().sort(dim=1).values
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        weights = self.weights[ordered].masked_fill(repeated, 0.0)
        return F.normalize(torch.einsum("bl,blw->bw", weights, self.signs[ordered].float()), dim=1)
