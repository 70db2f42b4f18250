"""Loads tensors from an untrusted file: safetensors, or a pickle that holds nothing but tensors. No code in it is run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from roclip.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a local file, on the CPU.

    Takes them from under `state_dict` or `model` where a trainer wrote more than weights, and strips the `module.` that
    parallel training puts before each name.

    Raises `CheckpointError` for a missing file, another format, or a pickle that holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: expected a file of weights, got none. Copy it there: nothing is downloaded behind your back."
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file makes of the parser
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: refused, expected safetensors or a pickle of tensors alone ({type(error).__name__}: {reason}). "
            "Code in a checkpoint is never run: save its weights as safetensors on a machine that may be lost."
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected named tensors, got {type(state).__name__}. Name a file of weights.")
    return {str(name).removeprefix("module."): value for name, value in state.items()}
