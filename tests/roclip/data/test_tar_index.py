"""The scanner of tars: against `tarfile` on honest ones, and on its own on the others."""

import hashlib
import io
import tarfile
import tracemalloc

import pytest
from hostile import SETTINGS, header, octal, packed, padded, tars
from hypothesis import given, settings
from hypothesis import strategies as st

from roclip.data import tar_index
from roclip.data.tar_index import Member, TarScan, group

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
END = bytes(1024)


def scan(content: bytes) -> tuple[list[Member], str]:
    """Members and problem; whatever the tar holds, what was said of it holds too."""
    file, asked = io.BytesIO(content), []

    def read(count: int) -> bytes:
        asked.append(count)
        return file.read(count)

    tar = TarScan(read)
    members = list(tar)
    assert (tar.size, tar.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert max(asked) <= 1 << 20
    assert len(asked) == -(-len(content) // (1 << 20)) + (1 if tar.problem != "truncated_tar" else 2)
    ends = [0, *(member.offset + member.size for member in members)]
    assert all(member.size >= 0 and member.offset >= end for member, end in zip(members, ends, strict=False))
    assert ends[-1] <= len(content)
    return members, tar.problem


def theirs(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [Member(info.name, info.offset_data, info.size) for info in tar if info.isfile()]


@pytest.mark.parametrize("format", FORMATS)
def test_members_match_tarfile(format):
    names = ["0.jpg", "0.txt", "a/b/1.jpg", f"{'f' * 90}/{'n' * 80}.txt", "café.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += [f"{'long/' * 60}1.txt", "é" * 200 + ".png"]
    content = packed([(name, bytes(number * 300)) for number, name in enumerate(names)], format)
    assert scan(content) == (theirs(content), "")
    assert [member.name for member in theirs(content)] == names


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_regular_file_is_stepped_over_as_tarfile_does(format):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, kind in enumerate(
            [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
        ):
            info = tarfile.TarInfo(f"{number}.txt")
            info.type, info.linkname = kind, "0.jpg"
            tar.addfile(info)
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    members, problem = scan(buffer.getvalue())
    assert (members, problem) == (theirs(buffer.getvalue()), "")
    assert [member.name for member in members] == [f"{number}.jpg" for number in range(5)]


def test_sizes_in_base_256_and_in_pax_are_read():
    base256 = b"\x80" + (5).to_bytes(11, "big")
    pax = b"9 size=5\n"
    content = header(b"0.txt", base256) + padded(b"hello")
    content += header(b"p", octal(len(pax)), b"x") + padded(pax) + header(b"1.txt", octal(0)) + padded(b"hello")
    content += header(b"2.txt", octal(5), b"7") + padded(b"hello") + END
    assert scan(content) == (theirs(content), "")
    assert [(member.name, member.size) for member in theirs(content)] == [("0.txt", 5), ("1.txt", 5), ("2.txt", 5)]


def test_old_v7_headers_are_read():
    block = bytearray(header(b"0.txt", octal(3), b"\0"))
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    content = bytes(block) + padded(b"abc") + END
    assert scan(content) == ([Member("0.txt", 512, 3)], "")
    assert theirs(content) == [Member("0.txt", 512, 3)]


def test_old_gnu_sparse_files_are_stepped_over_with_their_further_headers():
    more = bytearray(512)
    more[504] = 1
    content = header(b"s", octal(600), b"S", 1) + bytes(more) + bytes(512) + bytes(1024)
    content += header(b"0.txt", octal(2)) + padded(b"ab") + END
    assert scan(content) == ([Member("0.txt", len(content) - 1024 - 512, 2)], "")


@pytest.mark.parametrize("format", FORMATS)
def test_what_comes_before_a_cut_is_found_and_the_cut_is_told(format):
    content = packed([("0.jpg", bytes(700)), (f"{'d' * 60}/{'n' * 60}.txt", b"cat"), ("1.jpg", bytes(3))], format)
    members = theirs(content)
    end = members[-1].offset + 512
    for cut in [*range(0, end, 37), end, end + 100]:
        whole = [member for member in members if member.offset + member.size <= cut]
        assert scan(content[:cut]) == (whole, "truncated_tar"), cut
    assert scan(content[: end + 512]) == (members, "")


LIES = {
    "negative size": header(b"a", b"\xff" * 12),
    "size that is no number": header(b"a", b"-0000000001\0"),
    "wrong checksum": b"b" + header(b"a", octal(0))[1:],
    "long name of a TiB": header(b"a", b"\x80" + (1 << 40).to_bytes(11, "big"), b"L"),
    "pax header over the bound": header(b"a", octal(tar_index.MAX_HEADER_BYTES + 1), b"x"),
    "pax record without a length": header(b"a", octal(4), b"x") + padded(b"a=b\n"),
    "pax record that ends elsewhere": header(b"a", octal(6), b"x") + padded(b"60 a=b"),
    "pax size below zero": header(b"a", octal(11), b"x") + padded(b"11 size=-1\n"),
    "no tar": b"\x1f\x8b" + bytes(510),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_scan_and_keeps_what_came_before(lie):
    before = header(b"0.txt", octal(3)) + padded(b"cat")
    after = header(b"1.txt", octal(3)) + padded(b"dog") + END
    assert scan(before + LIES[lie] + after) == ([Member("0.txt", 512, 3)], "broken_tar")


def test_a_size_beyond_the_file_is_a_cut():
    for size in (octal(4096), b"\x80" + b"\xff" * 11, b"77777777777\0"):
        assert scan(header(b"0.txt", size) + bytes(2048)) == ([], "truncated_tar")


def test_a_name_is_only_data():
    names = [b"../../etc/passwd", b"/abs", b"a\xffb"]
    content = b"".join(header(name, octal(0)) for name in names) + END
    assert [member.name for member in scan(content)[0]] == ["../../etc/passwd", "/abs", "a\\xffb"]


def test_extended_headers_without_end_take_no_memory_and_no_stack():
    pax = header(b"p", octal(1 << 20), b"x") + padded(b"1048576 a=" + b"b" * ((1 << 20) - 11) + b"\n")
    lone = header(b"p", octal(9), b"x") + padded(b"9 a=bcde\n")
    content = pax * 8 + lone * 5000 + header(b"0.txt", octal(1 << 23)) + bytes(1 << 23) + END
    file = io.BytesIO(content)
    tracemalloc.start()
    members = list(TarScan(file.read))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [member.size for member in members] == [1 << 23]
    assert peak < 8 << 20


@settings(max_examples=300, **SETTINGS)
@given(tars())
def test_any_damaged_tar_is_read_to_its_end(content):
    members, _ = scan(content)
    keys = [sample.key for sample in group(members)]
    assert len(keys) <= len(members)


@settings(max_examples=200, **SETTINGS)
@given(
    st.one_of(st.binary(max_size=3000), st.binary(min_size=12, max_size=12).map(lambda size: header(b"a", size) + END))
)
def test_any_bytes_are_read_to_their_end(content):
    scan(content)


def grouped(*names: str):
    samples = group(Member(name, 512, number) for number, name in enumerate(names))
    return [(sample.key, sorted(sample.members)) for sample in samples]


def test_members_are_grouped_as_webdataset_does():
    assert grouped("a/0.JPG", "a/0.txt", "a/b.c/1.seg.png", "no_suffix", ".hidden.txt", "a/b.c/1.txt", "./2.txt") == [
        ("a/0", ["jpg", "txt"]),
        ("a/b.c/1", ["seg.png", "txt"]),
        ("./2", ["txt"]),
    ]
    assert grouped("0.jpg", "0.txt", "0.jpg", "1.jpg", "0.txt") == [
        ("0", ["jpg", "txt"]),
        ("0", ["jpg"]),
        ("1", ["jpg"]),
        ("0", ["txt"]),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_groups_match_webdataset():
    from webdataset.tariterators import group_by_keys

    names = ["0.jpg", "0.txt", "x/1.a.b", "x/1.TXT", "x.y/z/2.jpg", "README", ".z.txt", "3.json"]
    samples = group_by_keys({"fname": name, "data": b"", "__url__": ""} for name in names)
    expected = [(each["__key__"], sorted(key for key in each if not key.startswith("__"))) for each in samples]
    assert grouped(*names) == expected


def test_the_first_image_in_order_is_taken_and_what_is_too_long_is_left():
    sample = next(iter(group(Member(f"0.{suffix}", 512, 9) for suffix in ("webp", "png", "jpeg", "txt"))))
    assert (sample.image.name, sample.caption.name, sample.json) == ("0.jpeg", "0.txt", None)
    long = {"jpg": tar_index.MAX_IMAGE_BYTES, "txt": tar_index.MAX_TEXT_BYTES, "json": tar_index.MAX_TEXT_BYTES}
    for extra in (0, 1):
        (sample,) = group(Member(f"0.{suffix}", 512, size + extra) for suffix, size in long.items())
        assert [member is None for member in (sample.image, sample.caption, sample.json)] == [bool(extra)] * 3


def test_nothing_heavy_is_loaded(tmp_path):
    import subprocess
    import sys

    from kit import environment

    code = "import sys, roclip.data.tar_index; print({'numpy', 'torch', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
