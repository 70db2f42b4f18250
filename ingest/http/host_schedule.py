"""The rate limiting algorithm, host by host: connections, request rate, back-off, hosts that are down. No clock, threads or
sockets.

A caller requests a permit for a host with a ticket of its own and the time; each call returns the decisions that have been made
by then. `ingest.http.rate_limiter` drives it for one process, `cluster.ingest.rate_limiter` for a cluster.

Rate: permits of a host start at least a gap apart: `1 / requests_per_s`, or the site's Crawl-delay. A response 429 or 503
doubles the gap, to 1 s at least, and pauses the host for its Retry-After or else for the new gap; each good response halves the
gap again. Connections: at most so many permits are granted at a time, the other requests wait in order of arrival. Down: after
`MAX_FAILURES` failures in a row the host is left alone, for 30 s first and twice as long each time a trial fails. A permit that
was granted before a pause began is still used.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

MAX_FAILURES = 3
"""Consecutive failures after which a host counts as down."""
MIN_DOWN_S, MAX_DOWN_S = 30.0, 600.0
"""Time that a host that is down is left alone: at first, and at most."""
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 600.0
"""Pause of a busy host: at least, and at most, whatever its Retry-After says."""
MAX_HOSTS = 2**15
"""Idle hosts that are remembered, about 20 MB. Unhealthy ones are forgotten last."""

Outcome = Literal["ok", "failed", "busy", "unused"]
"""Outcome of a request: a response; none; 429 or 503; or no request was made."""
Refusal = Literal["host_busy", "host_down"]


@dataclass(frozen=True)
class Limits:
    """The rate limits of a host."""

    connections: int
    requests_per_s: float
    max_hosts: int = MAX_HOSTS
    rates: tuple[tuple[str, float], ...] = ()
    """(domain, requests per second) for domains with a higher limit, subdomains included. The first match counts."""

    def for_host(self, host: str) -> tuple[int, float]:
        """Number of connections and seconds between permits for a host. A domain's own rate scales its connections too."""
        name = host.partition(":")[0]
        for domain, rate in self.rates:
            if name == domain or name.endswith(f".{domain}"):
                return max(1, round(self.connections * rate / self.requests_per_s)), 1 / rate
        return self.connections, 1 / self.requests_per_s


class Decision(NamedTuple):
    """The ticket is granted from `start_s` on, or refused."""

    ticket: Any
    start_s: float = 0.0
    refusal: Refusal | None = None


class _WaitingRequest(NamedTuple):
    deadline_s: float
    hold_s: float


class _GrantedPermit(NamedTuple):
    start_s: float
    expires_s: float


@dataclass(slots=True)
class _Host:
    connections: int
    min_gap_s: float
    gap_s: float
    """Current seconds between permits, adapted to the site's responses."""
    crawl_delay_s: float = 0.0
    next_s: float = -math.inf
    """No permit starts before this."""
    down_until_s: float = -math.inf
    down_s: float = MIN_DOWN_S
    failures: int = 0
    last_verdict_s: float = -math.inf
    """When the host was last found down or busy. Outcomes of permits that started earlier carry no new information."""
    mean_permit_s: float = 0.0
    """Moving average of how long a permit is held."""
    granted: dict[Hashable, _GrantedPermit] = field(default_factory=dict)
    waiting: dict[Hashable, _WaitingRequest] = field(default_factory=dict)


class HostSchedule:
    """The state of all hosts. Each method takes the time, which must not decrease, and returns the decisions made by then.

    Not thread-safe. A ticket is decided once, by the call that requested it or a later one, or never if it is withdrawn by
    `release` before.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._in_use: dict[str, _Host] = {}
        self._healthy: OrderedDict[str, _Host] = OrderedDict()
        self._unhealthy: OrderedDict[str, _Host] = OrderedDict()

    def request(
        self,
        ticket: Hashable,
        host: str,
        now_s: float,
        *,
        wait_s: float,
        hold_s: float = math.inf,
        crawl_delay_s: float = 0.0,
    ) -> list[Decision]:
        """Request a permit that starts within `wait_s`.

        Refused at once: `host_down`; `host_busy` if the permit is not expected in time, by the gaps and by how long permits are
        held. A permit is held until `release`, or for `hold_s` after its start, when its holder is presumed dead.
        """
        state = self._in_use.get(host) or self._get_or_create(host)
        state.crawl_delay_s = crawl_delay_s
        if now_s < state.down_until_s or (state.failures >= MAX_FAILURES and state.granted):
            decisions = [Decision(ticket, refusal="host_down")]
        elif self._expected_start_s(state, now_s) > now_s + wait_s:
            decisions = [Decision(ticket, refusal="host_busy")]
        else:
            state.waiting[ticket] = _WaitingRequest(now_s + wait_s, hold_s)
            decisions = self._grant(state, now_s)
        self._park(host, state)
        return decisions

    def release(
        self, ticket: Hashable, host: str, now_s: float, outcome: Outcome, retry_after_s: float = 0.0
    ) -> list[Decision]:
        """Return a permit, or withdraw a waiting ticket. An unknown ticket is ignored."""
        state = self._in_use.get(host)
        if state is None:
            return []
        state.waiting.pop(ticket, None)
        if (permit := state.granted.pop(ticket, None)) is not None:
            self._update(state, permit, now_s, outcome, retry_after_s)
        decisions = self._refuse(state, "host_busy", state.next_s) if outcome == "busy" else []
        decisions += self._grant(state, now_s)
        self._park(host, state)
        return decisions

    def expire(self, now_s: float) -> list[Decision]:
        """Take back expired permits and refuse requests that have waited too long. Scans all hosts in use."""
        decisions = []
        for host, state in list(self._in_use.items()):
            for ticket in [ticket for ticket, permit in state.granted.items() if permit.expires_s <= now_s]:
                del state.granted[ticket]
            decisions += self._refuse(state, "host_busy", now_s)
            decisions += self._grant(state, now_s)
            self._park(host, state)
        return decisions

    def __len__(self) -> int:
        """Number of hosts that are remembered."""
        return len(self._in_use) + len(self._healthy) + len(self._unhealthy)

    def _gap(self, state: _Host) -> float:
        return max(state.gap_s, state.crawl_delay_s)

    def _expected_start_s(self, state: _Host, now_s: float) -> float:
        """When the next request would get its permit, behind those that wait."""
        ahead = len(state.waiting)
        by_rate_s = max(now_s, state.next_s) + ahead * self._gap(state)
        must_end = len(state.granted) + ahead + 1 - state.connections
        by_connections_s = now_s + max(must_end, 0) * state.mean_permit_s / state.connections
        return max(by_rate_s, by_connections_s)

    def _grant(self, state: _Host, now_s: float) -> list[Decision]:
        """Grant permits to waiting requests, in order, as far as connections allow."""
        if now_s < state.down_until_s:
            return self._refuse(state, "host_down")
        decisions = []
        connections = 1 if state.failures >= MAX_FAILURES else state.connections
        while state.waiting and len(state.granted) < connections:
            ticket = next(iter(state.waiting))
            wait = state.waiting.pop(ticket)
            start_s = max(now_s, state.next_s)
            if start_s > wait.deadline_s:
                decisions.append(Decision(ticket, refusal="host_busy"))
                continue
            state.next_s = start_s + self._gap(state)
            state.granted[ticket] = _GrantedPermit(start_s, start_s + wait.hold_s)
            decisions.append(Decision(ticket, start_s))
        return decisions

    def _refuse(self, state: _Host, refusal: Refusal, until_s: float = math.inf) -> list[Decision]:
        """Refuse the requests whose deadline is before `until_s`."""
        late = [ticket for ticket, wait in state.waiting.items() if wait.deadline_s < until_s]
        for ticket in late:
            del state.waiting[ticket]
        return [Decision(ticket, refusal=refusal) for ticket in late]

    def _update(
        self, state: _Host, permit: _GrantedPermit, now_s: float, outcome: Outcome, retry_after_s: float
    ) -> None:
        if outcome == "unused":
            return
        held_s = max(now_s - permit.start_s, 0.0)
        state.mean_permit_s = 0.75 * state.mean_permit_s + 0.25 * held_s if state.mean_permit_s else held_s
        is_current = permit.start_s >= state.last_verdict_s
        if outcome == "failed":
            if is_current:
                state.failures += 1
            if is_current and state.failures >= MAX_FAILURES:
                state.last_verdict_s, state.down_until_s = now_s, now_s + state.down_s
                state.down_s = min(2 * state.down_s, MAX_DOWN_S)
            return
        # Any response shows that the host is up.
        state.failures, state.down_s, state.down_until_s = 0, MIN_DOWN_S, -math.inf
        if outcome == "ok":
            state.gap_s = max(state.gap_s / 2, state.min_gap_s)
            return
        if is_current:
            state.last_verdict_s = now_s
            state.gap_s = max(min(max(2 * state.gap_s, MIN_PAUSE_S), MAX_PAUSE_S), state.min_gap_s)
        pause_s = min(retry_after_s, MAX_PAUSE_S) if retry_after_s > 0 else state.gap_s
        state.next_s = max(state.next_s, now_s + pause_s)

    def _get_or_create(self, host: str) -> _Host:
        state = self._healthy.pop(host, None) or self._unhealthy.pop(host, None)
        if state is None:
            connections, gap_s = self.limits.for_host(host)
            state = _Host(connections, gap_s, gap_s)
        self._in_use[host] = state
        return state

    def _park(self, host: str, state: _Host) -> None:
        """Move a host out of use when nothing is requested of it, and forget another one beyond `max_hosts`."""
        if state.granted or state.waiting:
            return
        del self._in_use[host]
        is_unhealthy = state.failures or self._gap(state) > state.min_gap_s
        (self._unhealthy if is_unhealthy else self._healthy)[host] = state
        if len(self._healthy) + len(self._unhealthy) > self.limits.max_hosts:
            (self._healthy or self._unhealthy).popitem(last=False)
