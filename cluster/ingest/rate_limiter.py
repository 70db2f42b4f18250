"""One rate limit per host for a whole cluster: actors that grant permits, and the client of the processes that fetch.

A process that fetches has a `SharedRateLimiter`, with the interface of `ingest.http.rate_limiter.RateLimiter`. The requests and
releases of its threads are batched: after a call, the process waits `IDLE_FACTOR` times as long as the call took, so the busier
an actor is, the more each call carries. The actor replies "in so many seconds", never with a time, because clocks differ. The
algorithm is that of `ingest.http.host_schedule` on both sides.

If a process dies, its permits expire at the actor. If the actor dies, Ray restarts it empty; until it answers again, each
process keeps the limits on its own and logs a warning once. Ray does not retry these calls: a permit granted to nobody would be
held.

Several actors share the hosts by the hash of the host name.
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

IDLE_FACTOR, MIN_IDLE_S, MAX_IDLE_S = 10, 0.01, 0.1
POLL_S = 0.05
"""How often a client asks for the decision it waits for, when it has nothing else to send."""
REPLY_TIMEOUT_S = 5.0
"""An actor that has not replied by then is considered lost."""
NODES_PER_LIMITER = 10
RECONNECT_S = 2.0
GRACE_S = 5.0
"""A permit expires this long after the longest time that a request may take."""
MAX_HOSTS_TOTAL = 2**18
_EXPIRE_EVERY_S = 1.0
_CLIENT_TIMEOUT_S = 60.0
_log = logging.getLogger(__name__)

PermitRequest = tuple[int, str, float, float]
"""Ticket, host, longest wait in s, Crawl-delay in s."""
PermitRelease = tuple[int, str, Outcome, float]
"""Ticket, host, outcome, Retry-After in s."""
PermitReply = tuple[int, float, Refusal | None]
"""Ticket, wait in s, or why there is no permit."""


class HostRateLimiter:
    """The actor: grants permits for hosts to all processes of an ingest."""

    def __init__(self, limits: Limits, hold_s: float):
        self._schedule, self._hold_s = HostSchedule(limits), hold_s
        self._decided: dict[str, list[Decision]] = {}
        self._last_seen_s: dict[str, float] = {}
        self._expired_s = time.monotonic()

    def exchange(self, client: str, requests: list[PermitRequest], releases: list[PermitRelease]) -> list[PermitReply]:
        """Take a client's releases and requests, and return the decisions made for it since its last call."""
        now_s = time.monotonic()
        self._last_seen_s[client] = now_s
        if now_s - self._expired_s >= _EXPIRE_EVERY_S:
            self._expire(now_s)
        for ticket, host, outcome, retry_after_s in releases:
            self._queue(self._schedule.release((client, ticket), host, now_s, outcome, retry_after_s))
        for ticket, host, wait_s, crawl_delay_s in requests:
            self._queue(
                self._schedule.request(
                    (client, ticket), host, now_s, wait_s=wait_s, hold_s=self._hold_s, crawl_delay_s=crawl_delay_s
                )
            )
        return [
            (ticket[1], max(start_s - now_s, 0.0), refusal)
            for ticket, start_s, refusal in self._decided.pop(client, [])
        ]

    def _expire(self, now_s: float) -> None:
        self._expired_s = now_s
        self._queue(self._schedule.expire(now_s))
        for client in [
            client for client, last_seen_s in self._last_seen_s.items() if now_s - last_seen_s > _CLIENT_TIMEOUT_S
        ]:
            del self._last_seen_s[client]
            self._decided.pop(client, None)

    def _queue(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            self._decided.setdefault(decision.ticket[0], []).append(decision)


def limiters_needed() -> int:
    """Number of actors for the current cluster: each takes one core for about ten nodes that fetch."""
    return 1 + sum(node["Alive"] for node in ray.nodes()) // NODES_PER_LIMITER


@contextlib.contextmanager
def host_rate_limiters(policy: FetchPolicy, name: str, number: int = 1) -> Iterator[tuple[str, ...]]:
    """Start the rate limiter actors of an ingest on this node and kill them at the end. Yields their names, for
    `SharedRateLimiter`.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    max_hosts = MAX_HOSTS_TOTAL // number
    limits = Limits(policy.host_connections, policy.host_requests_per_s, max_hosts, policy.rates)
    unique = uuid.uuid4().hex[:8]
    names = tuple(f"host rate limiter {index} of {name} ({unique})" for index in range(number))
    actor: Any = ray.remote(HostRateLimiter)
    limiters = [
        actor.options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here).remote(
            limits, policy.deadline_s + GRACE_S
        )
        for name in names
    ]
    try:
        ray.get([limiter.exchange.remote("", [], []) for limiter in limiters])  # wait until they have started
        yield names
    finally:
        for limiter in limiters:
            ray.kill(limiter)


class SharedRateLimiter(RateLimiter):
    """Permits from the actors named `names`. Use it in a `with` block, so that pending releases are sent at the end.

    The limits are approximate in two ways: replies take time, so two requests that the actor put a gap apart may be closer by
    the difference of two replies; and while no actor answers, the limits hold per process.
    """

    def __init__(self, policy: FetchPolicy, names: tuple[str, ...]):
        super().__init__(policy)
        self._clients = [_LimiterClient(name) for name in names]

    def __enter__(self) -> "SharedRateLimiter":
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def _decide(self, ticket: int, waiter: Waiter) -> tuple[Decision, object]:
        client = self._clients[zlib.crc32(waiter.host.encode()) % len(self._clients)]
        decision = client.request(ticket, waiter)
        if decision is not None:
            return decision, client
        return super()._decide(ticket, Waiter(waiter.host, waiter.deadline_s, waiter.crawl_delay_s))

    def _give_back(self, permit: Permit, host: str, outcome: Outcome, retry_after_s: float) -> None:
        if isinstance(permit.issuer, _LimiterClient):
            permit.issuer.release(permit.ticket, host, outcome, retry_after_s)
        else:
            super()._give_back(permit, host, outcome, retry_after_s)


class _LimiterClient:
    """This process's connection to one actor: a thread that sends the batched calls of all others."""

    def __init__(self, name: str):
        self._name, self._client = name, uuid.uuid4().hex
        self._actor: Any = None
        self._changed = threading.Condition()
        self._requests: list[int] = []
        self._releases: list[PermitRelease] = []
        self._waiters: dict[int, Waiter] = {}
        """Waiters without a decision, by ticket."""
        self._retry_at_s: float | None = None
        self._idle_until_s = 0.0
        self._closed = self._has_warned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def request(self, ticket: int, waiter: Waiter) -> Decision | None:
        """Wait for the actor's decision. None: the actor is not available."""
        with self._changed:
            if self._retry_at_s is not None:
                if time.monotonic() >= self._retry_at_s:
                    self._changed.notify()  # reconnect only when somebody needs it
                return None
            self._waiters[ticket] = waiter
            self._requests.append(ticket)
            self._changed.notify()
        waiter.is_decided.wait(min(max(waiter.deadline_s - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
        with self._changed:
            if waiter.is_decided.is_set():
                return waiter.decision
            del self._waiters[ticket]
            self._releases.append((ticket, waiter.host, "unused", 0.0))
        return Decision(ticket, refusal="host_busy")

    def release(self, ticket: int, host: str, outcome: Outcome, retry_after_s: float) -> None:
        """Return a permit, with the next call."""
        with self._changed:
            if self._retry_at_s is None:
                self._releases.append((ticket, host, outcome, retry_after_s))
                self._changed.notify()

    def close(self) -> None:
        """Send what is pending and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(2 * REPLY_TIMEOUT_S)

    def _run(self) -> None:
        while self._wait_for_work():
            time.sleep(max(self._idle_until_s - time.monotonic(), 0.0))
            requests, releases = self._take_pending()
            start_s = time.monotonic()
            try:
                self._actor = self._actor or ray.get_actor(self._name)
                replies = ray.get(
                    self._actor.exchange.remote(self._client, requests, releases), timeout=REPLY_TIMEOUT_S
                )
            except (RayError, ValueError) as error:  # ValueError: no actor of that name
                self._disconnect(error)
            else:
                self._deliver(replies)
            now_s = time.monotonic()
            silence_s = min(max(IDLE_FACTOR * (now_s - start_s), MIN_IDLE_S), MAX_IDLE_S)
            self._idle_until_s = now_s + silence_s

    def _wait_for_work(self) -> bool:
        """Wait until there is something to send or to receive. False when the client is closed and everything is sent."""
        with self._changed:
            if self._retry_at_s is not None:
                self._changed.wait_for(lambda: self._closed or self._reconnect_is_due(), None)
                return not self._closed
            if not (self._requests or self._releases or self._closed):
                self._changed.wait(POLL_S if self._waiters else None)
            return not self._closed or bool(self._requests or self._releases)

    def _reconnect_is_due(self) -> bool:
        return self._retry_at_s is not None and time.monotonic() >= self._retry_at_s

    def _take_pending(self) -> tuple[list[PermitRequest], list[PermitRelease]]:
        with self._changed:
            now_s = time.monotonic()
            requests = [
                (ticket, waiter.host, waiter.deadline_s - now_s, waiter.crawl_delay_s)
                for ticket in self._requests
                if (waiter := self._waiters.get(ticket))
            ]
            releases, self._requests, self._releases = self._releases, [], []
        return requests, releases

    def _deliver(self, replies: list[PermitReply]) -> None:
        with self._changed:
            self._retry_at_s = None
            now_s = time.monotonic()
            for ticket, wait_s, refusal in replies:
                if waiter := self._waiters.pop(ticket, None):
                    waiter.decide(Decision(ticket, now_s + wait_s, refusal))

    def _disconnect(self, error: Exception) -> None:
        with self._changed:
            self._actor = None
            self._retry_at_s = time.monotonic() + RECONNECT_S
            self._requests, self._releases = [], []
            for waiter in self._waiters.values():
                waiter.is_decided.set()  # without a decision
            self._waiters.clear()
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s does not reply (%s): the limits per host hold for this process alone until it is back.",
                self._name,
                type(error).__name__,
            )
