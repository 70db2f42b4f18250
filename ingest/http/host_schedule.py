"""Whose turn it is, host by host: connections, rate, back-off, hosts that are down. No clock, no threads, no sockets.

A caller asks for a turn at a host with a ticket of its own and the time; what has been decided by then comes back. `Hosts` drives
it for one process, `cluster.ingest.rate_limiter` for a cluster: both by the same code.

Rate: turns at a host are a gap apart. The gap is `1 / requests_per_s`, or the site's Crawl-delay. An answer 429 or 503 doubles
it, to 1 s at least, and pauses the host for Retry-After or else for the new gap; each good answer halves it again. Connections:
so many turns at most are taken at a time, the rest waits in order of arrival. Down: after `FAILURES` failures in a row the host
is left alone, 30 s first and twice as long each time a trial fails. A turn that was given before a pause began is still used.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FAILURES = 3
"""So many failures in a row, and a host is down."""
FIRST_REST_S, LONGEST_REST_S = 30.0, 600.0
"""How long a host that is down is left alone: at first, and at most."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 600.0
"""How long a host that is busy is left alone: at least, and at most, whatever its Retry-After says."""
MAX_HOSTS = 2**15
"""Hosts that are remembered while nothing is asked of them; about 20 MB. Those in trouble are forgotten last."""

Outcome = Literal["ok", "failed", "busy", "unused"]
"""What became of a turn: an answer; none; 429 or 503; nothing was asked."""
Refusal = Literal["host_busy", "host_down"]


@dataclass(frozen=True)
class Limits:
    """What one host may be asked for."""

    connections: int
    requests_per_s: float
    max_hosts: int = MAX_HOSTS
    rates: tuple[tuple[str, float], ...] = ()
    """(domain, requests a second) of those that take more, with what is below them; the first that fits counts."""

    def of(self, host: str) -> tuple[int, float]:
        """Connections and seconds between two turns of a host: where a rate is given, as many more connections."""
        name = host.partition(":")[0]
        for domain, rate in self.rates:
            if name == domain or name.endswith(f".{domain}"):
                return max(1, round(self.connections * rate / self.requests_per_s)), 1 / rate
        return self.connections, 1 / self.requests_per_s


class Decision(NamedTuple):
    """The ticket may go at `start_s`, or not at all."""

    ticket: Any
    start_s: float = 0.0
    refusal: Refusal | None = None


class _Wait(NamedTuple):
    deadline_s: float
    hold_s: float


class _Turn(NamedTuple):
    start_s: float
    expires_s: float


@dataclass(slots=True)
class _Host:
    connections: int
    least_gap_s: float
    gap_s: float
    """Between two turns, as the site's answers have it."""
    crawl_delay_s: float = 0.0
    next_s: float = -math.inf
    """No turn before then."""
    down_until_s: float = -math.inf
    rest_s: float = FIRST_REST_S
    failures: int = 0
    judged_s: float = -math.inf
    """When it was last found down or busy: what began before says nothing new."""
    usual_s: float = 0.0
    """How long a turn takes, as of late."""
    taken: dict[Hashable, _Turn] = field(default_factory=dict)
    waiting: dict[Hashable, _Wait] = field(default_factory=dict)


class HostSchedule:
    """The state of all hosts. Each method takes the time, which never runs backwards, and returns what is decided by it.

    Not thread-safe. A ticket is decided once: by the call that asked for it, or by a later one; or never, where it is withdrawn
    (`end`) before.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._in_use: dict[str, _Host] = {}
        self._calm: OrderedDict[str, _Host] = OrderedDict()
        self._troubled: OrderedDict[str, _Host] = OrderedDict()

    def ask(
        self,
        ticket: Hashable,
        host: str,
        now_s: float,
        *,
        wait_s: float,
        hold_s: float = math.inf,
        crawl_delay_s: float = 0.0,
    ) -> list[Decision]:
        """Ask for a turn that begins within `wait_s`.

        Refused at once: `host_down`; `host_busy` where the turn will hardly come in time, by the gaps and by how long turns take
        there. A turn is taken until `end`, or for `hold_s` after its start: then whoever held it is held to be dead.
        """
        state = self._in_use.get(host) or self._recall(host)
        state.crawl_delay_s = crawl_delay_s
        if now_s < state.down_until_s or (state.failures >= FAILURES and state.taken):
            decided = [Decision(ticket, refusal="host_down")]
        elif self._likely_s(state, now_s) > now_s + wait_s:
            decided = [Decision(ticket, refusal="host_busy")]
        else:
            state.waiting[ticket] = _Wait(now_s + wait_s, hold_s)
            decided = self._grant(state, now_s)
        self._settle(host, state)
        return decided

    def end(
        self, ticket: Hashable, host: str, now_s: float, outcome: Outcome, retry_after_s: float = 0.0
    ) -> list[Decision]:
        """Give a turn back, or withdraw a ticket that waits. A ticket that is not known (any more) is no error."""
        state = self._in_use.get(host)
        if state is None:
            return []
        state.waiting.pop(ticket, None)
        if (turn := state.taken.pop(ticket, None)) is not None:
            self._learn(state, turn, now_s, outcome, retry_after_s)
        decided = self._refuse(state, "host_busy", state.next_s) if outcome == "busy" else []
        decided += self._grant(state, now_s)
        self._settle(host, state)
        return decided

    def advance(self, now_s: float) -> list[Decision]:
        """Take back the turns that have expired and refuse those who waited too long. Looks at all hosts in use."""
        decided = []
        for host, state in list(self._in_use.items()):
            for ticket in [ticket for ticket, turn in state.taken.items() if turn.expires_s <= now_s]:
                del state.taken[ticket]
            decided += self._refuse(state, "host_busy", now_s)
            decided += self._grant(state, now_s)
            self._settle(host, state)
        return decided

    def __len__(self) -> int:
        """Hosts that are remembered."""
        return len(self._in_use) + len(self._calm) + len(self._troubled)

    def _gap(self, state: _Host) -> float:
        return max(state.gap_s, state.crawl_delay_s)

    def _likely_s(self, state: _Host, now_s: float) -> float:
        """When the next one to ask would get its turn; it waits behind those who wait."""
        ahead = len(state.waiting)
        by_rate_s = max(now_s, state.next_s) + ahead * self._gap(state)
        must_end = len(state.taken) + ahead + 1 - state.connections
        by_connections_s = now_s + max(must_end, 0) * state.usual_s / state.connections
        return max(by_rate_s, by_connections_s)

    def _grant(self, state: _Host, now_s: float) -> list[Decision]:
        """Give turns to those who wait, in order, as far as connections allow."""
        if now_s < state.down_until_s:
            return self._refuse(state, "host_down")
        decided = []
        connections = 1 if state.failures >= FAILURES else state.connections
        while state.waiting and len(state.taken) < connections:
            ticket = next(iter(state.waiting))
            wait = state.waiting.pop(ticket)
            start_s = max(now_s, state.next_s)
            if start_s > wait.deadline_s:
                decided.append(Decision(ticket, refusal="host_busy"))
                continue
            state.next_s = start_s + self._gap(state)
            state.taken[ticket] = _Turn(start_s, start_s + wait.hold_s)
            decided.append(Decision(ticket, start_s))
        return decided

    def _refuse(self, state: _Host, refusal: Refusal, until_s: float = math.inf) -> list[Decision]:
        """Those whose deadline is before `until_s`."""
        late = [ticket for ticket, wait in state.waiting.items() if wait.deadline_s < until_s]
        for ticket in late:
            del state.waiting[ticket]
        return [Decision(ticket, refusal=refusal) for ticket in late]

    def _learn(self, state: _Host, turn: _Turn, now_s: float, outcome: Outcome, retry_after_s: float) -> None:
        if outcome == "unused":
            return
        took_s = max(now_s - turn.start_s, 0.0)
        state.usual_s = 0.75 * state.usual_s + 0.25 * took_s if state.usual_s else took_s
        is_news = turn.start_s >= state.judged_s
        if outcome == "failed":
            if is_news:
                state.failures += 1
            if is_news and state.failures >= FAILURES:
                state.judged_s, state.down_until_s = now_s, now_s + state.rest_s
                state.rest_s = min(2 * state.rest_s, LONGEST_REST_S)
            return
        state.failures, state.rest_s, state.down_until_s = 0, FIRST_REST_S, -math.inf  # whatever it said, it is there
        if outcome == "ok":
            state.gap_s = max(state.gap_s / 2, state.least_gap_s)
            return
        if is_news:
            state.judged_s = now_s
            state.gap_s = max(min(max(2 * state.gap_s, FIRST_PAUSE_S), LONGEST_PAUSE_S), state.least_gap_s)
        pause_s = min(retry_after_s, LONGEST_PAUSE_S) if retry_after_s > 0 else state.gap_s
        state.next_s = max(state.next_s, now_s + pause_s)

    def _recall(self, host: str) -> _Host:
        state = self._calm.pop(host, None) or self._troubled.pop(host, None)
        if state is None:
            connections, gap_s = self.limits.of(host)
            state = _Host(connections, gap_s, gap_s)
        self._in_use[host] = state
        return state

    def _settle(self, host: str, state: _Host) -> None:
        """Put a host aside when nothing is asked of it, and forget another where these are too many."""
        if state.taken or state.waiting:
            return
        del self._in_use[host]
        troubled = state.failures or self._gap(state) > state.least_gap_s
        (self._troubled if troubled else self._calm)[host] = state
        if len(self._calm) + len(self._troubled) > self.limits.max_hosts:
            (self._calm or self._troubled).popitem(last=False)
