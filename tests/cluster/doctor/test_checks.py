"""The doctor on this machine: real compiler, real FAISS, real folder, real port."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit import REPOSITORY, TINY_MODEL
from name_server import NameServer

from cluster.doctor.checks import Check, doctor, exit_code, usable_cores, usable_memory_bytes
from cluster.plan import make_plan
from roclip.config import load_config


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.json").write_text(TINY_MODEL)
    path = tmp_path / "test.yaml"
    path.write_text(
        f"name: test\nruns: {tmp_path / 'runs'}\ndata: {{scenes: 1000}}\nmodel: {{name: tiny}}\n"
        "pool: {size: 64}\ntrain: {global_batch_size: 64}\n"
    )
    return path


def checks(preset: Path, *overrides: str) -> dict[str, Check]:
    """The checks by name."""
    return {check.name: check for check in doctor(load_config(preset, overrides))}


def test_machine_is_fit_when_the_config_is_small(preset: Path):
    found = checks(preset)
    failed = {name: check.got for name, check in found.items() if check.status == "fail"}
    assert failed == {}
    names = {"python", "packages", "compiler", "ninja", "faiss", "ports", "cores", "gpus"}
    assert names | {"run store", "memory", "shared memory", "disk", "data"} == set(found)
    assert exit_code(list(found.values())) == 0
    assert sorted(path.name for path in preset.parent.iterdir()) == ["models", "test.yaml"]


@pytest.mark.parametrize(
    ("overrides", "name", "advice"),
    [
        (["cluster.workers=4096", "train.global_batch_size=4096"], "cores", "cluster.workers="),
        (["cluster.gpus_per_worker=64"], "gpus", "cluster.gpus_per_worker=0"),
        (["runs=/proc/roclip"], "run store", "Set `runs`"),
        (["train.global_batch_size=2048"], "data", "train.global_batch_size"),
        (["data.scenes=2_000_000_000_000"], "disk", "Free some space"),
        (["pool.size=1_000_000_000_000"], "memory", "pool.size"),
        (["model.name=none"], "model", "Correct model.name"),
        (["data.scenes=0", "data.urls=/nowhere"], "data", "Correct the path"),
    ],
)
def test_check_fails_with_advice_when_the_config_asks_too_much(
    preset: Path, overrides: list[str], name: str, advice: str
):
    check = checks(preset, *overrides)[name]
    assert check.status == "fail"
    assert check.got
    assert check.need
    assert advice in check.what_to_do
    assert exit_code([check]) == 7


def test_stores_that_will_be_written_to_are_tried(preset: Path):
    found = checks(preset, "data.shards=memory://shards", "train.checkpoint_store=nowhere://bucket")
    assert found["data.shards"].status == "ok"
    assert found["train.checkpoint_store"].status == "fail"
    assert "nowhere" in found["train.checkpoint_store"].got


def test_shards_on_a_store_need_no_disk(preset: Path):
    here, there = (make_plan(load_config(preset, more)) for more in ([], ["data.shards=memory://shards"]))
    assert here.shard_bytes == there.shard_bytes
    assert here.disk_bytes - there.disk_bytes == here.shard_bytes


def test_compiler_fails_when_it_cannot_compile(preset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "false")
    assert checks(preset)["compiler"].status == "fail"


def test_cluster_decides_when_it_is_not_this_machine(preset: Path):
    found = checks(preset, "cluster.address=auto", "cluster.workers=64", "cluster.gpus_per_worker=8")
    assert found["cores"].status == "ok"
    assert found["gpus"].status == "ok"


def test_warnings_do_not_fail_when_counted():
    warning = Check("cores", "warn", "1", "2", "It will be slow.")
    assert exit_code([warning]) == 0
    assert exit_code([warning, Check("faiss", "fail", "no module", "a correct search", "Install it.")]) == 7


def test_limits_are_no_more_than_the_machine_has_when_read():
    assert 0 < usable_cores() <= (os.cpu_count() or 1)
    assert 0 < usable_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_command_ends_with_7_and_says_what_to_do_when_a_check_fails(preset: Path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cluster.cli",
            "doctor",
            str(preset),
            "cluster.workers=4096",
            "train.global_batch_size=4096",
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=preset.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert "cores: Set cluster.workers=" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def listed(preset: Path, tmp_path: Path) -> Path:
    """The preset on a list of 30 hosts."""
    hosts = "".join(f"http://host{row}.example/{row}.jpg\n" for row in range(30))
    (tmp_path / "urls.txt").write_text(hosts)
    preset.write_text(preset.read_text().replace("scenes: 1000", f"urls: {tmp_path / 'urls.txt'}"))
    return preset


def test_resolver_is_measured_on_the_hosts_of_the_list(listed: Path):
    with NameServer({f"host{row}.example": [["127.0.0.1"]] for row in range(30)}) as server:
        check = checks(listed, f"ingest.policy.nameservers=[{server.address}]")["names"]
        assert sum(server.asked.values()) == 30
    assert check.got.endswith("names/s, 0% not found")


def test_advice_is_to_run_a_resolver_when_names_are_not_found(listed: Path):
    with NameServer({}) as server:
        check = checks(listed, f"ingest.policy.nameservers=[{server.address}]")["names"]
    assert (check.status, check.got.partition(", ")[2]) == ("warn", "100% not found")
    assert "ingest.policy.nameservers=[127.0.0.1]" in check.what_to_do
