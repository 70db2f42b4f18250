"""Trainings in forks of a process that has imported everything: each starts in a second and can be killed for real.

The file run as a script is that process. A JSON line ["train", [arguments], {environment}] forks `roclip.train.main`
and answers its process id; ["wait", id] answers its exit code, negative for a signal. When stdin ends, what still runs
is killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


class Trainings:
    """Starts and ends trainings of one preset."""

    def __init__(self, process: subprocess.Popen, config: Path):
        self.process, self.config = process, config

    def start(self, run: Path, *overrides: str, **extra: str) -> int:
        """The process id of a training in `run`, with `extra` in its environment."""
        return self._ask("train", [str(self.config), f"run_dir={run}", *overrides], extra)

    def start_ranks(self, run: Path, number: int, *overrides: str) -> list[int]:
        """The process ids of a training's ranks, with what `torchrun` would tell them."""
        from kit import free_port

        world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **world} for rank in range(number)]
        return [self.start(run, *overrides, **rank) for rank in ranks]

    def end(self, process: int) -> int:
        """Wait for it; its exit code, negative for a signal."""
        return self._ask("wait", process)

    def kill(self, process: int) -> int:
        """SIGKILL, then `end`. One that has ended keeps its id until it is waited for."""
        os.kill(process, signal.SIGKILL)
        return self.end(process)

    def _ask(self, *order: object) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def trainings_of(config: Path) -> Iterator[Trainings]:
    """Within it trainings can be started; at its end none runs. What they say is in `said.txt` beside the preset."""
    from kit import environment

    with (
        (config.parent / "said.txt").open("w") as said,
        subprocess.Popen(
            [sys.executable, __file__],
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        yield Trainings(process, config)


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
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(2, 1)
                _train(main, *given)
            running.add(answer)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(given[0], 0)[1])
            running.discard(given[0])
        print(json.dumps(answer), flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def _train(main, arguments: list[str], environment: dict[str, str]) -> None:
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
