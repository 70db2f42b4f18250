"""Names to addresses: a cache in the process, with a bounded number of lookups at the same time.

Whoever asks for a name that is being looked up waits for that lookup, so a dead host costs one. `getaddrinfo` knows no
timeout: lookups run in threads of their own, which the asker leaves at its deadline, and which end when they are idle.
The addresses are not judged here. The connection vets those that it is about to use, so an answer that changes between
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
"""How long an answer of the system's resolver is kept, which tells no time to live."""
MAX_TTL_S = 3600.0
FAILED_TTL_S = 60.0
"""How long a name without an address is not asked for again."""
LOOKUP_S = 8.0
"""Longest time for one question to `nameservers`."""
LOOKUPS = 64
"""Lookups at the same time in one process."""
MAX_NAMES = 1 << 15
MAX_ADDRESSES = 8
_IDLE_S = 5.0


class Lookup(NamedTuple):
    """What a lookup brought."""

    addresses: tuple[str, ...]
    """IP addresses as text; none is a failure."""
    said: str
    """Why there are none."""
    ttl_s: float


@dataclass(frozen=True)
class Counts:
    """What a resolver has done so far."""

    lookups: int
    """Questions that were asked."""
    hits: int
    """Questions that the cache, or a lookup on its way, answered."""
    failures: int
    """Lookups that brought no address."""
    seconds: float
    """Time that the lookups took, all together."""


class _Known:
    """A name that is being looked up, until `found` is set; then there is no more to wait for."""

    __slots__ = ("coming", "expires_s", "found")

    def __init__(self) -> None:
        self.coming: concurrent.futures.Future[Lookup] | None = concurrent.futures.Future()
        self.found: Lookup | None = None
        self.expires_s = float("inf")


class Resolver:
    """Looks names up, once per name and time to live. Safe to use from many threads.

    `nameservers` are DNS servers (`address`, `address:port`, `[IPv6]:port`); without any, the system's resolver is asked,
    hosts file and search domains included. At most `lookups` questions are under way at the same time. `clock` tells when
    an answer has expired, in seconds. Raises `ConfigError` for what is no address of a server.
    """

    def __init__(
        self, nameservers: tuple[str, ...] = (), lookups: int = LOOKUPS, clock: Callable[[], float] = time.monotonic
    ):
        self._look_up = _FromServers(nameservers) if nameservers else _from_system
        self._limit = lookups
        self._clock = clock
        self._lock = threading.Lock()
        self._names: OrderedDict[str, _Known] = OrderedDict()
        self._waiting: queue.SimpleQueue[tuple[str, _Known]] = queue.SimpleQueue()
        self._open = self._workers = 0
        self._lookups = self._hits = self._failures = 0
        self._seconds = 0.0

    def addresses(self, host: str, deadline_s: float) -> tuple[str, ...]:
        """The addresses of a name, at least one. `deadline_s` is a moment of the monotonic clock.

        Raises `FetchError`: `no_host`, or `too_slow` when the answer has not come by then.
        """
        with self._lock:
            known = self._names.get(host)
            if known is None or known.expires_s <= self._clock():
                known = self._ask(host)
            else:
                self._hits += 1
            self._names.move_to_end(host)
            found, coming = known.found, known.coming
        if coming:
            try:
                found = coming.result(max(0.0, deadline_s - time.monotonic()))
            except concurrent.futures.TimeoutError:
                raise FetchError("too_slow", f"{host} was not found within the deadline") from None
        assert found
        if not found.addresses:
            raise FetchError("no_host", f"{host}: {found.said}")
        return found.addresses

    def counts(self) -> Counts:
        """What has been done so far."""
        with self._lock:
            return Counts(self._lookups, self._hits, self._failures, self._seconds)

    def _ask(self, host: str) -> _Known:
        known = self._names[host] = _Known()
        if len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)
        self._open += 1
        self._waiting.put((host, known))
        if self._workers < min(self._open, self._limit):
            self._workers += 1
            threading.Thread(target=self._work, name="resolver", daemon=True).start()
        return known

    def _work(self) -> None:
        while True:
            try:
                host, known = self._waiting.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._waiting.empty():  # questions are put under the same lock
                        self._workers -= 1
                        return
                continue
            began_s = time.monotonic()
            try:
                found = self._look_up(host)
            except Exception as error:  # whatever a hostile answer made of the library: the askers wait for this
                found = Lookup((), f"{type(error).__name__}: {error}"[:200], FAILED_TTL_S)
            with self._lock:
                self._open -= 1
                self._lookups += 1
                self._failures += not found.addresses
                self._seconds += time.monotonic() - began_s
                coming, known.coming = known.coming, None
                known.found, known.expires_s = found, self._clock() + found.ttl_s
            assert coming
            coming.set_result(found)


def _from_system(host: str) -> Lookup:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Lookup((), str(error)[:200], FAILED_TTL_S)
    addresses = tuple(dict.fromkeys(str(info[4][0]) for info in found))
    return Lookup(addresses[:MAX_ADDRESSES], "", SYSTEM_TTL_S)


class _FromServers:
    """Asks DNS servers: first for IPv4, then for IPv6 addresses."""

    def __init__(self, nameservers: tuple[str, ...]):
        self._resolver = dns.resolver.Resolver(configure=False)
        self._resolver.nameservers = [dns.nameserver.Do53Nameserver(*_server(text)) for text in nameservers]
        self._resolver.lifetime = LOOKUP_S

    def __call__(self, host: str) -> Lookup:
        addresses: list[str] = []
        said, ttl_s = "it has no address", MAX_TTL_S
        for kind in ("A", "AAAA"):
            try:
                answer = self._resolver.resolve(host, kind, raise_on_no_answer=False, search=False)
            except dns.exception.DNSException as error:
                said = str(error)[:200]
                break
            addresses += [record.address for record in answer]
            if answer.rrset:
                ttl_s = min(ttl_s, answer.chaining_result.minimum_ttl)
        return Lookup(tuple(addresses[:MAX_ADDRESSES]), said, float(ttl_s if addresses else FAILED_TTL_S))


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
