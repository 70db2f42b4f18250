"""Trainings in forks of a process that has imported everything: each starts in a second and can be killed for real.

The file run as a script is that process. A JSON line ["train", [arguments], {environment}, file] forks
`roclip.train.main`, which says into the file, and answers its process id; ["wait", id] answers its exit code, negative for
a signal. When stdin ends, what still runs
is killed.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


class Trainings:
    """Starts and ends trainings of one preset. What they say is in `said.txt` beside it."""

    def __init__(self, config: Path):
        self.config, self.running = config, set[int]()

    def start(self, run: Path, *overrides: str, **extra: str) -> int:
        """The process id of a training in `run`, with `extra` in its environment."""
        said = str(self.config.parent / "said.txt")
        process = _ask("train", [str(self.config), f"run_dir={run}", *overrides], extra, said)
        self.running.add(process)
        return process

    def start_ranks(self, run: Path, number: int, *overrides: str) -> list[int]:
        """The process ids of a training's ranks, with what `torchrun` would tell them."""
        from kit import free_port

        world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **world} for rank in range(number)]
        return [self.start(run, *overrides, **rank) for rank in ranks]

    def end(self, process: int) -> int:
        """Wait for it; its exit code, negative for a signal."""
        self.running.discard(process)
        return _ask("wait", process)

    def kill(self, process: int) -> int:
        """SIGKILL, then `end`. One that has ended keeps its id until it is waited for."""
        os.kill(process, signal.SIGKILL)
        return self.end(process)


@contextlib.contextmanager
def trainings_of(config: Path) -> Iterator[Trainings]:
    """Within it trainings can be started; at its end none runs."""
    trainings = Trainings(config)
    try:
        yield trainings
    finally:
        for process in list(trainings.running):
            trainings.kill(process)


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
    from roclip.train import main

    running: set[int] = set()
    for line in sys.stdin:
        order, *given = json.loads(line)
        if order == "train":
            answer = os.fork()
            if answer == 0:
                _train(main, *given)
            running.add(answer)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(given[0], 0)[1])
            running.discard(given[0])
        print(json.dumps(answer), flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def _train(main, arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
