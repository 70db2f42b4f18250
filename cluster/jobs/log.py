"""The log of a job on a cluster: each line once, however often the connection is lost."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable

from cluster.display import Display

SILENCE_TIMEOUT_S = 30.0
"""A log stream that is silent for this long is reopened: the connection may be dead."""
MAX_BACKOFF_S = 30.0
PROGRESS = re.compile(r"(?P<stage>\S+) +(?P<percent>\d{1,3})%  (?P<text>.*)")
"""The line that `Display` prints for a stage when there is no terminal."""
_RAY_LINE = re.compile(r"Running entrypoint for job |[-\d]+ [:,\d]+\s+INFO job_manager\.py:")


class Log:
    """Splits a log stream into lines, and drops what was received before.

    Args:
        show: Called with each line, without its end.
    """

    def __init__(self, show: Callable[[str], None]):
        self._show = show
        self.seen_chars = 0
        self._partial_line = ""

    async def read(self, chunks: AsyncIterator[str], silence_timeout_s: float = SILENCE_TIMEOUT_S) -> None:
        """Read a log from its start, until it ends or is silent for `silence_timeout_s`."""
        position = 0
        while True:
            next_chunk = asyncio.ensure_future(anext(chunks, None))
            try:
                done, _ = await asyncio.wait({next_chunk}, timeout=silence_timeout_s)
                if not done or (chunk := next_chunk.result()) is None:
                    return
            finally:
                if not next_chunk.done():
                    next_chunk.cancel()
                    await asyncio.wait({next_chunk})  # neither its error nor its end takes the place of a Ctrl-C
                if not next_chunk.cancelled():
                    next_chunk.exception()  # asyncio complains of one that nobody has asked for
            self._append(chunk, position)
            position += len(chunk)

    def end(self, whole: str) -> None:
        """Add the rest of the log of a job that has ended."""
        self._append(whole, 0)
        if self._partial_line:
            self._emit(self._partial_line)
            self._partial_line = ""

    def _append(self, chunk: str, position: int) -> None:
        new = chunk[max(0, self.seen_chars - position) :]
        self.seen_chars = max(self.seen_chars, position + len(chunk))
        *lines, self._partial_line = (self._partial_line + new).split("\n")
        for line in lines:
            self._emit(line)

    def _emit(self, line: str) -> None:
        if not _RAY_LINE.match(line):
            self._show(printable(line))


def show_line(display: Display) -> Callable[[str], None]:
    """A function that shows lines of a run's log: on a terminal, progress lines become the stage's progress bar, as in the run
    itself.
    """

    def show(line: str) -> None:
        progress = PROGRESS.fullmatch(line)
        if progress and display.console.is_terminal:
            display.show(progress["stage"], float(progress["percent"]), 100.0, progress["text"])
        else:
            display.say(line)

    return show


def last_progress(log: str) -> str:
    """The last progress line of a log, or ""."""
    return next((printable(line) for line in reversed(log.splitlines()) if PROGRESS.fullmatch(line)), "")


def printable(line: str) -> str:
    """The line without control characters: a log may quote untrusted text."""
    return "".join(character if character.isprintable() or character == "\t" else "�" for character in line)
