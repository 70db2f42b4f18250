"""Which URLs and addresses the policy allows. Pure functions over `FetchPolicy`, called by `connection.py` at each connection.

What counts as a public address:

    IPv4      what the IANA registries call globally reachable, without multicast
    IPv6      the same within 2000::/3, the only space handed out; if the address embeds an IPv4 address (mapped, NAT64,
              6to4, Teredo, ISATAP), that one must be public too

Nothing else: the metadata services of clouds (169.254.169.254, fd00:ec2::254) are excluded as private addresses. Only
`allow_networks` opens more. A name with public and other addresses is reached at its public ones.
"""

import functools
import importlib.metadata
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from ingest.http import urls
from ingest.http.urls import Target
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError
from roclip.errors import ConfigError

AGENT = "roclip"
"""The crawler's name in User-Agent, robots.txt and X-Robots-Tag."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        # Missing from `ipaddress` in some Pythons: protocol assignments, former 6to4 relays (RFC 7526), documentation (RFC 9637).
        ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20"),
    )
)
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_allowed_address(policy: FetchPolicy, address: str) -> bool:
    """Whether the policy allows a connection to this IP address, with or without a zone."""
    return _allowed(tuple(policy.allow_networks), address)


def check_url(policy: FetchPolicy, url: str) -> Target:
    """Parse a URL and check everything that needs no DNS lookup.

    Raises `FetchError`: those of `urls.parse`, `refused_host`, or `refused_address` if the host is an IP address.
    """
    target = urls.parse(url)
    host = target.host
    if policy.allow_hosts and not _is_listed(host, host_list(tuple(policy.allow_hosts))):
        raise FetchError("refused_host", f"{host} is not in ingest.policy.allow_hosts")
    if policy.deny_hosts and _is_listed(host, host_list(tuple(policy.deny_hosts))):
        raise FetchError("refused_host", f"{host} is in ingest.policy.deny_hosts")
    if target.is_address:
        allowed_addresses(policy, host, (host,))
    return target


def allowed_addresses(policy: FetchPolicy, host: str, addresses: Iterable[str]) -> list[str]:
    """The addresses of a host that may be connected to. Raises `FetchError("refused_address")` if there are none."""
    addresses = list(addresses)
    allowed = [address for address in addresses if is_allowed_address(policy, address)]
    if not allowed:
        raise FetchError("refused_address", f"{host} is at {', '.join(addresses[:4])}, not a public address")
    return allowed


@functools.lru_cache(maxsize=16)
def host_list(entries: tuple[str, ...]) -> frozenset[str]:
    """The domains of `allow_hosts` or `deny_hosts`. Cached, so an `@file` entry is read once.

    Raises `ConfigError` for a file that cannot be read and for an invalid host name.
    """
    names: set[str] = set()
    for entry in entries:
        for name in _lines(entry[1:]) if entry.startswith("@") else [entry]:
            try:
                names.add(urls.canonical_host(name))
            except FetchError as error:
                raise ConfigError(
                    f"ingest.policy: expected host names such as example.com in allow_hosts and deny_hosts, "
                    f"got {name[:100]!r} in {entry[:100]!r}. Write it without scheme, port and path."
                ) from error
    return frozenset(names)


def user_agent(policy: FetchPolicy) -> str:
    """The User-Agent header: our name, version and contact. Raises `ConfigError` for a contact that is not printable ASCII."""
    contact = policy.contact
    if not (contact.isascii() and contact.isprintable()):
        raise ConfigError(
            f"ingest.policy.contact: expected printable ASCII, got {contact!r}. Set a URL or mail address."
        )
    own = f"{AGENT}/{_version()}"
    return f"{own} (+{contact})" if contact else own


def proxy(policy: FetchPolicy) -> Target | None:
    """The proxy, or None. Raises `ConfigError` unless it is `http://host:port`."""
    if not policy.proxy:
        return None
    try:
        target = urls.parse(policy.proxy)
    except FetchError as error:
        raise ConfigError(f"ingest.policy.proxy: expected http://host:port, got {policy.proxy!r} ({error}).") from error
    if target.scheme != "http" or target.path != "/":
        raise ConfigError(f"ingest.policy.proxy: expected http://host:port, got {policy.proxy!r}.")
    return target


@functools.lru_cache(maxsize=1)
def _version() -> str:
    return importlib.metadata.version("roclip")


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"ingest.policy: @{path} cannot be read ({error}). Expected one host name a line.") from error
    return [name for line in lines if (name := line.strip())]


def _is_listed(host: str, domains: frozenset[str]) -> bool:
    while host not in domains:
        host = host.partition(".")[2]
        if not host:
            return False
    return True


@functools.lru_cache(maxsize=16)
def _networks(texts: tuple[str, ...]) -> tuple[_Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


@functools.lru_cache(maxsize=1 << 14)
def _allowed(networks: tuple[str, ...], text: str) -> bool:
    address: _Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped  # the socket reaches that host
    return any(address in network for network in _networks(networks)) or _is_public(address)


def _is_public(address: _Address) -> bool:
    if any(address in network for network in _SPECIAL):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if address in _NAT64:
        return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _UNICAST and address.is_global and all(map(_is_public, _embedded_ipv4(address)))


def _embedded_ipv4(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address may lead to."""
    inner = [*(address.teredo or ())]
    if address.sixtofour:
        inner.append(address.sixtofour)
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return inner
