"""The rules for turns at hosts, with a clock that the test moves."""

import itertools
import math
from collections import defaultdict

import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.host_schedule import (
    FAILURES,
    FIRST_PAUSE_S,
    FIRST_REST_S,
    LONGEST_PAUSE_S,
    LONGEST_REST_S,
    HostSchedule,
    Limits,
)

A, B = "a.example", "b.example"
EPSILON_S = 1e-6
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from((A, B)), st.floats(0, 40), st.floats(0.1, 20)),
        st.tuples(
            st.just("end"), st.integers(0, 50), st.sampled_from(("ok", "failed", "busy", "unused")), st.floats(0, 900)
        ),
        st.tuples(st.just("pass"), st.floats(0, 60)),
    ),
    max_size=80,
)


class World:
    """Drives a table as its users do, and remembers who holds what since when."""

    def __init__(self, connections=2, requests_per_s=4.0, **limits):
        self.table = HostSchedule(Limits(connections, requests_per_s, **limits))
        self.now_s, self.tickets = 100.0, 0
        self.hosts, self.holds_s, self.starts, self.decided = {}, {}, defaultdict(list), {}
        self.held: dict[int, float] = {}

    def take_in(self, decisions):
        for ticket, start_s, refusal in decisions:
            assert ticket not in self.decided, "decided twice"
            self.decided[ticket] = refusal or "turn"
            if refusal is None:
                assert start_s >= self.now_s
                self.held[ticket] = start_s
                self.starts[self.hosts[ticket]].append(start_s)

    def ask(self, host=A, wait_s=30.0, hold_s=math.inf, **more):
        self.tickets += 1
        self.hosts[self.tickets], self.holds_s[self.tickets] = host, hold_s
        self.take_in(self.table.ask(self.tickets, host, self.now_s, wait_s=wait_s, hold_s=hold_s, **more))
        return self.tickets

    def end(self, ticket, outcome="ok", retry_after_s=0.0):
        self.held.pop(ticket, None)
        self.take_in(self.table.end(ticket, self.hosts[ticket], self.now_s, outcome, retry_after_s))

    def go_on(self, seconds):
        self.now_s += seconds
        self.held = {t: start_s for t, start_s in self.held.items() if start_s + self.holds_s[t] > self.now_s}
        self.take_in(self.table.advance(self.now_s))

    def one(self, outcome="ok", host=A, **more):
        """A turn from asking to its end, begun when it is due; what was decided."""
        ticket = self.ask(host)
        if ticket in self.held:
            self.now_s = max(self.now_s, self.held[ticket])
            self.end(ticket, outcome, **more)
        return self.decided.get(ticket)


@given(steps)
@settings(max_examples=200, **SETTINGS)
def test_connections_and_rate_are_never_exceeded_and_no_one_waits_for_ever(script):
    world = World(connections=2, requests_per_s=4.0)
    for step in script:
        if step[0] == "ask":
            world.ask(step[1], wait_s=step[2], hold_s=step[3])
        elif step[0] == "end" and world.held:
            ticket = sorted(world.held)[step[1] % len(world.held)]
            if world.held[ticket] <= world.now_s:
                world.end(ticket, step[2], step[3])
        elif step[0] == "pass":
            world.go_on(step[1])
        for host in (A, B):
            assert sum(world.hosts[ticket] == host for ticket in world.held) <= 2
    for host in (A, B):
        starts = world.starts[host]
        assert all(late - early >= 0.25 - EPSILON_S for early, late in itertools.pairwise(starts))
    world.go_on(10_000)
    assert sorted(world.decided) == list(range(1, world.tickets + 1))
    assert not world.table._in_use


@given(st.lists(st.sampled_from(("ok", "failed", "busy")), max_size=40))
@settings(max_examples=100, **SETTINGS)
def test_host_comes_back_whatever_it_has_answered(outcomes):
    world = World()
    for outcome in outcomes:
        world.one(outcome)
    world.go_on(LONGEST_REST_S + 1)
    assert world.one("ok") == "turn"
    world.go_on(LONGEST_PAUSE_S + 1)
    assert world.one("ok") == "turn"


def test_turns_are_given_in_the_order_of_arrival():
    world = World(connections=1, requests_per_s=1e9)
    first, second, third = world.ask(), world.ask(), world.ask()
    assert list(world.held) == [first]
    world.end(first)
    assert list(world.held) == [second]
    world.end(second)
    assert list(world.held) == [third]


def test_one_who_withdraws_leaves_its_place():
    world = World(connections=1, requests_per_s=1e9)
    first, second, third = world.ask(), world.ask(), world.ask()
    world.end(second, "unused")
    world.end(first)
    assert list(world.held) == [third]


def test_turn_after_the_deadline_is_refused_at_once_by_the_gaps():
    world = World(connections=100, requests_per_s=1.0)
    fates = [world.decided.get(world.ask(wait_s=4.5)) for _ in range(8)]
    assert fates == ["turn"] * 5 + ["host_busy"] * 3


def test_turn_after_the_deadline_is_refused_at_once_by_how_long_turns_take():
    world = World(connections=2, requests_per_s=1e9)
    for ticket in (world.ask(), world.ask()):
        world.now_s += 5
        world.end(ticket)
    world.ask(), world.ask()
    fates = [world.decided.get(world.ask(wait_s=10)) for _ in range(6)]
    assert fates == [None, None, None, "host_busy", "host_busy", "host_busy"]  # one ends each 3.1 s


def test_turn_that_nobody_gives_back_expires():
    world = World(connections=1)
    dead, waits = world.ask(hold_s=20), world.ask(wait_s=60)
    world.go_on(19)
    assert waits not in world.decided
    world.go_on(2)
    assert world.decided[waits] == "turn"
    world.end(dead)  # it was not dead after all
    assert waits in world.held
    assert world.ask() not in world.held


def test_crawl_delay_is_the_gap():
    world = World(connections=9, requests_per_s=100)
    starts = [world.held[world.ask(crawl_delay_s=2.0)] - world.now_s for _ in range(4)]
    assert starts == [0, 2, 4, 6]
    assert world.decided[world.ask(wait_s=7, crawl_delay_s=2.0)] == "host_busy"


def test_host_is_down_after_failures_in_a_row_and_for_twice_as_long_each_time():
    world = World(requests_per_s=1e9)
    world.one("failed"), world.one("failed"), world.one("ok")
    assert [world.one("failed") for _ in range(FAILURES + 2)] == ["turn"] * FAILURES + ["host_down"] * 2
    rests = []
    for _ in range(7):
        begun_s = world.now_s
        while world.one("failed") == "host_down":
            world.go_on(1.0)
        rests.append(world.now_s - begun_s)
    assert rests == pytest.approx([FIRST_REST_S, 60, 120, 240, 480, LONGEST_REST_S, LONGEST_REST_S], abs=1e-3)
    world.go_on(LONGEST_REST_S)
    assert [world.one("ok") for _ in range(3)] == ["turn"] * 3
    assert world.one("failed", host=B) == "turn"


def test_one_trial_at_a_time_and_a_trial_whose_worker_died_is_no_failure():
    world = World(requests_per_s=1e9)
    for _ in range(FAILURES):
        world.one("failed")
    world.go_on(FIRST_REST_S)
    trial = world.ask(hold_s=10)
    assert trial in world.held
    assert world.decided[world.ask()] == "host_down"
    world.go_on(11)
    assert world.one("ok") == "turn"
    assert {world.ask() in world.held, world.ask() in world.held} == {True}


def test_those_who_wait_learn_at_once_that_the_host_is_down():
    world = World(connections=FAILURES, requests_per_s=1e9)
    running = [world.ask() for _ in range(FAILURES)]
    waiting = [world.ask() for _ in range(5)]
    for ticket in running[:-1]:
        world.held.pop(ticket)
        world.take_in(world.table.end(ticket, A, world.now_s, "failed"))
    world.end(running[-1], "failed")
    assert {world.decided[ticket] for ticket in waiting[2:]} == {"host_down"}


def test_failures_of_turns_that_began_before_count_once():
    world = World(connections=6, requests_per_s=1e9)
    tickets = [world.ask() for _ in range(6)]
    world.go_on(1)
    for ticket in tickets:
        world.end(ticket, "failed")
    world.go_on(FIRST_REST_S)
    assert world.one("ok") == "turn"


def test_retry_after_is_honoured_up_to_a_limit():
    for asked_s, pause_s in (
        (7.0, 7.0),
        (1e9, LONGEST_PAUSE_S),
        (math.inf, LONGEST_PAUSE_S),
        (math.nan, FIRST_PAUSE_S),
    ):
        world = World()
        world.one("busy", retry_after_s=asked_s)
        ticket = world.ask(wait_s=1000)
        assert world.held[ticket] - world.now_s == pytest.approx(pause_s)


def test_pause_without_retry_after_doubles_and_good_answers_halve_it():
    world = World(requests_per_s=10)
    pauses = []
    for outcome in ["busy"] * 5 + ["ok"] * 6:
        begun_s = world.now_s
        assert world.one(outcome) == "turn"
        pauses.append(world.now_s - begun_s)
    assert pauses == pytest.approx([0, 1, 2, 4, 8, 16, 16, 8, 4, 2, 1])


def test_those_who_cannot_wait_for_the_end_of_a_pause_are_told():
    world = World(connections=1, requests_per_s=1e9)
    first, short, long = world.ask(), world.ask(wait_s=10), world.ask(wait_s=100)
    world.end(first, "busy", 50)
    assert world.decided[short] == "host_busy"
    assert world.held[long] == world.now_s + 50


def test_many_busy_answers_at_the_same_time_count_once():
    world = World(connections=4, requests_per_s=1e9)
    tickets = [world.ask() for _ in range(4)]
    world.go_on(1)
    for ticket in tickets:
        world.end(ticket, "busy")
    assert world.held[world.ask()] - world.now_s == pytest.approx(FIRST_PAUSE_S)


def test_memory_is_bounded_and_hosts_in_use_or_in_trouble_stay():
    world = World(requests_per_s=1e9, max_hosts=50)
    for _ in range(FAILURES):
        world.one("failed", host="dead.example")
    kept = world.ask("kept.example")
    for number in range(1000):
        world.one("ok", host=f"{number}.example")
    assert len(world.table) == 51
    assert world.one(host="dead.example") == "host_down"
    assert world.ask("kept.example") in world.held
    assert world.ask("kept.example") not in world.held
    world.end(kept)


def test_domain_with_a_rate_of_its_own_gets_it_with_all_below_it():
    world = World(connections=2, requests_per_s=4.0, rates=(("cdn.example", 40.0),))
    for host in ("img.cdn.example:8080", "cdn.example", "notcdn.example"):
        for _ in range(50):
            world.ask(host)
    at_once = {host: len(starts) for host, starts in world.starts.items()}
    assert at_once == {"img.cdn.example:8080": 20, "cdn.example": 20, "notcdn.example": 2}
    gaps = [later - earlier for earlier, later in itertools.pairwise(world.starts["cdn.example"])]
    assert gaps == pytest.approx([1 / 40] * 19)
