import itertools
import os
import subprocess
import sys
import tarfile

import pytest
from kit import REPOSITORY

from ingest.shard.tar_writer import SortedTar, header
from roclip.data.tar_index import TarScan, group

SAMPLES = {
    f"{row:09d}": {"jpg": bytes([row]) * (row * 511), "txt": b"a caption", "json": b"{}" * row} for row in range(5)
}


def _write(folder, keys, name="00000.tar"):
    tar = SortedTar(folder / "00000.spool")
    for key in keys:
        tar.add(key, SAMPLES[key])
    tar.write(folder / name)
    return (folder / name).read_bytes()


def test_tar_has_the_same_bytes_in_whichever_order_samples_came(tmp_path):
    contents = set()
    for order in itertools.permutations(SAMPLES):
        contents.add(_write(tmp_path, order))
        (tmp_path / "00000.tar").unlink()
    assert len(contents) == 1
    assert list(tmp_path.iterdir()) == []


def test_tar_is_the_one_that_tarfile_writes(tmp_path):
    ours = _write(tmp_path, reversed(SAMPLES))
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in SAMPLES.items():
            for suffix, content in members.items():
                (tmp_path / suffix).write_bytes(content)
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                with (tmp_path / suffix).open("rb") as file:
                    archive.addfile(info, file)
    assert ours == (tmp_path / "theirs.tar").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1])
def test_header_is_the_one_that_tarfile_writes(size):
    info = tarfile.TarInfo("0123456789.jpg")
    info.size = size
    assert header("0123456789.jpg", size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_samples_are_found_where_they_lie(tmp_path):
    content = _write(tmp_path, SAMPLES)
    with (tmp_path / "00000.tar").open("rb") as file:
        scan = TarScan(file.read)
        samples = list(group(scan))
    assert scan.problem == ""
    assert [sample.key for sample in samples] == list(SAMPLES)
    for sample in samples:
        assert list(sample.members) == ["jpg", "txt", "json"]
        for suffix, member in sample.members.items():
            assert content[member.offset :][: member.size] == SAMPLES[sample.key][suffix]


def test_empty_tar_is_a_tar(tmp_path):
    assert _write(tmp_path, []) == b"\0" * 10240
    assert tarfile.is_tarfile(tmp_path / "00000.tar")


def test_full_disk_is_an_error(tmp_path):
    script = (
        "import resource, signal, sys; from pathlib import Path; from ingest.shard.tar_writer import SortedTar\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "tar = SortedTar(Path(sys.argv[1]))\n"
        "try: [tar.add(str(row), {'jpg': b'x' * 5000}) for row in range(100)]\n"
        "except OSError as error: print(error.errno)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "27"  # EFBIG
