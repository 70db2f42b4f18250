"""Resizes and encodes images with img2dataset's own `Resizer`, whose code runs here with three names of its module replaced:

cv2.imdecode           returns the pixels that `ingest.shard.images` has decoded already
albumentations         reuses the transforms it has made: creating one takes longer than applying it
SuppressStdoutStderr   does nothing: it would redirect this process's file descriptors 1 and 2 for every image
"""

import contextlib
import io
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from ingest.shard import img2dataset_shim
from roclip.config import IngestConfig
from roclip.data.outcomes import FetchError


class Resized(NamedTuple):
    """An image as it is stored."""

    content: bytes
    width: int
    height: int
    original_width: int
    original_height: int


class Resize:
    """Resizes and encodes images as a config says. Not thread-safe."""

    def __init__(self, config: IngestConfig):
        module = img2dataset_shim.resizer()
        options = {
            "image_size": config.image_size,
            "resize_mode": config.resize_mode,
            "resize_only_if_bigger": config.resize_only_if_bigger,
            "encode_quality": config.encode_quality,
            "encode_format": config.encode_format,
        }
        self._resizers = {keep: module.Resizer(**options, skip_reencode=keep) for keep in (False, True)}
        self._pixels: np.ndarray | None = None
        names = {
            **vars(module),
            "cv2": types.SimpleNamespace(**{**vars(cv2), "imdecode": lambda *_: self._pixels}),
            "A": _Memoized(module.A),
            "SuppressStdoutStderr": contextlib.nullcontext,
        }
        original = module.Resizer.__call__
        self._call = types.FunctionType(original.__code__, names, argdefs=original.__defaults__)

    def __call__(self, content: bytes, pixels: np.ndarray, *, keep: bool) -> Resized:
        """Resize `pixels`, which `ingest.shard.images.decode` returned for `content`, and encode them.

        With `keep`, `content` itself is returned if its size is right already. Raises `FetchError`: undecodable.
        """
        self._pixels = pixels
        try:
            *resized, error = self._call(self._resizers[keep], io.BytesIO(content))
        finally:
            self._pixels = None
        if error is not None:
            raise FetchError("undecodable", f"it cannot be resized or encoded ({error})")
        return Resized(*resized)


class _Memoized:
    """A module whose constructors are called once per set of options."""

    def __init__(self, module: Any):
        self._module = module
        self._made: dict[tuple[str, str], Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def make(**options: Any) -> Any:
            key = name, repr(options)
            if key not in self._made:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # img2dataset uses option names that albumentations has deprecated
                    self._made[key] = getattr(self._module, name)(**options)
            return self._made[key]

        return make
