"""Which tests may run side by side, a scrubbed environment, and tiny shards."""

import atexit
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kit import tiny_shards
from xdist.scheduler import LoadScopeScheduling

from roclip.config import environment_defaults

environment_defaults()
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves its workers beside the other half of the tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing here has loaded torch yet; threads that spin cost minutes

_exit_status: list[int] = []


class OneRayAtATime(LoadScopeScheduling):
    """Files stay whole, and those that start a Ray are one: two Rays on one machine would find each other's. So are those
    that bring up a cluster of hosts, whose Ray no other finds. They are among the first, as they take longest."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(nodeid.split("::")[0])


@cache
def _scope(file: str) -> str:
    text = (Path(__file__).parents[1] / file).read_text()
    return next((kind for kind in ("nodes", "ray") if f"mark.{kind}" in text), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRayAtATime:
    return OneRayAtATime(config, log)


def pytest_sessionfinish(exitstatus: int) -> None:
    _exit_status.append(int(exitstatus))


@atexit.register  # first in, so last out: after Ray's and torch's own
def _leave() -> None:
    """End without tearing down Ray, torch, FAISS and Arrow in one process: that crashed once, after the last test."""
    if _exit_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status[-1])


@pytest.fixture(autouse=True)
def _no_inherited_world(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three sealed shards of 64 scenes each, ingest ended."""
    return tiny_shards(tmp_path / "shards")
