"""Checkpoints: saved atomically, verified before they are loaded, named by LATEST and TRUSTED, exported to open_clip.

checkpoints/
  step-00000120/
    open_clip_config.json open_clip_model.safetensors   the towers, loadable by open_clip as they are
    optimizer.safetensors   moments of every weight, whole: for any number of ranks and any ZeRO stage
    pool.safetensors        the caption pool         gate.safetensors   what the gate suspects
    cursor.json             where in the data and in the schedule training stands
    SHA256SUMS              of every file above
  LATEST                    the newest complete checkpoint: resume starts here
  TRUSTED                   the one that may leave the run; only the oracle moves it

There is no random state in it: all that is random is drawn for (seed, step, rank) or (seed, epoch, sample).
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from roclip import distributed
from roclip.engine_state import load_optimizer_state, load_weights, optimizer_state
from roclip.errors import CheckpointError
from roclip.model import CONFIG, WEIGHTS, Towers
from roclip.shards import sha256_file, write_atomic

SUMS = "SHA256SUMS"
_CURSOR = "cursor.json"


class Part(Protocol):
    """What a checkpoint keeps beside the engine, in a file of its own: the pool, the gate. All ranks ask, rank 0 writes."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Cursor:
    """Where training stands: everything that is not a tensor."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """The current epoch, from 1."""
    step_in_epoch: int
    """Steps done of it."""
    samples_seen: int
    phase: str
    """Phase of the last step: 'matched' or 'plain'."""


class Writer:
    """Saves the checkpoints of a training: all ranks gather, then rank 0 writes while they train on.

    Args:
        folder: `checkpoints`.
        keep: The newest checkpoints that are kept.
        keep_every_epochs: Also kept are those at the end of every so manieth epoch; 0 is none. And what TRUSTED names.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every_epochs: int = 0):
        self.folder, self.keep, self.keep_every_epochs = folder, keep, keep_every_epochs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, engine: Any, towers: Towers, parts: Mapping[str, Part], cursor: Cursor) -> None:
        """Copy the state, and write it in the background. Call it on all ranks.

        It is written under a temporary name and renamed when every file is on disk, so that no reader ever sees a part;
        then LATEST names it. A second call waits for the first to be written, and raises what went wrong there.
        """
        self._join()
        weights = towers.weights()
        tensors = {"optimizer": optimizer_state(engine), **{name: part.state_dict() for name, part in parts.items()}}
        if distributed.rank() == 0:
            tensors |= {name: _copied(tensors[name]) for name in parts}
            self._writing = self._thread.submit(self._write, towers, weights, tensors, cursor)

    def wait(self) -> None:
        """Return on all ranks when what was saved last is on disk and named."""
        self._join()
        distributed.barrier()

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(
        self,
        towers: Towers,
        weights: dict[str, Tensor],
        tensors: Mapping[str, dict[str, Tensor]],
        cursor: Cursor,
    ) -> None:
        name = f"step-{cursor.step:08d}"
        final, temporary = self.folder / name, self.folder / f".{name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        towers.save(temporary, weights)
        for part, state in tensors.items():
            save_file(state, temporary / f"{part}.safetensors")
        write_atomic(temporary / _CURSOR, json.dumps(asdict(cursor)))
        _seal(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_atomic(self.folder / "LATEST", name)
        self._drop_old()

    def _drop_old(self) -> None:
        for left in self.folder.glob(".*.partial"):  # of a process that was killed as it wrote
            shutil.rmtree(left)
        for path in sorted(self.folder.glob("step-*"))[: -self.keep]:
            at = cursor(path)
            epoch_end = (
                self.keep_every_epochs and at.step_in_epoch == 0 and (at.epoch - 1) % self.keep_every_epochs == 0
            )
            if not epoch_end and path != named(self.folder, "TRUSTED"):
                shutil.rmtree(path)


def resume(folder: Path, engine: Any, towers: Towers, parts: Mapping[str, Part]) -> Cursor | None:
    """Load the checkpoint that LATEST names into a new engine and the parts; None where there is none.

    Any number of ranks at any ZeRO stage may load it; the same ones go on bit by bit as if nothing had been.
    Raises `CheckpointError` when a file is missing or was altered.
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


def named(folder: Path, name: str) -> Path | None:
    """The checkpoint that `LATEST` or `TRUSTED` names, or None. Raises `CheckpointError` if it is gone."""
    pointer = folder / name
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not path.is_dir():
        raise CheckpointError(f"{pointer}: names {path.name}, which is not there. Bring it back or delete {pointer}.")
    return path


def verify(path: Path) -> None:
    """Compare every file with SHA256SUMS. Raises `CheckpointError` naming the file that is missing or altered."""
    sums = path / SUMS
    if not sums.exists():
        raise CheckpointError(f"{path}: expected {SUMS}, got none. This is not a complete checkpoint.")
    for line in sums.read_text().splitlines():
        expected, name = line.split("  ", 1)
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
    return Cursor(**json.loads((path / _CURSOR).read_text()))


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


def _seal(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_atomic(path / SUMS, "".join(f"{sha256_file(file)}  {file.relative_to(path)}\n" for file in files))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
