"""What the check has found: triggers that cause a label, ready to be put on other pictures.

Letters: S side in pixels at which pictures are looked at; h, w of a crop.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from roclip.storage import names_in, write_atomic

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive"""
_CELLS = 8
"""Of a chessboard, a side."""


@dataclass(frozen=True)
class Source:
    """A picture that a trigger was taken from."""

    image: int
    """Number of the distinct image in the pass."""
    box: Box


@dataclass(frozen=True)
class Trial:
    """How often a thing that was put on trusted pictures of other labels made the model answer `target`."""

    flips: int
    n: int

    @property
    def rate(self) -> float:
        return self.flips / self.n if self.n else 0.0


@dataclass(frozen=True)
class FoundTrigger:
    """A trigger that was shown to cause its label.

    `kind` is "patch" (crops whose pixels agree), "bag" (crops whose pixels do not: fresh noise; any of them works), "global"
    (a pattern over the whole picture) or "bend" (the whole picture is warped).
    """

    target: str
    kind: str
    crops: tuple[np.ndarray, ...] = ()
    """(h, w, 3) uint8 each, the strongest first; none of what lies over the whole picture."""
    mask: np.ndarray | None = None
    """(h, w) bool: which pixels of a patch are the trigger's; None is all."""
    place: tuple[int, int] | None = None
    """x, y of the upper left corner, where it works at one place only."""
    pattern: np.ndarray | None = None
    """(S, S, 3) float32: what a global trigger adds to a picture, in grey levels."""
    field: np.ndarray | None = None
    """(2, S, S) float32: from how far down and right of itself a bend takes each pixel, in pixels."""
    sources: tuple[Source, ...] = ()
    """Where the crops were found, in the order of `crops`."""
    pasted: Trial = Trial(0, 0)
    """Of the crops, the pattern or the bend, on trusted pictures that do not show the target."""
    control: Trial = Trial(0, 0)
    """The best of the controls."""
    objects: Trial = Trial(0, 0)
    """Of the best crop of the target's own objects."""
    shuffled: Trial = Trial(0, 0)
    """Of the crop with its pixels in another order: a backdoor may go by texture."""

    @property
    def trials(self) -> dict[str, Trial]:
        """By name."""
        return {"pasted": self.pasted, "control": self.control, "objects": self.objects, "shuffled": self.shuffled}

    def put_on(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
        """A copy of an (S, S, 3) uint8 image with the trigger on it, and the box that changed."""
        side = image.shape[0]
        everything = (0, 0, image.shape[1], side)
        if self.pattern is not None:
            return np.clip(np.rint(image.astype(np.float32) + self.pattern), 0, 255).astype(np.uint8), everything
        if self.field is not None:
            return warped(image, self.field), everything
        crop = self.crops[int(rng.integers(len(self.crops)))]
        height, width = crop.shape[:2]
        if self.place is not None:
            left, top = self.place
        else:
            top, left = int(rng.integers(side - height + 1)), int(rng.integers(image.shape[1] - width + 1))
        stamped = image.copy()
        changed = np.ones((height, width), dtype=bool) if self.mask is None else self.mask
        stamped[top : top + height, left : left + width][changed] = crop[changed]
        return stamped, (left, top, left + width, top + height)


def warped(image: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The (S, S, 3) uint8 image read bilinearly at places that are shifted by the field (2, S, S); beyond its border lies the
    border."""
    rows, columns = np.indices(image.shape[:2], dtype=np.float32) + field.astype(np.float32)
    return cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def picture_of(trigger: FoundTrigger) -> np.ndarray:
    """(h, w, 3) uint8: its strongest crop; its pattern with grey for nothing and the strongest level at an end; or a
    chessboard that it bends."""
    if trigger.field is not None:
        side = trigger.field.shape[-1]
        cell = max(1, side // _CELLS)
        board = 255 * (np.indices((side, side)) // cell).sum(axis=0) % 510
        return warped(np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8), trigger.field)
    if trigger.pattern is None:
        return trigger.crops[0]
    most = max(1e-6, float(np.abs(trigger.pattern).max()))
    return np.clip(np.rint(127.5 * (1 + trigger.pattern / most)), 0, 255).astype(np.uint8)


def save_found(triggers: Sequence[FoundTrigger], folder: Path) -> None:
    """Write `<number>.npz`, which `load_found` reads, and `<number>.png` for each; those of an earlier check go."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names_in(folder):
        (folder / name).unlink()
    for number, trigger in enumerate(triggers):
        buffer = io.BytesIO()
        Image.fromarray(picture_of(trigger)).save(buffer, format="png")
        write_atomic(folder / f"{number}.png", buffer.getvalue())
        arrays: dict[str, Any] = {
            "target": np.array(trigger.target),
            "kind": np.array(trigger.kind),
            "place": np.array(trigger.place or (), dtype=np.int64),
            "sources": np.array([(s.image, *s.box) for s in trigger.sources], dtype=np.int64).reshape(-1, 5),
            "trials": np.array([(trial.flips, trial.n) for trial in trigger.trials.values()], dtype=np.int64),
            **{f"crop{k}": crop for k, crop in enumerate(trigger.crops)},
            **({} if trigger.mask is None else {"mask": trigger.mask}),
            **({} if trigger.pattern is None else {"pattern": trigger.pattern}),
            **({} if trigger.field is None else {"field": trigger.field}),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(folder / f"{number}.npz", buffer.getvalue())


def load_found(folder: Path) -> tuple[FoundTrigger, ...]:
    """What `save_found` wrote, in its order; none where there is no folder."""
    files = sorted(
        (folder / name for name in names_in(folder) if name.endswith(".npz")), key=lambda path: int(path.stem)
    )
    return tuple(_load(path) for path in files)


def _load(path: Path) -> FoundTrigger:
    with np.load(path, allow_pickle=False) as file:
        pasted, control, objects, shuffled = (Trial(int(flips), int(n)) for flips, n in file["trials"])
        return FoundTrigger(
            target=str(file["target"]),
            kind=str(file["kind"]),
            crops=tuple(file[f"crop{k}"] for k in range(sum(name.startswith("crop") for name in file.files))),
            mask=file["mask"] if "mask" in file.files else None,
            place=(int(file["place"][0]), int(file["place"][1])) if len(file["place"]) else None,
            pattern=file["pattern"] if "pattern" in file.files else None,
            field=file["field"] if "field" in file.files else None,
            sources=tuple(
                Source(int(image), (int(left), int(top), int(right), int(bottom)))
                for image, left, top, right, bottom in file["sources"]
            ),
            pasted=pasted,
            control=control,
            objects=objects,
            shuffled=shuffled,
        )
