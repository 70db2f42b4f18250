"""The rate limiter per host, with real threads and the real clock."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ingest.http.host_schedule import MAX_FAILURES
from ingest.http.rate_limiter import DOWN_REASONS, RateLimiter, site
from roclip.config import FetchPolicy
from roclip.data.outcomes import REASONS, FetchError, is_transient, reason_of

HOST = "a.example"


def hosts(connections=4, requests_per_s=1e6):
    return RateLimiter(FetchPolicy(host_connections=connections, host_requests_per_s=requests_per_s))


def soon(seconds=30.0):
    return time.monotonic() + seconds


class Site:
    """Counts who is inside at the same time."""

    def __init__(self):
        self.lock, self.inside, self.most, self.visits = threading.Lock(), 0, 0, []

    def visit(self, seconds):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.visits.append(time.monotonic())
        time.sleep(seconds)
        with self.lock:
            self.inside -= 1


def test_256_threads_share_the_connections_of_one_host():
    limiter, here = hosts(connections=3), Site()

    def fetch(_):
        limiter.acquire(HOST, soon())
        try:
            here.visit(0.001)
        finally:
            limiter.release(HOST, size_bytes=10)

    with ThreadPoolExecutor(256) as pool:
        list(pool.map(fetch, range(600)))
    assert here.most == 3
    count = limiter.take_counts().top(1)[HOST]
    assert (count.requests, count.bytes, count.refused) == (600, 6000, 0)
    assert count.seconds >= 0.6
    assert len(limiter.take_counts()) == 0


def test_requests_of_many_threads_are_a_gap_apart():
    limiter, here = hosts(connections=8, requests_per_s=50), Site()

    def fetch(_):
        limiter.acquire(HOST, soon())
        here.visit(0)
        limiter.release(HOST)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fetch, range(20)))
    assert max(here.visits) - min(here.visits) >= 19 / 50 - 0.02


def test_one_host_does_not_wait_for_another():
    limiter = hosts(connections=1)
    limiter.acquire(HOST, soon())
    limiter.acquire("b.example", soon(0.5))
    limiter.release("b.example")
    limiter.release(HOST)


def test_busy_host_is_refused_at_once_when_the_permit_cannot_come_in_time():
    limiter = hosts(requests_per_s=0.01)
    limiter.acquire(HOST, soon())
    with pytest.raises(FetchError) as error:
        limiter.acquire(HOST, soon(50))
    assert reason_of(str(error.value)) == "host_busy"
    assert is_transient("host_busy")
    limiter.release(HOST)
    assert limiter.take_counts().total.refused == 1


def test_waiting_ends_with_the_deadline_and_leaves_no_trace():
    limiter = hosts(connections=1)
    limiter.acquire(HOST, soon())
    with pytest.raises(FetchError, match="host_busy"):
        limiter.acquire(HOST, soon(0.05))
    limiter.release(HOST)
    limiter.acquire(HOST, soon(0.5))
    limiter.release(HOST)


def test_host_that_failed_is_down_at_once_for_those_who_wait_too():
    limiter, go, outcomes = hosts(connections=MAX_FAILURES), threading.Event(), []

    def fetch(_):
        try:
            limiter.acquire(HOST, soon())
            go.wait(30)
            limiter.release(HOST, failed=True)
        except FetchError as error:
            outcomes.append(reason_of(str(error)))

    with ThreadPoolExecutor(20) as pool:
        done = [pool.submit(fetch, number) for number in range(20)]
        while len(limiter._waiters) < 20 - MAX_FAILURES:
            time.sleep(0.001)
        go.set()
        for future in done:
            future.result()
    assert outcomes == ["host_down"] * (20 - MAX_FAILURES - 2)  # two took the places of the first two that failed
    with pytest.raises(FetchError, match="host_down"):
        limiter.acquire(HOST, soon())


def test_retry_after_holds_for_all_threads():
    limiter = hosts()
    limiter.acquire(HOST, soon())
    limiter.release(HOST, busy=True, retry_after_s=120)
    with pytest.raises(FetchError, match="host_busy"):
        limiter.acquire(HOST, soon(100))
    limiter.acquire("b.example", soon())
    limiter.release("b.example")
    assert limiter.take_counts().top(1, by="busy")[HOST].busy == 1


def test_release_without_acquire_is_an_error():
    limiter = hosts()
    with pytest.raises(RuntimeError, match="acquired and not released"):
        limiter.release(HOST)


def test_names_of_one_site_are_one():
    names = ("Example.COM", "example.com.", "example.com:80", "EXAMPLE.com:443")
    assert {site(name) for name in names} == {"example.com"}
    assert site("example.com:8080") == "example.com:8080"
    assert site("[::1]:443") == "[::1]"
    for name in ("", ".", ":80", "x" * 10_000):
        with pytest.raises(FetchError, match="bad_url"):
            site(name)


def test_reasons_of_hosts_are_registered_and_transient():
    assert all(REASONS[name].transient for name in itertools.chain(DOWN_REASONS, ("host_busy", "host_down")))
