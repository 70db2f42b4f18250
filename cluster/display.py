"""The run on a terminal: one bar for ingest and one for each training, or plain lines if the output is no terminal."""

import contextlib
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from roclip.report.ingest_progress import IngestProgress, describe
from roclip.report.oracle_state import parse_progress
from roclip.report.training_state import TrainingReader, TrainingState
from roclip.report.watched_files import WatchedFiles

_LINE_EVERY_S = 10.0
_READ_EVERY_S = 0.5


class Display:
    """Progress bars by stage. All methods may be called from any thread."""

    def __init__(self) -> None:
        self.console = Console()
        self._bars = Progress(
            TextColumn("[bold]{task.fields[stage]:<8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, tuple[float, str]] = {}
        self._live = self.console.is_terminal

    def __enter__(self) -> "Display":
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, stage: str, done: float, total: float, text: str) -> None:
        """Show the progress of a stage as a bar, or as a line every ten seconds."""
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(text, total=total, stage=stage)
            self._bars.update(self._tasks[stage], completed=done, total=total, description=text)
        else:
            line = f"{stage:<8} {done / total if total else 1:>4.0%}  {text}"
            printed_s, printed = self._printed.get(stage, (-_LINE_EVERY_S, ""))
            if line != printed and (done >= total or time.monotonic() - printed_s >= _LINE_EVERY_S):
                self._printed[stage] = (time.monotonic(), line)
                print(line, flush=True)

    def ingest(self, now: IngestProgress) -> None:
        """Show the progress of the ingest."""
        total = (
            max(1, 2 * now.done_urls) if now.total_urls is None else now.total_urls
        )  # an unknown total shows as half done
        self.show("ingest", now.done_urls + now.again_done, total + now.again_total, describe(now))

    @contextlib.contextmanager
    def follow_training(self, stage: str, folder: Path, epochs: int) -> Iterator[None]:
        """While the block runs, show the progress of the training in `folder` and print the events of its ranks."""
        reader = TrainingReader(WatchedFiles(folder.parent), folder.name)
        known = reader.read_all().event_count

        def show() -> None:
            nonlocal known
            training = reader.read_all()
            new = max(training.event_count - known, 0)
            for event in training.events[len(training.events) - new :]:
                self.say(f"{stage:<8} {event.text}")
            known = training.event_count
            if training.row:
                self.show(stage, training.progress, epochs, training_line(training))

        with self._repeating(show):
            yield

    @contextlib.contextmanager
    def follow_task(self, stage: str, progress: Path) -> Iterator[None]:
        """While the block runs, show what a task writes to its progress.json."""
        files = WatchedFiles(progress.parent)

        def show() -> None:
            written = files.read(progress.name, parse_progress)
            if written is not None:
                self.show(stage, *written)

        with self._repeating(show):
            yield

    @contextlib.contextmanager
    def _repeating(self, show: Callable[[], None]) -> Iterator[None]:
        """Call a function twice a second while the block runs, and once more at its end."""
        stop = threading.Event()

        def repeat() -> None:
            while not stop.wait(_READ_EVERY_S):
                show()
            show()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def training_line(training: TrainingState) -> str:
    """Epoch and its shards, phase, loss, logit scale, rate and time left at the last logged step."""
    row: Mapping[str, float] = defaultdict(lambda: math.nan, training.row)
    return (
        f"epoch {row['epoch']}/{row['epochs']} {training.phase:<7} of {row['epoch_shards']} shards  step {row['step']}  "
        f"loss {row['loss']:.3f}  scale {row['logit_scale']:.1f}  {row['samples_per_s']:.0f} samples/s, "
        f"{row['data_wait_frac']:.0%} of it waiting for data  {row['eta_s']:.0f} s left"
    )
