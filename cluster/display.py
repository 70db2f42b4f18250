"""The run on a terminal: a bar for ingest and one for each training, or plain lines where there is no terminal."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from roclip.metrics.registry import read_metrics
from roclip.report.ingest_progress import IngestProgress, describe
from roclip.report.oracle_state import Standing
from roclip.report.training_state import LOG

_LINE_EVERY_S = 10.0


class Display:
    """Bars by name. Every call may come from any thread."""

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
        self._said: dict[str, tuple[float, str]] = {}
        self._live = self.console.is_terminal

    def __enter__(self) -> "Display":
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, stage: str, done: float, total: float, text: str) -> None:
        """Where a stage stands: a bar, or now and then a line."""
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(text, total=total, stage=stage)
            self._bars.update(self._tasks[stage], completed=done, total=total, description=text)
        else:
            line = f"{stage:<8} {done / total if total else 1:>4.0%}  {text}"
            said_s, said = self._said.get(stage, (-_LINE_EVERY_S, ""))
            if line != said and (done >= total or time.monotonic() - said_s >= _LINE_EVERY_S):
                self._said[stage] = (time.monotonic(), line)
                print(line, flush=True)

    def ingest(self, now: IngestProgress) -> None:
        total = max(1, 2 * now.done_urls) if now.total_urls is None else now.total_urls  # half of what nobody knows
        self.show("ingest", now.done_urls + now.again_done, total + now.again_total, describe(now))

    @contextlib.contextmanager
    def follow_training(self, name: str, folder: Path, epochs: int) -> Iterator[None]:
        """While the block runs, show how far the training in `folder` is, and say what befalls its ranks."""
        news = NewLines(folder / LOG)

        def look() -> Standing | None:
            for line in news():
                self.say(f"{name:<8} {line}")
            return training_standing(folder / "metrics.jsonl", epochs)

        with self.follow(name, look):
            yield

    @contextlib.contextmanager
    def follow(self, stage: str, look: Callable[[], Standing | None], every_s: float = 0.5) -> Iterator[None]:
        """While the block runs, show what `look` finds: what another process writes down as it goes."""
        stop = threading.Event()

        def watch() -> None:
            last = None
            while True:
                ended = stop.wait(every_s)
                now = look()
                if now is not None and now != last:
                    last = now
                    self.show(stage, *now)
                if ended:
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class NewLines:
    """Each call gives the lines that a log has got since the last, without their dates; first those since now."""

    def __init__(self, path: Path):
        self.path = path
        self._read_bytes = path.stat().st_size if path.exists() else 0

    def __call__(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            *whole, _ = file.read().split(b"\n")
        self._read_bytes += sum(len(line) + 1 for line in whole)
        return [line.decode()[len("2000-01-01 00:00:00 ") :] for line in whole]


def training_standing(metrics: Path, epochs: int) -> Standing | None:
    """How far a training is, by its `metrics.jsonl`."""
    rows = read_metrics(metrics)
    return (rows[-1]["progress"], epochs, training_line(rows[-1])) if rows else None


def told_standing(path: Path) -> Standing | None:
    """How far a task says it is, in a JSON file of [done, total, text]."""
    if not path.exists():
        return None
    done, total, text = json.loads(path.read_text())
    return done, total, text


def training_line(row: dict) -> str:
    """Epoch and its shards, phase, loss, logit scale, rate and time left of a logged step."""
    return (
        f"epoch {row['epoch']}/{row['epochs']} {row['phase']:<7} of {row['epoch_shards']} shards  step {row['step']}  "
        f"loss {row['loss']:.3f}  scale {row['logit_scale']:.1f}  {row['samples_per_s']:.0f} samples/s, "
        f"{row['data_wait_frac']:.0%} of it waiting for data  {row['eta_s']:.0f} s left"
    )
