"""Has parts made into shards by Ray tasks: few in flight, tried again when they fail, bisected when they kill.

How a task ended decides what is done with its part:

    lost      with its node or its input: again, as often as it takes
    failed    with an error: again, `ingest.shard_retries` times, then the ingest ends
    died      its process ended, by itself or for want of memory: as above, with a smaller window; and if it died each time,
              the rows that do it are looked for (`cluster/ingest/recovery.py`) and left out

Each further try waits, twice as long as the one before, give or take a half.
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
from cluster.ingest.task import Order, TaskResult, probe, seal_part
from cluster.monitoring.publisher import count
from cluster.ray.failures import Failure, cause_of, kind_of, words_of
from ingest.folder.lease import Lease
from roclip.config import Config
from roclip.data.shards import ShardRecord
from roclip.errors import DataError, RunLockedError, StageError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
SHORT_MEMORY_FRAC = 0.1
"""A node with less of its memory free is short of it."""
MOST_SEARCHES = 3
_POLL_S = 0.25
_CANCEL_S = 30.0
_log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818  # no error: somebody asked for it
    """The stop event was set."""


@dataclass
class _Try:
    """One task of a part, or of some of its rows."""

    order: Order
    attempt: int = 1
    deaths: int = 0
    losses: int = 0
    search: "_Search | None" = None
    rows: range = range(0)
    """Of the part, which `search` wants to be tried."""
    searches: int = 0
    """Bisections of this part so far; what they have found is left out."""
    round: int = 0


@dataclass
class _Search:
    """The bisection of one part."""

    order: Order
    number: int
    """Of this part's bisections, from 1: a row may have been out of reach while it was tried."""
    bisection: Bisection = field(init=False)

    def __post_init__(self) -> None:
        self.bisection = Bisection(len(self.order.part.table))


class Tasks:
    """
    Args:
        run: For the names of the tasks, `ingest <run> part <number>`, and for the metrics.
        stop: Ends `run` by `Stopped`.
        on_sealed: Told each shard that was sealed.
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
        self._in_flight: dict[Any, _Try] = {}
        self._waiting: list[tuple[float, int, _Try]] = []
        self._searches: list[_Search] = []
        self._numbers = itertools.count()

    def run(self, orders: Iterable[Order]) -> None:
        """Have all of them sealed. No more of `orders` is taken than the window has room for.

        Raises `Stopped`, `RunLockedError` when the lease is lost, `DataError` for a part with too many bad images, and
        `StageError` for one that failed too often.
        """
        feed = iter(orders)
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
        """End the tasks that are still in flight; returns when they have ended."""
        tasks = list(self._in_flight)
        self._in_flight.clear()
        self._waiting.clear()
        self._searches.clear()
        if not tasks or not ray.is_initialized():
            return
        for task in tasks:
            ray.cancel(task, force=True)
        ray.wait(tasks, num_returns=len(tasks), timeout=_CANCEL_S)

    def _fill(self, feed: Iterator[Order]) -> None:
        while len(self._in_flight) < self.window.size and (one := self._next(feed)) is not None:
            one.round = self.window.round
            self._in_flight[self._submit(one)] = one

    def _next(self, feed: Iterator[Order]) -> _Try | None:
        if self._waiting and self._waiting[0][0] <= time.monotonic():
            return heapq.heappop(self._waiting)[2]
        for search in self._searches:
            if (rows := search.bisection.next()) is not None:
                return _Try(search.order.only(rows), search=search, rows=rows)
        order = next(feed, None)
        return None if order is None else _Try(order)

    def _submit(self, one: _Try) -> Any:
        cluster, number = self.config.cluster, one.order.part.number
        rows = f", rows {one.rows.start} to {one.rows.stop - 1}" if one.search else ""
        options = {
            "name": f"ingest {self.run_name} part {number}{rows}",
            "num_cpus": cluster.cpus_per_ingest_task,
            "resources": {cluster.ingest_resource: 1} if cluster.ingest_resource else None,
            "max_retries": 0,  # done here, where it is known why
            "scheduling_strategy": "SPREAD",
            # Workers of their own: in them webdataset found no torch, which nobody else should inherit.
            "runtime_env": {"env_vars": {"ROCLIP_ROOM": "ingest"}},
        }
        return ray.remote(probe if one.search else seal_part).options(**options).remote(one.order)

    def _wait(self) -> None:
        if not self._in_flight:
            time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=_POLL_S)
        for task in ready:
            one = self._in_flight.pop(task)
            try:
                outcome = ray.get(task)
            except RayError as error:
                self._failed(one, error)
                continue
            self.window.succeeded()
            if one.search:
                self._told(one, died=False)
            else:
                self._take_in(one, outcome)

    def _take_in(self, one: _Try, outcome: TaskResult) -> None:
        if outcome.free_memory_frac < SHORT_MEMORY_FRAC:
            self.window.shrink(one.round)
        if outcome.record is not None:
            count_sealed(self.run_name, outcome.record)
            self.hosts.add(outcome.bad_hosts)
            self.on_sealed(outcome.record)
        elif outcome.samples or outcome.bad_frac:
            raise DataError(
                f"shard {one.order.name}: expected at most {one.order.max_bad_frac:.1%} of what arrived to be of no use, got "
                f"{outcome.bad_frac:.1%}; of {len(one.order.part.table)} URLs: {_counts(outcome.failed)}. "
                "Look at these URLs, or raise data.max_bad_frac."
            )
        else:
            said = f"none of {len(one.order.part.table)} URLs arrived: {_counts(outcome.failed)}"
            self._again(one, "failed", said)

    def _failed(self, one: _Try, error: RayError) -> None:
        if isinstance(cause := cause_of(error), RunLockedError):
            raise cause
        kind = kind_of(error)
        if kind in ("memory", "died"):
            self.window.shrink(one.round)
            if one.search:
                count("roclip_ingest_task_failures", run=self.run_name, how=kind)
                self._told(one, died=True)
                return
        self._again(one, kind, words_of(error))

    def _again(self, one: _Try, kind: Failure, said: str) -> None:
        count("roclip_ingest_task_failures", run=self.run_name, how=kind)
        if kind == "lost":
            one.losses += 1
            self._later(one, one.losses)
            return
        one.deaths += kind in ("memory", "died")
        if one.attempt <= self.config.ingest.shard_retries:
            one.attempt += 1
            self._later(one, one.attempt - 1)
        elif one.deaths == one.attempt and one.searches < MOST_SEARCHES:
            _log.warning(
                "shard %s: its worker died %d times (%s). The rows that do it are looked for.",
                one.order.name,
                one.deaths,
                said,
            )
            self._searches.append(_Search(one.order, one.searches + 1))
            self._conclude(self._searches[-1])
        else:
            raise StageError(
                f"shard {one.order.name} failed {one.attempt} times, last: {said}. "
                "What is sealed stays: run ingest again when the cause is gone."
            )

    def _later(self, one: _Try, times: int) -> None:
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(times - 1, 20)) * random.uniform(0.5, 1.5)
        heapq.heappush(self._waiting, (time.monotonic() + wait_s, next(self._numbers), one))

    def _told(self, one: _Try, *, died: bool) -> None:
        assert one.search is not None
        one.search.bisection.tell(one.rows, died)
        self._conclude(one.search)

    def _conclude(self, search: _Search) -> None:
        """Fetch the part without the rows that a bisection has found, once it has ended."""
        found, order = search.bisection, search.order
        if not found.done:
            return
        self._searches.remove(search)
        if found.left_out:
            _log.warning("shard %s: rows %s kill the worker and are left out.", order.name, _ranges(found.left_out))
        if found.together:
            _log.warning(
                "shard %s: rows %s kill the worker together, and none of them alone. The part is fetched one row at a time.",
                order.name,
                ", ".join(f"{rows.start}-{rows.stop - 1}" for rows in found.together),
            )
            order = replace(order, config=replace(order.config, threads=1))
        left_out = tuple(sorted({*order.left_out, *found.left_out}))
        self._later(_Try(replace(order, left_out=left_out), searches=search.number), 1)


def _counts(failed: dict[str, int]) -> str:
    return ", ".join(f"{reason} {rows}" for reason, rows in Counter(failed).most_common())


def _ranges(rows: list[int]) -> str:
    """Ascending numbers in words: `3, 7-9`."""
    words = []
    for _, run in itertools.groupby(enumerate(rows), lambda item: item[1] - item[0]):
        numbers = [row for _, row in run]
        words.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(words)
