"""Which checkpoint LATEST and TRUSTED name, where it stands, and whether its files are what they were. Needs no torch.

`roclip/checkpoint/checkpoint.py` shows the layout of the folder.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from roclip.errors import CheckpointError
from roclip.storage import sha256_file

SUMS = "SHA256SUMS"
CURSOR = "cursor.json"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]*)")
"""A line of SHA256SUMS; the name has no folder in it, so that it cannot lead out of the checkpoint."""


@dataclass(frozen=True)
class Cursor:
    """Where training stands: everything that is not a tensor."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """The current epoch, from 1."""
    step_in_epoch: int
    """Steps done in it."""
    samples_seen: int
    phase: str
    """Phase of the last step: 'matched' or 'plain'."""


Outdated = Callable[[Mapping[str, Cursor]], list[str]]
"""Takes the cursors of checkpoints by name; returns the names of those to delete."""


def named(folder: Path, name: str) -> Path | None:
    """The checkpoint that `LATEST` or `TRUSTED` names, or None. Raises `CheckpointError` if it is gone."""
    pointer = folder / name
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not path.is_dir():
        raise CheckpointError(f"{pointer}: names {path.name}, which is not there. Bring it back or delete {pointer}.")
    return path


def remove(path: Path) -> None:
    """Delete a checkpoint if it is there. Even if this process is killed, it is either whole or gone under its name; leftovers
    under a temporary name are deleted before the next checkpoint is written."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        os.replace(path, removed)
        shutil.rmtree(removed)


def verify(path: Path) -> None:
    """Compare every file with SHA256SUMS. Raises `CheckpointError` naming the file that is missing or altered."""
    sums = path / SUMS
    if not sums.exists():
        raise CheckpointError(f"{path}: expected {SUMS}, got none. This is not a complete checkpoint.")
    for name, expected in parse_sums(sums.read_text(), sums).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing from the checkpoint. Resume from another one or train again.")
        if sha256_file(file) != expected:
            raise CheckpointError(
                f"{file}: altered since it was saved (its sha256 is not the one in {SUMS}). "
                "It is refused; restore the file, or remove this checkpoint and point LATEST at another."
            )


def cursor(path: Path) -> Cursor:
    """The cursor of a checkpoint."""
    return Cursor(**json.loads((path / CURSOR).read_text()))


def parse_sums(text: str, source: Path) -> dict[str, str]:
    """Parse a SHA256SUMS that anybody may have written into file names and their sha256. Raises `CheckpointError`."""
    sums = {}
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None or found[2] == SUMS:
            raise CheckpointError(
                f"{source}: expected lines of a sha256 and the plain name of a file beside it, got {line[:200]!r}. "
                "It is refused: no checkpoint of ours has such a line. Use another checkpoint."
            )
        sums[found[2]] = found[1]
    return sums
