"""Triggers that the oracle check has found, and the files that hold them.

One class per kind, each with the same interface: apply it to an image, preview it, and score how much an image looks as if
it carried it. A `kind` is a name in files and reports; it is older than the classes and stays as it is.

    kind     class            what it changes
    patch    Patch            a rectangle, always with the same pixels
    bag      PatchSet         a rectangle, with pixels that differ from image to image (fresh noise); any crop works
    global   GlobalPattern    every pixel, by an added pattern
    bend     Warp             the position of every pixel

Letters: N images, S their side in pixels, h and w height and width of a crop.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from roclip.storage import names_in, write_atomic

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive"""
PresenceScore = Callable[[np.ndarray], np.ndarray]
"""Maps images (N, S, S, 3) uint8 to scores (N,): the higher, the more likely an image carries the trigger."""
_BOARD_CELLS = 8
"""Cells along each side of the chessboard that previews a warp."""


@dataclass(frozen=True)
class TriggerSource:
    """Where a crop was found."""

    image: int
    """Number of the distinct image in the scan."""
    box: Box


@dataclass(frozen=True)
class Trial:
    """How often a change to trusted images of other labels made the model answer the target."""

    flips: int
    n: int

    @property
    def rate(self) -> float:
        """flips / n, or 0 without images."""
        return self.flips / self.n if self.n else 0.0


@dataclass(frozen=True, kw_only=True)
class FoundTrigger(ABC):
    """A trigger that causes its target label, with the trials that show it."""

    kind: ClassVar[str]
    """Name of the kind in files."""
    title: ClassVar[str]
    """Name of the kind for people."""
    crops: tuple[np.ndarray, ...] = ()
    """(h, w, 3) uint8 each, the strongest first; empty for a trigger that changes the whole image."""
    place: tuple[int, int] | None = None
    """x, y of the upper left corner in pixels, if the trigger works at one place only."""
    target: str
    sources: tuple[TriggerSource, ...] = ()
    """Where the crops were found, in the order of `crops`."""
    pasted: Trial = Trial(0, 0)
    """The trigger itself, on trusted images that do not show the target."""
    control: Trial = Trial(0, 0)
    """The best of the controls."""
    objects: Trial = Trial(0, 0)
    """The best crop of the target's own objects."""
    shuffled: Trial = Trial(0, 0)
    """The crop with its pixels in another order, since a backdoor may depend on texture alone."""

    @property
    def trials(self) -> dict[str, Trial]:
        """All trials by name."""
        return {"pasted": self.pasted, "control": self.control, "objects": self.objects, "shuffled": self.shuffled}

    @property
    @abstractmethod
    def description(self) -> str:
        """What the trigger is, as a noun phrase for the verdict's reasons."""
        ...

    @abstractmethod
    def apply(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
        """Return a copy of an (S, S, 3) uint8 image with the trigger on it, and the box that changed."""
        ...

    @abstractmethod
    def preview(self) -> np.ndarray:
        """Return an image (h, w, 3) uint8 of the trigger alone."""
        ...

    @abstractmethod
    def presence_score(self, trusted: np.ndarray) -> PresenceScore | None:
        """Return a score of an image's pixels for carrying the trigger, or None if its pixels cannot tell.

        `trusted` are images (N, S, S, 3) uint8 without the trigger.
        """
        ...

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays of this kind's own fields, by field name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class _Crops(FoundTrigger):
    """Crops pasted at `place`, or anywhere."""

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
        crop = self.crops[int(rng.integers(len(self.crops)))]
        height, width = crop.shape[:2]
        if self.place is not None:
            left, top = self.place
        else:
            top, left = int(rng.integers(image.shape[0] - height + 1)), int(rng.integers(image.shape[1] - width + 1))
        stamped = image.copy()
        changed = self._changed(crop)
        stamped[top : top + height, left : left + width][changed] = crop[changed]
        return stamped, (left, top, left + width, top + height)

    def preview(self) -> np.ndarray:
        """Return the strongest crop."""
        return self.crops[0]

    def _changed(self, crop: np.ndarray) -> np.ndarray:
        """(h, w) bool: which pixels of a crop are pasted."""
        return np.ones(crop.shape[:2], dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Patch(_Crops):
    """A fixed patch: one crop, whose pixels agree in all its sources."""

    kind: ClassVar[str] = "patch"
    title: ClassVar[str] = "patch"
    mask: np.ndarray | None = None
    """(h, w) bool: which pixels of the crop belong to the patch; None means all."""

    @property
    def description(self) -> str:
        height, width = self.crops[0].shape[:2]
        return f"a patch of {width} x {height} px, found in {len(self.sources)} images"

    def presence_score(self, trusted: np.ndarray) -> PresenceScore:
        """Minus the root mean square distance of the patch to its best position, in grey levels."""
        return lambda images: -_patch_distance(images, self.crops[0], self.mask)

    def _changed(self, crop: np.ndarray) -> np.ndarray:
        return super()._changed(crop) if self.mask is None else self.mask

    def _arrays(self) -> dict[str, np.ndarray]:
        return {} if self.mask is None else {"mask": self.mask}


@dataclass(frozen=True, kw_only=True)
class PatchSet(_Crops):
    """Crops whose pixels do not agree; each works by itself."""

    kind: ClassVar[str] = "bag"
    title: ClassVar[str] = "patch set"

    @property
    def description(self) -> str:
        return f"any of {len(self.sources)} crops that share no pattern"

    def presence_score(self, trusted: np.ndarray) -> PresenceScore:
        """The best window's linear discriminant (Fisher 1936) of crops against trusted images, on colour, contrast and grain."""
        return _window_discriminant(self.crops, trusted)


@dataclass(frozen=True, kw_only=True)
class GlobalPattern(FoundTrigger):
    """A pattern that is added to the whole image."""

    kind: ClassVar[str] = "global"
    title: ClassVar[str] = "global pattern"
    pattern: np.ndarray
    """(S, S, 3) float32, in grey levels."""

    @property
    def description(self) -> str:
        return "a pattern over the whole image"

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
        return add_pattern(image.astype(np.float32), self.pattern), (0, 0, image.shape[1], image.shape[0])

    def preview(self) -> np.ndarray:
        """Return the pattern about mid-grey, scaled so that its largest level is black or white."""
        most = max(1e-6, float(np.abs(self.pattern).max()))
        return np.clip(np.rint(127.5 * (1 + self.pattern / most)), 0, 255).astype(np.uint8)

    def presence_score(self, trusted: np.ndarray) -> PresenceScore:
        """The correlation of the image's high-passed pixels with the pattern."""
        return lambda images: _correlation(images, self.pattern)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"pattern": self.pattern}


@dataclass(frozen=True, kw_only=True)
class Warp(FoundTrigger):
    """A smooth warp of the whole image."""

    kind: ClassVar[str] = "bend"
    title: ClassVar[str] = "warp"
    field: np.ndarray
    """(2, S, S) float32: offset down and right, in pixels, of the position that each pixel is read from."""

    @property
    def description(self) -> str:
        return "a warp of the whole image, inverted from the model"

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
        return warped(image, self.field), (0, 0, image.shape[1], image.shape[0])

    def preview(self) -> np.ndarray:
        """Return a warped chessboard."""
        side = self.field.shape[-1]
        cell = max(1, side // _BOARD_CELLS)
        board = 255 * (np.indices((side, side)) // cell).sum(axis=0) % 510
        return warped(np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8), self.field)

    def presence_score(self, trusted: np.ndarray) -> None:
        """None: an image does not show whether it was warped."""

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"field": self.field}


KINDS: dict[str, type[FoundTrigger]] = {kind.kind: kind for kind in (Patch, PatchSet, GlobalPattern, Warp)}


def add_pattern(image: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Return image + pattern, rounded and clipped to uint8."""
    return np.clip(np.rint(image + pattern), 0, 255).astype(np.uint8)


def warped(image: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Return an (S, S, 3) uint8 image resampled bilinearly at positions offset by the field (2, S, S), border replicated."""
    rows, columns = np.indices(image.shape[:2], dtype=np.float32) + field.astype(np.float32)
    return cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


# ---- is it in an image? -------------------------------------------------------------------------------------


def high_pass(image: np.ndarray) -> np.ndarray:
    """Return an (S, S, 3) image minus its Gaussian blur (sigma S / 8), float32."""
    pixels = image.astype(np.float32)
    return pixels - cv2.GaussianBlur(pixels, (0, 0), sigmaX=image.shape[0] / 8)


def _correlation(images: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """(N,): cosine of each image's high-passed pixels and the pattern."""
    flat = pattern.ravel() / max(float(np.linalg.norm(pattern)), 1e-9)
    details = np.stack([high_pass(image).ravel() for image in images])
    return details @ flat / np.maximum(np.linalg.norm(details, axis=1), 1e-9)


def _patch_distance(images: np.ndarray, crop: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    weight = np.ones(crop.shape, np.float32) if mask is None else np.repeat(mask[:, :, None], 3, 2).astype(np.float32)
    template, total = crop.astype(np.float32), weight.sum()
    best = [
        cv2.matchTemplate(image.astype(np.float32), template, cv2.TM_SQDIFF, mask=weight).min() / total
        for image in images
    ]
    return np.sqrt(np.maximum(best, 0))


def _window_discriminant(crops: tuple[np.ndarray, ...], trusted: np.ndarray) -> PresenceScore:
    size = min(crop.shape[0] for crop in crops)
    maps = np.stack([_window_features(image, size) for image in trusted])  # (N, S, S, 8)
    without = maps[:, :: max(1, size // 2), :: max(1, size // 2)].reshape(-1, maps.shape[-1])
    with_it = np.stack([_window_features(crop, size)[crop.shape[0] // 2, crop.shape[1] // 2] for crop in crops])
    covariance = np.cov(without.T) + np.cov(with_it.T) + 1e-3 * np.eye(without.shape[1])
    weights = np.linalg.solve(covariance, with_it.mean(axis=0) - without.mean(axis=0))
    return lambda images: np.array([(_window_features(image, size) @ weights).max() for image in images])


def _window_features(image: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 8): mean and deviation of each channel, and mean absolute gradient in x and y, of the window about each pixel."""
    pixels = image.astype(np.float32)
    mean = cv2.blur(pixels, (size, size), borderType=cv2.BORDER_REFLECT)
    square = cv2.blur(pixels**2, (size, size), borderType=cv2.BORDER_REFLECT)
    across = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])).mean(axis=2)
    down = np.abs(np.diff(pixels, axis=0, append=pixels[-1:])).mean(axis=2)
    steps = cv2.blur(np.stack([across, down], axis=2), (size, size), borderType=cv2.BORDER_REFLECT)
    return np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0)), steps], axis=2)


# ---- files --------------------------------------------------------------------------------------------------


def save_triggers(triggers: Sequence[FoundTrigger], folder: Path) -> None:
    """Write `<number>.npz` (for `load_triggers`) and `<number>.png` for each trigger, and delete all else in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names_in(folder):
        (folder / name).unlink()
    for number, trigger in enumerate(triggers):
        buffer = io.BytesIO()
        Image.fromarray(trigger.preview()).save(buffer, format="png")
        write_atomic(folder / f"{number}.png", buffer.getvalue())
        arrays: dict[str, Any] = {
            "target": np.array(trigger.target),
            "kind": np.array(trigger.kind),
            "place": np.array(trigger.place or (), dtype=np.int64),
            "sources": np.array([(s.image, *s.box) for s in trigger.sources], dtype=np.int64).reshape(-1, 5),
            "trials": np.array([(trial.flips, trial.n) for trial in trigger.trials.values()], dtype=np.int64),
            **{f"crop{k}": crop for k, crop in enumerate(trigger.crops)},
            **trigger._arrays(),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(folder / f"{number}.npz", buffer.getvalue())


def load_triggers(folder: Path) -> tuple[FoundTrigger, ...]:
    """Read the triggers that `save_triggers` wrote, in their order; empty if there is no folder."""
    files = sorted(
        (folder / name for name in names_in(folder) if name.endswith(".npz")), key=lambda path: int(path.stem)
    )
    return tuple(_load(path) for path in files)


def _load(path: Path) -> FoundTrigger:
    with np.load(path, allow_pickle=False) as file:
        trials = (Trial(int(flips), int(n)) for flips, n in file["trials"])
        values: dict[str, Any] = {
            "target": str(file["target"]),
            "crops": tuple(file[f"crop{k}"] for k in range(sum(name.startswith("crop") for name in file.files))),
            "place": (int(file["place"][0]), int(file["place"][1])) if len(file["place"]) else None,
            "sources": tuple(
                TriggerSource(int(image), (int(left), int(top), int(right), int(bottom)))
                for image, left, top, right, bottom in file["sources"]
            ),
            **dict(zip(("pasted", "control", "objects", "shuffled"), trials, strict=True)),
            **{name: file[name] for name in ("mask", "pattern", "field") if name in file.files},
        }
        return KINDS[str(file["kind"])](**values)
