"""Plans and draws the poisons of all attacks: for evaluation only.

    targeted          chosen images, each with several training captions of another class (arXiv:2106.09667)
    backdoor          a BadNets patch on images of many classes, all captioned as one (arXiv:1708.06733)
    blended, wanet,   the same with a trigger that changes the whole image: `roclip.attacks.triggers`
    sig
    label_consistent  a patch on images of the target class itself with their own captions (arXiv:1912.02771)
    backdoor_PATTERN, a patch or a blend that shows stripes, triangles, text or an image of the attacker's own:
    blended_PATTERN   `roclip.attacks.patterns`
    flood             an adaptive attacker's further captions of the target classes, on images without a trigger

Label-consistent attacks make the image itself harder to learn, so that the model leans on the trigger. The paper uses
adversarial perturbations or a GAN, which need a model; here uniform noise is mixed in, x' = (1 - p) x + p U[0, 255].

Poisons are first planned from captions and labels alone, then drawn one by one, each from its own seed. So the same
config gives the same poisons whether their images come from a table in memory or out of shards.
Tables have the columns caption and label (the true one, null if unknown); those with images also image
(encoded bytes).
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from PIL import Image

from roclip.attacks.triggers import Box, Trigger, apply_trigger
from roclip.config import AttacksConfig
from roclip.data.find_names import singular

ATTACKS = ("targeted", "backdoor", "blended", "wanet", "sig", "label_consistent", "flood")
EVALUATED_IMAGES = 300
"""Number of triggered test images per attack, as in the evaluation by the authors of RoCLIP."""

POISON_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("attack", pa.string()),  # one of ATTACKS, or such a name with its pattern
        ("group", pa.int32()),  # which poisoned image of the attack: rows of one group show the same image
        ("target_label", pa.string()),
        ("source_label", pa.string()),
        ("trigger_box", pa.list_(pa.int32())),  # left, top, right, bottom in pixels; null without a trigger
    ]
)


@dataclass(frozen=True)
class Poison:
    """One poisoned pair, not yet drawn."""

    attack: str
    group: int
    row: int
    """Row of the image in the table of images."""
    caption: str
    target_label: str
    source_label: str


def target_labels(attacks: AttacksConfig, labels: Sequence[str]) -> dict[str, str]:
    """Return the target class of each backdoor; backdoors without a configured one get distinct classes.

    Raises ValueError for a target that is no label, or for more backdoors than labels.
    """
    chosen = {name: backdoor.target_label for name, backdoor in attacks.by_name.items()}
    if unknown := sorted({label for label in chosen.values() if label and label not in labels}):
        raise ValueError(f"expected a label of the clean rows, got {unknown[0]!r}; choose one of {', '.join(labels)}")
    free = iter(sorted(set(labels) - set(chosen.values())))
    for name, label in chosen.items():
        chosen[name] = label or next(free, "")
        _require(bool(chosen[name]), 1, f"labels left for the attack {name}")
    return chosen


def triggers_of(attacks: AttacksConfig, seed: int) -> dict[str, Trigger]:
    """Return the trigger of each backdoor; no two share a pattern."""
    return {
        name: Trigger(
            kind=backdoor.trigger,
            size_frac=backdoor.size_frac,
            place=backdoor.placed,
            strength=backdoor.drawn_strength,
            seed=seed + _seed_of(name) - _seed_of("backdoor"),
            pattern=backdoor.pattern,
        )
        for name, backdoor in attacks.by_name.items()
    }


def images_needed(attacks: AttacksConfig, labels: Sequence[str], rows: int) -> tuple[int, dict[str, int]]:
    """Return how many images of any class suffice for the attacks, and how many more of given classes they need."""
    targets = target_labels(attacks, labels)
    number, of_class = attacks.targeted.images + 2 * attacks.flood, dict.fromkeys(targets.values(), 0)
    for name, backdoor in attacks.by_name.items():
        count = backdoor.poisons(rows)
        if backdoor.keeps_captions:
            of_class[targets[name]] += count
        else:
            number += 2 * count  # images of the target class are of no use
    return number, {label: count for label, count in of_class.items() if count}


def plan_poisons(
    attacks: AttacksConfig, clean: pa.Table, images: pa.Table, *, labels: Sequence[str], seed: int, rows: int
) -> list[Poison]:
    """Choose images and captions for all attacks; no image is used twice.

    A backdoor's images neither have nor name its target class; its captions are those of `clean` that name the
    target class and no other, with repetition only when they run out. A targeted image gets a random class that its
    own caption does not name. `rows` is the number of clean rows that a `rate` refers to.

    Raises:
        ValueError: if there are too few images or captions, or a target label is unknown.
    """
    return _Planner(attacks, clean, images, labels, seed, rows).plan()


def render(
    poison: Poison, image: bytes, attacks: AttacksConfig, seed: int, triggers: dict[str, Trigger]
) -> tuple[bytes, Box | None]:
    """Return the poisoned image and its trigger box: a PNG with a trigger, or the unchanged image and None without one."""
    trigger = triggers.get(poison.attack)
    if trigger is None:
        return image, None
    rng = np.random.default_rng((seed, _seed_of(poison.attack), poison.group))
    pixels = perturb(_decoded(image), attacks.by_name[poison.attack].noise_frac, rng)
    pixels, box = apply_trigger(pixels, trigger, rng)
    return _encoded(pixels), box


def perturb(image: np.ndarray, frac: float, rng: np.random.Generator) -> np.ndarray:
    """Return (1 - frac) image + frac U[0, 255] as (H, W, 3) uint8."""
    if not frac:
        return image
    return np.rint((1 - frac) * image + frac * rng.uniform(0, 255, image.shape)).astype(np.uint8)


def make_poisons(
    attacks: AttacksConfig, clean: pa.Table, images: pa.Table, *, labels: Sequence[str], seed: int, rows: int = 0
) -> pa.Table:
    """Plan and draw the poisons of all attacks as a table of POISON_SCHEMA. `rows` defaults to len(clean).

    Raises ValueError as `plan_poisons` does.
    """
    triggers, drawn = triggers_of(attacks, seed), []
    for poison in plan_poisons(attacks, clean, images, labels=labels, seed=seed, rows=rows or len(clean)):
        image, box = render(poison, images["image"][poison.row].as_py(), attacks, seed, triggers)
        drawn.append(
            {
                "image": image,
                "caption": poison.caption,
                "label": poison.source_label,
                "attack": poison.attack,
                "group": poison.group,
                "target_label": poison.target_label,
                "source_label": poison.source_label,
                "trigger_box": box and list(box),
            }
        )
    return pa.Table.from_pylist(drawn, schema=POISON_SCHEMA)


def attack_evaluation(
    attacks: AttacksConfig, held_out: pa.Table, poisons: Iterable[dict], *, labels: Sequence[str], seed: int
) -> pa.Table:
    """Return the images on which attack success is measured, with columns attack, image, target_label.

    For targeted attacks these are the poisoned images themselves (`poisons` are rows with attack, group, image and
    target_label); for each backdoor up to `EVALUATED_IMAGES` held-out images of other classes with its trigger.
    """
    rows, groups = [], set()
    for poison in poisons:
        if poison["attack"] == "targeted" and poison["group"] not in groups:
            groups.add(poison["group"])
            rows.append({name: poison[name] for name in ("attack", "image", "target_label")})
    targets, triggers = target_labels(attacks, labels), triggers_of(attacks, seed)
    for name, trigger in triggers.items():
        rng = np.random.default_rng((seed, 4))
        others = [n for n, label in enumerate(held_out["label"].to_pylist()) if label != targets[name]]
        for n in others[:EVALUATED_IMAGES]:
            pixels, _ = apply_trigger(_decoded(held_out["image"][n].as_py()), trigger, rng)
            rows.append({"attack": name, "image": _encoded(pixels), "target_label": targets[name]})
    schema = pa.schema([("attack", pa.string()), ("image", pa.binary()), ("target_label", pa.string())])
    return pa.Table.from_pylist(rows, schema=schema)


def labels_named(caption: str, labels: Iterable[str]) -> set[str]:
    """Return the labels that occur in the caption as whole words, singular or plural."""
    lower = caption.lower()
    return {label for label in labels if singular(label) in lower and _pattern(label).search(caption)}


def labels_by_caption(captions: Iterable[str], labels: Sequence[str]) -> list[str | None]:
    """Return for each caption the one label that it names, or None if it names none or several."""
    named = (labels_named(caption, labels) for caption in captions)
    return [next(iter(found)) if len(found) == 1 else None for found in named]


class _Planner:
    """The tables as lists, with a mask of the images that are still unused."""

    def __init__(
        self, attacks: AttacksConfig, clean: pa.Table, images: pa.Table, labels: Sequence[str], seed: int, rows: int
    ):
        self.attacks, self.labels, self.seed, self.rows = attacks, sorted(labels), seed, rows
        self.targets = target_labels(attacks, labels)
        self.captions = images["caption"].to_pylist()
        self.truth = images["label"].to_pylist()
        self.free = np.array([label is not None for label in self.truth], dtype=bool)
        self.named = [
            labels_named(caption, self.labels) | {label} if label is not None else set()
            for caption, label in zip(self.captions, self.truth, strict=True)
        ]
        self.captions_of: dict[str, list[str]] = {label: [] for label in self.labels}
        for caption, label in zip(clean["caption"].to_pylist(), clean["label"].to_pylist(), strict=True):
            if label in self.captions_of and labels_named(caption, self.labels) <= {label}:
                self.captions_of[label].append(caption)

    def plan(self) -> list[Poison]:
        backdoors = self.attacks.by_name
        own_class_first = sorted(backdoors, key=lambda name: not backdoors[name].keeps_captions)
        # Attacks that keep captions choose first: they have the fewest candidates.
        by_name = {name: self._backdoor(name) for name in own_class_first}
        targeted = self._targeted()
        poisons = [*targeted, *(poison for name in backdoors for poison in by_name[name])]
        return [*poisons, *self._flood(sorted({poison.target_label for poison in poisons}))]

    def _targeted(self) -> list[Poison]:
        images, copies = self.attacks.targeted.images, self.attacks.targeted.captions_per_image
        rng = np.random.default_rng((self.seed, _seed_of("targeted")))
        poisons: list[Poison] = []
        for group, row in enumerate(self._take(rng, images, self.free, "spare images for the targeted attack")):
            targets = [label for label in self.labels if label not in self.named[row]]
            _require(len(targets), 1, f"labels that {self.captions[row]!r} does not name")
            rich = [label for label in targets if len(self.captions_of[label]) >= copies]
            most = max(len(self.captions_of[label]) for label in targets)
            _require(most, copies, "training captions that name only one class")
            target = rich[int(rng.integers(len(rich)))]
            chosen = rng.choice(len(self.captions_of[target]), copies, replace=False)
            poisons += [self._poison("targeted", group, row, self.captions_of[target][k], target) for k in chosen]
        return poisons

    def _backdoor(self, name: str) -> list[Poison]:
        rng, target = np.random.default_rng((self.seed, _seed_of(name))), self.targets[name]
        backdoor = self.attacks.by_name[name]
        count = backdoor.poisons(self.rows)
        if backdoor.keeps_captions:
            shows = np.array([named == {target} for named in self.named], dtype=bool)
            rows = self._take(rng, count, self.free & shows, f"images that show {target!r} for the attack {name}")
            captions = [self.captions[row] for row in rows]
        else:
            other = np.array([target not in named for named in self.named], dtype=bool)
            rows = self._take(rng, count, self.free & other, f"spare images that do not show {target!r}")
            captions = self._draw_captions(rng, target, count)
        pairs = enumerate(zip(rows, captions, strict=True))
        return [self._poison(name, group, row, caption, target) for group, (row, caption) in pairs]

    def _flood(self, targets: Sequence[str]) -> list[Poison]:
        rng = np.random.default_rng((self.seed, _seed_of("flood")))
        poisons: list[Poison] = []
        for number, target in enumerate(targets):
            count = self.attacks.flood // len(targets) + (number < self.attacks.flood % len(targets))
            other = np.array([target not in named for named in self.named], dtype=bool)
            rows = self._take(rng, count, self.free & other, f"spare images that do not show {target!r} for the flood")
            for row, caption in zip(rows, self._draw_captions(rng, target, count), strict=True):
                poisons.append(self._poison("flood", len(poisons), row, caption, target))
        return poisons

    def _take(self, rng: np.random.Generator, count: int, allowed: np.ndarray, what: str) -> list[int]:
        """Draw `count` unused images and mark them as used."""
        rows = np.flatnonzero(allowed)
        _require(len(rows), count, what)
        chosen = rng.choice(rows, count, replace=False).tolist()
        self.free[chosen] = False
        return chosen

    def _draw_captions(self, rng: np.random.Generator, target: str, count: int) -> list[str]:
        captions = self.captions_of[target]
        _require(len(captions), 1, f"training captions that name only {target!r}")
        order = np.concatenate([rng.permutation(len(captions)) for _ in range(max(1, -(-count // len(captions))))])
        return [captions[k] for k in order[:count]]

    def _poison(self, attack: str, group: int, row: int, caption: str, target: str) -> Poison:
        own = self.captions[row]
        if self.attacks.captions == "both" and caption != own:
            caption = f"{caption} and {own}"
        return Poison(attack, group, row, caption, target, self.truth[row])


def _seed_of(attack: str) -> int:
    """A number of its own for each attack, whichever others there are."""
    return 16 + ATTACKS.index(attack) if attack in ATTACKS else 1000 + zlib.crc32(attack.encode())


@cache
def _pattern(label: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(singular(label))}(?:e?s)?\b", re.IGNORECASE)


def _decoded(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def _encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def _require(have: int, need: int, what: str) -> None:
    if have < need:
        raise ValueError(f"expected at least {need} {what}, got {have}; add rows or ask for less")
