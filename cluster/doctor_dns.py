"""Doctor's look at names: how many hosts of the list are found a second, and what to run when that is the bottleneck."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from cluster.url_list import open_list
from ingest.reasons import FetchError
from ingest.resolver import Resolver
from roclip.config import Config

HOSTS = 200
"""Names of the list that are looked up, from its first rows."""
IMAGES_PER_S_PER_CORE = 100
"""What img2dataset's users see; its README says so, and that the resolver comes first to its end."""
_ROWS, _LONGEST_S = 5_000, 20.0
WHAT_TO_DO = (
    "Run a caching resolver on every node that fetches (knot-resolver or unbound) and set ingest.policy.nameservers=[127.0.0.1]; "
    "a provider's resolver drops questions at this rate."
)


def measure_names(config: Config) -> tuple[float, float, float]:
    """Names found a second, names needed a second by this machine's cores, share of names that were not found.

    Asked as a task would ask: so many at a time, by the same resolver, nothing in its cache.
    """
    part = next(open_list(config, config.data.urls).parts(_ROWS))
    hosts = list(itertools.islice(dict.fromkeys(filter(None, map(_host, part.table["url"].to_pylist()))), _ROWS))
    per_row = len(hosts) / len(part.table)
    hosts = hosts[:HOSTS]
    rules = config.ingest.policy
    resolver = Resolver(tuple(rules.nameservers), rules.dns_lookups)
    start_s = time.monotonic()
    with ThreadPoolExecutor(rules.dns_lookups) as pool:
        found = list(pool.map(lambda host: _is_found(resolver, host, start_s + _LONGEST_S), hosts))
    seconds = max(time.monotonic() - start_s, 1e-3)
    needed = IMAGES_PER_S_PER_CORE * (os.cpu_count() or 1) * per_row
    return len(hosts) / seconds, needed, 1 - sum(found) / max(1, len(hosts))


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_found(resolver: Resolver, host: str, deadline_s: float) -> bool:
    try:
        return bool(resolver.addresses(host, deadline_s))
    except FetchError:
        return False
