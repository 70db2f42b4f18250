"""Parses URLs as the socket will see them, so that what is checked is what is requested.

The rules are those of browsers (WHATWG URL, UTS 46) where they are unambiguous: a host in any notation becomes one
lower-case ASCII name or one canonical address. Where parsers differ (backslashes, control characters, missing
slashes), the URL is refused instead.
"""

import functools
import ipaddress
import re
import socket
import string
import urllib.parse
from typing import NamedTuple

import idna

from roclip.data.outcomes import FetchError

MAX_URL_CHARS = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
_BAD_PORTS = """
    0 1 7 9 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115 117
    119 123 135 137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556 563 587 601
    636 989 990 993 995 1719 1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666 6667 6668 6669 6679
    6697 10080
"""
BAD_PORTS = frozenset(map(int, _BAD_PORTS.split()))
"""Ports of services that no web server shares, by the Fetch standard ("port blocking")."""
_MAX_HOST_CHARS = 253
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_AUTHORITY = re.compile(r"//([^/?#]*)")
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_PORT = re.compile(r"[0-9]{1,16}")
_KEPT = "".join(set(string.punctuation) - set('"<>\\^`{|}'))


class Target(NamedTuple):
    """Where a request goes."""

    scheme: str
    host: str
    """A lower-case ASCII name without a trailing dot, or a canonical IPv4 or IPv6 address (without brackets)."""
    port: int
    path: str
    """From the first slash on, with the query, percent-encoded."""

    @property
    def is_address(self) -> bool:
        """Whether the host is an IP address."""
        return ":" in self.host or self.host.rpartition(".")[2].isdigit()  # no name ends in a number: `canonical_host`

    @property
    def netloc(self) -> str:
        """Host and, unless it is the scheme's default, port: the value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL in canonical form; parsing it gives this target again."""
        return f"{self.scheme}://{self.netloc}{self.path}"


def parse(url: str) -> Target:
    """Parse a URL. Its fragment is dropped.

    Raises `FetchError`: `bad_url`, `refused_scheme`, `refused_credentials` or `refused_port`.
    """
    if len(url) > MAX_URL_CHARS or _CONTROL.search(url):
        raise _bad(url, f"more than {MAX_URL_CHARS} characters, or control characters")
    named = _SCHEME.match(url)
    if not named:
        raise _bad(url, "no scheme")
    scheme = named[1].lower()
    if scheme not in DEFAULT_PORTS:
        raise FetchError("refused_scheme", f"expected http or https, got {scheme[:20]}")
    found = _AUTHORITY.match(url, named.end())
    if not found:
        raise _bad(url, "no // after the scheme")
    host, port = _host_and_port(found[1], DEFAULT_PORTS[scheme])
    rest = url[found.end() :].partition("#")[0]
    try:
        path = urllib.parse.quote(rest, safe=_KEPT)
    except UnicodeEncodeError as error:
        raise _bad(url, "an unpaired surrogate") from error
    return Target(scheme, host, port, path if path[:1] == "/" else f"/{path}")


def join(base: str, location: str) -> str:
    """Resolve a `Location` header (decoded as latin-1) against a URL. Raises `FetchError("bad_url")`."""
    try:
        return urllib.parse.urljoin(base, urllib.parse.quote(location, safe=string.punctuation, encoding="latin-1"))
    except ValueError as error:
        raise _bad(location, str(error)) from error


def host_of(url: str | None) -> str:
    """The host of a URL as written, in lower case; "" if there is none. For statistics, not for connections."""
    try:
        return urllib.parse.urlsplit(url or "").hostname or ""
    except ValueError:
        return ""


def canonical_host(host: str) -> str:
    """The canonical spelling of a host: IDNA (UTS 46), any notation of IPv4 and IPv6, no trailing dot.

    Raises `FetchError("bad_url")`.
    """
    if host[:1] == "[":
        return _ipv6(host)
    name = host
    if "%" in name:
        name = urllib.parse.unquote(name, errors="surrogateescape")
    if len(name) > 4 * _MAX_HOST_CHARS:
        raise _bad(host, "the host name is too long")
    name = _ascii(name).removesuffix(".")
    if len(name) > _MAX_HOST_CHARS or not _NAME.fullmatch(name):
        raise _bad(host, "not a host name")
    last = name.rpartition(".")[2]
    return _ipv4(name) if _NUMBER.fullmatch(last) else name


@functools.lru_cache(maxsize=1 << 12)
def _host_and_port(authority: str, default_port: int) -> tuple[str, int]:
    if "@" in authority:
        raise FetchError("refused_credentials", "a user or password in the URL")
    host, colon, digits = authority.rpartition(":")
    if not colon or "]" in digits:
        host, digits = authority, ""
    host = canonical_host(host)
    if digits and not _PORT.fullmatch(digits):
        raise _bad(authority, "no such port")
    port = int(digits) if digits else default_port
    if port > 65535:
        raise _bad(authority, "no such port")
    if port in BAD_PORTS:
        raise FetchError("refused_port", f"port {port} is not a web server's")
    return host, port


def _ascii(name: str) -> str:
    if name.isascii():
        return name.lower()
    try:
        labels = idna.uts46_remap(name, std3_rules=False).split(".")
        return ".".join(label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels)
    except (idna.IDNAError, UnicodeError) as error:
        raise _bad(name, "not a valid international name") from error


def _ipv4(name: str) -> str:
    """The dotted form of decimal, octal, hexadecimal and shortened forms, as `inet_aton` of the C library reads them."""
    try:
        return socket.inet_ntoa(socket.inet_aton(name))
    except OSError as error:
        raise _bad(name, "not an IPv4 address") from error


def _ipv6(host: str) -> str:
    try:
        if host[-1] != "]" or "%" in host:  # a zone only makes sense on this machine
            raise ValueError("brackets or a zone")
        return ipaddress.IPv6Address(host[1:-1]).compressed
    except ValueError as error:
        raise _bad(host, "not an IPv6 address") from error


def _bad(what: str, why: str) -> FetchError:
    return FetchError("bad_url", f"{what[:100]!a}: {why}")
