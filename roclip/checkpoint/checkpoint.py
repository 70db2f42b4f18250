"""Checkpoints: saved atomically, verified before they are loaded, named by LATEST and TRUSTED, exported to open_clip.

checkpoints/
  step-00000120/
    open_clip_config.json open_clip_model.safetensors   the towers, loadable by open_clip as they are
    optimizer.safetensors   moments of every weight, whole: for any number of ranks and any ZeRO stage
    pool.safetensors        the caption pool
    sample_filter.safetensors  what the sample filter suspects
    neighbours.safetensors  the neighbours, where they are in use
    cursor.json             where in the data and in the schedule training stands
    SHA256SUMS              of every file above, by names without a folder
  LATEST                    the newest complete checkpoint: resume starts here
  TRUSTED                   the one that may leave the run; only the oracle moves it
  saves.jsonl               when each was complete, its size, and how long writing and copying took

It holds no random state: everything random is drawn from (seed, step, rank) or (seed, epoch, sample).
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from roclip import distributed
from roclip.checkpoint.engine_state import load_optimizer_state, load_weights, optimizer_state
from roclip.checkpoint.pointers import CURSOR, SUMS, Cursor, Outdated, cursor, named, remove, verify
from roclip.errors import CheckpointError, without_space
from roclip.model.tensor_file import write_tensors
from roclip.model.towers import CONFIG, WEIGHTS, Towers
from roclip.storage import sha256_file, write_atomic

SAVES = "saves.jsonl"


class Stateful(Protocol):
    """A part whose state a checkpoint keeps in its own file, such as the pool. All ranks ask for it, rank 0 writes it."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Store(Protocol):
    """A second place for checkpoints: `roclip/checkpoint/store.py`."""

    def take(self, checkpoint: Path, outdated: Outdated) -> bool:
        """Copy a complete checkpoint there and drop the outdated ones. Returns whether that worked."""
        ...


class Writer:
    """Saves the checkpoints of a training: all ranks gather, then rank 0 writes while they train on.

    The state is copied into memory that stays from one save to the next: fresh memory costs several times the copy.

    Args:
        folder: `checkpoints`.
        keep: How many of the newest checkpoints to keep.
        keep_every_epochs: Also keep the checkpoint at the end of every epoch that this number divides; 0 keeps none of
            them. The checkpoint that TRUSTED names is always kept.
        store: Also receives each checkpoint, from the same thread: a slow store delays the next save, not the steps.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every_epochs: int = 0, store: Store | None = None):
        self.folder, self.keep, self.keep_every_epochs, self.store = folder, keep, keep_every_epochs, store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_yield_to_training)
        self._writing: Future[None] | None = None
        self._memory: dict[str, Tensor] = {}

    def save(self, engine: Any, towers: Towers, parts: Mapping[str, Stateful], cursor: Cursor) -> None:
        """Copy the state and write it in the background. Call it on all ranks.

        It is written under a temporary name and renamed when every file is on disk, so no reader ever sees half of it;
        then LATEST names it. A second call waits until the first is written and raises its error.
        """
        distributed.lead(self._join)
        leader = distributed.rank() == 0
        weights = towers.weights(self._copy if leader else None)
        tensors = {"optimizer": optimizer_state(engine, self._copy)}
        states = {name: part.state_dict() for name, part in parts.items()}
        if leader:
            for part, state in states.items():
                tensors[part] = {
                    name: self._copy(f"{part}/{name}", value, value.dtype) for name, value in state.items()
                }
            self._writing = self._thread.submit(self._write, towers, weights, tensors, cursor)

    def wait(self) -> None:
        """Return on all ranks when the last save is on disk and LATEST names it."""
        distributed.lead(self._join)

    def _join(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            raise without_space(error, self.folder) or CheckpointError(
                f"{self.folder}: a checkpoint cannot be written ({error}). The last whole one is as it was: mend the disk and "
                "run the same command again."
            ) from error

    def _copy(self, name: str, value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape != value.shape or memory.dtype != dtype:
            memory = self._memory[name] = torch.empty(value.shape, dtype=dtype)
        return memory.copy_(value.detach())

    def _write(
        self,
        towers: Towers,
        weights: dict[str, Tensor],
        tensors: Mapping[str, dict[str, Tensor]],
        cursor: Cursor,
    ) -> None:
        begun_s = time.monotonic()
        name = f"step-{cursor.step:08d}"
        final, temporary = self.folder / name, self.folder / f".{name}.partial"
        for left in self.folder.glob(".step-*"):  # by a process that was killed as it wrote or removed
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        sums = {WEIGHTS: towers.save(temporary, weights), CONFIG: sha256_file(temporary / CONFIG)}
        for part, state in tensors.items():
            file = temporary / f"{part}.safetensors"
            sums[file.name] = write_tensors(file, state)
        write_atomic(temporary / CURSOR, json.dumps(asdict(cursor)))
        sums[CURSOR] = sha256_file(temporary / CURSOR)
        write_atomic(temporary / SUMS, "".join(f"{sums[file]}  {file}\n" for file in sorted(sums)))
        remove(final)
        os.replace(temporary, final)
        write_atomic(self.folder / "LATEST", name)
        outdated = partial(self._outdated, newest=cursor)
        self._drop_old(outdated)
        written_s = time.monotonic()
        copied = self.store.take(final, outdated) if self.store is not None else None
        self._note(final, cursor, written_s - begun_s, copied, time.monotonic() - written_s)

    def _note(self, final: Path, cursor: Cursor, write_s: float, copied: bool | None, copy_s: float) -> None:
        """Add a line to `saves.jsonl`; `copied` is None without a store."""
        row = {
            "step": cursor.step,
            "saved_s": time.time() - copy_s,
            "size_bytes": sum(file.stat().st_size for file in final.iterdir()),
            "write_s": round(write_s, 3),
            "copied": copied,
            "copy_s": round(copy_s, 3),
        }
        with contextlib.suppress(OSError), (self.folder / SAVES).open("a") as file:  # the checkpoint is safe without it
            file.write(json.dumps(row) + "\n")

    def _drop_old(self, outdated: Outdated) -> None:
        for name in outdated({path.name: cursor(path) for path in self.folder.glob("step-*")}):
            remove(self.folder / name)

    def _outdated(self, checkpoints: Mapping[str, Cursor], newest: Cursor) -> list[str]:
        every, pointer = self.keep_every_epochs, self.folder / "TRUSTED"
        trusted = pointer.read_text().strip() if pointer.exists() else ""
        # Newer ones that LATEST never came to name, because of a kill, do not push out the one that it names.
        done = sorted(name for name in checkpoints if checkpoints[name].step <= newest.step)
        return [
            name
            for name in done[: -self.keep]
            if not (every and checkpoints[name].step_in_epoch == 0 and (checkpoints[name].epoch - 1) % every == 0)
            and name != trusted
        ]


def resume(folder: Path, engine: Any, towers: Towers, parts: Mapping[str, Stateful]) -> Cursor | None:
    """Load the checkpoint that LATEST names into a new engine and the parts; None where there is none.

    Any number of ranks at any ZeRO stage may load it; with the same ranks and stage, training continues bit for bit as
    if it had never stopped. Raises `CheckpointError` when a file is missing or was altered.
    """
    path = named(folder, "LATEST")
    if path is None:
        return None
    verify(path)
    at = cursor(path)
    load_weights(towers.clip, load_file(path / WEIGHTS))
    load_optimizer_state(engine, load_file(path / "optimizer.safetensors"))
    for part, holder in parts.items():
        holder.load_state_dict(load_file(path / f"{part}.safetensors"))
    return at


def export(checkpoint: Path, out: Path) -> Path:
    """Copy the towers to `out`, for `open_clip.create_model_and_transforms("local-dir:<out>")`.

    The checkpoint is verified first. Raises `CheckpointError` if it was altered or `out` holds another model.
    """
    verify(checkpoint)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: expected an empty or new folder, got one with files. Name another --out.")
    out.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        write_atomic(out / name, (checkpoint / name).read_bytes())
    return out


def _yield_to_training() -> None:
    """Let the training go first: of a core that both want, this thread gets a quarter. With much less, a checkpoint would
    not be written before the next one is due."""
    if sys.platform == "linux":  # where each thread has its own priority
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + 5))
