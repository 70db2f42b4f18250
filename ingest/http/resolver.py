"""DNS lookups: a cache per process, with a bounded number of concurrent lookups.

Callers that ask for a name that is being looked up wait for that lookup, so a dead host costs one. `getaddrinfo` has no
timeout: lookups run in threads of their own, which the caller stops waiting for at its deadline, and which end when idle.
The addresses are not checked here. The connection checks those that it is about to use, so an answer that changes between
two lookups (DNS rebinding) gains nothing.
"""

import concurrent.futures
import ipaddress
import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import dns.exception
import dns.nameserver
import dns.resolver

from roclip.data.outcomes import FetchError
from roclip.errors import ConfigError

SYSTEM_TTL_S = 300.0
"""How long an answer of the system's resolver, which reports no time to live, is cached."""
MAX_TTL_S = 3600.0
FAILED_TTL_S = 60.0
"""How long a failed lookup is cached."""
LOOKUP_TIMEOUT_S = 8.0
"""Longest time of one query to `nameservers`."""
LOOKUPS = 64
"""Most concurrent lookups of a process."""
MAX_NAMES = 1 << 15
MAX_ADDRESSES = 8
_IDLE_TIMEOUT_S = 5.0


class Lookup(NamedTuple):
    """The result of a lookup."""

    addresses: tuple[str, ...]
    """IP addresses as text; empty after a failure."""
    error: str
    """Why there are no addresses."""
    ttl_s: float


@dataclass(frozen=True)
class LookupCounts:
    """Statistics of a resolver."""

    lookups: int
    """Lookups made."""
    hits: int
    """Queries answered by the cache, or by a lookup that was already under way."""
    failures: int
    """Lookups without an address."""
    seconds: float
    """Total time of the lookups."""


class _CacheEntry:
    """A name that is being looked up; once `lookup` is set, `pending` is None."""

    __slots__ = ("expires_s", "lookup", "pending")

    def __init__(self) -> None:
        self.pending: concurrent.futures.Future[Lookup] | None = concurrent.futures.Future()
        self.lookup: Lookup | None = None
        self.expires_s = float("inf")


class Resolver:
    """Looks names up, once per name and time to live. Thread-safe.

    Args:
        nameservers: DNS servers (`address`, `address:port`, `[IPv6]:port`). Without any, the system's resolver is used, with its
            hosts file and search domains.
        lookups: Most concurrent lookups.
        clock: Seconds, for the expiry of cached answers.

    Raises `ConfigError` for an invalid server address.
    """

    def __init__(
        self, nameservers: tuple[str, ...] = (), lookups: int = LOOKUPS, clock: Callable[[], float] = time.monotonic
    ):
        self._resolve = _FromServers(nameservers) if nameservers else _from_system
        self._max_workers = lookups
        self._clock = clock
        self._lock = threading.Lock()
        self._names: OrderedDict[str, _CacheEntry] = OrderedDict()
        self._waiting: queue.SimpleQueue[tuple[str, _CacheEntry]] = queue.SimpleQueue()
        self._open_lookups = self._workers = 0
        self._lookups = self._hits = self._failures = 0
        self._seconds = 0.0

    def addresses(self, host: str, deadline_s: float) -> tuple[str, ...]:
        """The addresses of a name, at least one. `deadline_s` is a time of the monotonic clock.

        Raises `FetchError`: `no_host`, or `too_slow` if the answer has not come by the deadline.
        """
        with self._lock:
            entry = self._names.get(host)
            if entry is None or entry.expires_s <= self._clock():
                entry = self._start_lookup(host)
            else:
                self._hits += 1
            self._names.move_to_end(host)
            lookup, pending = entry.lookup, entry.pending
        if pending:
            try:
                lookup = pending.result(max(0.0, deadline_s - time.monotonic()))
            except concurrent.futures.TimeoutError:
                raise FetchError("too_slow", f"{host} was not found within the deadline") from None
        assert lookup
        if not lookup.addresses:
            raise FetchError("no_host", f"{host}: {lookup.error}")
        return lookup.addresses

    def counts(self) -> LookupCounts:
        """The statistics so far."""
        with self._lock:
            return LookupCounts(self._lookups, self._hits, self._failures, self._seconds)

    def _start_lookup(self, host: str) -> _CacheEntry:
        entry = self._names[host] = _CacheEntry()
        if len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)
        self._open_lookups += 1
        self._waiting.put((host, entry))
        if self._workers < min(self._open_lookups, self._max_workers):
            self._workers += 1
            threading.Thread(target=self._work, name="resolver", daemon=True).start()
        return entry

    def _work(self) -> None:
        while True:
            try:
                host, entry = self._waiting.get(timeout=_IDLE_TIMEOUT_S)
            except queue.Empty:
                with self._lock:
                    if self._waiting.empty():  # names are queued under the same lock
                        self._workers -= 1
                        return
                continue
            began_s = time.monotonic()
            try:
                lookup = self._resolve(host)
            except (
                Exception
            ) as error:  # a hostile answer may make the library raise anything, and callers wait for a result
                lookup = Lookup((), f"{type(error).__name__}: {error}"[:200], FAILED_TTL_S)
            with self._lock:
                self._open_lookups -= 1
                self._lookups += 1
                self._failures += not lookup.addresses
                self._seconds += time.monotonic() - began_s
                pending, entry.pending = entry.pending, None
                entry.lookup, entry.expires_s = lookup, self._clock() + lookup.ttl_s
            assert pending
            pending.set_result(lookup)


def _from_system(host: str) -> Lookup:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Lookup((), str(error)[:200], FAILED_TTL_S)
    addresses = tuple(dict.fromkeys(str(info[4][0]) for info in infos))
    return Lookup(addresses[:MAX_ADDRESSES], "", SYSTEM_TTL_S)


class _FromServers:
    """Queries DNS servers, for IPv4 addresses first, then for IPv6."""

    def __init__(self, nameservers: tuple[str, ...]):
        self._resolver = dns.resolver.Resolver(configure=False)
        self._resolver.nameservers = [dns.nameserver.Do53Nameserver(*_server(text)) for text in nameservers]
        self._resolver.lifetime = LOOKUP_TIMEOUT_S

    def __call__(self, host: str) -> Lookup:
        addresses: list[str] = []
        error, ttl_s = "it has no address", MAX_TTL_S
        for kind in ("A", "AAAA"):
            try:
                answer = self._resolver.resolve(host, kind, raise_on_no_answer=False, search=False)
            except dns.exception.DNSException as error:
                error = str(error)[:200]
                break
            addresses += [record.address for record in answer]
            if answer.rrset:
                ttl_s = min(ttl_s, answer.chaining_result.minimum_ttl)
        return Lookup(tuple(addresses[:MAX_ADDRESSES]), error, float(ttl_s if addresses else FAILED_TTL_S))


def _server(text: str) -> tuple[str, int]:
    """Address and port of a DNS server."""
    address, port = text, "53"
    if text.startswith("["):
        address, bracket, port = text[1:].partition("]")
        port = port.removeprefix(":") or ("53" if bracket else "")
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    try:
        ipaddress.ip_address(address)
        if not 0 < int(port) < 65536:
            raise ValueError("no such port")
    except ValueError as error:
        raise ConfigError(
            f"ingest.policy.nameservers: expected address, address:port or [address]:port, got {text!r} ({error})."
        ) from error
    return address, int(port)
