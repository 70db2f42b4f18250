"""Limits this process's requests per host: `acquire` waits for a permit, `release` returns it. Thread-safe.

The algorithm is in `host_schedule.py`. `cluster.ingest.rate_limiter.SharedRateLimiter` has the same interface and shares its
limits with other processes.
"""

import itertools
import math
import threading
import time
from collections import defaultdict
from typing import NamedTuple

from ingest.http.host_counts import HostCount, HostCounts
from ingest.http.host_schedule import Decision, HostSchedule, Limits, Outcome
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError

DOWN_REASONS = frozenset({"no_host", "timeout", "too_slow", "connection_refused", "connection_reset", "unreachable"})
"""Reasons that count as a failure of the host: `release(host, failed=reason in DOWN_REASONS)`."""
_DEFAULT_PORTS = (":80", ":443")
_MAX_NAME_CHARS = 300
_MESSAGES = {
    "host_busy": "no permit for {host} within the deadline: others wait for it, or it asked for a pause",
    "host_down": "{host} has failed several times in a row and is left alone for a while",
}


def site(host: str) -> str:
    """The name under which a host's permits are counted: lower case, without trailing dot, with any port but 80 and 443.

    Other ports count for themselves, so that a URL with a dead port does not block the whole host. Raises `FetchError("bad_url")`
    for an empty or overlong name.
    """
    name = host.lower()
    for port in _DEFAULT_PORTS:
        name = name.removesuffix(port)
    name = name.removesuffix(".")
    if not name or len(name) > _MAX_NAME_CHARS:
        raise FetchError("bad_url", f"expected a host name, got {host[:40]!r} of {len(host)} characters")
    return name


class Waiter:
    """A thread that waits for its permit."""

    def __init__(self, host: str, deadline_s: float, crawl_delay_s: float):
        self.host, self.deadline_s, self.crawl_delay_s = host, deadline_s, crawl_delay_s
        self.decision: Decision | None = None
        self.is_decided = threading.Event()

    def decide(self, decision: Decision) -> None:
        self.decision = decision
        self.is_decided.set()


class Permit(NamedTuple):
    """A permit that was acquired and not yet released."""

    ticket: int
    issuer: object
    since_s: float


class RateLimiter:
    """Permits per host, by `policy.host_connections` and `policy.host_requests_per_s`."""

    def __init__(self, policy: FetchPolicy):
        self._schedule = HostSchedule(Limits(policy.host_connections, policy.host_requests_per_s, rates=policy.rates))
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._waiters: dict[int, Waiter] = {}
        self._held: defaultdict[str, list[Permit]] = defaultdict(list)
        self._counts = HostCounts()

    def acquire(self, host: str, deadline_s: float, *, crawl_delay_s: float = 0.0) -> None:
        """Wait for a permit of a host, `name` or `name:port`.

        Always `release` it, from any thread, and before the next one is acquired: a redirect to the same host would wait for
        itself.

        Args:
            deadline_s: Latest start, by the clock of `time.monotonic`.
            crawl_delay_s: Seconds between two requests that the site's robots.txt asks for.

        Raises `FetchError`: `host_busy` as soon as it is clear that the permit will not come in time, `host_down` at once.
        """
        host = site(host)
        ticket = next(self._tickets)
        waiter = Waiter(host, deadline_s, crawl_delay_s)
        decision, issuer = self._decide(ticket, waiter)
        if decision.refusal is not None:
            with self._lock:
                self._counts.add(host, HostCount(refused=1))
            raise FetchError(decision.refusal, _MESSAGES[decision.refusal].format(host=host))
        if (early_s := decision.start_s - time.monotonic()) > 0:
            time.sleep(early_s)
        with self._lock:
            self._held[host].append(Permit(ticket, issuer, time.monotonic()))

    def release(
        self, host: str, *, failed: bool = False, busy: bool = False, retry_after_s: float = 0.0, size_bytes: int = 0
    ) -> None:
        """Return a permit.

        Args:
            failed: There was no response (`DOWN_REASONS`).
            busy: The response was 429 or 503; `retry_after_s` is its Retry-After, or 0.
            size_bytes: Bytes received, for the report.

        Raises `RuntimeError` if no permit of the host is held.
        """
        host = site(host)
        now_s = time.monotonic()
        with self._lock:
            held = self._held.get(host)
            if not held:
                raise RuntimeError(
                    f"release({host!r}): expected a permit that was acquired and not released, got none."
                )
            permit = held.pop(0)
            if not held:
                del self._held[host]
            count = HostCount(requests=1, failures=failed, busy=busy, seconds=now_s - permit.since_s, bytes=size_bytes)
            self._counts.add(host, count)
        outcome: Outcome = "failed" if failed else "busy" if busy else "ok"
        self._give_back(permit, host, outcome, retry_after_s)

    def take_counts(self) -> HostCounts:
        """The counts per host since the last call."""
        with self._lock:
            counts, self._counts = self._counts, HostCounts()
        return counts

    def _decide(self, ticket: int, waiter: Waiter) -> tuple[Decision, object]:
        """Wait for the decision. Returns it and who made it."""
        with self._lock:
            now_s = time.monotonic()
            self._waiters[ticket] = waiter
            wait_s = waiter.deadline_s - now_s
            self._deliver(
                self._schedule.request(ticket, waiter.host, now_s, wait_s=wait_s, crawl_delay_s=waiter.crawl_delay_s)
            )
        waiter.is_decided.wait(None if math.isinf(wait_s) else max(wait_s, 0.0))
        with self._lock:
            self._waiters.pop(ticket, None)
            if waiter.decision is None:
                self._deliver(self._schedule.release(ticket, waiter.host, time.monotonic(), "unused"))
        return waiter.decision or Decision(ticket, refusal="host_busy"), self

    def _give_back(self, permit: Permit, host: str, outcome: Outcome, retry_after_s: float) -> None:
        with self._lock:
            self._deliver(self._schedule.release(permit.ticket, host, time.monotonic(), outcome, retry_after_s))

    def _deliver(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if waiter := self._waiters.get(decision.ticket):
                waiter.decide(decision)
