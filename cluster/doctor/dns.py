"""Doctor's look at names: how many hosts of the list are found a second, and what to run when that is the bottleneck."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from ingest.http.resolver import LOOKUPS, Resolver
from ingest.lists.configured import open_list
from roclip.config import Config, FetchPolicy
from roclip.data.outcomes import FetchError

HOSTS = 200
"""Names of the list that are looked up, from its first rows."""
IMAGES_PER_S_PER_CORE = 100
"""What img2dataset's users see; its README says so, and that the resolver comes first to its end."""
_ROWS, _LONGEST_S = 5_000, 20.0
WHAT_TO_DO = (
    "Run a caching resolver on every node that fetches (knot-resolver or unbound) and set ingest.policy.nameservers=[127.0.0.1]; "
    "a provider's resolver drops questions at this rate."
)


@dataclass(frozen=True)
class HostSample:
    """Names to look up."""

    names: list[str]
    per_row: float
    """Different names in the first rows of the list, to one row."""


def first_hosts(config: Config) -> HostSample:
    """Hosts of the first rows of the URL list. Raises `UrlListError`."""
    part = next(open_list(config, config.data.urls).parts(_ROWS))
    hosts = list(dict.fromkeys(filter(None, map(_host, part.table["url"].to_pylist()))))
    return HostSample(hosts[:HOSTS], len(hosts) / len(part.table))


def measure_names(hosts: HostSample, rules: FetchPolicy) -> tuple[float, float, float]:
    """Names found a second, names needed a second by this machine's cores, share of names that were not found.

    Asked as a task would ask: so many at a time, by the same resolver, nothing in its cache.
    """
    resolver = Resolver(tuple(rules.nameservers))
    start_s = time.monotonic()
    with ThreadPoolExecutor(LOOKUPS) as pool:
        found = list(pool.map(lambda host: _is_found(resolver, host, start_s + _LONGEST_S), hosts.names))
    seconds = max(time.monotonic() - start_s, 1e-3)
    needed = IMAGES_PER_S_PER_CORE * (os.cpu_count() or 1) * hosts.per_row
    return len(found) / seconds, needed, 1 - sum(found) / max(1, len(found))


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
