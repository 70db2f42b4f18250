"""Trainings and ranks in forks of a process that has imported everything: each starts in a second and can be killed for
real.

The file run as a script is that process. A JSON line ["start", target, [arguments], {environment}, file] forks it into
`roclip.training.main`, or into the script that `target` names, which says into the file, and answers its process id;
["wait", id] answers its exit code, negative for a signal. When stdin ends, what still runs is killed.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import fsspec
import psutil

TRAIN = "roclip.training"
F = TypeVar("F", bound="Forks")


class Forks:
    """Starts and ends processes. What they say is in `said`."""

    def __init__(self, said: Path):
        self.said, self.running = said, set[int]()

    def start(self, target: str | Path, *arguments: object, **extra: str) -> int:
        """The process id of a target that runs, with `extra` in its environment."""
        process = _ask("start", str(target), [str(argument) for argument in arguments], extra, str(self.said))
        self.running.add(process)
        return process

    def start_ranks(self, number: int, target: str | Path, *arguments: object) -> list[int]:
        """The process ids of a target's ranks, with what `torchrun` would tell them."""
        from kit import free_port

        world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **world} for rank in range(number)]
        return [self.start(target, *arguments, **rank) for rank in ranks]

    def end(self, process: int) -> int:
        """Wait for it; its exit code, negative for a signal."""
        self.running.discard(process)
        return _ask("wait", process)

    def end_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Their exit codes; when one fails the others, which may wait for it, are killed."""
        codes: dict[int, int] = {}
        while len(codes) < len(ranks):
            time.sleep(0.01)
            for rank in (rank for rank in ranks if rank not in codes and has_ended(rank)):
                codes[rank] = self.end(rank)
            if any(codes.values()):
                codes.update((rank, self.kill(rank)) for rank in ranks if rank not in codes)
        return [codes[rank] for rank in ranks]

    def kill(self, process: int) -> int:
        """SIGKILL, then `end`. One that has ended keeps its id until it is waited for."""
        os.kill(process, signal.SIGKILL)
        return self.end(process)

    def last_words(self) -> str:
        """The end of what was said, if one of those that are not waited for has ended; else nothing."""
        return self.said.read_text()[-3000:] if any(map(has_ended, self.running)) else ""


class Trainings(Forks):
    """Starts and ends trainings of one preset. What they say is in `said.txt` beside it."""

    def __init__(self, config: Path):
        super().__init__(config.parent / "said.txt")
        self.config = config

    def train(self, run: Path, *overrides: str, **extra: str) -> int:
        """The process id of a training in `run`."""
        return self.start(TRAIN, self.config, f"run_dir={run}", *overrides, **extra)

    def train_ranks(self, run: Path, number: int, *overrides: str) -> list[int]:
        """The process ids of a training's ranks."""
        return self.start_ranks(number, TRAIN, self.config, f"run_dir={run}", *overrides)


def trainings_of(config: Path) -> contextlib.AbstractContextManager[Trainings]:
    """Within it trainings can be started; at its end none runs."""
    return _ended(Trainings(config))


def forks_that_say(said: Path) -> contextlib.AbstractContextManager[Forks]:
    """Within it processes can be started; at its end none runs."""
    return _ended(Forks(said))


def run_script(ranks: int, script: Path, folder: Path, *arguments: object) -> None:
    """Run a script with a folder and more arguments on so many ranks of this machine. All must end well."""
    with forks_that_say(folder / "said.txt") as forks:
        codes = forks.end_ranks(forks.start_ranks(ranks, script, folder, *arguments))
    assert codes == [0] * ranks, forks.said.read_text()[-3000:]


def has_ended(process: int) -> bool:
    """Whether one that was started, and not waited for, runs no more."""
    return psutil.Process(process).status() == psutil.STATUS_ZOMBIE


@contextlib.contextmanager
def _ended(forks: F) -> Iterator[F]:
    try:
        yield forks
    finally:
        for process in list(forks.running):
            forks.kill(process)


@functools.cache
def _server() -> subprocess.Popen:
    """Started once for all tests; it ends with this process, when its stdin does."""
    from kit import environment

    return subprocess.Popen(
        [sys.executable, __file__],
        env=environment(OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _ask(*order: object) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(order), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> None:
    from roclip.config import environment_defaults

    environment_defaults()
    import roclip.training.__main__  # noqa: F401  # what the forks shall find imported

    running: set[int] = set()
    for line in sys.stdin:
        order, *given = json.loads(line)
        if order == "start":
            answer = os.fork()
            if answer == 0:
                _become(*given)
            running.add(answer)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(given[0], 0)[1])
            running.discard(given[0])
        print(json.dumps(answer), flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def _become(target: str, arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # which it has read before
    code = 1
    try:
        code = _run(target, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run(target: str, arguments: list[str]) -> int:
    if target == TRAIN:
        return sys.modules[f"{TRAIN}.__main__"].main(arguments)
    sys.argv = [target, *arguments]
    sys.path.insert(0, str(Path(target).parent))
    runpy.run_path(target, run_name="__main__")
    return 0


if __name__ == "__main__":
    _serve()
