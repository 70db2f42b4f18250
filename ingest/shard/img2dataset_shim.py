"""The parts of img2dataset that are used. The only file that imports it.

Its package imports torch (through webdataset) and Ray where it finds them and does without where it does not.
A fetching process needs neither, so they are hidden for the moment of the import: 180 MB instead of more than
400, and 4 s less.
"""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

from roclip.config import environment_defaults


def bound_decoders(max_pixels: int) -> None:
    """Let OpenCV refuse larger images by itself too, whatever their header said. It asks once, when it is first imported."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max_pixels)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def downloader() -> ModuleType:
    """img2dataset's module of that name."""
    return _import("downloader")


def resizer() -> ModuleType:
    """img2dataset's module of that name."""
    return _import("resizer")


def _import(name: str) -> ModuleType:
    environment_defaults()
    with _hidden("torch", "ray", "faiss", "deepspeed"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports imghdr
        return importlib.import_module(f"img2dataset.{name}")


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Inside, importing one of these packages fails, unless this process has it already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None means: do not look for it
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
