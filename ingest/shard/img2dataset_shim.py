"""The parts of img2dataset that are used. The only module that imports it.

img2dataset imports torch (through webdataset) and Ray if they are installed, and works without them. A fetching process needs
neither, so they are hidden during the import: 180 MB instead of more than 400, and 4 s less.
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
    """Set OpenCV's own limit on the pixels of an image, whatever its header claims. OpenCV reads it when it is first imported."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max_pixels)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def downloader() -> ModuleType:
    """The module `img2dataset.downloader`."""
    return _import("downloader")


def resizer() -> ModuleType:
    """The module `img2dataset.resizer`."""
    return _import("resizer")


def _import(name: str) -> ModuleType:
    environment_defaults()
    with _hidden("torch", "ray", "faiss", "deepspeed"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports imghdr
        return importlib.import_module(f"img2dataset.{name}")


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Within the block, importing one of these packages fails, unless this process has imported it already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
