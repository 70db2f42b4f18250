"""RoCLIP: pretrain CLIP on web data that somebody may have poisoned (arXiv:2303.06854).

The library: tensors and files, no Ray, no HTTP. Read `training/loop.py` first, then `defence/defence.py` and `defence/pool.py`.
Importing it loads no torch: the names below are looked up when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roclip.defence.pool import CaptionPool
    from roclip.evaluation.evaluate import evaluate
    from roclip.training.loop import train
    from roclip.training.losses import clip_loss

__all__ = ["CaptionPool", "clip_loss", "evaluate", "train"]

_HOMES = {
    "CaptionPool": "roclip.defence.pool",
    "clip_loss": "roclip.training.losses",
    "evaluate": "roclip.evaluation.evaluate",
    "train": "roclip.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'roclip' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
