"""The first stage of a run: its URL list becomes shards, while other stages may begin. Loads no torch."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.ingest.job import finished_summary, ingest
from cluster.ray.queueing import ingest_need, wait_for_room
from cluster.ray.session import Session, session
from ingest.lists.sources import open_configured_list
from ingest.origin import Origin
from roclip.config import Config
from roclip.data.shards import Manifest
from roclip.data.tar_sources import index_tars, is_pattern
from roclip.report.ingest_progress import IngestProgress


def ingest_only(config: Config) -> dict:
    """Fill the shards of a run."""
    with session(config) as here:
        fill(here)
        return {"ingest": Manifest(here.shards).summary}


def fill(here: Session) -> None:
    """Ingest to the end, including rows that the user's list has got since; nothing if all is sealed."""
    with fetching(here, grown=True):
        pass


def index(here: Session) -> None:
    """Index ready-made tars; nothing for a folder of shards, and for tars that are indexed."""
    where = here.config.data.shards
    if is_pattern(where):
        index_tars(
            where, here.shards, on_progress=lambda done, total, text: here.display.show("index", done, total, text)
        )


class Fetching(threading.Thread):
    """Ingest in a thread beside the main thread, with its signals and its page.

    Args:
        here: The session of the run.
        urls: The URL list.
        is_sealed: All shards are sealed, and only the signals are missing.
    """

    def __init__(self, here: Session, urls: str | Path, is_sealed: bool):
        from cluster.ingest.report import IngestPage  # loads matplotlib

        super().__init__(name="ingest")
        self.is_sealed = is_sealed
        self.here, self.urls, self.halt = here, urls, threading.Event()
        self.sealed = 0
        self.problem: BaseException | None = None
        self.folder = here.path / "ingest"
        self.page = IngestPage(self.folder, here.shards, here.config.name)

    def run(self) -> None:
        try:
            self._ingest()
        except _HaltedError:
            pass
        except BaseException as error:  # handed to the main thread by `check`
            self.problem = error

    def _ingest(self) -> None:
        from cluster.ingest.signals import find_signals, release  # loads scipy and OpenCV

        config, shards = self.here.config, self.here.shards
        if not self.is_sealed:
            release_held = release(config.ingest, self.folder, self._say)
            ingest(
                config,
                self.urls,
                shards,
                on_progress=self._show,
                stop=self.halt,
                release=release_held,
                run=self.here.path.resolve().name,
            )
        if Manifest(shards).summary is not None:
            find_signals(config.ingest, shards, self.folder, Manifest(shards).records(), self._say)
        self.page.write()

    def wait_for(self, shards: int) -> None:
        """Return when `shards` are sealed or ingest has ended; raises its error."""
        while self.is_alive() and self.sealed < shards:
            time.sleep(0.2)
        self.check()

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def _show(self, now: IngestProgress) -> None:
        self.sealed = now.published
        self.here.display.ingest(now)
        self.page.show(now)

    def _say(self, done: int, total: int, text: str) -> None:
        if self.halt.is_set():
            raise _HaltedError
        self.here.display.show("signals", done, total, text)


class _HaltedError(Exception):
    """The main thread does not wait for the signals."""


@contextlib.contextmanager
def fetching(here: Session, *, grown: bool = False) -> Iterator[Fetching]:
    """Ingest while the block runs; the end of the block waits for it.

    Does nothing if all is sealed, or if there is nothing to fetch because `data.shards` is the only source. With `grown`, a
    finished ingest continues with the rows that the list has got since.
    """
    from cluster.ingest.signals import SIGNALS_FILE
    from ingest.signals.quarantine import check_signals
    from roclip.attacks import corpus

    config = here.config
    with contextlib.ExitStack() as stack:
        urls: str | Path = config.data.urls
        origin_folder = here.path / "origin"
        if config.data.images or config.data.scenes:
            if not (origin_folder / "labels.json").exists():
                here.display.say("origin   preparing images, captions and what an attacker adds")
            corpus.prepare(config, origin_folder)
        else:
            corpus.prepare_held_out(config, origin_folder)
        check_signals(config.ingest.quarantine)  # now, and not when the list has ended
        index(here)
        is_sealed = Manifest(here.shards).summary is not None
        if is_sealed and grown and urls:
            is_sealed = finished_summary(config, open_configured_list(config, urls), here.shards) is not None
        thread = Fetching(here, urls, is_sealed)
        if config.data.fetches and not is_sealed:
            here.need_ray()
            wait_for_room(ingest_need(config.cluster), config.cluster, here.display.say)
            if not urls:
                origin = stack.enter_context(Origin(origin_folder / "corpus.parquet"))
                thread.urls = origin_folder / "urls.parquet"
                origin.url_list(thread.urls)
        if config.data.fetches and not (is_sealed and (thread.folder / SIGNALS_FILE).exists()):
            thread.start()
        try:
            yield thread
            if thread.is_alive():
                thread.join()
        finally:
            thread.halt.set()
            if thread.ident is not None:
                thread.join()
        thread.check()
