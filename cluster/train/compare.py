"""Trains every arm of an experiment on every corpus, as many at a time as fit on the cluster, and writes the report.

A corpus is made once (origin, poisons, ingest) and shared by its arms, whose folders stand in it as in a run directory.
What is done stays done: the same command goes on, and with one more seed or arm it trains only what is new.
"""

import contextlib
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.ingest.stage import fill
from cluster.ray.session import Session, keep_config, session
from cluster.train.job import finished, train_arm
from roclip.config import Config, dump_config, environment_defaults, parse_config, strict
from roclip.errors import StageError
from roclip.report.comparison_report import write_comparison
from roclip.report.experiment import Corpus, Experiment, Training
from roclip.storage import write_atomic

_COMMITS = "commits.txt"
_POLL_S = 0.5


def compare(experiment: Experiment, command: str) -> Path:
    """Run the trainings that are not done yet and write the report; returns the experiment's folder.

    Args:
        command: What the user typed, for the report.

    Raises:
        ConfigError: the folder began with other settings.
        StageError: trainings failed; the others went on, and are in the report.
    """
    with session(experiment.shared) as here:
        write_atomic(here.path / "experiment.yaml", strict.dump(experiment.protocol))
        for corpus in experiment.corpora:
            keep_config(corpus.config, here.path / corpus.name)
            for training in corpus.trainings:
                keep_config(training.config, here.path / corpus.name / training.arm)
        for corpus in experiment.corpora:
            fill(Session(corpus.config, here.path / corpus.name, here.display))
        problems = _train(here, experiment)
        here.note_cost()
        facts = {
            "command": command,
            "commits": _commits(here.path, experiment),
            "machine": here.provenance["machine"],
            "wall_s": here.cost["wall_s"],
        }
        write_comparison(here.path, experiment, facts)
    if problems:
        raise StageError(f"{here.path}: {len(problems)} of the trainings did not finish. {' '.join(problems)}")
    return here.path


def lanes(config: Config) -> int:
    """How many trainings run at a time, so that all CPUs (or GPUs) have a rank.

    Needs Ray, except for a local one without GPUs."""
    cluster = config.cluster
    local = cluster.address == "local" and not cluster.gpus_per_worker
    total = {"CPU": os.cpu_count() or 1} if local else ray.cluster_resources()
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    fits = [total.get(kind, 0) // (cluster.workers * share) for kind, share in each.items() if share]
    return max(1, int(min(fits)))


@dataclass(frozen=True)
class _Job:
    corpus: Corpus
    training: Training
    run: Path

    @property
    def name(self) -> str:
        return f"{self.corpus.name}/{self.training.arm}"

    @property
    def folder(self) -> Path:
        return self.run / self.training.arm

    @property
    def done(self) -> bool:
        return finished(self.training.config, self.folder / "checkpoints") is not None


def _jobs(folder: Path, experiment: Experiment) -> list[_Job]:
    return [_Job(corpus, each, folder / corpus.name) for corpus in experiment.corpora for each in corpus.trainings]


def _train(here: Session, experiment: Experiment) -> list[str]:
    """Returns a sentence for each training that failed."""
    waiting = deque(job for job in _jobs(here.path, experiment) if not job.done)
    if not waiting:
        return []
    here.need_ray()
    at_a_time = lanes(experiment.shared)
    here.display.say(f"train    {len(waiting)} trainings, {min(at_a_time, len(waiting))} at a time")
    running: dict[Any, tuple[_Job, contextlib.ExitStack]] = {}
    problems = []
    with contextlib.ExitStack() as shown:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.popleft()
                watch = shown.enter_context(contextlib.ExitStack())
                watch.enter_context(_shown(here, job))
                running[_start(here, job)] = job, watch
            ready, _ = ray.wait(list(running), timeout=_POLL_S)  # a short wait, so that Ctrl-C is heard
            for reference in ready:
                job, watch = running.pop(reference)
                watch.close()
                try:
                    ray.get(reference)
                except RayTaskError as error:
                    problems.append(f"{job.corpus.name}: {error.cause}")
                except RayError as error:
                    problems.append(f"{job.name}: its task was lost ({error}).")
    return problems


def _shown(here: Session, job: _Job) -> contextlib.AbstractContextManager[None]:
    return here.display.follow_training(job.name, job.folder, job.training.config.train.epochs)


def _start(here: Session, job: _Job) -> Any:
    commits, commit = job.folder / _COMMITS, _commit(here.provenance)
    before = commits.read_text().split() if commits.exists() else []
    write_atomic(commits, "\n".join(dict.fromkeys([*before, commit])))
    config = dump_config(job.training.config)
    return _task.options(name=f"train {job.name}").remote(
        config, job.training.method, str(job.run.resolve()), job.training.arm
    )


@ray.remote(num_cpus=0, max_retries=0)
def _task(config: str, method: str, run: str, name: str) -> None:
    """Run one training and wait for it; its ranks take the CPUs, not this task."""
    environment_defaults()
    train_arm(parse_config(config), method, Path(run), name=name)


def _commit(provenance: dict[str, Any]) -> str:
    return provenance["commit"][:12] + ("-dirty" if provenance["dirty"] else "")


def _commits(folder: Path, experiment: Experiment) -> list[str]:
    """The commits that the trainings ran with, so that a report never names one that trained nothing."""
    files = [job.folder / _COMMITS for job in _jobs(folder, experiment)]
    return list(dict.fromkeys(commit for file in files if file.exists() for commit in file.read_text().split()))
