"""Which tests may run side by side, a scrubbed environment, and tiny shards."""

import atexit
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import netns
import own_network
import pytest
from kit import REPOSITORY, tiny_shards
from xdist.scheduler import LoadScopeScheduling

from roclip.config import environment_defaults

for watcher in ("STATE_TRACKING", "PREEMPTION_WATCHER"):  # a process each beside every training; `watched.py` has them
    os.environ.setdefault(f"RAY_TRAIN_ENABLE_{watcher}", "0")
environment_defaults()
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves its workers beside the other half of the tests
os.environ.setdefault("RAY_agent_register_timeout_ms", "240000")  # a node's agents may start beside other Rays
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing here has loaded torch yet; threads that spin cost minutes

TRAINING = re.compile(r"tests/cluster/(test_pipeline\.py|(jobs|monitoring|nodes|train)/)")
"""Where Ray trains, which takes minutes and more than a core."""

_exit_status: list[int] = []


class LongestFirst(LoadScopeScheduling):
    """Files stay whole. Those that train on Ray are one scope where there are no cores for two of them: they begin, and the
    rest runs beside them. Without a network of its own for each process, no two files start a Ray at once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        alone = "ray" in _marks(file) and not own_network.is_possible()
        return "ray" if alone or (_trains(file) and (os.cpu_count() or 1) < 4) else file


def _trains(file: str) -> bool:
    return "ray" in _marks(file) and TRAINING.match(file) is not None


@cache
def _marks(file: str) -> set[str]:
    return set(re.findall(r"\bmark\.(\w+)", (REPOSITORY / file).read_text()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst:
    return LongestFirst(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a Ray is slow. What trains on it begins; the other Rays come last, when there are fewer of them."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker("slow")
    items.sort(key=lambda item: _place(item.nodeid.split("::")[0]))


@cache
def _place(file: str) -> int:
    marks = _marks(file)
    return 0 if _trains(file) else 3 if "ray" in marks else 1 if "slow" in marks else 2


@pytest.fixture(scope="session", autouse=True)
def _own_network(worker_id: str) -> Iterator[None]:
    """Each of several processes that run tests has a network and a folder for Ray of its own."""
    if worker_id == "master" or not own_network.is_possible():
        yield
        return
    own_network.enter()
    folder = netns.short_folder(f"rx{os.getpid()}-")  # swept by the next, should this process be killed
    os.environ["RAY_TMPDIR"] = str(folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


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


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces torch's linear layer in the whole process, by one that rounds differently."""
    yield
    if torch := sys.modules.get("torch"):
        torch.nn.functional.linear = torch._C._nn.linear


@pytest.fixture(scope="session")
def undisturbed(worker_id: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Ranks -> the directory of the run of `ends.KILLED_RUN` on so many, which nothing befell. Only to be read."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    def run_of(ranks: int) -> Path:
        import ends  # it loads torch

        return ends.undisturbed(shared, ranks)

    return run_of


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three sealed shards of 64 scenes each, ingest ended."""
    return tiny_shards(tmp_path / "shards")
