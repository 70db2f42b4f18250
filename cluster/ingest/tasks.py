"""Runs parts as Ray tasks: a window of tasks in flight, retries, and bisection of parts that kill their workers.

How a task ended decides what happens to its part:

    lost      with its node or its input: retried, without limit
    failed    with an error: retried `ingest.shard_retries` times, then the ingest ends
    died      its process ended, by itself or out of memory: as above, with a smaller window; if it died each time, the
              rows that kill it are searched (`cluster/ingest/recovery.py`) and excluded

Retries wait with exponential backoff and jitter.
"""

import heapq
import itertools
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.ingest.metrics import HostErrors, count_sealed
from cluster.ingest.recovery import Bisection, Window
from cluster.ingest.task import PartSpec, TaskResult, probe, seal_part
from cluster.monitoring.publisher import count
from cluster.ray.failures import Failure, cause_of, kind_of, words_of
from ingest.folder.lease import Lease
from roclip.config import Config
from roclip.data.shards import ShardRecord
from roclip.errors import DataError, RunLockedError, StageError

MIN_BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0
LOW_MEMORY_FRAC = 0.1
"""A node with a smaller fraction of free memory shrinks the window."""
MAX_SEARCHES = 3
_POLL_S = 0.25
_CANCEL_S = 30.0
_log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818  # not an error: a stop was requested
    """The stop event was set."""


@dataclass
class _Attempt:
    """One task of a part, or of some of its rows."""

    spec: PartSpec
    number: int = 1
    deaths: int = 0
    losses: int = 0
    search: "_Search | None" = None
    rows: range = range(0)
    """Rows of the part that `search` probes."""
    searches: int = 0
    """Bisections of this part so far, whose findings are excluded."""
    round: int = 0


@dataclass
class _Search:
    """The bisection of one part."""

    spec: PartSpec
    number: int
    """Counts this part's bisections, from 1: a killer row may not have been reachable during an earlier one."""
    bisection: Bisection = field(init=False)

    def __post_init__(self) -> None:
        self.bisection = Bisection(len(self.spec.part.table))


class Tasks:
    """Runs parts as Ray tasks until all of them are sealed.

    Args:
        config: The run's config.
        run: Names the tasks, `ingest <run> part <number>`, and the metrics.
        lease: The lease of the folder.
        stop: Makes `run` raise `Stopped`.
        on_sealed: Called for each shard that was sealed.
        on_step: Called several times a second.
    """

    def __init__(
        self,
        config: Config,
        run: str,
        lease: Lease,
        stop: threading.Event,
        *,
        on_sealed: Callable[[ShardRecord], None],
        on_step: Callable[[], None],
    ):
        self.config, self.run_name, self.lease, self.stop = config, run, lease, stop
        self.on_sealed, self.on_step = on_sealed, on_step
        self.window = Window(config.ingest.max_in_flight)
        self.hosts = HostErrors(run)
        self._in_flight: dict[Any, _Attempt] = {}
        self._waiting: list[tuple[float, int, _Attempt]] = []
        self._searches: list[_Search] = []
        self._numbers = itertools.count()

    def run(self, specs: Iterable[PartSpec]) -> None:
        """Run all parts until they are sealed. `specs` is consumed only as fast as the window allows.

        Raises `Stopped`; `RunLockedError` if the lease is lost; `DataError` for a part with too many bad images; `StageError`
        for one that failed too often.
        """
        feed = iter(specs)
        while True:
            if self.stop.is_set():
                raise Stopped
            self.lease.check()
            self._fill(feed)
            if not (self._in_flight or self._waiting or self._searches):
                return
            self._wait()
            count("roclip_ingest_in_flight_tasks", len(self._in_flight), run=self.run_name)
            count("roclip_ingest_window_tasks", self.window.size, run=self.run_name)
            self.on_step()

    def cancel(self) -> None:
        """Cancel the tasks in flight and wait until they have ended."""
        tasks = list(self._in_flight)
        self._in_flight.clear()
        self._waiting.clear()
        self._searches.clear()
        if not tasks or not ray.is_initialized():
            return
        for task in tasks:
            ray.cancel(task, force=True)
        ray.wait(tasks, num_returns=len(tasks), timeout=_CANCEL_S)

    def _fill(self, feed: Iterator[PartSpec]) -> None:
        while len(self._in_flight) < self.window.size and (attempt := self._next_attempt(feed)) is not None:
            attempt.round = self.window.round
            self._in_flight[self._submit(attempt)] = attempt

    def _next_attempt(self, feed: Iterator[PartSpec]) -> _Attempt | None:
        if self._waiting and self._waiting[0][0] <= time.monotonic():
            return heapq.heappop(self._waiting)[2]
        for search in self._searches:
            if (rows := search.bisection.next()) is not None:
                return _Attempt(search.spec.only(rows), search=search, rows=rows)
        spec = next(feed, None)
        return None if spec is None else _Attempt(spec)

    def _submit(self, attempt: _Attempt) -> Any:
        cluster, number = self.config.cluster, attempt.spec.part.number
        rows = f", rows {attempt.rows.start} to {attempt.rows.stop - 1}" if attempt.search else ""
        options = {
            "name": f"ingest {self.run_name} part {number}{rows}",
            "num_cpus": cluster.cpus_per_ingest_task,
            "resources": {cluster.ingest_resource: 1} if cluster.ingest_resource else None,
            "max_retries": 0,  # retried here, depending on the cause
            "scheduling_strategy": "SPREAD",
            # Separate workers: img2dataset was imported there with torch hidden, which no other task should inherit.
            "runtime_env": {"env_vars": {"ROCLIP_ROOM": "ingest"}},
        }
        return ray.remote(probe if attempt.search else seal_part).options(**options).remote(attempt.spec)

    def _wait(self) -> None:
        if not self._in_flight:
            time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=_POLL_S)
        for task in ready:
            attempt = self._in_flight.pop(task)
            try:
                result = ray.get(task)
            except RayError as error:
                self._failed(attempt, error)
                continue
            self.window.succeeded()
            if attempt.search:
                self._record_probe(attempt, died=False)
            else:
                self._handle_result(attempt, result)

    def _handle_result(self, attempt: _Attempt, result: TaskResult) -> None:
        if result.free_memory_frac < LOW_MEMORY_FRAC:
            self.window.shrink(attempt.round)
        if result.record is not None:
            count_sealed(self.run_name, result.record)
            self.hosts.add(result.bad_hosts)
            self.on_sealed(result.record)
        elif result.samples or result.bad_frac:
            raise DataError(
                f"shard {attempt.spec.name}: expected at most {attempt.spec.max_bad_frac:.1%} of what arrived to be bad, got "
                f"{result.bad_frac:.1%}; of {len(attempt.spec.part.table)} URLs: {_counts(result.failed)}. "
                "Check these URLs, or raise data.max_bad_frac."
            )
        else:
            message = f"none of {len(attempt.spec.part.table)} URLs arrived: {_counts(result.failed)}"
            self._retry(attempt, "failed", message)

    def _failed(self, attempt: _Attempt, error: RayError) -> None:
        if isinstance(cause := cause_of(error), RunLockedError):
            raise cause
        kind = kind_of(error)
        if kind in ("memory", "died"):
            self.window.shrink(attempt.round)
            if attempt.search:
                count("roclip_ingest_task_failures", run=self.run_name, how=kind)
                self._record_probe(attempt, died=True)
                return
        self._retry(attempt, kind, words_of(error))

    def _retry(self, attempt: _Attempt, kind: Failure, message: str) -> None:
        count("roclip_ingest_task_failures", run=self.run_name, how=kind)
        if kind == "lost":
            attempt.losses += 1
            self._schedule(attempt, attempt.losses)
            return
        attempt.deaths += kind in ("memory", "died")
        if attempt.number <= self.config.ingest.shard_retries:
            attempt.number += 1
            self._schedule(attempt, attempt.number - 1)
        elif attempt.deaths == attempt.number and attempt.searches < MAX_SEARCHES:
            _log.warning(
                "shard %s: its worker died %d times (%s). Searching for the rows that kill it.",
                attempt.spec.name,
                attempt.deaths,
                message,
            )
            self._searches.append(_Search(attempt.spec, attempt.searches + 1))
            self._conclude(self._searches[-1])
        else:
            raise StageError(
                f"shard {attempt.spec.name} failed {attempt.number} times, last: {message}. "
                "Sealed shards stay: run ingest again when the cause is gone."
            )

    def _schedule(self, attempt: _Attempt, times: int) -> None:
        wait_s = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(times - 1, 20)) * random.uniform(0.5, 1.5)
        heapq.heappush(self._waiting, (time.monotonic() + wait_s, next(self._numbers), attempt))

    def _record_probe(self, attempt: _Attempt, *, died: bool) -> None:
        assert attempt.search is not None
        attempt.search.bisection.record(attempt.rows, died)
        self._conclude(attempt.search)

    def _conclude(self, search: _Search) -> None:
        """When a bisection is done, fetch the part without the rows that it found."""
        found, spec = search.bisection, search.spec
        if not found.done:
            return
        self._searches.remove(search)
        if found.excluded:
            _log.warning("shard %s: rows %s kill the worker and are excluded.", spec.name, _ranges(found.excluded))
        if found.only_together:
            _log.warning(
                "shard %s: rows %s kill the worker together, but not alone. The part is fetched one row at a time.",
                spec.name,
                ", ".join(f"{rows.start}-{rows.stop - 1}" for rows in found.only_together),
            )
            spec = replace(spec, config=replace(spec.config, threads=1))
        excluded = tuple(sorted({*spec.excluded, *found.excluded}))
        self._schedule(_Attempt(replace(spec, excluded=excluded), searches=search.number), 1)


def _counts(failed: dict[str, int]) -> str:
    return ", ".join(f"{reason} {rows}" for reason, rows in Counter(failed).most_common())


def _ranges(rows: list[int]) -> str:
    """Formats ascending numbers: `3, 7-9`."""
    parts = []
    for _, run in itertools.groupby(enumerate(rows), lambda item: item[1] - item[0]):
        numbers = [row for _, row in run]
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(parts)
