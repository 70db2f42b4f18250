"""The whole system in one file: URL list -> shards -> towers -> figures -> verdict -> report.

Each stage leaves its result in the run directory and is skipped when that is there, so running the same command
again goes on where it stopped. Training starts as soon as the manifest names `data.min_shards`, while ingest runs.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cluster import corpus
from cluster.ingest_job import ended, ingest
from cluster.ingest_progress import IngestProgress
from cluster.oracle_job import oracle, progress_file
from cluster.plan import ingests
from cluster.progress import told_standing
from cluster.session import Session, session
from cluster.train_job import finished, train_arm
from cluster.url_list import open_list
from ingest.origin import Origin
from roclip import checkpoint
from roclip.config import Config
from roclip.errors import CheckpointError, DataError
from roclip.evaluate import evaluate, load_evaluation_set
from roclip.metrics import read_metrics
from roclip.model import Encoder, Towers
from roclip.report import write_report
from roclip.shards import Manifest, write_atomic
from roclip.tar_sources import index_tars, is_pattern


def run(config: Config) -> dict:
    """Everything, from the URL list to the report. Returns the summary, which `summary.json` holds too."""
    with session(config) as here:
        with _fetching(here) as fetching:
            fetching.wait_for(config.data.min_shards)
            for arm in config.arms:
                _train(here, arm)
        verdicts = {arm: _judge(here, arm) for arm in config.arms}
        here.note_cost()
        summary = {
            "schema": 1,
            "config": Path(config.source).name,
            "commit": here.provenance["commit"],
            **here.cost,
            "ingest": Manifest(here.shards).summary or {},
            "arms": {arm: {**_figures(here, arm), "oracle": verdicts[arm]} for arm in config.arms},
        }
        write_atomic(here.path / "summary.json", json.dumps(summary, indent=1))
        write_report(here.path)
        return summary


def ingest_only(config: Config) -> dict:
    """Fill the shards of a run."""
    with session(config) as here:
        fill(here)
        return {"ingest": Manifest(here.shards).summary}


def train_only(config: Config) -> dict:
    """Train every arm on the shards that are there."""
    with session(config) as here:
        _index(here)
        if not Manifest(here.shards).records():
            raise DataError(f"{here.shards}: expected sealed shards, got none. Run `roclip ingest` first.")
        for arm in config.arms:
            _train(here, arm)
        return {"arms": {arm: _figures(here, arm) for arm in config.arms}}


def evaluate_only(config: Config, folder: str | None = None) -> dict:
    """Measure the newest checkpoint of every arm, or the checkpoint in `folder`, afresh.

    The figures go into `<run>/<arm>/evaluation.json`, or `<run>/evaluation-<folder's name>.json`.
    """
    with session(config, resumes=False) as here:
        data = load_evaluation_set(config, here.path / "origin")
        if folder is not None:
            name = Path(folder).resolve().name
            figures = evaluate(_encoder(Path(folder)), data)
            path = here.path / f"evaluation-{name}.json"
            write_atomic(path, json.dumps({"checkpoint": folder, **figures}, indent=1))
            return {"arms": {name: figures}}
        arms = {}
        for arm in config.arms:
            latest = checkpoint.named(here.path / arm / "checkpoints", "LATEST")
            if latest is None:
                raise CheckpointError(f"{here.path / arm}: expected a checkpoint, got none. Run `roclip train` first.")
            checkpoint.verify(latest)
            arms[arm] = evaluate(_encoder(latest), data)
            result = {"checkpoint": latest.name, **arms[arm]}
            write_atomic(here.path / arm / "evaluation.json", json.dumps(result, indent=1))
        return {"arms": arms}


def oracle_only(config: Config, folder: str | None = None) -> dict:
    """Let the oracle judge the newest checkpoint of every arm, or the checkpoint in `folder`."""
    with session(config, resumes=False) as here:
        if folder is None:
            return {"arms": {arm: {"oracle": _judge(here, arm)} for arm in config.arms}}
        here.need_ray()
        name = Path(folder).name
        return {"arms": {name: {"oracle": oracle(config, here.path, name, checkpoint=Path(folder))}}}


def _encoder(folder: Path) -> Encoder:
    return Encoder(Towers.load(folder).to("cuda" if torch.cuda.is_available() else "cpu"))


# ---- the stages ---------------------------------------------------------------------------------------------


def fill(here: Session) -> None:
    """Ingest to its end, also what a list of the user's own has got since; nothing when all is sealed."""
    with _fetching(here, grown=True):
        pass


def _index(here: Session) -> None:
    """Index ready-made tars; nothing for a folder of shards, and for tars that are indexed."""
    where = here.config.data.shards
    if is_pattern(where):
        index_tars(
            where, here.shards, on_progress=lambda done, total, text: here.display.show("index", done, total, text)
        )


class _Fetching(threading.Thread):
    """Ingest beside the main thread."""

    def __init__(self, here: Session, urls: str | Path):
        super().__init__(name="ingest")
        self.here, self.urls, self.halt = here, urls, threading.Event()
        self.sealed = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            ingest(self.here.config, self.urls, self.here.shards, on_progress=self._show, stop=self.halt)
        except BaseException as error:  # handed to the main thread by `check`
            self.problem = error

    def wait_for(self, shards: int) -> None:
        """Return when so many are sealed or ingest has ended; raise its error."""
        while self.is_alive() and self.sealed < shards:
            time.sleep(0.2)
        self.check()

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def _show(self, now: IngestProgress) -> None:
        self.sealed = now.published
        self.here.display.ingest(now)


@contextlib.contextmanager
def _fetching(here: Session, *, grown: bool = False) -> Iterator[_Fetching]:
    """Ingest while the block runs; the end of the block waits for it. Does nothing when all is sealed, or when there is
    nothing to fetch: `data.shards` is the only source. With `grown`, an ingest that has ended goes on with the rows that
    the list has got since."""
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
        fetching = _Fetching(here, urls)
        _index(here)
        over = Manifest(here.shards).summary is not None
        if over and grown and urls:
            over = ended(config, open_list(config, urls), here.shards) is not None
        if ingests(config) and not over:
            here.need_ray()
            if not urls:
                origin = stack.enter_context(Origin(origin_folder / "corpus.parquet"))
                fetching.urls = origin_folder / "urls.parquet"
                origin.url_list(fetching.urls)
            fetching.start()
        try:
            yield fetching
            if fetching.is_alive():
                fetching.join()
        finally:
            fetching.halt.set()
            if fetching.ident is not None:
                fetching.join()
        fetching.check()


def _train(here: Session, arm: str) -> None:
    if finished(here.config, here.path / arm / "checkpoints"):
        return
    here.need_ray()
    with here.display.follow_training(arm, here.path / arm, here.config.train.epochs):
        train_arm(here.config, arm, here.path)


def _judge(here: Session, arm: str) -> dict:
    if not (here.path / "origin" / "trusted.parquet").exists():
        here.display.say(
            f"oracle   {arm} is not checked: {here.path / 'origin' / 'trusted.parquet'} (image, mask, label), which the "
            "oracle learns from, is not there. TRUSTED does not move"
        )
        return {"verdict": "inconclusive"}
    here.display.say(f"oracle   checking {arm}")
    here.need_ray()
    said = progress_file(here.path, arm)
    said.unlink(missing_ok=True)
    with here.display.follow("oracle", lambda: told_standing(said)):
        return oracle(here.config, here.path, arm)


def _figures(here: Session, arm: str) -> dict:
    """What the evaluations say of the end, and of the last matched and the last plain epoch."""
    rows = read_metrics(here.path / arm / "evaluations.jsonl")
    metrics = read_metrics(here.path / arm / "metrics.jsonl")
    rates = sorted(row["samples_per_s"] for row in metrics)
    return {
        **(rows[-1] if rows else {}),
        "samples_per_s": rates[len(rates) // 2] if rates else None,
        "steps": metrics[-1]["step"] if metrics else 0,
        "phases": {row["phase"]: row for row in rows},
    }
