"""Fetches a URL under the policy, in place of `urllib.request.urlopen`, so that nothing gets around it.

img2dataset asks `urlopen(request)`, which would also read `file://`, follow a redirect to the cloud's metadata address, and
wait without end for a server that sends a byte now and then. `install` puts an opener of ours into the process. One URL:

    check     scheme, host lists, port; an address is judged at once            policy.py
    robots    robots.txt of the site                                            `RobotsRules`
    enter     the host's turn                                                   `HostPermits`
    look up   all addresses of the name, once; those allowed are kept           resolver.py
    connect   to such an address, and to nothing else; TLS for the URL's name   deadline_socket.py
    ask       no cookies, no credentials, no referrer; head and body bounded    deadline_socket.py, body.py
    redirect  from the top, like a first URL; https to http is followed: no secret is sent either way

Proxies of the environment are not used: they would connect in our place, unseen.
"""

import datetime
import email.utils
import errno
import functools
import http.client
import io
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import Any, Protocol, TypeVar

from ingest.http import body, opt_out, policy, urls
from ingest.http.deadline_socket import Deadline, DeadlineSocket, connected
from ingest.http.resolver import Resolver
from ingest.http.urls import Target
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError, is_passing, reason_of

MAX_HEADER_BYTES = 64 * 2**10
"""Largest headers of one answer."""
MAX_ROBOTS_BYTES = 2**19
"""How much of a robots.txt is read; RFC 9309 asks for 500 KiB."""
MAX_RETRY_AFTER_S = 86_400.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 503})
_HOST_FAILED = frozenset({"no_host", "timeout", "connection_refused", "connection_reset", "unreachable"})
_NOT_AT_ONCE = frozenset({"no_host", "timeout", "too_slow", "host_busy", "host_down", "http_429", "http_503"})
"""Failures that a second try right away would only repeat, or that ask for patience: a later pass is for them."""
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL})
Taken = TypeVar("Taken")


class HostPermits(Protocol):
    """Whose turn it is at a host, which is `name` or `name:port`."""

    def enter(self, host: str, deadline_s: float, *, crawl_delay_s: float = 0.0) -> None:
        """Wait for the turn, until a moment of the monotonic clock; raises `FetchError`: `host_busy` or `host_down`."""
        ...

    def leave(
        self, host: str, *, failed: bool = False, busy: bool = False, retry_after_s: float = 0.0, size_bytes: int = 0
    ) -> None:
        """End the turn, and say how it went."""
        ...


class RobotsRules(Protocol):
    """What robots.txt says."""

    def allows(self, url: str, deadline_s: float) -> bool:
        """Whether the site lets us fetch this URL. A `FetchError` becomes the URL's own."""
        ...

    def crawl_delay_s(self, url: str, deadline_s: float) -> float:
        """The time that the site wants between two requests."""
        ...


class Answer(io.BytesIO):
    """The body of a 200, complete. Who reads it tells `Opener.handled` once the image is no longer in memory."""

    def __init__(self, content: bytes, url: str, headers: Message, opener: "Opener"):
        super().__init__(content)
        self.url, self.headers, self.status, self.code = url, headers, http.client.OK, http.client.OK
        self._size, self._opener = len(content), opener
        self._is_read = False

    def read(self, size: int | None = -1, /) -> bytes:
        self._is_read = True
        return super().read(size)

    def info(self) -> Message:
        return self.headers

    def geturl(self) -> str:
        return self.url

    def close(self) -> None:
        if not (self.closed or self._is_read):
            self._opener.handled(self._size)
        super().close()


class _Moved(str):
    """Where a redirect leads."""


class Opener(urllib.request.OpenerDirector):
    """Opens URLs under a policy. Safe to use from many threads.

    `timeout_s` is the longest wait for a server, unless `open` is told another; `retries` are further tries at once, within
    the same deadline. Without `hosts` no turn is waited for; without `robots`, or where the policy says so, no robots.txt is
    asked. Raises `ConfigError` where host lists, contact, proxy or nameservers cannot be used.
    """

    def __init__(
        self,
        rules: FetchPolicy,
        *,
        timeout_s: float,
        retries: int = 0,
        hosts: HostPermits | None = None,
        robots: RobotsRules | None = None,
    ):
        super().__init__()
        self.rules = rules
        self.timeout_s = timeout_s
        self.retries = retries
        self.hosts = hosts
        self.robots = robots if rules.robots else None
        self.resolver = _resolver(tuple(rules.nameservers))
        self._memory = body.Memory(body.LARGE_BODIES * max(rules.max_bytes, body.SMALL_BYTES))
        self._proxy = policy.proxy(rules)
        self._headers = (
            f"User-Agent: {policy.user_agent(rules)}\r\n"
            "Accept: image/*, */*;q=0.5\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
        )
        policy.host_list(tuple(rules.allow_hosts))
        policy.host_list(tuple(rules.deny_hosts))

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """GET a URL (text or `Request`, of which only the URL is used) and read its body: an `Answer`.

        Raises `FetchError` with the reason, or `HTTPError` for a status other than 200, redirects followed. A numeric
        `timeout` stands in for `timeout_s`.
        """
        if data is not None:
            raise ValueError("expected no data: only GET is done")
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        timeout_s = timeout if isinstance(timeout, (int, float)) else self.timeout_s
        patience = Deadline(timeout_s, time.monotonic() + self.rules.deadline_s)
        tries_left = self.retries
        while True:
            try:
                return self._follow(url, patience, self._image, self.robots)
            except OSError as error:
                reason = reason_of(str(error))
                pause_s = random.uniform(0.1, 0.5)
                if not tries_left or not is_passing(reason) or reason in _NOT_AT_ONCE or patience.left_s() < pause_s:
                    raise
            tries_left -= 1
            time.sleep(pause_s)

    def fetch_robots(self, url: str) -> tuple[int, bytes]:
        """Status and up to `MAX_ROBOTS_BYTES` of the body of a robots.txt, redirects followed; no robots.txt is asked for it.

        Same policy, same turns, a deadline of its own. Raises `FetchError`.
        """
        patience = Deadline(self.timeout_s, time.monotonic() + self.rules.deadline_s)
        return self._follow(url, patience, self._robots_txt, None)

    def handled(self, size_bytes: int) -> None:
        """Say that a body that was read is no longer in memory. To be called once for each, whatever became of it."""
        if size_bytes > body.SMALL_BYTES:
            self._memory.give_back(size_bytes)

    def _follow(self, url: str, patience: Deadline, take: Callable[..., Taken], robots: RobotsRules | None) -> Taken:
        seen: set[str] = set()
        for _ in range(self.rules.max_redirects + 1):
            target = policy.check(self.rules, url)
            url = target.url
            if url in seen:
                raise FetchError("too_many_redirects", "a loop")
            seen.add(url)
            crawl_delay_s = 0.0
            if robots:
                if not robots.allows(url, patience.ends_s):
                    raise FetchError("robots_txt", f"{target.netloc} forbids it")
                crawl_delay_s = robots.crawl_delay_s(url, patience.ends_s)
                patience.wait_s()  # the site's first URL waits for robots.txt, which has a deadline of its own
            got = self._visit(target, patience, take, crawl_delay_s)
            if not isinstance(got, _Moved):
                return got
            url = urls.join(url, got)
        raise FetchError("too_many_redirects", f"more than {self.rules.max_redirects}")

    def _visit(
        self, target: Target, patience: Deadline, take: Callable[..., Taken], crawl_delay_s: float
    ) -> Taken | _Moved:
        """One request, within the host's turn."""
        if self.hosts:
            self.hosts.enter(target.netloc, patience.ends_s, crawl_delay_s=crawl_delay_s)
        began_s = time.monotonic()
        outcome: dict[str, Any] = {}
        wire = None
        try:
            addresses = policy.vetted(self.rules, target.host, self._addresses(target, patience))
            proxy = self._proxy and (self._addresses(self._proxy, patience), self._proxy.port)
            with connected(target, addresses, patience, proxy) as sock:
                wire = DeadlineSocket(sock, patience, MAX_HEADER_BYTES)
                response = wire.ask(f"GET {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\n{self._headers}".encode())
                if response.status in _BUSY:
                    outcome = {"busy": True, "retry_after_s": _retry_after_s(response.headers.get("Retry-After", ""))}
                if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                    return _Moved(location.strip())
                return take(target, response, wire, patience)
        except (OSError, http.client.HTTPException, ValueError) as error:
            named = _named(error, patience)
            reason = reason_of(str(named))
            slow = reason == "too_slow" and not isinstance(error, body.NoRoomError)
            # A host to which others left no time has not failed.
            if reason in _HOST_FAILED or (slow and time.monotonic() - began_s > patience.timeout_s):
                outcome = {"failed": True}
            if named is error:
                raise
            raise named from error
        finally:
            if self.hosts:
                self.hosts.leave(target.netloc, size_bytes=wire.received_bytes if wire else 0, **outcome)

    def _addresses(self, target: Target, patience: Deadline) -> tuple[str, ...]:
        return (target.host,) if target.is_address else self.resolver.addresses(target.host, patience.ends_s)

    def _image(
        self, target: Target, response: http.client.HTTPResponse, wire: DeadlineSocket, patience: Deadline
    ) -> Answer:
        status, headers = response.status, response.headers
        if status != http.client.OK:
            said = http.client.responses.get(status, "")  # not the server's own words: they may name another reason
            raise urllib.error.HTTPError(target.url, status, said, headers, io.BytesIO())
        if self.rules.opt_out:
            objection = opt_out.objection(headers.get_all("X-Robots-Tag", ()), policy.AGENT)
            if objection:
                raise FetchError("opted_out", f"X-Robots-Tag: {objection}")
        content = body.read(response, wire, self.rules.max_bytes, self._memory, patience)
        if not content:
            raise FetchError("not_an_image", "an empty answer")
        return Answer(content, target.url, headers, self)

    def _robots_txt(
        self, _: Target, response: http.client.HTTPResponse, wire: DeadlineSocket, __: Deadline
    ) -> tuple[int, bytes]:
        content = b""
        for piece in body.unpacked(response, wire, self.rules.max_bytes):
            content += piece
            if len(content) >= MAX_ROBOTS_BYTES:
                break
        return response.status, content[:MAX_ROBOTS_BYTES]


def install(
    rules: FetchPolicy,
    *,
    timeout_s: float,
    retries: int = 0,
    hosts: HostPermits | None = None,
    robots: RobotsRules | None = None,
) -> Opener:
    """Make `urllib.request.urlopen` obey the policy, in the whole of this process; the arguments are those of `Opener`.

    `RobotsRules` needs a way to fetch: `Opener(rules, timeout_s=..., hosts=hosts).fetch_robots`.
    """
    opener = Opener(rules, timeout_s=timeout_s, retries=retries, hosts=hosts, robots=robots)
    urllib.request.install_opener(opener)
    return opener


@functools.lru_cache(maxsize=4)
def _resolver(nameservers: tuple[str, ...]) -> Resolver:
    """One for the process, so that the next shard finds what this one has looked up."""
    return Resolver(nameservers)


def _named(error: Exception, patience: Deadline) -> Exception:
    """The error under the name of its reason. What a server wrote is cut short, and stands behind the name."""
    text = str(error)[:200]
    if isinstance(error, (FetchError, urllib.error.HTTPError)):
        return error
    if isinstance(error, TimeoutError):
        return (
            patience.over() if patience.left_s() <= 0 else FetchError("timeout", f"silent for {patience.timeout_s} s")
        )
    if isinstance(error, ssl.SSLError):
        return FetchError("tls_error", text)
    if isinstance(error, ConnectionRefusedError):
        return FetchError("connection_refused", text)
    if isinstance(error, ConnectionError):
        return FetchError("connection_reset", text)
    if isinstance(error, OSError):
        return FetchError("unreachable" if error.errno in _UNREACHABLE else "other", text)
    return FetchError("bad_response", f"{type(error).__name__}: {text}")


def _retry_after_s(value: str) -> float:
    """Seconds that `Retry-After` asks for, given in seconds or as a date; 0 where it says nothing of use."""
    try:
        seconds = min(int(value), MAX_RETRY_AFTER_S)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return 0.0
        if until.tzinfo is None:
            until = until.replace(tzinfo=datetime.timezone.utc)
        seconds = (until - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
