"""May this URL be fetched? The answer stands where the connection is made, so that nothing gets around it.

img2dataset asks `urllib.request.urlopen`, which would also read `file://`, follow a redirect to the cloud's
metadata address, and wait without end for a server that sends a byte now and then. `install` gives this
process an opener that knows http and https only, looks at each address right before it connects to that very
address (so a name cannot change its mind in between, and a redirect is judged like the first URL), and bounds
size and duration of an answer. Proxies of the environment are not used: they would connect in our place,
unseen.
"""

import functools
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any, NoReturn

from ingest.reasons import FetchError
from roclip.config import FetchPolicy

MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded, here or in training."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def allows(policy: FetchPolicy, address: str) -> bool:
    """Whether a connection to this IP address may be made."""
    known = ipaddress.ip_address(address.partition("%")[0])
    return any(known in ipaddress.ip_network(network) for network in policy.allow_networks) or _is_public(known)


def install(policy: FetchPolicy) -> None:
    """Make `urllib.request.urlopen` obey the policy, in the whole of this process."""
    urllib.request.install_opener(opener(policy))


def opener(policy: FetchPolicy) -> urllib.request.OpenerDirector:
    """An opener that obeys the policy: http and https, redirects among them, nothing else."""
    director = urllib.request.OpenerDirector()
    director.add_handler(_Http(policy))
    director.add_handler(_Https(policy))
    director.add_handler(_OtherSchemes())
    director.add_handler(urllib.request.HTTPRedirectHandler())
    director.add_handler(urllib.request.HTTPErrorProcessor())
    director.add_handler(urllib.request.HTTPDefaultErrorHandler())
    return director


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return _is_public(address.ipv4_mapped)
        inner = [address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(v4 is not None and not _is_public(v4) for v4 in inner):
            return False
    return address.is_global and not address.is_multicast


def _connect(policy: FetchPolicy, target: tuple[str, int], timeout: Any, source: Any = None) -> socket.socket:
    """Resolve once, and connect to the first allowed address that answers."""
    host, port = target
    addresses = list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)))
    allowed = [address for address in addresses if allows(policy, address)]
    if not allowed:
        raise FetchError("refused_address", f"{host} is at {', '.join(addresses)}, not a public address")
    for address in allowed[:-1]:
        try:
            return socket.create_connection((address, port), timeout, source)
        except OSError:
            continue
    return socket.create_connection((allowed[-1], port), timeout, source)


class _BoundedResponse(http.client.HTTPResponse):
    """An answer whose `read()` ends: by size, by time, or because the server sent less than it promised."""

    policy: FetchPolicy

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        promised, limit = self.length, self.policy.max_bytes
        ends_s = time.monotonic() + self.policy.deadline_s
        pieces, size = [], 0
        while (promised is None or size < promised) and (piece := self.read1(1 << 16)):
            pieces.append(piece)
            size += len(piece)
            if max(size, promised or 0) > limit:
                raise FetchError("too_large", f"more than {limit} bytes")
            if time.monotonic() > ends_s:
                raise FetchError("too_slow", f"the body took more than {self.policy.deadline_s} s")
        if promised is not None and size < promised:
            raise http.client.IncompleteRead(b"", promised - size)
        return b"".join(pieces)


def _checked(base: Any, policy: FetchPolicy) -> Any:
    """A factory of `base` connections whose sockets are opened by `_connect`."""
    response_class = type("Response", (_BoundedResponse,), {"policy": policy})

    def connection(host: str, **options: Any) -> http.client.HTTPConnection:
        made = base(host, **options)
        made._create_connection = functools.partial(_connect, policy)
        made.response_class = response_class
        return made

    return connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, policy: FetchPolicy):
        super().__init__()
        self.connection = _checked(http.client.HTTPConnection, policy)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, policy: FetchPolicy):
        self.tls = ssl.create_default_context()  # once: reading the certificates takes longer than a small image
        super().__init__(context=self.tls)
        self.connection = _checked(http.client.HTTPSConnection, policy)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection, req, context=self.tls)


class _OtherSchemes(urllib.request.BaseHandler):
    def unknown_open(self, req: urllib.request.Request) -> NoReturn:
        raise FetchError("refused_scheme", f"expected http or https, got {req.type}")
