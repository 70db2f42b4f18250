"""Tars that nobody honest wrote, for hypothesis: well-formed headers that lie, then bytes that fell over."""

import io
import os
import tarfile
import tempfile
from pathlib import Path

import hypothesis
from hypothesis import configuration
from hypothesis import strategies as st
from PIL import Image

# It keeps the constants of our code between runs; not in the repository.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"hypothesis-{os.getuid()}")
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
}
BLOCK = 512


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


NAMES = [
    "0.png",
    "0.txt",
    "0.json",
    "1.PNG",
    "1.txt",
    "../../etc/passwd.txt",
    "/abs/2.png",
    "/abs/2.txt",
    ".hidden.png",
    "no_suffix",
    "a\udcff.png",
    "a/b.c/d.seg.png",
    "folder/",
    "x" * 300 + ".txt",
]
CONTENTS = [
    *(picture(kind) for kind in ("png", "jpeg", "webp", "gif")),
    b"",
    b"a red circle",
    b"\xff\xfe",
    b'{"c": ["one", "two"]}',
    b"[" * 700,
]
SIZES = [
    b"00000000000\0",
    b"77777777777\0",
    b"-0000000001\0",
    b"0x000000001\0",
    b"\x80" + bytes(10) + b"\x09",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\xff" + b"\x80" * 11,
    b"\0" * 12,
]
PAX = [
    b"20 path=../../evil\n\n",
    b"18 size=999999999\n",
    b"10 size=-1\n",
    b"12 size=0x9\n",
    b"11 path=\0a\n",
    b"14 path=0.txt\n",
    b"9999999 path=a\n",
    b"0 a=b\n",
    b"5 a=b",
    b"23 GNU.sparse.major=1\n\n",
    b"14 path=\xff.png\n",
    b"22 size=" + b"9" * 13 + b"\n",
]


def header(name: bytes, size: bytes, kind: bytes = b"0", flag: int = 0) -> bytes:
    """A header with a right checksum, whatever else it says."""
    block = bytearray(BLOCK)
    block[: len(name[:100])] = name[:100]
    block[124:136] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[482] = flag
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def packed(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An honest tar, of which the last 1024 bytes are the end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    return buffer.getvalue()[: end + 2 * BLOCK]


@st.composite
def parts(draw: st.DrawFn) -> bytes:
    """A member, honest or not, without an end mark."""
    name, content = draw(st.sampled_from(NAMES)), draw(st.sampled_from(CONTENTS))
    own = name.encode(errors="surrogateescape")
    choice = draw(st.integers(0, 6))
    if choice <= 2:
        format = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        return packed([(name, content)], format)[: -2 * BLOCK]
    if choice == 3:
        kind = draw(st.sampled_from([b"0", b"\0", b"1", b"2", b"3", b"5", b"7", b"S", b"Z", b"L", b"x", b"g", b"K"]))
        return header(own, draw(st.sampled_from(SIZES)), kind, draw(st.integers(0, 1))) + padded(content)
    record = draw(st.sampled_from(PAX))
    extended = header(b"extended", octal(len(record)), draw(st.sampled_from([b"x", b"X", b"g", b"L"]))) + padded(record)
    return extended * draw(st.sampled_from([1, 1, 50])) + header(own, octal(len(content))) + padded(content)


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Some members, then some damage."""
    content = bytearray(b"".join(draw(st.lists(parts(), max_size=8))) + bytes(draw(st.sampled_from([0, BLOCK, 10240]))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "insert", "delete", "cut"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=600))
        elif kind == "delete":
            del content[at : at + draw(st.integers(0, 1024))]
        elif kind == "cut":
            del content[at:]
    return bytes(content)
