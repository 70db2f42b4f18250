"""10^9 URLs on 100 nodes: how long, what holds it up, what is lost. A simulation that is fed with what is measured here.

Measured first, on this machine: processor time and waiting of real shards (fetch, verify, publish; `tests/support/web.py` with
dead, dripping and huge answers), and what a task costs the driver (a real local Ray). Then 100,000 parts are made into shards by
100 simulated nodes under the job's own window (`cluster/ingest/recovery.py`): nodes die and come back, tasks fail and are
tried again,
the driver does one thing at a time. Assumed, and said in the output: cores and network of a node, how often it dies, how often a
task fails, bytes of an image on the web. What is lost is counted from the simulated manifest: each part must be in it once.

Apart from that it says how long the list's largest host takes at `ingest.policy.host_requests_per_s`, by the hosts of
`laion-style-10000.parquet`.

    python tests/bench/ingest_cluster.py [--quick]
"""

import argparse
import heapq
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq

HOME = Path(__file__).parents[2]
sys.path[:0] = [
    str(HOME),
    str(HOME / "tests" / "support"),
]  # the package first: a bench beside this one is called ingest
from web import FAULTS, HOSTS, PHOTOS, Web, url_list  # noqa: E402

from cluster.ingest.recovery import Window  # noqa: E402
from cluster.ray.connect import start_local_ray  # noqa: E402
from ingest.lists.sources import read_url_list, split  # noqa: E402

URLS, NODES, CORES, PER_SHARD = 10**9, 100, 16, 10_000
NODE_DIES_EVERY_S, NODE_IS_AWAY_S = 86_400.0, 600.0
TASK_FAILS_FRAC = 0.001
NODE_BITS_PER_S, IMAGE_BYTES = 10e9, 130_000
"""A node's network, and an image of the web, as LAION's authors give them (240 TB for 5.8e9 at 256 px are after resizing)."""
MEASURED_URLS = 500


@dataclass(frozen=True)
class Measured:
    """Of one shard of `MEASURED_URLS`."""

    cpu_s: float
    wait_s: float


def measure_shards(images: Path, number: int) -> list[Measured]:
    """Real shards, one after the other in this process."""
    from ingest.http.rate_limiter import RateLimiter
    from ingest.shard.fetch import fetch
    from ingest.shard.publish import publish
    from ingest.shard.verify import verify
    from roclip.config import FetchPolicy, IngestConfig

    policy = FetchPolicy(allow_networks=("127.0.0.0/8",), robots=False, deadline_s=10.0, contact="bench@localhost")
    config = IngestConfig(samples_per_shard=MEASURED_URLS, retries=0, policy=policy)
    limiter, found = RateLimiter(policy), []
    with Web(images, HOSTS) as web, tempfile.TemporaryDirectory() as folder:
        urls = url_list(Path(folder) / "urls.parquet", web, number * MEASURED_URLS, FAULTS)
        root = Path(folder) / "shards"
        root.mkdir()
        for part in split(read_url_list(str(urls)), MEASURED_URLS):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                fetched = fetch(part, Path(work), config, limiter)
                publish(root, fetched, verify(fetched.tar, fetched.parquet, urls=fetched.urls))
                cpu_s = time.process_time() - cpu_s
                found.append(Measured(cpu_s, max(0.0, time.perf_counter() - wall_s - cpu_s)))
    return found


def measure_driver(tasks: int = 300) -> float:
    """Seconds of the driver's processor time for one task: submit, wait, take the result."""
    import ray

    start_local_ray(num_cpus=2, include_dashboard=False)
    try:
        task = ray.remote(lambda part: part).options(num_cpus=0)
        ray.get(task.remote(0))
        start_s = time.process_time()
        waiting = [task.remote(bytes(200 * 100)) for _ in range(tasks)]
        while waiting:
            done, waiting = ray.wait(waiting)
            ray.get(done)
        return (time.process_time() - start_s) / tasks
    finally:
        ray.shutdown()


class Cluster:
    """The simulation. Time is a number; nothing waits."""

    def __init__(self, shards: list[Measured], driver_s: float, urls: int, seed: int = 0):
        self.shards, self.driver_s, self.draw = shards, driver_s, random.Random(seed)
        self.parts = -(-urls // PER_SHARD)
        self.todo = deque(range(self.parts))
        self.sealed: Counter[int] = Counter()
        self.window = Window(NODES * CORES)
        self.free = dict.fromkeys(range(NODES), CORES)
        self.flying: dict[int, tuple[int, int, int]] = {}
        self.events: list[tuple[float, int, str, int]] = []
        self.now_s = self.driver_free_s = self.driver_busy_s = self.busy_s = self.lost_s = 0.0
        self.tries = self.deaths = self.failures = 0
        for node in range(NODES):
            self._at(self.draw.expovariate(1 / NODE_DIES_EVERY_S), "dies", node)

    def run(self) -> None:
        while len(self.sealed) < self.parts:
            self._submit()
            self.now_s, _, what, which = heapq.heappop(self.events)
            getattr(self, f"_{what}")(which)

    def _at(self, seconds: float, what: str, which: int) -> None:
        heapq.heappush(self.events, (self.now_s + seconds, self.draw.getrandbits(62), what, which))

    def _submit(self) -> None:
        spread = [node for node, cores in self.free.items() if cores]
        while self.todo and spread and len(self.flying) < self.window.size:
            node = max(spread, key=self.free.__getitem__)
            part = self.todo.popleft()
            self.driver_free_s = max(self.driver_free_s, self.now_s) + self.driver_s
            self.driver_busy_s += self.driver_s
            measured = self.draw.choice(self.shards)
            took_s = measured.cpu_s * PER_SHARD / MEASURED_URLS + measured.wait_s
            self.tries += 1
            self.flying[self.tries] = part, node, self.window.round
            self.free[node] -= 1
            self.busy_s += took_s
            self._at(self.driver_free_s - self.now_s + took_s, "ends", self.tries)
            if not self.free[node]:
                spread.remove(node)

    def _releases(self, number: int) -> None:
        if number not in self.flying:
            return  # it was on a node that died
        part, node, began = self.flying.pop(number)
        self.free[node] += 1
        if self.draw.random() < TASK_FAILS_FRAC:
            self.failures += 1
            self.window.shrink(began)
            self.todo.appendleft(part)
        else:
            self.sealed[part] += 1
            self.window.succeeded()

    def _dies(self, node: int) -> None:
        self.deaths += 1
        for number in [number for number, (_, on, _) in self.flying.items() if on == node]:
            self.todo.appendleft(self.flying.pop(number)[0])
        self.free.pop(node, None)
        self._at(NODE_IS_AWAY_S, "returns", node)

    def _returns(self, node: int) -> None:
        self.free[node] = CORES
        self._at(self.draw.expovariate(1 / NODE_DIES_EVERY_S), "dies", node)


def largest_host() -> tuple[str, float]:
    """The host with the most URLs of the real list, and its share."""
    urls = pq.read_table(HOME.parent / "shared" / "data" / "urls" / "laion-style-10000.parquet")["URL"].to_pylist()
    host, count = Counter(urlsplit(url).hostname or "" for url in urls).most_common(1)[0]
    return host, count / len(urls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    shards = measure_shards(PHOTOS, 2 if given.quick else 12)
    driver_s = measure_driver()
    urls = URLS // 100 if given.quick else URLS
    cluster = Cluster(shards, driver_s, urls)
    cluster.run()
    hours, seconds = cluster.now_s / 3600, cluster.now_s
    used = {
        "cores": cluster.busy_s / (seconds * NODES * CORES),
        "driver": cluster.driver_busy_s / seconds,
        "network": urls / seconds / NODES * IMAGE_BYTES * 8 / NODE_BITS_PER_S,
    }
    host, share = largest_host()
    client = {
        "bench": "ingest_cluster",
        "urls": urls,
        "nodes": NODES,
        "cores_per_node": CORES,
        "measured_cpu_ms_per_url": round(1e3 * statistics.mean(s.cpu_s for s in shards) / MEASURED_URLS, 2),
        "measured_wait_s_per_shard": round(statistics.mean(s.wait_s for s in shards), 1),
        "measured_driver_ms_per_task": round(1e3 * driver_s, 2),
        "hours": round(hours, 2),
        "urls_per_s": round(urls / seconds),
        "node_deaths": cluster.deaths,
        "task_failures": cluster.failures,
        "tries_per_shard": round(cluster.tries / cluster.parts, 4),
        "used": {name: round(value, 3) for name, value in used.items()},
        "bottleneck": max(used, key=lambda name: used[name]),
        "parts_lost": cluster.parts - len(cluster.sealed),
        "parts_twice": sum(count > 1 for count in cluster.sealed.values()),
        "largest_host": host,
        "its_share": share,
        "its_hours_at_10_requests_per_s": round(share * urls / 10 / 3600, 1),
        "machine_cores": os.cpu_count(),
    }
    print(json.dumps(client))


if __name__ == "__main__":
    sys.exit(main())
