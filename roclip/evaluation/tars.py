"""Reads evaluation sets in the WebDataset layout of CLIP_benchmark with plain tarfile: no code in a tar is run.

FOLDER/test/*.tar (or FOLDER/*.tar)       samples: KEY.jpg|png|webp and KEY.cls (class number) or KEY.txt (captions,
                                          one a line)
FOLDER/classnames.txt                     the names of classes 0, 1, …, one a line
FOLDER/zeroshot_classification_templates.txt   one a line, with {c} for the name
"""

import functools
import glob
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand

from roclip.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_MAX_TEXT_BYTES = 1 << 20


@dataclass
class Tars:
    """The samples of a set in the order of its tars."""

    images: list[Callable[[], bytes]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    """Class number of each sample; empty for a retrieval set."""
    captions: list[list[str]] = field(default_factory=list)
    """Captions of each sample; empty for a classification set."""
    classnames: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)


def read_tars(where: str) -> Tars:
    """Read the set in a folder or in the tars that match a pattern (`*`, `{0..9}`). Images are read later, by offset.

    Raises `DataError` naming the tar and the sample that is not as expected.
    """
    tars = _tars(where)
    found = Tars()
    samples = [sample for tar in tars for sample in _samples(tar)]
    for kind in ("cls", "txt"):
        having = [kind in sample for _, sample in samples]
        if any(having) and not all(having):
            raise DataError(f"{samples[having.index(False)][0]}: expected .{kind} as the other samples have, got none.")
    for name, sample in samples:
        found.images.append(sample["image"])
        if "cls" in sample:
            found.classes.append(_class_number(name, sample["cls"]()))
        if "txt" in sample:
            found.captions.append(_captions(name, sample["txt"]()))
    if not samples or not (found.classes or found.captions):
        raise DataError(f"{where}: expected samples with an image and .cls or .txt, got none in {len(tars)} tars.")
    for root in (tars[0].parent, tars[0].parent.parent):
        found.classnames = found.classnames or _lines(root / "classnames.txt")
        found.templates = found.templates or _lines(root / "zeroshot_classification_templates.txt")
    return found


def _tars(where: str) -> list[Path]:
    folder = Path(where)
    if folder.is_dir():
        tars = list(folder.glob("*.tar")) or list(folder.glob("test/*.tar"))
    else:
        tars = [Path(path) for pattern in braceexpand.braceexpand(where) for path in glob.glob(pattern)]
    if not tars:
        raise DataError(f"{where}: expected a folder with *.tar or test/*.tar, or a pattern of tars; found none.")
    return sorted(tars, key=lambda tar: (len(tar.stem), tar.stem))  # CLIP_benchmark numbers without leading zeros


def _samples(tar: Path) -> list[tuple[str, dict[str, Callable[[], bytes]]]]:
    """For each sample that has an image: tar and key, and for each of image, cls and txt a function that reads it."""
    samples: dict[str, dict[str, Callable[[], bytes]]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                kind = "image" if suffix.lower() in _IMAGES else suffix.lower()
                if not member.isfile() or not stem or kind not in ("image", "cls", "txt"):
                    continue
                if kind != "image" and member.size > _MAX_TEXT_BYTES:
                    raise DataError(f"{tar}: {member.name}: expected a short text, got {member.size} bytes.")
                read = functools.partial(_read, tar, member.offset_data, member.size)
                samples.setdefault(f"{folder}/{stem}", {})[kind] = read
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{tar}: expected an uncompressed tar, got {error}.") from error
    return [(f"{tar}: {key.strip('/')}", sample) for key, sample in samples.items() if "image" in sample]


def _read(tar: Path, offset: int, size: int) -> bytes:
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _class_number(name: str, content: bytes) -> int:
    try:
        number = int(content)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{name}.cls: expected a class number from 0, got {content[:20]!r}.")
    return number


def _captions(name: str, content: bytes) -> list[str]:
    captions = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    if not captions:
        raise DataError(f"{name}.txt: expected a caption a line, got none.")
    return captions


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
