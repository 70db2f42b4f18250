"""Lists of millions, kept as arrays: each looks like a list and makes its items when they are asked for."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa


class Strings(Sequence[str]):
    """Text in Arrow's memory: its bytes and 8 more, where a Python string takes 49 more."""

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
    """sha256 in hex, out of (N, 32) uint8."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index):
        return [row.tobytes().hex() for row in self._values[index]] if isinstance(index, slice) else self._hex(index)

    def _hex(self, index: int) -> str:
        return self._values[index].tobytes().hex()


class SamplePlaces(Sequence[tuple[str, int]]):
    """Shard and sample number within it, of M samples: (M,) numbers of `names`, and (M,) sample numbers."""

    def __init__(self, names: Sequence[str], shard: np.ndarray, sample: np.ndarray):
        self._names, self._shard, self._sample = names, shard, sample

    def __len__(self) -> int:
        return len(self._sample)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self._names[int(self._shard[index])], int(self._sample[index])


class RaggedRows(Sequence[list[int]]):
    """For each of `number` groups, the rows that belong to it, ascending, out of each row's (M,) group."""

    def __init__(self, group: np.ndarray, number: int):
        self._rows = np.argsort(group, kind="stable")
        self._ends = np.cumsum(np.bincount(group, minlength=number))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # from the end, too, and IndexError past it
        return self._rows[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()
