"""Writes tensors as a safetensors file and returns its checksum, with as little processor time as possible.

Training runs beside it and needs the processor.

The bytes are hashed while they are written, not read back, and bypass the page cache where the file system allows it:
allocating gigabytes of pages that nobody will read costs more than hashing.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 22
_BLOCK = 4096
"""Writes that bypass the page cache must be multiples of this."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write contiguous CPU tensors to a new file as `safetensors.torch.save_file(tensors, path, metadata)` does.

    The file is synced to disk when this returns. Returns its sha256."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, value in ordered:
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    return _write(path, (start_of_file, *(value.view(-1).view(torch.uint8).numpy() for _, value in ordered)))


def _write(path: Path, contents: Iterable[np.ndarray]) -> str:
    state, size, filled = hashlib.sha256(), 0, 0
    memory = memoryview(mmap.mmap(-1, _PIECE))  # aligned to a page, as O_DIRECT needs it
    piece = np.frombuffer(memory, np.uint8)  # the same memory: numpy releases the GIL while it copies
    descriptor = _open(path)
    try:
        for content in contents:
            size += len(content)
            while len(content):
                taken = min(len(content), _PIECE - filled)
                piece[filled : filled + taken] = content[:taken]
                content, filled = content[taken:], filled + taken
                if filled == _PIECE:
                    state.update(memory)
                    _write_all(descriptor, memory)
                    filled = 0
        state.update(memory[:filled])
        _write_all(descriptor, memory[: -(-filled // _BLOCK) * _BLOCK])
        os.truncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return state.hexdigest()


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError:  # such as a file system in memory
        return os.open(path, flags, 0o644)


def _write_all(descriptor: int, content: memoryview) -> None:
    while len(content):
        content = content[os.write(descriptor, content) :]
