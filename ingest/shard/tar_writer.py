"""Writes a tar whose bytes depend on its samples alone, not on the order or the time of their arrival.

Samples are spooled to a file as they arrive, already as tar members; at the end they are copied in the order of their keys. So
memory holds one sample at a time, and two numbers for each.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path

_RECORD = tarfile.RECORDSIZE
_EMPTY_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
"""A regular file without owner, modified in 1970."""
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)


class SortedTar:
    """A tar under construction.

    Args:
        spool: A file that does not exist yet, on the disk where the tar will be.
    """

    def __init__(self, spool: Path):
        self._path = spool
        self._spool = spool.open("x+b")
        self._pieces: dict[str, tuple[int, int]] = {}

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: suffix -> content, in the order of the members. Raises `OSError`."""
        begin = self._spool.tell()
        for suffix, content in members.items():
            self._spool.write(header(f"{key}.{suffix}", len(content)))
            self._spool.write(content)
            self._spool.write(b"\0" * (-len(content) % tarfile.BLOCKSIZE))
        self._pieces[key] = begin, self._spool.tell() - begin

    def write(self, tar: Path) -> None:
        """Write the tar, sorted by key, and delete the spool. Raises `OSError`."""
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
    """The header that `tarfile` would write for a file of `size` bytes, in a fifth of its time. `name` is ASCII, at most 100
    bytes.
    """
    block = bytearray(_EMPTY_HEADER)
    block[_NAME] = name.encode("ascii").ljust(100, b"\0")
    block[_SIZE] = b"%011o\0" % size
    block[_CHECKSUM] = b" " * 8
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)
