"""The rate limiting algorithm, with a clock that the test moves."""

import itertools
import math
from collections import defaultdict

import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.host_schedule import (
    MAX_DOWN_S,
    MAX_FAILURES,
    MAX_PAUSE_S,
    MIN_DOWN_S,
    MIN_PAUSE_S,
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
    """Drives a schedule as its users do, and records which permits are held since when."""

    def __init__(self, connections=2, requests_per_s=4.0, **limits):
        self.schedule = HostSchedule(Limits(connections, requests_per_s, **limits))
        self.now_s, self.tickets = 100.0, 0
        self.hosts, self.holds_s, self.starts, self.decided = {}, {}, defaultdict(list), {}
        self.held: dict[int, float] = {}

    def record(self, decisions):
        for ticket, start_s, refusal in decisions:
            assert ticket not in self.decided, "decided twice"
            self.decided[ticket] = refusal or "granted"
            if refusal is None:
                assert start_s >= self.now_s
                self.held[ticket] = start_s
                self.starts[self.hosts[ticket]].append(start_s)

    def request(self, host=A, wait_s=30.0, hold_s=math.inf, **more):
        self.tickets += 1
        self.hosts[self.tickets], self.holds_s[self.tickets] = host, hold_s
        self.record(self.schedule.request(self.tickets, host, self.now_s, wait_s=wait_s, hold_s=hold_s, **more))
        return self.tickets

    def release(self, ticket, outcome="ok", retry_after_s=0.0):
        self.held.pop(ticket, None)
        self.record(self.schedule.release(ticket, self.hosts[ticket], self.now_s, outcome, retry_after_s))

    def advance(self, seconds):
        self.now_s += seconds
        self.held = {t: start_s for t, start_s in self.held.items() if start_s + self.holds_s[t] > self.now_s}
        self.record(self.schedule.expire(self.now_s))

    def one(self, outcome="ok", host=A, **more):
        """A permit from its request to its release, used when it starts; returns the decision."""
        ticket = self.request(host)
        if ticket in self.held:
            self.now_s = max(self.now_s, self.held[ticket])
            self.release(ticket, outcome, **more)
        return self.decided.get(ticket)


@given(steps)
@settings(max_examples=200, **SETTINGS)
def test_connections_and_rate_are_never_exceeded_and_no_one_waits_for_ever(script):
    world = World(connections=2, requests_per_s=4.0)
    for step in script:
        if step[0] == "ask":
            world.request(step[1], wait_s=step[2], hold_s=step[3])
        elif step[0] == "end" and world.held:
            ticket = sorted(world.held)[step[1] % len(world.held)]
            if world.held[ticket] <= world.now_s:
                world.release(ticket, step[2], step[3])
        elif step[0] == "pass":
            world.advance(step[1])
        for host in (A, B):
            assert sum(world.hosts[ticket] == host for ticket in world.held) <= 2
    for host in (A, B):
        starts = world.starts[host]
        assert all(late - early >= 0.25 - EPSILON_S for early, late in itertools.pairwise(starts))
    world.advance(10_000)
    assert sorted(world.decided) == list(range(1, world.tickets + 1))
    assert not world.schedule._in_use


@given(st.lists(st.sampled_from(("ok", "failed", "busy")), max_size=40))
@settings(max_examples=100, **SETTINGS)
def test_host_comes_back_whatever_it_has_answered(outcomes):
    world = World()
    for outcome in outcomes:
        world.one(outcome)
    world.advance(MAX_DOWN_S + 1)
    assert world.one("ok") == "granted"
    world.advance(MAX_PAUSE_S + 1)
    assert world.one("ok") == "granted"


def test_permits_are_granted_in_the_order_of_arrival():
    world = World(connections=1, requests_per_s=1e9)
    first, second, third = world.request(), world.request(), world.request()
    assert list(world.held) == [first]
    world.release(first)
    assert list(world.held) == [second]
    world.release(second)
    assert list(world.held) == [third]


def test_one_who_withdraws_leaves_its_place():
    world = World(connections=1, requests_per_s=1e9)
    first, second, third = world.request(), world.request(), world.request()
    world.release(second, "unused")
    world.release(first)
    assert list(world.held) == [third]


def test_permit_after_the_deadline_is_refused_at_once_by_the_gaps():
    world = World(connections=100, requests_per_s=1.0)
    outcomes = [world.decided.get(world.request(wait_s=4.5)) for _ in range(8)]
    assert outcomes == ["granted"] * 5 + ["host_busy"] * 3


def test_permit_after_the_deadline_is_refused_at_once_by_how_long_permits_are_held():
    world = World(connections=2, requests_per_s=1e9)
    for ticket in (world.request(), world.request()):
        world.now_s += 5
        world.release(ticket)
    world.request(), world.request()
    outcomes = [world.decided.get(world.request(wait_s=10)) for _ in range(6)]
    assert outcomes == [None, None, None, "host_busy", "host_busy", "host_busy"]  # one ends each 3.1 s


def test_permit_that_nobody_releases_expires():
    world = World(connections=1)
    dead, waits = world.request(hold_s=20), world.request(wait_s=60)
    world.advance(19)
    assert waits not in world.decided
    world.advance(2)
    assert world.decided[waits] == "granted"
    world.release(dead)  # it was not dead after all
    assert waits in world.held
    assert world.request() not in world.held


def test_crawl_delay_is_the_gap():
    world = World(connections=9, requests_per_s=100)
    starts = [world.held[world.request(crawl_delay_s=2.0)] - world.now_s for _ in range(4)]
    assert starts == [0, 2, 4, 6]
    assert world.decided[world.request(wait_s=7, crawl_delay_s=2.0)] == "host_busy"


def test_host_is_down_after_failures_in_a_row_and_for_twice_as_long_each_time():
    world = World(requests_per_s=1e9)
    world.one("failed"), world.one("failed"), world.one("ok")
    assert [world.one("failed") for _ in range(MAX_FAILURES + 2)] == ["granted"] * MAX_FAILURES + ["host_down"] * 2
    rests = []
    for _ in range(7):
        begun_s = world.now_s
        while world.one("failed") == "host_down":
            world.advance(1.0)
        rests.append(world.now_s - begun_s)
    assert rests == pytest.approx([MIN_DOWN_S, 60, 120, 240, 480, MAX_DOWN_S, MAX_DOWN_S], abs=1e-3)
    world.advance(MAX_DOWN_S)
    assert [world.one("ok") for _ in range(3)] == ["granted"] * 3
    assert world.one("failed", host=B) == "granted"


def test_one_trial_at_a_time_and_a_trial_whose_worker_died_is_no_failure():
    world = World(requests_per_s=1e9)
    for _ in range(MAX_FAILURES):
        world.one("failed")
    world.advance(MIN_DOWN_S)
    trial = world.request(hold_s=10)
    assert trial in world.held
    assert world.decided[world.request()] == "host_down"
    world.advance(11)
    assert world.one("ok") == "granted"
    assert {world.request() in world.held, world.request() in world.held} == {True}


def test_those_who_wait_learn_at_once_that_the_host_is_down():
    world = World(connections=MAX_FAILURES, requests_per_s=1e9)
    running = [world.request() for _ in range(MAX_FAILURES)]
    waiting = [world.request() for _ in range(5)]
    for ticket in running[:-1]:
        world.held.pop(ticket)
        world.record(world.schedule.release(ticket, A, world.now_s, "failed"))
    world.release(running[-1], "failed")
    assert {world.decided[ticket] for ticket in waiting[2:]} == {"host_down"}


def test_failures_of_permits_that_began_before_count_once():
    world = World(connections=6, requests_per_s=1e9)
    tickets = [world.request() for _ in range(6)]
    world.advance(1)
    for ticket in tickets:
        world.release(ticket, "failed")
    world.advance(MIN_DOWN_S)
    assert world.one("ok") == "granted"


def test_retry_after_is_honoured_up_to_a_limit():
    for asked_s, pause_s in (
        (7.0, 7.0),
        (1e9, MAX_PAUSE_S),
        (math.inf, MAX_PAUSE_S),
        (math.nan, MIN_PAUSE_S),
    ):
        world = World()
        world.one("busy", retry_after_s=asked_s)
        ticket = world.request(wait_s=1000)
        assert world.held[ticket] - world.now_s == pytest.approx(pause_s)


def test_pause_without_retry_after_doubles_and_good_answers_halve_it():
    world = World(requests_per_s=10)
    pauses = []
    for outcome in ["busy"] * 5 + ["ok"] * 6:
        begun_s = world.now_s
        assert world.one(outcome) == "granted"
        pauses.append(world.now_s - begun_s)
    assert pauses == pytest.approx([0, 1, 2, 4, 8, 16, 16, 8, 4, 2, 1])


def test_those_who_cannot_wait_for_the_end_of_a_pause_are_told():
    world = World(connections=1, requests_per_s=1e9)
    first, short, long = world.request(), world.request(wait_s=10), world.request(wait_s=100)
    world.release(first, "busy", 50)
    assert world.decided[short] == "host_busy"
    assert world.held[long] == world.now_s + 50


def test_many_busy_answers_at_the_same_time_count_once():
    world = World(connections=4, requests_per_s=1e9)
    tickets = [world.request() for _ in range(4)]
    world.advance(1)
    for ticket in tickets:
        world.release(ticket, "busy")
    assert world.held[world.request()] - world.now_s == pytest.approx(MIN_PAUSE_S)


def test_memory_is_bounded_and_hosts_in_use_or_in_trouble_stay():
    world = World(requests_per_s=1e9, max_hosts=50)
    for _ in range(MAX_FAILURES):
        world.one("failed", host="dead.example")
    kept = world.request("kept.example")
    for number in range(1000):
        world.one("ok", host=f"{number}.example")
    assert len(world.schedule) == 51
    assert world.one(host="dead.example") == "host_down"
    assert world.request("kept.example") in world.held
    assert world.request("kept.example") not in world.held
    world.release(kept)


def test_domain_with_a_rate_of_its_own_gets_it_with_all_below_it():
    world = World(connections=2, requests_per_s=4.0, rates=(("cdn.example", 40.0),))
    for host in ("img.cdn.example:8080", "cdn.example", "notcdn.example"):
        for _ in range(50):
            world.request(host)
    at_once = {host: len(starts) for host, starts in world.starts.items()}
    assert at_once == {"img.cdn.example:8080": 20, "cdn.example": 20, "notcdn.example": 2}
    gaps = [later - earlier for earlier, later in itertools.pairwise(world.starts["cdn.example"])]
    assert gaps == pytest.approx([1 / 40] * 19)
