"""The trigger search: what causes the model's answers of a suspected label?

    suspects    images of one label whose contradicted caption the model repeats                    statistics.py
    occlusion   which part of the image does the answer depend on?                                  occlusion.py
    shape       which pixels do these parts share?                                                  shape.py
    trial       pasted on trusted images of other labels, it flips the answer; controls do not      paste.py
    pattern     no such part? then what suspects share over the whole image, with the same trial    global_pattern.py
    inversion   nothing shared? then the warp field that the model responds to                      inversion.py
    repeat      suspects that carry the trigger are set aside, and the rest are searched            presence.py

Letters: N distinct images, C labels, S side in pixels.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from roclip.found_triggers import (
    FoundTrigger,
    GlobalPattern,
    Patch,
    PatchSet,
    Trial,
    TriggerSource,
    Warp,
    add_pattern,
    warped,
)
from roclip.oracle.held_out import TrustedImages
from roclip.oracle.triggers import global_pattern
from roclip.oracle.triggers.inversion import BATCH, ScoresWithGradient, invert_warp
from roclip.oracle.triggers.occlusion import ScoreFunction, Spot, find_spots, margins
from roclip.oracle.triggers.paste import Place, control_crops, pasted, shuffled, total, try_change, try_crop
from roclip.oracle.triggers.presence import Detector, trigger_detector
from roclip.oracle.triggers.shape import common_patch

MIN_FLIPS, MIN_TIMES_CONTROL = 0.5, 2.0
"""Minimum flip rate of a trigger on trusted images, absolute and as a multiple of the best control's."""
MIN_BEYOND_OBJECTS = 0.25
"""Minimum flip rate of a patch set or global pattern above that of real objects, or of what honest images of the label share:
the oracle may have missed small objects, so suspects may show the label after all."""
MIN_SOURCES = 3
PATCH_SET_SIZES = (1.25, 1.5, 2.0)
"""Sides of crops, in fine windows; a spot is located to a quarter of one."""
OCCLUDED, RESIDUAL = 16, 256
"""Maximum number of suspects for occlusion (only half if the first half finds nothing) and for the mean residual."""
PROBES, TRIED_ON, CONTROLS, WARP_CONTROLS = 64, 16, 8, 4
MAX_TRIGGERS = 3
"""Maximum number of triggers per label."""


@dataclass(frozen=True)
class Search:
    """The result of one label's search."""

    target: int
    suspects: int
    triggers: tuple[FoundTrigger, ...]
    detectors: tuple[Detector, ...]
    """One per trigger; empty for a warp, which is the only trigger of its label."""
    best: Trial
    """The highest flip rate of any candidate, proved or not."""
    control: Trial


class TriggerSearch:
    """Searches for the triggers of labels, one label per call of `label`."""

    def __init__(
        self,
        scores: ScoreFunction,
        scores_with_gradient: ScoresWithGradient,
        trusted: TrustedImages,
        answers: np.ndarray,
        labels: Sequence[str],
        seed: int,
        repeated: Collection[int] = (),
    ):
        """Create a search for one model.

        Args:
            scores: The model's scores, without gradients.
            scores_with_gradient: The model's scores, differentiable in the pixels.
            answers: (R,) int, the model's zero-shot labels of the R trusted images.
            repeated: Labels whose contradicted captions the model repeats. A warp is searched for only for these, where
                suspects share nothing (one to five runs of `invert_warp`), and none of them serves as a control.
        """
        self.scores, self.scores_with_gradient = scores, scores_with_gradient
        self.trusted, self.answers = trusted, answers
        self.labels, self.seed, self.repeated = tuple(labels), seed, tuple(repeated)

    def label(
        self, target: int, suspects: np.ndarray, read: Callable[[np.ndarray], np.ndarray], *, patch_sets: bool = True
    ) -> Search:
        """Search for the triggers of one label.

        Args:
            suspects: Numbers of the images that may carry a trigger, the likeliest first.
            read: Maps numbers (n,) to images (n, S, S, 3) uint8.
            patch_sets: Whether to try crops that share no pattern. Without other findings about the label they may be its
                objects, and prove nothing.
        """
        rng = np.random.default_rng((self.seed, 71, target))
        others = np.flatnonzero(~self.trusted.shows[:, target] & (self.answers != target))
        rows = rng.permutation(others)[:PROBES]
        remaining, found, detectors = suspects[:RESIDUAL], [], []
        best, control = Trial(0, 0), Trial(0, 0)
        while len(remaining) >= MIN_SOURCES and len(rows) >= TRIED_ON and len(found) < MAX_TRIGGERS:
            images = read(remaining)
            invert = target in self.repeated and not found
            trigger = self._find_cause(target, remaining, images, rows, rng, patch_sets=patch_sets, invert=invert)
            if trigger is None:
                break
            if trigger.pasted.rate >= best.rate:
                best, control = trigger.pasted, trigger.control
            if not _is_proved(trigger):
                break
            found.append(trigger)
            known = (
                np.isin(remaining, [source.image for source in trigger.sources])
                if trigger.sources
                else np.ones(len(remaining), bool)
            )
            detect = trigger_detector(trigger, images[known], self.trusted.images)
            if detect is None:
                break  # pixels do not show which suspects carry it
            carries = (detect(images) > 0) | (known if trigger.sources else False)
            detectors.append(detect)
            if not carries.any():
                break
            remaining = remaining[~carries]
        return Search(target, len(suspects), tuple(found), tuple(detectors), best, control)

    def _find_cause(self, target, numbers, images, rows, rng, *, patch_sets: bool, invert: bool) -> FoundTrigger | None:
        """Return the first proved trigger, or else the candidate that flips most. `rows` are the probes among trusted images."""
        probes = self.trusted.images[rows]
        searches = [
            lambda: self._local(target, numbers, images, probes, rng, patch_sets),
            lambda: self._global(target, numbers, images, probes, rng),
        ]
        if invert:
            searches.append(lambda: self._warp(target, rows, rng))
        tried = []
        for search in searches:
            trigger = search()
            if trigger is not None and _is_proved(trigger):
                return trigger
            tried += [trigger] if trigger else []
        return max(tried, key=lambda trigger: trigger.pasted.rate, default=None)

    def _local(self, target, numbers, images, probes, rng, patch_sets: bool) -> FoundTrigger | None:
        """Return the best trigger that changes only a part of the image, proved or not."""
        scores = self.scores(images)
        order = np.argsort(-margins(scores, target), kind="stable")
        order = order[scores[order].argmax(axis=1) == target][:OCCLUDED]
        spots = self._spots(target, images, order[: OCCLUDED // 2])
        if self._promising(target, images, spots, probes, rng):
            spots += self._spots(target, images, order[OCCLUDED // 2 :])
        if len(spots) < MIN_SOURCES:
            return None
        pieces, corners = _pieces(images, spots, spots[0][1].window_px * 2)
        shape = common_patch(pieces, np.array([spot.centre for _, spot in spots]) - np.array(corners))
        trigger = self._patch(target, numbers, spots, corners, shape, probes, rng) if shape else None
        if not patch_sets or (trigger is not None and _is_proved(trigger)):
            return trigger
        return self._patch_set(target, numbers, images, spots, probes, rng)

    def _spots(self, target: int, images: np.ndarray, rows: np.ndarray) -> list[tuple[int, Spot]]:
        """Return the rows whose answer depends on one place, with that spot."""
        spots = find_spots(images[rows], target, self.scores) if len(rows) else []
        return [(int(k), spot) for k, spot in zip(rows, spots, strict=True) if spot is not None]

    def _promising(self, target, images, spots, probes, rng) -> bool:
        """Whether the first spots coincide or their crops flip some probes, so that occluding more images pays off."""
        if len(spots) < MIN_SOURCES:
            return False
        window = spots[0][1].window_px
        centres = np.array([spot.centre for _, spot in spots])
        if (np.abs(centres - np.median(centres, axis=0)) <= window / 2).all(axis=1).mean() > 0.5:
            return True
        pieces, _ = _pieces(images, spots[: MIN_SOURCES + 1], 2 * window)
        return total([try_crop(p, probes[:TRIED_ON], target, self.scores, rng) for p in pieces]).rate >= MIN_FLIPS / 2

    def _patch(self, target, numbers, spots, corners, shape, probes, rng) -> FoundTrigger | None:
        sources = tuple(
            TriggerSource(int(numbers[k]), (x + box[0], y + box[1], x + box[2], y + box[3]))
            for (k, _), (x, y), box in zip(spots, corners, shape.boxes, strict=True)
            if box is not None
        )
        if len(sources) < MIN_SOURCES:
            return None
        crop, place = shape.pixels, None
        trial = try_crop(crop, probes, target, self.scores, rng)
        if trial.rate < MIN_FLIPS:
            fixed = (int(np.median([s.box[0] for s in sources])), int(np.median([s.box[1] for s in sources])))
            there_only = try_crop(crop, probes, target, self.scores, rng, fixed)
            if there_only.rate > trial.rate:
                trial, place = there_only, fixed
        control, objects = self._controls(trial, target, crop.shape[:2], probes, rng, place, noise=True)
        mixed = try_crop(shuffled(crop, rng), probes, target, self.scores, rng, place)
        return Patch(
            target=self.labels[target],
            crops=(crop,),
            mask=shape.mask,
            place=place,
            sources=sources,
            pasted=trial,
            control=control,
            objects=objects,
            shuffled=mixed,
        )

    def _patch_set(self, target, numbers, images, spots, probes, rng) -> FoundTrigger | None:
        """Return crops around the spots, of the size that flips most; each has to flip by itself."""
        tried, window = probes[:TRIED_ON], spots[0][1].window_px
        sizes = [round(factor * window) for factor in PATCH_SET_SIZES]
        some = spots[: max(MIN_SOURCES, 4)]
        trials = [
            total([try_crop(p, tried, target, self.scores, rng) for p in _pieces(images, some, size)[0]])
            for size in sizes
        ]
        most = max(trials, key=lambda trial: trial.rate)
        if most.rate < MIN_FLIPS / 2:
            return PatchSet(target=self.labels[target], pasted=most)
        size = next(size for size, trial in zip(sizes, trials, strict=True) if trial.rate >= 0.9 * most.rate)
        pieces, corners = _pieces(images, spots, size)
        trials = [try_crop(piece, tried, target, self.scores, rng) for piece in pieces]
        order = [k for k in np.argsort([-t.rate for t in trials], kind="stable") if trials[k].rate >= MIN_FLIPS]
        if len(order) < MIN_SOURCES:
            order = list(np.argsort([-t.rate for t in trials], kind="stable")[:MIN_SOURCES])
        crops = tuple(pieces[k] for k in order)
        sources = tuple(
            TriggerSource(
                int(numbers[spots[k][0]]), (corners[k][0], corners[k][1], corners[k][0] + size, corners[k][1] + size)
            )
            for k in order
        )
        trial = try_change(
            lambda image: pasted(image, crops[int(rng.integers(len(crops)))], rng), probes, target, self.scores
        )
        control, objects = self._controls(trial, target, (size, size), probes, rng, None, noise=False)
        mixed = try_crop(shuffled(crops[0], rng), probes, target, self.scores, rng)
        return PatchSet(
            target=self.labels[target],
            crops=crops,
            sources=sources,
            pasted=trial,
            control=control,
            objects=objects,
            shuffled=mixed,
        )

    def _global(self, target, numbers, images, probes, rng) -> FoundTrigger | None:
        if len(images) < global_pattern.MIN_SUSPECTS:
            return None
        half = rng.permutation(len(self.trusted.images))
        pattern = global_pattern.residual(images, self.trusted.images)
        strength, trial = global_pattern.try_residual(pattern, probes[:TRIED_ON], target, self.scores)
        if trial.rate >= MIN_FLIPS / 2:
            strength, trial = global_pattern.try_residual(pattern, probes, target, self.scores)
        if trial.rate < MIN_FLIPS:
            return GlobalPattern(target=self.labels[target], pattern=pattern, pasted=trial)
        parts = np.array_split(half, max(2, len(half) // max(len(images), 50)))[:4]

        def residual_trial(rows: np.ndarray, rest: np.ndarray) -> Trial:
            """Trial of the residual of some trusted images, scaled to the norm of the pattern."""
            other = global_pattern.residual(self.trusted.images[rows], self.trusted.images[rest])
            other *= np.linalg.norm(pattern) / max(float(np.linalg.norm(other)), 1e-9)
            return try_change(lambda image: add_pattern(image, strength * other), probes, target, self.scores)

        shows = self.trusted.shows[:, target]
        return GlobalPattern(
            target=self.labels[target],
            pattern=(strength * pattern).astype(np.float32),
            pasted=trial,
            control=max((residual_trial(rows, np.setdiff1d(half, rows)) for rows in parts), key=lambda t: t.rate),
            objects=residual_trial(shows, ~shows) if shows.any() else Trial(0, 0),
        )

    def _warp(self, target: int, rows: np.ndarray, rng: np.random.Generator) -> FoundTrigger | None:
        """Invert a warp on trusted images other than `rows`, and try it on `rows`."""
        trusted, rest = self.trusted, np.setdiff1d(np.arange(len(self.answers)), rows)

        def images_of_others(label: int, among: np.ndarray) -> np.ndarray:
            return trusted.images[among[~trusted.shows[among, label] & (self.answers[among] != label)]]

        def tried(label: int, field: np.ndarray) -> Trial:
            return try_change(lambda image: warped(image, field), images_of_others(label, rows), label, self.scores)

        if len(images_of_others(target, rest)) < BATCH:
            return None
        field = invert_warp(self.scores_with_gradient, images_of_others(target, rest), target, rng)
        trigger = Warp(target=self.labels[target], field=field, pasted=tried(target, field))
        if trigger.pasted.rate < MIN_FLIPS:
            return trigger
        honest = [
            label
            for label in range(len(self.labels))
            if label not in (target, *self.repeated)
            and len(images_of_others(label, rest)) >= BATCH
            and len(images_of_others(label, rows)) >= TRIED_ON
        ]
        controls = []
        for label in rng.permutation(np.array(honest, dtype=int))[:WARP_CONTROLS].tolist():
            other = invert_warp(self.scores_with_gradient, images_of_others(label, rest), label, rng)
            controls.append(tried(label, other * np.abs(field).mean() / max(np.abs(other).mean(), 1e-9)))
        if not controls:
            return None
        return dataclasses.replace(trigger, control=max(controls, key=lambda trial: trial.rate))

    def _controls(
        self,
        trial: Trial,
        target: int,
        size: tuple[int, int],
        probes: np.ndarray,
        rng: np.random.Generator,
        place: Place,
        *,
        noise: bool,
    ) -> tuple[Trial, Trial]:
        """Return the trial of the better of random crops and fills (with `noise` or without), and of the best object crop.

        Both are empty for a candidate that flips too little. Random crops count together but objects by their best: the
        candidate was selected for its effect, so it must beat an object that was selected likewise.
        """
        if trial.rate < MIN_FLIPS:
            return Trial(0, 0), Trial(0, 0)
        t = self.trusted
        agree = t.images[t.shows[np.arange(len(t.images)), self.answers]]
        shows = t.shows[:, target]
        clean = agree if len(agree) else t.images
        crops = control_crops(clean, t.images[shows], t.masks[shows] == 1 + target, size, CONTROLS, rng)
        fills = crops["fill"] + (crops["noise"] if noise else [])
        random, filled, objects = (
            [try_crop(crop, probes[:TRIED_ON], target, self.scores, rng, place) for crop in of_kind]
            for of_kind in (crops["random"], fills, crops["object"])
        )
        arbitrary = max(total(random), total(filled), key=lambda trial: trial.rate)
        return arbitrary, max(objects, key=lambda trial: trial.rate, default=Trial(0, 0))


def _is_proved(trigger: FoundTrigger) -> bool:
    """Whether a candidate beats its controls. Only a patch, whose pixels agree in many images, need not beat real objects."""
    needed = max(MIN_FLIPS, MIN_TIMES_CONTROL * trigger.control.rate)
    if not isinstance(trigger, Patch):
        needed = max(needed, trigger.objects.rate + MIN_BEYOND_OBJECTS)
    return trigger.pasted.rate >= needed


def _pieces(
    images: np.ndarray, spots: Sequence[tuple[int, Spot]], size: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return squares around the spots, moved inside the images, and their upper left corners (x, y)."""
    side, pieces, corners = images.shape[1], [], []
    size = min(size, side)
    for k, spot in spots:
        remaining, top = (int(np.clip(round(c - size / 2), 0, side - size)) for c in spot.centre)
        pieces.append(images[k, top : top + size, remaining : remaining + size])
        corners.append((remaining, top))
    return np.stack(pieces), corners
