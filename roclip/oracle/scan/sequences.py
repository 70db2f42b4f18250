"""List views of large arrays: each behaves as a list and creates its items on access."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa


class Strings(Sequence[str]):
    """Strings in Arrow memory: 8 bytes of overhead each, where a Python string has 49."""

    def __init__(self, pieces: Sequence[pa.Array]):
        self._values = pa.chunked_array(pieces, type=pa.large_string())

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index):
        found = self._values[index]
        return found.to_pylist() if isinstance(index, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        for piece in self._values.chunks:
            yield from piece.to_pylist()


class HexDigests(Sequence[str]):
    """Hex digests of sha256 values (N, 32) uint8."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index):
        return [row.tobytes().hex() for row in self._values[index]] if isinstance(index, slice) else self._hex(index)

    def _hex(self, index: int) -> str:
        return self._values[index].tobytes().hex()


class SamplePlaces(Sequence[tuple[str, int]]):
    """(shard name, sample number) of M samples, from indices into `names` (M,) and sample numbers (M,)."""

    def __init__(self, names: Sequence[str], shard: np.ndarray, sample: np.ndarray):
        self._names, self._shard, self._sample = names, shard, sample

    def __len__(self) -> int:
        return len(self._sample)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self._names[int(self._shard[index])], int(self._sample[index])


class RaggedRows(Sequence[list[int]]):
    """For each of `number` groups, its rows in ascending order, from the group of each row (M,)."""

    def __init__(self, group: np.ndarray, number: int):
        self._rows = np.argsort(group, kind="stable")
        self._ends = np.cumsum(np.bincount(group, minlength=number))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # supports negative indices, raises IndexError
        return self._rows[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()
