"""Evaluation sets: held-out images with captions and labels, class names, templates and attacks.

They come from a run's `origin/` folder or from the user's WebDataset tars (`roclip/evaluation/tars.py`).
"""

import dataclasses
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from roclip.config import Config, EvaluateConfig
from roclip.errors import DataError
from roclip.evaluation.tars import read_tars

_PLACEHOLDER = re.compile(r"\{c?\}")
_log = logging.getLogger(__name__)


class Images(Sequence[np.ndarray]):
    """Encoded images, decoded to (H, W, 3) uint8 on access, so that a rank decodes only its own.

    Args:
        sources: For each image a function that returns its bytes.
        size_px: Side in pixels to which images are resized as ingest does it, or 0 to leave them as they are.
        mode: `border` fits the image into a white square, `center_crop` fills the square, any other squeezes it.
    """

    def __init__(self, sources: Sequence[Callable[[], bytes]], size_px: int = 0, mode: str = "border"):
        self.sources, self.size_px, self.mode = sources, size_px, mode

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> "Images": ...

    def __getitem__(self, index: int | slice) -> "np.ndarray | Images":
        if isinstance(index, slice):
            return Images(self.sources[index], self.size_px, self.mode)
        try:
            with Image.open(io.BytesIO(self.sources[index]())) as image:
                image = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"evaluation image {index}: cannot be decoded ({error}). Leave it out of the set."
            ) from error
        return np.asarray(_fitted(image, self.size_px, self.mode) if self.size_px else image)

    def digests(self) -> list[str]:
        """sha256 of each image's bytes."""
        return [hashlib.sha256(source()).hexdigest() for source in self.sources]


@dataclass(frozen=True)
class AttackSet:
    """Images on which an attack is tried, and the label that it aims at for each."""

    images: Sequence[np.ndarray]
    target_labels: Sequence[str]


@dataclass(frozen=True)
class EvaluationSet:
    """N held-out images with captions, labels and attacks. Raises `DataError` for a label that is not among the classes."""

    images: Sequence[np.ndarray]
    """N of (H, W, 3) uint8, all of one size."""
    digests: Sequence[str]
    """Equal for copies of one image, so that the linear probe never tests on what it was trained on."""
    captions: Sequence[Sequence[str]] = ()
    """Captions of each image; empty for none: no retrieval."""
    labels: Sequence[str] = ()
    """The true class of each image; empty for none: no classification."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For each label the names that its prompts use."""
    templates: Sequence[str] = ("{}",)
    attacks: Mapping[str, AttackSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.labels) - set(self.classes)):
            raise DataError(
                f"evaluation: {len(unknown)} labels of the images are not among the {len(self.classes)} classes: "
                f"{', '.join(unknown[:5])}. Add them to evaluate.class_file, as the data spells them."
            )


def load_evaluation_set(config: Config, origin: Path) -> EvaluationSet:
    """The evaluation set that `config.evaluate` names: its WebDataset, or else the one in a run's `origin` folder.

    Attacks come from the run in both cases; one whose target is not among the classes cannot be measured and is left
    out with a warning. Raises `DataError` naming the file that is missing or not as expected.
    """
    settings = config.evaluate
    if settings.webdataset:
        data = _from_tars(settings, config.ingest.image_size, config.ingest.resize_mode)
    else:
        data = _from_origin(settings, origin)
    for name, attack in _attacks(origin).items():
        if missing := sorted(set(attack.target_labels) - set(data.classes)):
            _log.warning("attack %s is not measured: %s is not among the classes", name, ", ".join(missing))
        else:
            data = dataclasses.replace(data, attacks={**data.attacks, name: attack})
    return data


def read_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """A JSON list of labels, or an object of label -> names: label -> names. Raises `DataError`."""
    content = _json(path)
    if isinstance(content, list) and all(isinstance(item, str) for item in content):
        if len(set(content)) < len(content):
            raise DataError(f'{path}: expected different class names, got one twice. Write {{"label": [names]}}.')
        content = {label: [label] for label in content}
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(names, list) and names for names in content.values())
        or not all(isinstance(name, str) for names in content.values() for name in names)
    ):
        raise DataError(f'{path}: expected a JSON list of class names, or {{"label": ["name", …], …}}.')
    return {label: tuple(names) for label, names in content.items()}


def read_templates(path: Path) -> tuple[str, ...]:
    """A JSON list of templates. Raises `DataError` for one without a placeholder `{}` or `{c}`."""
    content = _json(path)
    if not isinstance(content, list) or not content or not all(isinstance(item, str) for item in content):
        raise DataError(f'{path}: expected a JSON list of templates, such as ["a photo of a {{}}"].')
    return check_templates(content, str(path))


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    for template in templates:
        if not _PLACEHOLDER.search(template):
            raise DataError(f"{where}: expected {{}} or {{c}} where the class name goes, got {template!r}.")
    return tuple(templates)


def fill(template: str, name: str) -> str:
    """The template with the name in place of `{}` or `{c}`; nothing else in it means anything."""
    return _PLACEHOLDER.sub(lambda _: name, template)


def _from_origin(settings: EvaluateConfig, origin: Path) -> EvaluationSet:
    try:
        names = json.loads((origin / "labels.json").read_text())
        table = pq.read_table(origin / "eval.parquet").to_pydict()
    except OSError as error:
        raise DataError(
            f"{origin}: expected labels.json and eval.parquet, got {error}. Set evaluate.images to a parquet with "
            "image, caption and label, or evaluate.webdataset, or run the whole pipeline with `roclip run`."
        ) from error
    images = Images([_constant(image) for image in table["image"]])
    return EvaluationSet(
        images=images,
        digests=images.digests(),
        captions=[[caption] for caption in table["caption"]],
        labels=table["label"],
        classes=_classes(settings, {label: (label,) for label in names["labels"]}),
        templates=_templates(settings, names["templates"]),
    )


def _from_tars(settings: EvaluateConfig, size_px: int, mode: str) -> EvaluationSet:
    found = read_tars(settings.webdataset)
    classes = _classes(settings, _distinct(found.classnames))
    labels: list[str] = []
    if found.classes:
        order = list(classes)
        if not order:
            raise DataError(
                f"{settings.webdataset}: expected classnames.txt beside the tars, got none. Set evaluate.class_file."
            )
        if max(found.classes) >= len(order):
            raise DataError(
                f"{settings.webdataset}: expected class numbers below {len(order)}, the number of class names, "
                f"got {max(found.classes)}. Give a name for each in evaluate.class_file."
            )
        labels = [order[number] for number in found.classes]
    images = Images(found.images, size_px, mode)
    return EvaluationSet(
        images=images,
        digests=images.digests(),
        captions=found.captions,
        labels=labels,
        classes=classes,
        templates=_templates(settings, found.templates or settings.templates),
    )


def _distinct(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """label -> name; a class whose name another one has too is told apart by its number."""
    return {name if names.count(name) == 1 else f"{name} #{i}": (name,) for i, name in enumerate(names)}


def _attacks(origin: Path) -> dict[str, AttackSet]:
    if not (origin / "attack_eval.parquet").exists():
        return {}
    rows = pq.read_table(origin / "attack_eval.parquet").to_pydict()
    attacks = {}
    for name in sorted(set(rows["attack"])):
        chosen = [i for i, attack in enumerate(rows["attack"]) if attack == name]
        images = Images([_constant(rows["image"][i]) for i in chosen])
        attacks[name] = AttackSet(images, [rows["target_label"][i] for i in chosen])
    return attacks


def _classes(settings: EvaluateConfig, own: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return read_classes(Path(settings.class_file)) if settings.class_file else own


def _templates(settings: EvaluateConfig, own: Sequence[str]) -> tuple[str, ...]:
    if settings.template_file:
        return read_templates(Path(settings.template_file))
    return check_templates(own, "templates of the evaluation set")


def _fitted(image: Image.Image, side_px: int, mode: str) -> Image.Image:
    size = (side_px, side_px)
    if image.size == size:
        return image
    if mode == "center_crop":
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    if mode == "border":
        return ImageOps.pad(image, size, Image.Resampling.BILINEAR, color="white")
    return image.resize(size, Image.Resampling.BILINEAR)


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file, got {error}.") from error


def _constant(content: bytes) -> Callable[[], bytes]:
    return lambda: content
