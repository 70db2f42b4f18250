"""The shared rate limiter on a real local Ray: processes share the limits of one host, and processes or actors die."""

import http.server
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from cluster.ingest.rate_limiter import SharedRateLimiter, host_rate_limiters
from cluster.ray.connect import start_local_ray
from ingest.http.host_schedule import MAX_FAILURES
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError, reason_of

pytestmark = pytest.mark.ray
HOST = "a.example"


@pytest.fixture(scope="module")
def local_ray():
    home = str(Path(__file__).parents[3])
    start_local_ray(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": home}},
    )
    yield
    ray.shutdown()


class Site(http.server.ThreadingHTTPServer):
    """Counts the requests that it sees at the same time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.lock, self.inside, self.most, self.visits = threading.Lock(), 0, 0, []
        super().__init__(("127.0.0.1", 0), _Handler)

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self):
        site = self.server
        with site.lock:
            site.inside += 1
            site.most = max(site.most, site.inside)
            site.visits.append(time.monotonic())
        time.sleep(0.02)
        with site.lock:
            site.inside -= 1
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def policy(connections=3, requests_per_s=1e6, deadline_s=30.0):
    return FetchPolicy(host_connections=connections, host_requests_per_s=requests_per_s, deadline_s=deadline_s)


def crawler():
    """A Ray task: threads of one process that fetch one URL again and again; counts the outcomes."""

    def crawl(policy, names, url, threads, requests):
        import time
        import urllib.request
        from collections import Counter
        from concurrent.futures import ThreadPoolExecutor
        from urllib.parse import urlsplit

        from cluster.ingest.rate_limiter import SharedRateLimiter

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def fetch(_):
            host = urlsplit(url).netloc
            hosts.acquire(host, time.monotonic() + policy.deadline_s)
            try:
                with opener.open(url, timeout=10) as answer:
                    return answer.status
            finally:
                hosts.release(host)

        with SharedRateLimiter(policy, names) as hosts, ThreadPoolExecutor(threads) as pool:
            outcomes = Counter(pool.map(fetch, range(requests)))
            return outcomes, hosts.take_counts().as_dict()

    return ray.remote(num_cpus=0.5, max_retries=0)(crawl)


def holder():
    """A Ray task that acquires a permit, writes its process id to a file, and keeps the permit."""

    def hold(policy, names, host, messages):
        import os
        import time
        from pathlib import Path

        from cluster.ingest.rate_limiter import SharedRateLimiter

        with SharedRateLimiter(policy, names) as hosts:
            hosts.acquire(host, time.monotonic() + 30)
            Path(messages).write_text(str(os.getpid()))
            time.sleep(600)

    return ray.remote(num_cpus=0.5, max_retries=0)(hold)


def limiter_pid(name):
    return ray.get(ray.get_actor(name).__ray_call__.remote(lambda _: os.getpid()))


def soon(seconds=30.0):
    return time.monotonic() + seconds


def test_two_processes_share_the_connections_of_one_host(local_ray):
    rules = policy(connections=3)
    with Site() as site, host_rate_limiters(rules, "test", 2) as names:
        url = f"http://127.0.0.1:{site.server_port}/"
        done = ray.get([crawler().remote(rules, names, url, 8, 60) for _ in range(2)])
    assert [outcomes for outcomes, _ in done] == [{200: 60}] * 2
    assert site.most == 3
    assert [counts["total"]["requests"] for _, counts in done] == [60, 60]


def test_two_processes_share_the_rate_of_one_host(local_ray):
    rules = policy(connections=20, requests_per_s=25)
    with Site() as site, host_rate_limiters(rules, "test") as names:
        url = f"http://127.0.0.1:{site.server_port}/"
        ray.get([crawler().remote(rules, names, url, 8, 15) for _ in range(2)])
    assert len(site.visits) == 30
    assert site.visits[-1] - site.visits[0] >= 29 / 25 - 0.2  # for each alone, 14 / 25


def test_host_that_is_down_for_one_is_down_for_all(local_ray):
    rules = policy()
    with (
        host_rate_limiters(rules, "test") as names,
        SharedRateLimiter(rules, names) as one,
        SharedRateLimiter(rules, names) as other,
    ):
        for _ in range(MAX_FAILURES):
            one.acquire(HOST, soon())
            one.release(HOST, failed=True)
        one.acquire("b.example", soon())  # the releases have arrived with this
        with pytest.raises(FetchError, match="host_down"):
            other.acquire(HOST, soon())
        one.release("b.example", busy=True, retry_after_s=300)
        one.acquire("c.example", soon())
        with pytest.raises(FetchError, match="host_busy"):
            other.acquire("b.example", soon(100))
        one.release("c.example")


def test_waiting_for_the_actor_ends_with_the_deadline(local_ray):
    rules = policy(connections=1)
    with (
        host_rate_limiters(rules, "test") as names,
        SharedRateLimiter(rules, names) as one,
        SharedRateLimiter(rules, names) as other,
    ):
        one.acquire(HOST, soon())
        with pytest.raises(FetchError, match="host_busy"):
            other.acquire(HOST, soon(0.3))
        one.release(HOST)
        other.acquire(HOST, soon())
        other.release(HOST)


@pytest.mark.slow
def test_permit_of_a_process_that_was_killed_expires(local_ray, tmp_path):
    rules = policy(connections=1, deadline_s=0.5)  # so its permits are held for 5.5 s
    with host_rate_limiters(rules, "test") as names, SharedRateLimiter(rules, names) as mine:
        holder().remote(rules, names, HOST, str(tmp_path / "held"))
        while not (tmp_path / "held").exists() or not (pid := (tmp_path / "held").read_text()):
            time.sleep(0.02)
        os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(FetchError) as error:
            mine.acquire(HOST, soon(0.5))
        assert reason_of(str(error.value)) == "host_busy"
        mine.acquire(HOST, soon(60))
        mine.release(HOST)


@pytest.mark.slow
def test_work_goes_on_while_the_actor_is_dead_and_finds_it_again(local_ray, caplog):
    rules = policy(connections=1)
    with (
        host_rate_limiters(rules, "test") as names,
        SharedRateLimiter(rules, names) as one,
        SharedRateLimiter(rules, names) as other,
    ):
        one.acquire(HOST, soon())
        pid = limiter_pid(names[0])
        os.kill(pid, signal.SIGKILL)
        other.acquire(HOST, soon())  # by its own limits, or by those of a restarted actor that knows of no permit
        other.release(HOST)
        one.release(HOST)
        for number in range(20):
            one.acquire(f"{number}.example", soon())
            one.release(f"{number}.example")
        while True:  # together again: what one holds, the other does not get
            one.acquire(HOST, soon())
            try:
                other.acquire(HOST, soon(0.2))
            except FetchError:
                break
            finally:
                one.release(HOST)
            other.release(HOST)
            time.sleep(0.1)
        assert limiter_pid(names[0]) != pid
    messages = [record.getMessage() for record in caplog.records if "does not reply" in record.getMessage()]
    assert 1 <= len(messages) <= 2  # once a process; here two are in one


def test_missing_actor_leaves_each_process_its_own_limits(local_ray):
    rules = policy(connections=1)
    with SharedRateLimiter(rules, ("no-such-actor",)) as hosts:
        hosts.acquire(HOST, soon())
        with pytest.raises(FetchError, match="host_busy"):
            hosts.acquire(HOST, soon(0.2))
        hosts.release(HOST)
