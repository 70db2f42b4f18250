"""The window of tasks in flight, and the search for rows that kill."""

import math

from hypothesis import given
from hypothesis import strategies as st

from cluster.ingest.recovery import START, Bisection, Window


@given(st.integers(1, 300), st.lists(st.sampled_from(["good", "bad", "old"]), max_size=400))
def test_window_stays_between_one_and_most(max_size, events):
    window, rounds = Window(max_size), [0]
    for event in events:
        before = window.size
        if event == "good":
            window.succeeded()
            assert before <= window.size <= before + 1
        elif event == "bad":
            window.shrink(window.round)
            rounds.append(window.round)
            assert window.size == max(1, before // 2)
        else:
            window.shrink(rounds[0] - 1)
            assert window.size == before
        assert 1 <= window.size <= max_size


@given(st.integers(1, 200))
def test_window_reaches_the_most_when_all_goes_well_and_after_trouble_too(max_size):
    window = Window(max_size)
    assert window.size == min(START, max_size)
    for _ in range(max_size):
        window.succeeded()
    assert window.size == max_size
    window.shrink(window.round)
    for _ in range(max_size * max_size):
        window.succeeded()
    assert window.size == max_size


def test_window_shrinks_once_for_tasks_that_were_under_way_together():
    window = Window(64)
    for _ in range(64):
        window.succeeded()
    started = window.round
    for _ in range(10):
        window.shrink(started)
    assert window.size == 32


def _search(rows, dies, in_flight=1, **limits):
    bisection, tried = Bisection(rows, **limits), []
    while not bisection.done:
        while len(tried) < in_flight and (one := bisection.next()) is not None:
            tried.append(one)
        one = tried.pop(0)
        bisection.record(one, dies(one))
    return bisection


@given(st.integers(1, 3000), st.sets(st.integers(0, 2999), max_size=6), st.integers(1, 5))
def test_bisection_finds_each_killer_and_nothing_else(rows, killers, in_flight):
    killers = {row for row in killers if row < rows} or {rows // 2}
    bisection = _search(rows, lambda tried: any(row in tried for row in killers), in_flight)
    assert bisection.killers == bisection.excluded == sorted(killers)
    assert not bisection.only_together
    assert bisection.probes <= 2 * len(killers) * math.ceil(math.log2(rows + 1))


@given(st.integers(2, 500), st.integers(2, 500))
def test_bisection_tells_rows_that_kill_only_together(rows, needed):
    needed = min(needed, rows)
    bisection = _search(rows, lambda tried: len(tried) >= needed)
    assert bisection.killers == []
    assert bisection.only_together
    assert all(len(tried) >= needed for tried in bisection.only_together)


@given(st.integers(1, 2000), st.sets(st.integers(0, 1999), min_size=1), st.integers(0, 40))
def test_bisection_with_few_probes_leaves_out_all_killers(rows, killers, max_size):
    killers = {row % rows for row in killers}
    bisection = _search(rows, lambda tried: any(row in tried for row in killers), max_probes=max_size)
    assert bisection.probes <= max_size
    assert killers <= set(bisection.excluded)
