"""One limit per site for a whole cluster: an actor that gives turns at hosts, and what fetching processes ask it through.

A process that fetches has `SharedRateLimiter`, which has the interface of `ingest.http.rate_limiter.RateLimiter`. Its threads'
questions and what they
give back travel together: after a call, a process is silent for `SILENCE` times as long as the call took, so the busier a desk
is, the more each call carries. The desk answers "in so many seconds", never with a time: clocks differ. The rules are
`ingest.http.host_schedule`'s on both sides.

What dies: a process, whose turns expire at the desk; the desk, which Ray restarts empty. Until it answers again each process
keeps the limits for itself alone, and says so once. Ray does not repeat calls: a turn that was given to nobody would be held.

Several desks share the hosts by the hash of their names.
"""

import contextlib
import logging
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ingest.http.host_schedule import Decision, HostSchedule, Limits, Outcome, Refusal
from ingest.http.rate_limiter import Permit, RateLimiter, Waiter
from roclip.config import FetchPolicy

SILENCE, SHORTEST_SILENCE_S, LONGEST_SILENCE_S = 10, 0.01, 0.1
PICK_UP_S = 0.05
"""So often it looks whether a turn that it waits for has come, while nothing else is to be said."""
ANSWER_S = 5.0
"""A desk that has not answered by then is away."""
NODES_PER_DESK = 10
SEARCH_EVERY_S = 2.0
GRACE_S = 5.0
"""A turn is held to be lost so long after its longest time."""
MAX_HOSTS_AT_DESK = 2**18
_ADVANCE_EVERY_S = 1.0
_SILENT_S = 60.0
_log = logging.getLogger(__name__)

Ask = tuple[int, str, float, float]
"""Ticket, host, longest wait in s, Crawl-delay in s."""
End = tuple[int, str, Outcome, float]
"""Ticket, host, outcome, Retry-After in s."""
Answer = tuple[int, float, Refusal | None]
"""Ticket, wait in s, or why there is no turn."""


class HostRateLimiter:
    """The actor: turns at hosts, for all processes of an ingest."""

    def __init__(self, limits: Limits, hold_s: float):
        self._table, self._hold_s = HostSchedule(limits), hold_s
        self._decided: dict[str, list[Decision]] = {}
        self._seen_s: dict[str, float] = {}
        self._advanced_s = time.monotonic()

    def exchange(self, client: str, asks: list[Ask], ends: list[End]) -> list[Answer]:
        """What a process gives back and wants; what has been decided for it since it last asked."""
        now_s = time.monotonic()
        self._seen_s[client] = now_s
        if now_s - self._advanced_s >= _ADVANCE_EVERY_S:
            self._advance(now_s)
        for ticket, host, outcome, retry_after_s in ends:
            self._note(self._table.end((client, ticket), host, now_s, outcome, retry_after_s))
        for ticket, host, wait_s, crawl_delay_s in asks:
            self._note(
                self._table.ask(
                    (client, ticket), host, now_s, wait_s=wait_s, hold_s=self._hold_s, crawl_delay_s=crawl_delay_s
                )
            )
        return [
            (ticket[1], max(start_s - now_s, 0.0), refusal)
            for ticket, start_s, refusal in self._decided.pop(client, [])
        ]

    def _advance(self, now_s: float) -> None:
        self._advanced_s = now_s
        self._note(self._table.advance(now_s))
        for client in [client for client, seen_s in self._seen_s.items() if now_s - seen_s > _SILENT_S]:
            del self._seen_s[client]
            self._decided.pop(client, None)

    def _note(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            self._decided.setdefault(decision.ticket[0], []).append(decision)


def desks_needed() -> int:
    """Desks for the cluster as it is now: each is a core's work for about ten nodes that fetch."""
    return 1 + sum(node["Alive"] for node in ray.nodes()) // NODES_PER_DESK


@contextlib.contextmanager
def host_desks(policy: FetchPolicy, name: str, number: int = 1) -> Iterator[tuple[str, ...]]:
    """Open the desks of an ingest beside this driver, and close them in the end. Yields their names, for `SharedRateLimiter`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    most_hosts = MAX_HOSTS_AT_DESK // number
    limits = Limits(policy.host_connections, policy.host_requests_per_s, most_hosts, policy.rates)
    unique = uuid.uuid4().hex[:8]
    names = tuple(f"hosts of {name}, desk {desk} ({unique})" for desk in range(number))
    actor: Any = ray.remote(HostRateLimiter)
    desks = [
        actor.options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here).remote(
            limits, policy.deadline_s + GRACE_S
        )
        for name in names
    ]
    try:
        ray.get([desk.exchange.remote("", [], []) for desk in desks])  # they are there
        yield names
    finally:
        for desk in desks:
            ray.kill(desk)


class SharedRateLimiter(RateLimiter):
    """Turns at hosts, from the desks of `names`. Use it in a `with` block: in the end what is still to be said is said.

    Beyond the limits: the desk's answer takes its way, so two requests that the desk put a gap apart may be closer by as much as
    two answers differ; and while no desk answers, the limits are those of one process.
    """

    def __init__(self, policy: FetchPolicy, names: tuple[str, ...]):
        super().__init__(policy)
        self._lines = [_Line(name) for name in names]

    def __enter__(self) -> "SharedRateLimiter":
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines:
            line.close()

    def _decide(self, ticket: int, waiter: Waiter) -> tuple[Decision, object]:
        line = self._lines[zlib.crc32(waiter.host.encode()) % len(self._lines)]
        decision = line.ask(ticket, waiter)
        if decision is not None:
            return decision, line
        return super()._decide(ticket, Waiter(waiter.host, waiter.deadline_s, waiter.crawl_delay_s))

    def _give_back(self, turn: Permit, host: str, outcome: Outcome, retry_after_s: float) -> None:
        if isinstance(turn.desk, _Line):
            turn.desk.end(turn.ticket, host, outcome, retry_after_s)
        else:
            super()._give_back(turn, host, outcome, retry_after_s)


class _Line:
    """One desk, as one process talks with it: a thread that carries the words of all others."""

    def __init__(self, name: str):
        self._name, self._client = name, uuid.uuid4().hex
        self._desk: Any = None
        self._changed = threading.Condition()
        self._asks: list[int] = []
        self._ends: list[End] = []
        self._waiters: dict[int, Waiter] = {}
        """Those whose ticket is to be sent, or was and is not decided."""
        self._away_until_s: float | None = None
        self._silent_until_s = 0.0
        self._closed = self._has_said = False
        self._thread = threading.Thread(target=self._talk, name=name, daemon=True)
        self._thread.start()

    def ask(self, ticket: int, waiter: Waiter) -> Decision | None:
        """Wait for the desk's decision. None: it is away."""
        with self._changed:
            if self._away_until_s is not None:
                if time.monotonic() >= self._away_until_s:
                    self._changed.notify()  # somebody needs it: look for it again
                return None
            self._waiters[ticket] = waiter
            self._asks.append(ticket)
            self._changed.notify()
        waiter.decided.wait(min(max(waiter.deadline_s - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
        with self._changed:
            if waiter.decided.is_set():
                return waiter.decision
            del self._waiters[ticket]
            self._ends.append((ticket, waiter.host, "unused", 0.0))
        return Decision(ticket, refusal="host_busy")

    def end(self, ticket: int, host: str, outcome: Outcome, retry_after_s: float) -> None:
        """Give a turn back, with the next call."""
        with self._changed:
            if self._away_until_s is None:
                self._ends.append((ticket, host, outcome, retry_after_s))
                self._changed.notify()

    def close(self) -> None:
        """Say the rest and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(2 * ANSWER_S)

    def _talk(self) -> None:
        while self._has_to_say():
            time.sleep(max(self._silent_until_s - time.monotonic(), 0.0))
            asks, ends = self._collect()
            begun_s = time.monotonic()
            try:
                self._desk = self._desk or ray.get_actor(self._name)
                answers = ray.get(self._desk.exchange.remote(self._client, asks, ends), timeout=ANSWER_S)
            except (RayError, ValueError) as error:  # ValueError: no actor of that name
                self._lose(error)
            else:
                self._tell(answers)
            now_s = time.monotonic()
            silence_s = min(max(SILENCE * (now_s - begun_s), SHORTEST_SILENCE_S), LONGEST_SILENCE_S)
            self._silent_until_s = now_s + silence_s

    def _has_to_say(self) -> bool:
        """Wait until there is something to say or to hear; False when the line is closed and all is said."""
        with self._changed:
            if self._away_until_s is not None:
                self._changed.wait_for(lambda: self._closed or self._is_missed(), None)
                return not self._closed
            if not (self._asks or self._ends or self._closed):
                self._changed.wait(PICK_UP_S if self._waiters else None)
            return not self._closed or bool(self._asks or self._ends)

    def _is_missed(self) -> bool:
        return self._away_until_s is not None and time.monotonic() >= self._away_until_s

    def _collect(self) -> tuple[list[Ask], list[End]]:
        with self._changed:
            now_s = time.monotonic()
            asks = [
                (ticket, waiter.host, waiter.deadline_s - now_s, waiter.crawl_delay_s)
                for ticket in self._asks
                if (waiter := self._waiters.get(ticket))
            ]
            ends, self._asks, self._ends = self._ends, [], []
        return asks, ends

    def _tell(self, answers: list[Answer]) -> None:
        with self._changed:
            self._away_until_s = None
            now_s = time.monotonic()
            for ticket, wait_s, refusal in answers:
                if waiter := self._waiters.pop(ticket, None):
                    waiter.tell(Decision(ticket, now_s + wait_s, refusal))

    def _lose(self, error: Exception) -> None:
        with self._changed:
            self._desk = None
            self._away_until_s = time.monotonic() + SEARCH_EVERY_S
            self._asks, self._ends = [], []
            for waiter in self._waiters.values():
                waiter.decided.set()  # without a decision
            self._waiters.clear()
        if not self._has_said:
            self._has_said = True
            _log.warning(
                "%s does not answer (%s): the limits per host hold for this process alone until it is found again.",
                self._name,
                type(error).__name__,
            )
