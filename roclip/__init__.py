"""RoCLIP: pretrain CLIP on web data that somebody may have poisoned (arXiv:2303.06854).

The library: tensors and files, no Ray, no HTTP. Read `train.py` first, then `pool.py` and `loss.py`.
Importing it loads no torch: the names below are looked up when they are used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roclip.evaluate import evaluate
    from roclip.loss import clip_loss
    from roclip.pool import CaptionPool
    from roclip.train import train

__all__ = ["CaptionPool", "clip_loss", "evaluate", "train"]

_HOMES = {"CaptionPool": "pool", "clip_loss": "loss", "evaluate": "evaluate", "train": "train"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'roclip' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"roclip.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Keeps `roclip.train` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
