"""Checkpoints: saved atomically, verified before they are loaded, named by LATEST and TRUSTED, exported to open_clip.

checkpoints/
  step-00000120/
    open_clip_config.json open_clip_model.safetensors   the towers, loadable by open_clip as they are
    deepspeed/ …            optimizer and weights of the engine, one file a rank
    pool.safetensors        the caption pool         gate.safetensors   what the gate suspects
    cursor.json             where in the data and in the schedule training stands
    SHA256SUMS              of every file above
  LATEST                    the newest complete checkpoint: resume starts here
  TRUSTED                   the one that may leave the run; only the oracle moves it
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from roclip import distributed
from roclip.errors import CheckpointError
from roclip.model import CONFIG, WEIGHTS, Towers
from roclip.shards import sha256_file, write_atomic

SUMS = "SHA256SUMS"
_ENGINE = "deepspeed"


class Part(Protocol):
    """What a checkpoint keeps beside the engine, in a file of its own: the pool, the gate. The same on every rank."""

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


def save(folder: Path, engine: Any, towers: Towers, parts: Mapping[str, Part], cursor: Cursor, *, keep: int) -> Path:
    """Write a checkpoint on all ranks, then name it in LATEST and drop all but the `keep` newest.

    It is written under a temporary name and renamed when every file is on disk, so that no reader ever sees a part.
    """
    name = f"step-{cursor.step:08d}"
    final, temporary = folder / name, folder / f".{name}.partial"
    leader = distributed.rank() == 0
    if leader:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(temporary / _ENGINE), tag="engine")
    weights = towers.weights()
    if leader:
        towers.save(temporary, weights)
        for part, holder in parts.items():
            save_file(holder.state_dict(), temporary / f"{part}.safetensors")
        write_atomic(temporary / "cursor.json", json.dumps(asdict(cursor)))
    distributed.barrier()
    if leader:
        _seal(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_atomic(folder / "LATEST", name)
        _drop_old(folder, keep)
    distributed.barrier()
    return final


def resume(folder: Path, engine: Any, parts: Mapping[str, Part]) -> Cursor | None:
    """Load the checkpoint that LATEST names into the engine and the parts; None where there is none.

    Raises `CheckpointError` when a file is missing or was altered.
    """
    path = named(folder, "LATEST")
    if path is None:
        return None
    verify(path)
    loaded, _ = engine.load_checkpoint(str(path / _ENGINE), tag="engine")
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed could not load it. Resume with the number of ranks that saved it.")
    for part, holder in parts.items():
        holder.load_state_dict(load_file(path / f"{part}.safetensors"))
    return Cursor(**json.loads((path / "cursor.json").read_text()))


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
    return Cursor(**json.loads((path / "cursor.json").read_text()))


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


def _drop_old(folder: Path, keep: int) -> None:
    trusted = named(folder, "TRUSTED")
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path != trusted:
            shutil.rmtree(path)
