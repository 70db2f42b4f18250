"""The search for triggers: of suspected labels, by what causes them.

    suspects    pictures of which the model repeats what only their captions say, of one label        statistics.py
    place       what must be hidden so that the answer changes?                                       occlusion.py
    form        what do these places have in common?                                                  shape.py
    proof       put on trusted pictures of other labels, it flips them; controls do not               paste.py
    spread      no place? then what suspects have in common all over, with the same proof             global_pattern.py
    inversion   nothing in common? then how the model would have a picture bent                       inversion.py
    again       suspects that have the trigger are set aside, and the rest are searched               presence.py

Letters: N distinct images, C labels, S side in pixels.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from roclip.found_triggers import FoundTrigger, Source, Trial, warped
from roclip.oracle.held_out import Trusted
from roclip.oracle.triggers import global_pattern
from roclip.oracle.triggers.inversion import BATCH, SoftScores, invert_bend
from roclip.oracle.triggers.occlusion import Scores, Spot, find_spots, margins
from roclip.oracle.triggers.paste import Place, add, control_crops, pasted, shuffled, try_change, try_crop
from roclip.oracle.triggers.presence import Evidence, evidence_of
from roclip.oracle.triggers.shape import common_shape

MIN_FLIPS, MIN_TIMES_CONTROL = 0.5, 2.0
"""A trigger flips so many trusted pictures, and so many times as many as the best control."""
MIN_BEYOND_OBJECTS = 0.25
"""By how much more a bag of crops, or a pattern all over, must flip than crops of real objects, or what honest pictures of
the label have in common: the oracle may have missed small objects, and suspects may show the label after all."""
MIN_SOURCES = 3
BAG_SIZES = (1.25, 1.5, 2.0)
"""Sides of crops, in fine windows: a spot is known to a quarter of one."""
OCCLUDED, RESIDUAL = 16, 256
"""Suspects that are looked at piece by piece, of which half only if those promise nothing, and whose mean is taken; at most."""
PROBES, TRIED_ON, CONTROLS, BENT_CONTROLS = 64, 16, 8, 4
MAX_TRIGGERS = 3
"""Of one label."""


@dataclass(frozen=True)
class Search:
    """What a label's search ended with."""

    target: int
    suspects: int
    triggers: tuple[FoundTrigger, ...]
    evidence: tuple[Evidence, ...]
    """Of each trigger; none of a bend, which is the only one of its label."""
    best: Trial
    """The most that anything flipped, found or not."""
    control: Trial


class TriggerSearch:
    """Searches label after label with one model; `scores` and `soft_scores` are all that is asked of it, `answers` (N,) int
    what it says of the trusted pictures."""

    def __init__(
        self,
        scores: Scores,
        soft_scores: SoftScores,
        trusted: Trusted,
        answers: np.ndarray,
        labels: Sequence[str],
        seed: int,
        repeated: Collection[int] = (),
    ):
        """`repeated` are the labels whose lies the model repeats: of them it is asked for a bend where suspects have nothing in
        common, which costs `invert_bend` one to five times, and none of them is a control."""
        self.scores, self.soft_scores, self.trusted, self.answers = scores, soft_scores, trusted, answers
        self.labels, self.seed, self.repeated = tuple(labels), seed, tuple(repeated)

    def label(
        self, target: int, suspects: np.ndarray, read: Callable[[np.ndarray], np.ndarray], *, bags: bool = True
    ) -> Search:
        """Search for what causes a label.

        Args:
            suspects: Numbers of the images that may have it, the likeliest first.
            read: Numbers (n,) to pictures (n, S, S, 3) uint8.
            bags: Whether crops that share no pattern are tried. Of a label that nothing else speaks against they may be its
                objects, and prove nothing.
        """
        rng = np.random.default_rng((self.seed, 71, target))
        others = np.flatnonzero(~self.trusted.shows[:, target] & (self.answers != target))
        rows = rng.permutation(others)[:PROBES]
        left, found, evidence = suspects[:RESIDUAL], [], []
        best, control = Trial(0, 0), Trial(0, 0)
        while len(left) >= MIN_SOURCES and len(rows) >= TRIED_ON and len(found) < MAX_TRIGGERS:
            images = read(left)
            invert = target in self.repeated and not found
            trigger = self._cause(target, left, images, rows, rng, bags=bags, invert=invert)
            if trigger is None:
                break
            if trigger.pasted.rate >= best.rate:
                best, control = trigger.pasted, trigger.control
            if not _proved(trigger):
                break
            found.append(trigger)
            if trigger.kind == "bend":
                break  # nothing in a picture's pixels tells whether it was bent
            sure = (
                np.isin(left, [source.image for source in trigger.sources])
                if trigger.sources
                else np.ones(len(left), bool)
            )
            tells = evidence_of(trigger, images[sure], self.trusted.images)
            has = (tells(images) > 0) | (sure if trigger.sources else False)
            evidence.append(tells)
            if not has.any():
                break
            left = left[~has]
        return Search(target, len(suspects), tuple(found), tuple(evidence), best, control)

    def _cause(self, target, numbers, images, rows, rng, *, bags: bool, invert: bool) -> FoundTrigger | None:
        """The first trigger that is proved, or else what flips most. `rows` are the probes among the trusted pictures."""
        probes = self.trusted.images[rows]
        searches = [
            lambda: self._local(target, numbers, images, probes, rng, bags),
            lambda: self._global(target, numbers, images, probes, rng),
        ]
        if invert:
            searches.append(lambda: self._bend(target, rows, rng))
        tried = []
        for search in searches:
            trigger = search()
            if trigger is not None and _proved(trigger):
                return trigger
            tried += [trigger] if trigger else []
        return max(tried, key=lambda trigger: trigger.pasted.rate, default=None)

    def _local(self, target, numbers, images, probes, rng, bags: bool) -> FoundTrigger | None:
        """The best trigger with a place, proved or not."""
        scores = self.scores(images)
        order = np.argsort(-margins(scores, target), kind="stable")
        order = order[scores[order].argmax(axis=1) == target][:OCCLUDED]
        there = self._spots(target, images, order[: OCCLUDED // 2])
        if self._promising(target, images, there, probes, rng):
            there += self._spots(target, images, order[OCCLUDED // 2 :])
        if len(there) < MIN_SOURCES:
            return None
        pieces, corners = _pieces(images, there, there[0][1].window_px * 2)
        shape = common_shape(pieces, np.array([spot.centre for _, spot in there]) - np.array(corners))
        trigger = self._patch(target, numbers, there, corners, shape, probes, rng) if shape else None
        if not bags or (trigger is not None and _proved(trigger)):
            return trigger
        return self._bag(target, numbers, images, there, probes, rng)

    def _spots(self, target: int, images: np.ndarray, rows: np.ndarray) -> list[tuple[int, Spot]]:
        """Rows whose answer hangs on one place, and the place."""
        spots = find_spots(images[rows], target, self.scores) if len(rows) else []
        return [(int(k), spot) for k, spot in zip(rows, spots, strict=True) if spot is not None]

    def _promising(self, target, images, there, probes, rng) -> bool:
        """Whether the first places are one, or what lies there flips some: then more pictures are looked at piece by piece."""
        if len(there) < MIN_SOURCES:
            return False
        window = there[0][1].window_px
        centres = np.array([spot.centre for _, spot in there])
        if (np.abs(centres - np.median(centres, axis=0)) <= window / 2).all(axis=1).mean() > 0.5:
            return True
        pieces, _ = _pieces(images, there[: MIN_SOURCES + 1], 2 * window)
        return add([try_crop(p, probes[:TRIED_ON], target, self.scores, rng) for p in pieces]).rate >= MIN_FLIPS / 2

    def _patch(self, target, numbers, there, corners, shape, probes, rng) -> FoundTrigger | None:
        sources = tuple(
            Source(int(numbers[k]), (x + box[0], y + box[1], x + box[2], y + box[3]))
            for (k, _), (x, y), box in zip(there, corners, shape.boxes, strict=True)
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
        return FoundTrigger(
            self.labels[target],
            "patch",
            (crop,),
            shape.mask,
            place,
            sources=sources,
            pasted=trial,
            control=control,
            objects=objects,
            shuffled=mixed,
        )

    def _bag(self, target, numbers, images, there, probes, rng) -> FoundTrigger | None:
        """Crops about the spots, of the size that flips most; each has to flip by itself."""
        tried, window = probes[:TRIED_ON], there[0][1].window_px
        sizes = [round(factor * window) for factor in BAG_SIZES]
        some = there[: max(MIN_SOURCES, 4)]
        trials = [
            add([try_crop(p, tried, target, self.scores, rng) for p in _pieces(images, some, size)[0]])
            for size in sizes
        ]
        most = max(trials, key=lambda trial: trial.rate)
        if most.rate < MIN_FLIPS / 2:
            return FoundTrigger(self.labels[target], "bag", pasted=most)
        size = next(size for size, trial in zip(sizes, trials, strict=True) if trial.rate >= 0.9 * most.rate)
        pieces, corners = _pieces(images, there, size)
        trials = [try_crop(piece, tried, target, self.scores, rng) for piece in pieces]
        order = [k for k in np.argsort([-t.rate for t in trials], kind="stable") if trials[k].rate >= MIN_FLIPS]
        if len(order) < MIN_SOURCES:
            order = list(np.argsort([-t.rate for t in trials], kind="stable")[:MIN_SOURCES])
        crops = tuple(pieces[k] for k in order)
        sources = tuple(
            Source(
                int(numbers[there[k][0]]), (corners[k][0], corners[k][1], corners[k][0] + size, corners[k][1] + size)
            )
            for k in order
        )
        trial = try_change(
            lambda image: pasted(image, crops[int(rng.integers(len(crops)))], rng), probes, target, self.scores
        )
        control, objects = self._controls(trial, target, (size, size), probes, rng, None, noise=False)
        mixed = try_crop(shuffled(crops[0], rng), probes, target, self.scores, rng)
        return FoundTrigger(
            self.labels[target],
            "bag",
            crops,
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
            return FoundTrigger(self.labels[target], "global", pattern=pattern, pasted=trial)
        parts = np.array_split(half, max(2, len(half) // max(len(images), 50)))[:4]

        def like(rows: np.ndarray, rest: np.ndarray) -> Trial:
            """What trusted pictures have in common flips, made as strong as the pattern."""
            other = global_pattern.residual(self.trusted.images[rows], self.trusted.images[rest])
            other *= np.linalg.norm(pattern) / max(float(np.linalg.norm(other)), 1e-9)
            return try_change(global_pattern.added(strength * other), probes, target, self.scores)

        shows = self.trusted.shows[:, target]
        return FoundTrigger(
            self.labels[target],
            "global",
            pattern=(strength * pattern).astype(np.float32),
            pasted=trial,
            control=max((like(rows, np.setdiff1d(half, rows)) for rows in parts), key=lambda t: t.rate),
            objects=like(shows, ~shows) if shows.any() else Trial(0, 0),
        )

    def _bend(self, target: int, rows: np.ndarray, rng: np.random.Generator) -> FoundTrigger | None:
        """How the model would have pictures bent; tried on `rows` of the trusted ones, learnt from the others."""
        trusted, rest = self.trusted, np.setdiff1d(np.arange(len(self.answers)), rows)

        def of_others(label: int, among: np.ndarray) -> np.ndarray:
            return trusted.images[among[~trusted.shows[among, label] & (self.answers[among] != label)]]

        def tried(label: int, field: np.ndarray) -> Trial:
            return try_change(lambda image: warped(image, field), of_others(label, rows), label, self.scores)

        if len(of_others(target, rest)) < BATCH:
            return None
        field = invert_bend(self.soft_scores, of_others(target, rest), target, rng)
        trigger = FoundTrigger(self.labels[target], "bend", field=field, pasted=tried(target, field))
        if trigger.pasted.rate < MIN_FLIPS:
            return trigger
        honest = [
            label
            for label in range(len(self.labels))
            if label not in (target, *self.repeated)
            and len(of_others(label, rest)) >= BATCH
            and len(of_others(label, rows)) >= TRIED_ON
        ]
        controls = []
        for label in rng.permutation(np.array(honest, dtype=int))[:BENT_CONTROLS].tolist():
            other = invert_bend(self.soft_scores, of_others(label, rest), label, rng)
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
        """The better of random crops and fills, with or without `noise`, and the best crop of the target's own objects; what
        flips too little by itself is held against none.

        All random crops count, of the objects the best: what is found was chosen for what it does, and must do more than an
        object that was chosen so.
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
        arbitrary = max(add(random), add(filled), key=lambda trial: trial.rate)
        return arbitrary, max(objects, key=lambda trial: trial.rate, default=Trial(0, 0))


def _proved(trigger: FoundTrigger) -> bool:
    """Pixels that agree in many pictures are no objects; crops that do not, or a mean of pictures, might be."""
    needed = max(MIN_FLIPS, MIN_TIMES_CONTROL * trigger.control.rate)
    if trigger.kind != "patch":
        needed = max(needed, trigger.objects.rate + MIN_BEYOND_OBJECTS)
    return trigger.pasted.rate >= needed


def _pieces(
    images: np.ndarray, there: Sequence[tuple[int, Spot]], size: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Squares about the spots, moved inside the pictures, and their upper left corners (x, y)."""
    side, pieces, corners = images.shape[1], [], []
    size = min(size, side)
    for k, spot in there:
        left, top = (int(np.clip(round(c - size / 2), 0, side - size)) for c in spot.centre)
        pieces.append(images[k, top : top + size, left : left + size])
        corners.append((left, top))
    return np.stack(pieces), corners
