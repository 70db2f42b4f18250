"""Doctor's DNS check: how many hosts of the list are resolved per second, and what to do if that is the bottleneck."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ingest.http.resolver import LOOKUPS, Resolver
from ingest.http.urls import host_of
from ingest.lists.sources import open_configured_list
from roclip.config import Config, FetchPolicy
from roclip.data.outcomes import FetchError

HOSTS = 200
"""Number of names that are looked up, from the list's first rows."""
IMAGES_PER_S_PER_CORE = 100
"""The rate that img2dataset's README reports, with the resolver as the first bottleneck."""
_ROWS, _LONGEST_S = 5_000, 20.0
WHAT_TO_DO = (
    "Run a caching resolver on every node that fetches (knot-resolver or unbound) and set ingest.policy.nameservers=[127.0.0.1]; "
    "a provider's resolver drops queries at this rate."
)


@dataclass(frozen=True)
class HostSample:
    """Names to look up."""

    names: list[str]
    per_row: float
    """Distinct names per row, in the first rows of the list."""


def first_hosts(config: Config) -> HostSample:
    """Hosts of the first rows of the URL list. Raises `UrlListError`."""
    part = next(open_configured_list(config, config.data.urls).parts(_ROWS))
    hosts = list(dict.fromkeys(filter(None, map(host_of, part.table["url"].to_pylist()))))
    return HostSample(hosts[:HOSTS], len(hosts) / len(part.table))


def measure_names(hosts: HostSample, rules: FetchPolicy) -> tuple[float, float, float]:
    """Names resolved per second, names needed per second for this machine's cores, and the fraction of names that were not
    found.

    Lookups are made as a task makes them: as many at a time, by the same resolver, with an empty cache.
    """
    resolver = Resolver(tuple(rules.nameservers))
    start_s = time.monotonic()
    with ThreadPoolExecutor(LOOKUPS) as pool:
        found = list(pool.map(lambda host: _is_found(resolver, host, start_s + _LONGEST_S), hosts.names))
    seconds = max(time.monotonic() - start_s, 1e-3)
    needed = IMAGES_PER_S_PER_CORE * (os.cpu_count() or 1) * hosts.per_row
    return len(found) / seconds, needed, 1 - sum(found) / max(1, len(found))


def _is_found(resolver: Resolver, host: str, deadline_s: float) -> bool:
    try:
        return bool(resolver.addresses(host, deadline_s))
    except FetchError:
        return False
