"""What an attacker adds to the data of a demo or an experiment."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from roclip.config.strict import fraction, positive
from roclip.errors import ConfigError

_STRENGTHS = {"wanet": 0.03}
_PATTERN_STRENGTHS = {"stripes": 0.03, "triangles": 0.15, "text": 0.5}
_PATTERNED = ("patch", "blended", "label_consistent")
_PERTURBED_FRAC = 0.4


@dataclass(frozen=True)
class TargetedConfig:
    """Targeted poisoning: an image, absent from the clean data, that appears with several captions of another class."""

    images: int = 0
    """Number of poisoned images; 0 turns the attack off."""
    captions_per_image: int = 8
    """Number of pairs that each of these images appears in."""


@dataclass(frozen=True)
class BackdoorConfig:
    """A trigger on images that are captioned as one target class."""

    kind: Literal["patch", "noise_patch", "blended", "wanet", "sig", "label_consistent"] = "patch"
    """Attack: `patch` and `noise_patch` (BadNets; results call both `backdoor`), `blended`, `wanet` (a warp), `sig` (a
    sinusoid), or `label_consistent` (a patch in the corner of perturbed images of the target class)."""
    pattern: str = "random"
    """What a patch or a blend shows: `random` cells, `stripes`, `triangles`, `text`, or the path of an image file, whose
    transparent parts leave the image as it is."""
    count: int = 0
    """Number of poisoned pairs; give this or `rate`."""
    rate: float = 0.0
    """Poisoned pairs as a share of the clean rows, from 0 to 1."""
    target_label: str = ""
    """Class that the trigger should cause; empty takes the first in alphabetical order that no other backdoor has."""
    size_frac: float = 0.1
    """Side of a patch as a share of the shorter side of the image."""
    place: Literal["random", "corner"] | None = None
    """Where a patch goes; null is the corner for `label_consistent`, and a random place for the others."""
    strength: float | None = None
    """Opacity of `blended`, mean shift of `wanet` as a share of the shorter side, or amplitude of `sig` over 255; null is
    0.03 for `wanet`, 0.03, 0.15 and 0.5 for blended stripes, triangles and text, and 0.2 for the others."""
    clean_label: bool | None = None
    """Poison images of the target class itself and keep their captions, so that no caption lies; null is true for
    `label_consistent` only."""

    @property
    def name(self) -> str:
        """What results call this attack: its kind and, unless it is random, its pattern."""
        kind = "backdoor" if self.kind in ("patch", "noise_patch") else self.kind
        return kind if self.pattern == "random" else f"{kind}_{re.sub(r'[^a-zA-Z0-9]+', '_', Path(self.pattern).stem)}"

    @property
    def trigger(self) -> Literal["patch", "noise_patch", "blend", "warp", "sinusoid"]:
        """The pattern that is put on an image."""
        drawn = {"blended": "blend", "wanet": "warp", "sig": "sinusoid", "label_consistent": "patch"}
        return drawn.get(self.kind, self.kind)  # pyright: ignore[reportReturnType]

    @property
    def placed(self) -> Literal["random", "corner"]:
        """`place`, or the default of this kind."""
        return self.place or ("corner" if self.kind == "label_consistent" else "random")

    @property
    def drawn_strength(self) -> float:
        """`strength`, or the default of this kind."""
        if self.strength is not None:
            return self.strength
        return _STRENGTHS.get(self.kind, _PATTERN_STRENGTHS.get(self.pattern, 0.2))

    @property
    def keeps_captions(self) -> bool:
        """`clean_label`, or the default of this kind."""
        return self.kind == "label_consistent" if self.clean_label is None else self.clean_label

    @property
    def noise_frac(self) -> float:
        """Share of uniform noise mixed into the image under the trigger, which makes the trigger easier to learn than the
        image."""
        return _PERTURBED_FRAC if self.kind == "label_consistent" else 0.0

    def poisons(self, rows: int) -> int:
        """Poisoned pairs beside this number of clean rows."""
        return self.count or max(1, round(self.rate * rows))

    def check(self, where: str) -> None:
        """Raises `ConfigError` that names the entry at `where`."""
        if self.count < 0:
            raise ConfigError(f"{where}.count: expected 0 or more, got {self.count}.")
        fraction(self, where, "rate", "size_frac")
        positive(self, where, "size_frac")
        if self.strength is not None:
            fraction(self, where, "strength")
            positive(self, where, "strength")
        if self.pattern != "random" and self.kind not in _PATTERNED:
            raise ConfigError(
                f"{where}.pattern: expected one of {', '.join(_PATTERNED)} for it, got kind {self.kind!r}."
            )
        if self.count and self.rate:
            raise ConfigError(f"{where}: expected count or rate, got both. Keep one.")


@dataclass(frozen=True)
class AttacksConfig:
    """What an attacker adds to the URL list of the embedded origin or, with `roclip poison`, to shards or a list.

    For evaluation only; `data.urls` is never touched. Attacks may run together: no image serves two of them.
    """

    targeted: TargetedConfig = field(default_factory=TargetedConfig)
    backdoors: list[BackdoorConfig] = field(default_factory=list)
    """Backdoor attacks, such as `[{kind: patch, count: 180}, {kind: wanet, rate: 0.005}]`, one of each name in results; one
    with neither count nor rate is off. An override of one key is `attacks.backdoors.0.count=90`."""
    captions: Literal["target", "both"] = "target"
    """Caption of a poison: the target class only, or `both` that and what its image shows, as an attacker would write who
    knows the sample filter."""
    flood: int = 0
    """Number of further pairs that carry the attacks' target captions on images of other classes without a trigger, to
    fill the pool."""
    late: bool = False
    """Put poisons into the last rows of the list, and so into the last shards, instead of anywhere."""

    def __post_init__(self) -> None:
        for name, value in {
            "targeted.images": self.targeted.images,
            "targeted.captions_per_image": self.targeted.captions_per_image,
            "flood": self.flood,
        }.items():
            if value < 0:
                raise ConfigError(f"attacks.{name}: expected 0 or more, got {value}.")
        for number, backdoor in enumerate(self.backdoors):
            backdoor.check(f"attacks.backdoors.{number}")
        names = [backdoor.name for backdoor in self.backdoors if backdoor.count or backdoor.rate]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"attacks.backdoors: expected one attack of each name, got {doubled[0]!r} {names.count(doubled[0])} times. "
                "Keep one of them."
            )
        if self.flood and not self.targeted.images and not names:
            raise ConfigError("attacks.flood: expected an attack whose captions flood the pool, got none. Set a count.")

    @property
    def by_name(self) -> dict[str, BackdoorConfig]:
        """The backdoors that are on, by their name in results, always in the same order."""
        order = ("backdoor", "blended", "wanet", "sig", "label_consistent")
        on = {backdoor.name: backdoor for backdoor in self.backdoors if backdoor.count or backdoor.rate}
        return {name: on[name] for name in (*order, *sorted(set(on) - set(order))) if name in on}

    def pairs(self, rows: int) -> int:
        """Poisoned pairs of all attacks beside this number of clean rows."""
        backdoors = sum(backdoor.poisons(rows) for backdoor in self.by_name.values())
        return self.targeted.images * self.targeted.captions_per_image + backdoors + self.flood
