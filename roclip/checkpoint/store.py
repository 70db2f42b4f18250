"""A second copy of the checkpoints on any store that fsspec knows, so that what a lost node saved is there for the next one.

    <store>/<run>/<arm>/step-00000120/…   a checkpoint's files, SHA256SUMS last
    <store>/<run>/<arm>/LATEST            the newest complete one, put after all its files
    <store>/<run>/snapshots/…             the list of shards of each epoch, so that a resume sees the same samples

Every object is put whole; none is renamed or appended to. The store is not trusted: names in it are checked, each file is
compared with its sha256, and TRUSTED never comes from it.
"""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from roclip import distributed
from roclip.checkpoint.pointers import SUMS, Cursor, Outdated, cursor, parse_sums, remove
from roclip.errors import CheckpointError, RoclipError
from roclip.storage import content_of, drop, names_in, patiently, place, put, sha256_file, write_atomic

_STEP = re.compile(r"step-\d{8,}")
_SNAPSHOT = re.compile(r"epoch-\d{5,}\.json")


def checkpoint_store(url: str, folder: Path) -> "CheckpointStore | None":
    """The store of the training whose checkpoints lie in `folder`, `<run>/<arm>/checkpoints`; None for an empty URL."""
    arm = folder.resolve().parent
    return CheckpointStore(place(url) / arm.parent.name / arm.name) if url else None


def bring(folder: Path, store: "CheckpointStore | None") -> None:
    """If the store has a newer checkpoint than `folder`, or `folder` has none, copy it there and let LATEST name it.

    Call it on all ranks, before `checkpoint.resume`: rank 0 does it while the others wait. Raises `CheckpointError` on
    all of them when the store cannot be read or its checkpoint was altered.
    """
    if store is None:
        return

    def bring_newer() -> None:
        try:
            store.bring_newer(folder)
        except RoclipError:
            raise
        except Exception as error:  # each store has errors of its own
            raise CheckpointError(
                f"{store.root}: expected a store of checkpoints that can be read, got {type(error).__name__}: {error}. "
                "The same command goes on when it can; without train.checkpoint_store it goes on from what is here."
            ) from error

    distributed.lead(bring_newer)


class CheckpointStore:
    """The checkpoints of one training on a store.

    Args:
        root: `<store>/<run>/<arm>`.
    """

    def __init__(self, root: Path):
        self.root = root
        self._cursors: dict[str, Cursor] = {}
        self._snapshots: set[str] = set()

    def take(self, checkpoint: Path, outdated: Outdated) -> bool:
        """Copy a complete checkpoint to the store and drop the outdated ones there. Returns whether that worked.

        A failure is logged and training goes on: the next checkpoint is copied all the same.
        """
        try:
            self._put(checkpoint)
            self._drop(outdated)
        except Exception as error:  # each store has errors of its own
            logging.getLogger(__name__).warning(
                "%s: could not be kept on %s (%s: %s). It is complete here; the next checkpoint tries again.",
                checkpoint, self.root, type(error).__name__, error,
            )  # fmt: skip
            return False
        return True

    def bring_newer(self, folder: Path) -> None:
        """The work of `bring` on rank 0. Raises the store's own errors."""
        try:
            name = content_of(self.root / "LATEST").decode().strip()
        except FileNotFoundError:
            return
        if not _STEP.fullmatch(name):
            raise CheckpointError(
                f"{self.root}/LATEST: expected the name of a checkpoint, got {name[:200]!r}. Put the right name there."
            )
        pointer = folder / "LATEST"
        here = pointer.read_text().strip() if pointer.exists() else ""
        if (folder / here).is_dir() and _step(here) >= _step(name):
            return
        self._bring_snapshots(folder.parent.parent / "snapshots")
        arriving = folder / f".{name}.arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        source = self.root / name
        text = content_of(source / SUMS).decode()
        for file, sha256 in parse_sums(text, source / SUMS).items():
            patiently(lambda file=file, sha256=sha256: _fetch(source / file, arriving / file, sha256))
        write_atomic(arriving / SUMS, text)
        remove(folder / name)
        os.replace(arriving, folder / name)
        write_atomic(pointer, name)

    def _put(self, checkpoint: Path) -> None:
        snapshots = checkpoint.parents[2] / "snapshots"
        for name in set(names_in(snapshots)) - self._snapshots:
            put(snapshots / name, self.root.parent / "snapshots" / name)
            self._snapshots.add(name)
        names = parse_sums((checkpoint / SUMS).read_text(), checkpoint / SUMS)
        for name in (*names, SUMS):
            put(checkpoint / name, self.root / checkpoint.name / name)
        write_atomic(self.root / "LATEST", checkpoint.name)

    def _drop(self, outdated: Outdated) -> None:
        store: Any = self.root
        found = [name for name in names_in(self.root) if _STEP.fullmatch(name)]
        incomplete = [name for name in found if name not in self._cursors and not self._is_complete(name)]
        complete = {name: self._cursors[name] for name in found if name not in incomplete}
        for name in (*incomplete, *outdated(complete)):
            path: Any = store / name
            drop(path / SUMS)  # first, so that a checkpoint that a kill leaves half deleted counts as incomplete
            patiently(lambda path=path: store.fs.rm(path.path, recursive=True))

    def _is_complete(self, name: str) -> bool:
        """Whether a checkpoint is complete on the store; if so, its cursor is remembered."""
        if SUMS not in names_in(self.root / name):
            return False
        self._cursors[name] = patiently(lambda: cursor(self.root / name))
        return True

    def _bring_snapshots(self, folder: Path) -> None:
        source = self.root.parent / "snapshots"
        for name in names_in(source):
            if _SNAPSHOT.fullmatch(name) and not (folder / name).exists():
                write_atomic(folder / name, content_of(source / name))


def _step(name: str) -> int:
    return int(name.removeprefix("step-")) if _STEP.fullmatch(name) else -1


def _fetch(source: Path, target: Path, sha256: str) -> None:
    store: Any = source
    store.fs.get_file(store.path, str(target))
    if sha256_file(target) != sha256:
        raise CheckpointError(
            f"{source}: altered since it was saved (its sha256 is not the one in {SUMS}). It is refused; restore it, or "
            "point LATEST there at another checkpoint."
        )
    with target.open("rb") as file:
        os.fsync(file.fileno())
