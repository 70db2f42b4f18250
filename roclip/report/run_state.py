"""The one reader of a run directory: everything that a terminal, a monitor or a page shows of a run, as one frozen value.

It reads files alone, needs no Ray and takes no lock, so it works during a run, after it, and after a crash.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from roclip.config import Config, parse_config
from roclip.report.ingest_state import IngestReader, IngestState
from roclip.report.oracle_state import OracleState, PngStore, oracle_state
from roclip.report.training_state import TrainingReader, TrainingState, is_number
from roclip.report.watched_files import WatchedFiles

SILENT_S = 45.0
"""A run that works writes something every ten seconds (`cost.json`); after this long it counts as stopped."""
Status = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Stage:
    """One stage between the URL list and the verdict."""

    title: str
    status: Status
    share: float | None = None
    """Share that is done."""
    text: str = ""
    ends_s: float | None = None
    """When it will end at the present rate, in seconds since 1970."""


@dataclass(frozen=True)
class RunState:
    """Everything that is known about a run."""

    path: Path
    name: str
    config: Config | None
    config_text: str
    summary: Mapping[str, Any]
    """The content of summary.json; empty until the run has ended."""
    commit: str
    machine: Mapping[str, Any]
    packages: Mapping[str, Any]
    status: Literal["running", "finished", "failed", "stopped"]
    last_update_s: float | None
    """When something was last written, in seconds since 1970."""
    wall_s: float | None
    peak_rss_bytes: float | None
    disk_free_frac: float
    ingest: IngestState | None
    trainings: tuple[TrainingState, ...]
    repairs: tuple[TrainingState, ...]
    """The fine-tunings of the repairs that have started."""
    oracles: tuple[OracleState, ...]
    stages: tuple[Stage, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Files that exist and cannot be used, and why."""
    behind: bool = False
    """Whether the next read will find more that was already written."""


class RunReader:
    """Reads a run directory again and again; each read costs only what has changed.

    Args:
        path: The run directory.
        images: Keeps the oracle's images.
    """

    def __init__(self, path: Path, images: PngStore):
        self.path, self.images = path, images
        self.files = WatchedFiles(path)
        self._ingest = IngestReader(self.files)
        self._trainings: dict[str, TrainingReader] = {}

    def read(self) -> RunState:
        """Read what is new. A broken file raises nothing; it is named in `unreadable`."""
        files = self.files
        config_text = files.text("config.yaml")
        config = files.read("config.yaml", _config)
        arms: list[str] = [*config.arms] if config else self._found_arms()
        ingest = self._ingest.read(_shards(config, self.path))
        trainings = tuple(self._training(arm) for arm in arms)
        repairs = tuple(self._training(f"{arm}/repair/clip") for arm in arms if (self.path / arm / "repair").is_dir())
        oracles = tuple(oracle_state(files, arm, self.images) for arm in arms)
        self.images.drop_all_but(set().union(*(oracle.images for oracle in oracles)))
        summary, cost, provenance = map(files.table, ("summary.json", "cost.json", "provenance.json"))
        last_update_s = self._last_update_s(trainings + repairs, ingest, arms)
        alive = last_update_s is not None and time.time() - last_update_s < SILENT_S
        stages = _stages(config, ingest, trainings, repairs, oracles, alive)
        finished = bool(summary) and all(stage.status == "done" for stage in stages)
        failed = any(training.failure for training in trainings)
        return RunState(
            path=self.path,
            name=config.name if config else self.path.resolve().name,
            config=config,
            config_text=config_text,
            summary=summary,
            commit=str(provenance.get("commit", ""))[:12],
            machine=_plain(provenance.get("machine")),
            packages=_plain(provenance.get("packages")),
            status="finished" if finished else "running" if alive else "failed" if failed else "stopped",
            last_update_s=last_update_s,
            wall_s=_number(cost, "wall_s"),
            peak_rss_bytes=_number(cost, "peak_rss_bytes"),
            disk_free_frac=_free(self.path),
            ingest=ingest,
            trainings=trainings,
            repairs=repairs,
            oracles=oracles,
            stages=stages,
            unreadable=dict(files.unreadable),
            behind=any(reader.behind for reader in self._trainings.values()),
        )

    def read_all(self) -> RunState:
        """Read everything that is written so far, however long that takes."""
        state = self.read()
        while state.behind:
            state = self.read()
        return state

    def _training(self, name: str) -> TrainingState:
        if name not in self._trainings:
            self._trainings[name] = TrainingReader(self.files, name)
        return self._trainings[name].read()

    def _found_arms(self) -> list[str]:
        """Folders that hold a training, for a run without a readable config."""
        return sorted(path.parent.name for path in self.path.glob("*/metrics.jsonl"))[:16]

    def _last_update_s(
        self, trainings: tuple[TrainingState, ...], ingest: IngestState | None, arms: list[str]
    ) -> float | None:
        checks = [f"{arm}/{part}oracle/progress.json" for arm in arms for part in ("", "repair/")]
        times = [
            *map(self.files.changed_s, ["cost.json", *checks]),
            *(training.last_update_s for training in trainings),
        ]
        return max(filter(None, [*times, ingest and ingest.last_update_s]), default=None)


def is_run(path: Path) -> bool:
    """Whether a folder looks like a run directory."""
    return any((path / name).is_file() for name in ("config.yaml", "summary.json", "cost.json")) or any(
        path.glob("*/metrics.jsonl")
    )


def _stages(
    config: Config | None,
    ingest: IngestState | None,
    trainings: tuple[TrainingState, ...],
    repairs: tuple[TrainingState, ...],
    oracles: tuple[OracleState, ...],
    alive: bool,
) -> tuple[Stage, ...]:
    """The stages in the order in which a run goes through them. A stage that has begun counts as stopped if the run is dead."""
    halted: Status = "running" if alive else "stopped"
    stages = []
    if ingest is not None or (config and config.data.fetches):
        stages.append(_ingest_stage(ingest, halted))
    stages += [_training_stage(training, training.name, config, halted) for training in trainings]
    repaired = {repair.name.split("/")[0]: repair for repair in repairs}
    for oracle in oracles:
        stages.append(_oracle_stage(oracle, halted))
        if oracle.repair is not None:
            text = "no trigger is left: trusted" if oracle.repair.accepted else "not trusted"
            stages.append(Stage(f"repair of {oracle.arm}", "done", 1.0, text))
        elif oracle.rechecking is not None:
            done, total, text = oracle.rechecking
            stages.append(
                Stage(f"repair of {oracle.arm}", halted, done / total if total else None, f"checked again: {text}")
            )
        elif oracle.arm in repaired and repaired[oracle.arm].row:
            stages.append(_training_stage(repaired[oracle.arm], f"repair of {oracle.arm}", None, halted))
    return tuple(stages)


def _ingest_stage(ingest: IngestState | None, halted: Status) -> Stage:
    if ingest is None:
        return Stage("ingest", halted, None, "preparing" if halted == "running" else "no shard is sealed yet")
    share = 1.0 if ingest.ended else ingest.done_urls / ingest.total_urls if ingest.total_urls else None
    of = "" if ingest.total_urls is None or ingest.ended else f" of {ingest.total_urls:,}"
    text = f"{ingest.done_urls:,}{of} URLs, {ingest.succeeded:,} usable pairs in {ingest.shards:,} shards"
    return Stage("ingest", "done" if ingest.ended else halted, share, text, ingest.ends_s)


def _training_stage(training: TrainingState, title: str, config: Config | None, halted: Status) -> Stage:
    row, epochs = training.row, training.row.get("epochs") or (config.train.epochs if config else 0)
    if not row:
        begun = bool(training.events)
        return Stage(
            title,
            "failed" if training.failure else halted if begun else "waiting",
            0.0 if begun else None,
            training.failure,
        )
    share = min(training.progress / epochs, 1.0) if epochs else None
    if share == 1.0:
        return Stage(
            title,
            "done",
            1.0,
            f"{epochs:g} epochs, {row.get('step', 0):,g} steps, {row.get('samples_seen', 0):,.0f} pairs",
        )
    if training.share_read < 1:
        return Stage(title, halted, share, f"reading the log, {training.share_read:.0%} of it")
    of = f" of {epochs:g}" if epochs else ""
    text = f"epoch {row.get('epoch', 0):g}{of}, {training.phase or 'step'}, step {row.get('step', 0):,.0f}"
    if training.failure:
        return Stage(title, "failed" if halted == "stopped" else "running", share, training.failure)
    ends_s = (
        training.last_update_s + row["eta_s"]
        if training.last_update_s and "eta_s" in row and halted == "running"
        else None
    )
    return Stage(title, halted, share, text, ends_s)


def _oracle_stage(oracle: OracleState, halted: Status) -> Stage:
    title = f"check of {oracle.arm}"
    if oracle.checking is not None:
        done, total, text = oracle.checking
        return Stage(title, halted, done / total if total else None, text)
    if oracle.verdict:
        return Stage(title, "done", 1.0, f"{oracle.verdict}, {oracle.checkpoint}")
    return Stage(title, "waiting")


def _config(content: bytes) -> Config:
    return parse_config(content.decode())


def _shards(config: Config | None, run: Path) -> Path | None:
    """The folder of the manifest, as `roclip.data.tar_sources.shards_root` finds it, but on this machine alone and without
    listing a folder of a million shards; None if it is on a store."""
    where, own = config.data.shards if config else "", run.resolve() / "shards"
    given = Path(where.removeprefix("file://")).expanduser()
    if where and "://" not in where.removeprefix("file://") and (given / "manifest").is_dir():
        return given.resolve()
    return None if "://" in where and not (own / "manifest").is_dir() else own


def _number(found: Mapping[str, Any], key: str) -> float | None:
    return found[key] if is_number(found.get(key)) else None


def _plain(found: Any) -> dict[str, Any]:
    """The texts and numbers of an object, cut to a length that a page can show."""
    if not isinstance(found, dict):
        return {}
    return {str(key)[:60]: value if is_number(value) else str(value)[:120] for key, value in list(found.items())[:40]}


def _free(path: Path) -> float:
    usage = shutil.disk_usage(path)
    return usage.free / usage.total
