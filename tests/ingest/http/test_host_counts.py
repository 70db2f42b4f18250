"""The table of hosts: exact while it fits, bounded and honest beyond."""

import json
from collections import Counter

from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.host_counts import HostCount, HostCounts

hosts = st.lists(st.sampled_from([f"{letter}.example" for letter in "abcdefghijkl"]), max_size=60)
ONE = HostCount(requests=1, bytes=7)


def counted(names, capacity):
    counts = HostCounts(capacity)
    for name in names:
        counts.add(name, ONE)
    return counts


def promised(counts, names):
    """What the table promises about the true counts of these names."""
    table, true = counts.top(10**6), Counter(names)
    assert counts.total == HostCount(requests=len(names), bytes=7 * len(names))
    assert len(counts) <= 2 * counts.capacity
    for name, number in true.items():
        if name in table:
            assert table[name].requests <= number <= table[name].requests + table[name].missed
        else:
            assert number <= counts.floor


@given(hosts, hosts, hosts)
@settings(max_examples=80, **SETTINGS)
def test_promise_holds_for_tables_and_for_what_they_merge_to(first, second, third):
    whole = HostCounts(2)
    for names in (first, second, third):
        counts = counted(names, 2)
        promised(counts, names)
        whole.merge(HostCounts.from_dict(json.loads(json.dumps(counts.as_dict()))))
    promised(whole, first + second + third)


@given(hosts, hosts)
@settings(max_examples=50, **SETTINGS)
def test_table_is_exact_while_it_fits(first, second):
    counts = counted(first, 12)
    counts.merge(counted(second, 12))
    assert {name: count.requests for name, count in counts.top(99).items()} == Counter(first + second)
    assert counts.floor == 0


def test_heavy_hosts_are_found_among_many():
    names = [f"{number}.example" for number in range(20_000)]
    names[::4] = ["heavy.example"] * 5000
    counts = counted(names, 100)
    name, count = next(iter(counts.top(1).items()))
    assert name == "heavy.example"
    assert count.requests == 5000


def test_top_is_by_what_is_asked_for():
    counts = HostCounts()
    counts.add("a.example", HostCount(requests=9, seconds=1.0))
    counts.add("b.example", HostCount(requests=1, failures=1, seconds=30.0))
    counts.add("c.example", HostCount(refused=20))
    assert list(counts.top(1, by="seconds")) == ["b.example"]
    assert list(counts.top(1, by="failures")) == ["b.example"]
    assert list(counts.top(2)) == ["c.example", "a.example"]
