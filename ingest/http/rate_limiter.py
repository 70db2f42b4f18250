"""The turns that this process takes at hosts: `enter` waits for one, `leave` gives it back. Thread-safe.

The rules stand in `host_schedule.py`. `cluster.ingest.rate_limiter.DeskHosts` has the same interface and shares turns with
other processes.
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
"""Reasons by which a request has failed as far as its host is concerned: `leave(host, failed=reason in DOWN_REASONS)`."""
_DEFAULT_PORTS = (":80", ":443")
_LONGEST_NAME = 300
_SAID = {
    "host_busy": "no turn at {host} within the deadline: others wait there, or it asked for a pause",
    "host_down": "{host} has failed several times in a row and is left alone for a while",
}


def site(host: str) -> str:
    """The name by which turns at a host are counted: lower case, without a last dot, with any port but 80 and 443.

    Other ports count for themselves, so that a URL with a dead port does not close the whole host. Raises `FetchError("bad_url")`
    for a name that is none.
    """
    name = host.lower()
    for port in _DEFAULT_PORTS:
        name = name.removesuffix(port)
    name = name.removesuffix(".")
    if not name or len(name) > _LONGEST_NAME:
        raise FetchError("bad_url", f"expected the name of a host, got {host[:40]!r} of {len(host)} characters")
    return name


class Waiter:
    """A thread that waits for its turn."""

    def __init__(self, host: str, deadline_s: float, crawl_delay_s: float):
        self.host, self.deadline_s, self.crawl_delay_s = host, deadline_s, crawl_delay_s
        self.decision: Decision | None = None
        self.decided = threading.Event()

    def tell(self, decision: Decision) -> None:
        self.decision = decision
        self.decided.set()


class Permit(NamedTuple):
    """A turn that was entered and not left: its ticket, who gave it, when it was entered."""

    ticket: int
    desk: object
    since_s: float


class RateLimiter:
    """Turns at hosts by `policy.host_connections` and `policy.host_requests_per_s`."""

    def __init__(self, policy: FetchPolicy):
        self._table = HostSchedule(Limits(policy.host_connections, policy.host_requests_per_s, rates=policy.rates))
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._waiters: dict[int, Waiter] = {}
        self._held: defaultdict[str, list[Permit]] = defaultdict(list)
        self._counts = HostCounts()

    def enter(self, host: str, deadline_s: float, *, crawl_delay_s: float = 0.0) -> None:
        """Wait for a turn at a host, `name` or `name:port`. `leave` it in any case, in whichever thread, and before the next is
        entered: a redirect to the same host would wait for itself.

        Args:
            deadline_s: By the clock of `time.monotonic`.
            crawl_delay_s: What the site's robots.txt asks for between two requests.

        Raises `FetchError`: `host_busy` as soon as it is clear that the turn does not come in time, `host_down` at once.
        """
        host = site(host)
        ticket = next(self._tickets)
        waiter = Waiter(host, deadline_s, crawl_delay_s)
        decision, desk = self._decide(ticket, waiter)
        if decision.refusal is not None:
            with self._lock:
                self._counts.add(host, HostCount(refused=1))
            raise FetchError(decision.refusal, _SAID[decision.refusal].format(host=host))
        if (early_s := decision.start_s - time.monotonic()) > 0:
            time.sleep(early_s)
        with self._lock:
            self._held[host].append(Permit(ticket, desk, time.monotonic()))

    def leave(
        self, host: str, *, failed: bool = False, busy: bool = False, retry_after_s: float = 0.0, size_bytes: int = 0
    ) -> None:
        """Give a turn back.

        Args:
            failed: There was no answer (`DOWN_REASONS`).
            busy: The answer was 429 or 503; `retry_after_s` is its Retry-After, where it has one.
            size_bytes: What was read, for the report.

        Raises `RuntimeError` for a host of which no turn is held.
        """
        host = site(host)
        now_s = time.monotonic()
        with self._lock:
            held = self._held.get(host)
            if not held:
                raise RuntimeError(f"leave({host!r}): expected a turn that was entered and not left yet, got none.")
            turn = held.pop(0)
            if not held:
                del self._held[host]
            count = HostCount(requests=1, failures=failed, busy=busy, seconds=now_s - turn.since_s, bytes=size_bytes)
            self._counts.add(host, count)
        outcome: Outcome = "failed" if failed else "busy" if busy else "ok"
        self._give_back(turn, host, outcome, retry_after_s)

    def take_counts(self) -> HostCounts:
        """What was counted since the last call, by host."""
        with self._lock:
            counts, self._counts = self._counts, HostCounts()
        return counts

    def _decide(self, ticket: int, waiter: Waiter) -> tuple[Decision, object]:
        """Wait until it is decided, by whom is the second."""
        with self._lock:
            now_s = time.monotonic()
            self._waiters[ticket] = waiter
            wait_s = waiter.deadline_s - now_s
            self._tell(self._table.ask(ticket, waiter.host, now_s, wait_s=wait_s, crawl_delay_s=waiter.crawl_delay_s))
        waiter.decided.wait(None if math.isinf(wait_s) else max(wait_s, 0.0))
        with self._lock:
            self._waiters.pop(ticket, None)
            if waiter.decision is None:
                self._tell(self._table.end(ticket, waiter.host, time.monotonic(), "unused"))
        return waiter.decision or Decision(ticket, refusal="host_busy"), self

    def _give_back(self, turn: Permit, host: str, outcome: Outcome, retry_after_s: float) -> None:
        with self._lock:
            self._tell(self._table.end(turn.ticket, host, time.monotonic(), outcome, retry_after_s))

    def _tell(self, decided: list[Decision]) -> None:
        for decision in decided:
            if waiter := self._waiters.get(decision.ticket):
                waiter.tell(decision)
