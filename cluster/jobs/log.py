"""The log of a job on a cluster, each line once, however often the connection is lost."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable

from cluster.display import Display

SILENT_S = 30.0
"""A log without news for so long is asked for afresh: the connection may have died without a word."""
LONGEST_WAIT_S = 30.0
PROGRESS = re.compile(r"(?P<stage>\S+) +(?P<percent>\d{1,3})%  (?P<text>.*)")
"""What `Display` prints of a stage where there is no terminal."""
_OF_RAY = re.compile(r"Running entrypoint for job |[-\d]+ [:,\d]+\s+INFO job_manager\.py:")


class Log:
    """Cuts what comes in into lines, and leaves out what came before.

    Args:
        show: Gets each line, without its end.
    """

    def __init__(self, show: Callable[[str], None]):
        self._show = show
        self.seen_chars = 0
        self._rest = ""

    async def read(self, chunks: AsyncIterator[str], silent_s: float = SILENT_S) -> None:
        """Take in a log from its start, until it ends or is silent for too long."""
        position = 0
        while True:
            next_chunk = asyncio.ensure_future(anext(chunks, None))
            try:
                done, _ = await asyncio.wait({next_chunk}, timeout=silent_s)
                if not done or (chunk := next_chunk.result()) is None:
                    return
            finally:
                if not next_chunk.done():
                    next_chunk.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await next_chunk
            self._take(chunk, position)
            position += len(chunk)

    def end(self, whole: str) -> None:
        """Take in the log of a job that has ended."""
        self._take(whole, 0)
        if self._rest:
            self._say(self._rest)
            self._rest = ""

    def _take(self, chunk: str, position: int) -> None:
        new = chunk[max(0, self.seen_chars - position) :]
        self.seen_chars = max(self.seen_chars, position + len(chunk))
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._say(line)

    def _say(self, line: str) -> None:
        if not _OF_RAY.match(line):
            self._show(printable(line))


def show_line(display: Display) -> Callable[[str], None]:
    """Shows lines of a run's log: on a terminal those of a stage's progress as its bar, as the run itself would."""

    def show(line: str) -> None:
        progress = PROGRESS.fullmatch(line)
        if progress and display.console.is_terminal:
            display.show(progress["stage"], float(progress["percent"]), 100.0, progress["text"])
        else:
            display.say(line)

    return show


def last_progress(log: str) -> str:
    """The last line of a log that says how far a stage is; empty where none does."""
    return next((printable(line) for line in reversed(log.splitlines()) if PROGRESS.fullmatch(line)), "")


def printable(line: str) -> str:
    """Without what a terminal would obey: a log may quote the open web."""
    return "".join(character if character.isprintable() or character == "\t" else "�" for character in line)
