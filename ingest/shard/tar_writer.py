"""A shard's tar, whose bytes depend on its samples alone and not on the order or the time in which they came.

Samples go to a file of their own as they arrive, as the members that they will be; at the end these pieces are copied in the
order of their keys. So memory holds one sample at a time, and a number or two for each.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path

_RECORD = tarfile.RECORDSIZE
_EMPTY_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
"""Of a regular file without owner, and of 1970."""
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)


class SortedTar:
    """A tar in the making.

    Args:
        spool: A file that does not exist yet, on the disk where the tar will be.
    """

    def __init__(self, spool: Path):
        self._path = spool
        self._spool = spool.open("x+b")
        self._pieces: dict[str, tuple[int, int]] = {}

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Take in a sample: suffix -> content, in the order in which the members shall stand. Raises `OSError`."""
        begin = self._spool.tell()
        for suffix, content in members.items():
            self._spool.write(header(f"{key}.{suffix}", len(content)))
            self._spool.write(content)
            self._spool.write(b"\0" * (-len(content) % tarfile.BLOCKSIZE))
        self._pieces[key] = begin, self._spool.tell() - begin

    def write(self, tar: Path) -> None:
        """Write the tar, its samples by key, and drop the spool. Raises `OSError`."""
        with tar.open("xb") as target:
            for key in sorted(self._pieces):
                begin, size = self._pieces[key]
                self._spool.seek(begin)
                target.write(self._spool.read(size))
            target.write(b"\0" * (2 * tarfile.BLOCKSIZE))
            target.write(b"\0" * (-target.tell() % _RECORD))
        self._spool.close()
        self._path.unlink()


def header(name: str, size: int) -> bytes:
    """What `tarfile` would write before a file of `size` bytes, in a fifth of its time. `name` is ASCII, at most 100 bytes."""
    block = bytearray(_EMPTY_HEADER)
    block[_NAME] = name.encode("ascii").ljust(100, b"\0")
    block[_SIZE] = b"%011o\0" % size
    block[_CHECKSUM] = b" " * 8
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)
