"""The resolver against a real DNS server on loopback, and against the system's resolver."""

import threading
import time

import pytest
from name_server import NameServer

from ingest.http.resolver import FAILED_TTL_S, MAX_ADDRESSES, MAX_TTL_S, SYSTEM_TTL_S, LookupCounts, Resolver
from roclip.data.outcomes import FetchError
from roclip.errors import ConfigError


def soon():
    return time.monotonic() + 20


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def _resolver(server, clock=time.monotonic, lookups=8):
    return Resolver((server.address,), lookups, clock)


def test_addresses_of_both_families_are_found():
    with NameServer({"a.example": [["93.184.215.14", "2606:4700::1", "8.8.8.8"]]}) as server:
        found = _resolver(server).addresses("a.example", soon())
    assert sorted(found) == ["2606:4700::1", "8.8.8.8", "93.184.215.14"]


def test_answer_is_kept_as_long_as_its_server_says():
    clock = Clock()
    with NameServer({"a.example": [["1.1.1.1"], ["2.2.2.2"]]}, ttl_s=60) as server:
        resolver = _resolver(server, clock)
        assert resolver.addresses("a.example", soon()) == ("1.1.1.1",)
        clock.now_s += 59
        assert resolver.addresses("a.example", soon()) == ("1.1.1.1",)
        clock.now_s += 1
        assert resolver.addresses("a.example", soon()) == ("2.2.2.2",)
        assert server.asked == {"a.example": 2}
        counts = resolver.counts()
    assert (counts.lookups, counts.hits, counts.failures) == (2, 1, 0)
    assert counts.seconds > 0


@pytest.mark.parametrize(("ttl_s", "kept_s"), [(0, 0), (10**6, MAX_TTL_S)])
def test_time_to_live_has_bounds(ttl_s, kept_s):
    clock = Clock()
    with NameServer({"a.example": [["1.1.1.1"], ["2.2.2.2"]]}, ttl_s=ttl_s) as server:
        resolver = _resolver(server, clock)
        resolver.addresses("a.example", soon())
        clock.now_s += kept_s
        assert resolver.addresses("a.example", soon()) == ("2.2.2.2",)


def test_name_that_does_not_exist_costs_one_lookup():
    clock = Clock()
    with NameServer({"empty.example": [[]]}) as server:
        resolver = _resolver(server, clock)
        for _ in range(3):
            with pytest.raises(FetchError, match="no_host"):
                resolver.addresses("dead.example", soon())
            with pytest.raises(FetchError, match=r"no_host: empty\.example: it has no address"):
                resolver.addresses("empty.example", soon())
        assert server.asked == {"dead.example": 1, "empty.example": 1}
        assert resolver.counts() == LookupCounts(2, 4, 2, resolver.counts().seconds)
        clock.now_s += FAILED_TTL_S
        with pytest.raises(FetchError, match="no_host"):
            resolver.addresses("dead.example", soon())
        assert server.asked["dead.example"] == 2


def test_those_who_ask_at_the_same_time_share_one_lookup():
    with NameServer({"a.example": [["1.1.1.1"]]}) as server:
        resolver = _resolver(server)
        server.hold.clear()
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(resolver.addresses("a.example", soon()))) for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        while resolver.counts().hits < 15:
            time.sleep(0.01)
        server.hold.set()
        for thread in threads:
            thread.join()
    assert found == [("1.1.1.1",)] * 16
    assert server.asked == {"a.example": 1}


def test_caller_leaves_at_its_deadline_and_the_answer_serves_the_next():
    with NameServer({"a.example": [["1.1.1.1"]]}) as server:
        resolver = _resolver(server)
        server.hold.clear()
        with pytest.raises(FetchError, match="too_slow"):
            resolver.addresses("a.example", time.monotonic() + 0.1)
        with pytest.raises(FetchError, match="too_slow"):
            resolver.addresses("a.example", time.monotonic() - 1)
        server.hold.set()
        assert resolver.addresses("a.example", soon()) == ("1.1.1.1",)
        assert server.asked == {"a.example": 1}


def test_no_more_lookups_than_allowed_are_under_way():
    names = {f"{n}.example": [["1.1.1.1"]] for n in range(10)}
    with NameServer(names) as server:
        resolver = _resolver(server, lookups=3)
        server.hold.clear()
        before = threading.active_count()
        for name in names:
            with pytest.raises(FetchError, match="too_slow"):
                resolver.addresses(name, time.monotonic() + 0.01)
        assert threading.active_count() - before <= 3
        server.hold.set()
        assert {resolver.addresses(name, soon()) for name in names} == {("1.1.1.1",)}
        assert resolver.counts().lookups == 10


def test_threads_end_when_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr("ingest.http.resolver._IDLE_TIMEOUT_S", 0.05)
    with NameServer({"a.example": [["1.1.1.1"]]}, ttl_s=0) as server:
        before = set(threading.enumerate())
        resolver = _resolver(server)
        for _ in range(2):
            resolver.addresses("a.example", soon())
            for thread in set(threading.enumerate()) - before:
                thread.join()
        assert server.asked == {"a.example": 2}


def test_cache_forgets_what_was_not_asked_for_longest(monkeypatch):
    monkeypatch.setattr("ingest.http.resolver.MAX_NAMES", 2)
    with NameServer({f"{name}.example": [["1.1.1.1"]] for name in "abc"}) as server:
        resolver = _resolver(server)
        for name in "abacab":
            resolver.addresses(f"{name}.example", soon())
    assert server.asked == {"a.example": 1, "b.example": 2, "c.example": 1}


def test_hostile_answers_are_bounded():
    many = [f"1.1.{n}.1" for n in range(30)]
    names = {"many.example": [many], "loop.example": [["loop.example."]], "alias.example": [["x.example."]]}
    with NameServer(names) as server:
        resolver = _resolver(server)
        assert len(resolver.addresses("many.example", soon())) == MAX_ADDRESSES
        for name in ("loop.example", "alias.example"):
            with pytest.raises(FetchError, match="no_host"):
                resolver.addresses(name, soon())


def test_second_server_is_asked_when_the_first_is_silent():
    with NameServer({"a.example": [None]}) as silent, NameServer({"a.example": [["1.1.1.1"]]}) as server:
        resolver = Resolver((silent.address, server.address))
        resolver._resolve._resolver.timeout = 0.2
        assert resolver.addresses("a.example", soon()) == ("1.1.1.1",)


def test_system_resolver_is_asked_without_nameservers():
    clock = Clock()
    resolver = Resolver(clock=clock)
    assert "127.0.0.1" in resolver.addresses("localhost", soon())
    clock.now_s += SYSTEM_TTL_S - 1
    resolver.addresses("localhost", soon())
    assert (resolver.counts().lookups, resolver.counts().hits) == (1, 1)
    with pytest.raises(FetchError, match=r"no_host: nowhere\.invalid"):
        resolver.addresses("nowhere.invalid", soon())


@pytest.mark.parametrize("text", ["127.0.0.1", "127.0.0.1:5353", "::1", "[::1]", "[::1]:5353"])
def test_nameserver_is_an_address_with_or_without_a_port(text):
    Resolver((text,))


@pytest.mark.parametrize("text", ["", "dns.example", "127.0.0.1:0", "127.0.0.1:x", "[::1]:99999", "[::1"])
def test_nameserver_that_is_no_address_is_a_config_error(text):
    with pytest.raises(ConfigError, match=r"ingest\.policy\.nameservers"):
        Resolver((text,))
