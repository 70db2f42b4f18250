"""Fetches a URL under the policy; replaces `urllib.request.urlopen` for the whole process, so that nothing gets around it.

img2dataset calls `urlopen(request)`, which would also read `file://`, follow a redirect to the cloud's metadata address, and
wait for ever for a server that sends a byte now and then. `install` puts our own opener into the process. The steps for one URL:

    check     scheme, host lists and port; an IP address is judged at once        policy.py
    robots    apply the site's robots.txt                                         `RobotsRules`
    acquire   wait for a permit from the host's rate limiter                      `HostLimiter`
    look up   all addresses of the name, once; forbidden ones are dropped         resolver.py
    connect   to one of the allowed addresses only; TLS for the URL's host name   deadline_socket.py
    request   no cookies, credentials or referrer; head and body are bounded      deadline_socket.py, body.py
    redirect  starts over like a first URL; https to http is followed, as no secret is sent either way

Proxies from the environment are ignored: they would connect on our behalf, out of the policy's reach.
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
from roclip.data.outcomes import FetchError, is_transient, reason_of

MAX_HEADER_BYTES = 64 * 2**10
"""Largest head of one response."""
MAX_ROBOTS_BYTES = 2**19
"""Bytes of a robots.txt that are read; RFC 9309 requires at least 500 KiB."""
MAX_RETRY_AFTER_S = 86_400.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 503})
_HOST_FAILED = frozenset({"no_host", "timeout", "connection_refused", "connection_reset", "unreachable"})
_NOT_AT_ONCE = frozenset({"no_host", "timeout", "too_slow", "host_busy", "host_down", "http_429", "http_503"})
"""Transient failures that an immediate retry would only repeat, or that ask for a pause: a later pass retries them."""
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL})
Result = TypeVar("Result")


class HostLimiter(Protocol):
    """A rate limiter with one budget per host, which is `name` or `name:port`."""

    def acquire(self, host: str, deadline_s: float, *, crawl_delay_s: float = 0.0) -> None:
        """Wait for a permit, until `deadline_s` of the monotonic clock. Raises `FetchError`: `host_busy` or `host_down`."""
        ...

    def release(
        self, host: str, *, failed: bool = False, busy: bool = False, retry_after_s: float = 0.0, size_bytes: int = 0
    ) -> None:
        """Return the permit and report the outcome of the request."""
        ...


class RobotsRules(Protocol):
    """The rules of robots.txt files."""

    def allows(self, url: str, deadline_s: float) -> bool:
        """Whether the site allows this URL to be fetched. A raised `FetchError` becomes the URL's outcome."""
        ...

    def crawl_delay_s(self, url: str, deadline_s: float) -> float:
        """Seconds that the site wants between two requests."""
        ...


class FetchedBody(io.BytesIO):
    """The complete body of a 200 response.

    Whoever reads it calls `Opener.release_body` once the image is no longer in memory; closing it unread does the same.
    """

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
            self._opener.release_body(self._size)
        super().close()


class _Redirect(str):
    """The Location of a redirect."""


class Opener(urllib.request.OpenerDirector):
    """Opens URLs under a policy. Thread-safe.

    Args:
        rules: The policy.
        timeout_s: Longest silence of a server, unless `open` gets another one.
        retries: Immediate further attempts, within the same deadline.
        limiter: Rate limiter per host; without one, requests are not limited.
        robots: robots.txt rules; without them, or if the policy turns them off, no robots.txt is read.

    Raises `ConfigError` for unusable host lists, contact, proxy or nameservers.
    """

    def __init__(
        self,
        rules: FetchPolicy,
        *,
        timeout_s: float,
        retries: int = 0,
        limiter: HostLimiter | None = None,
        robots: RobotsRules | None = None,
    ):
        super().__init__()
        self.rules = rules
        self.timeout_s = timeout_s
        self.retries = retries
        self.limiter = limiter
        self.robots = robots if rules.robots else None
        self.resolver = _resolver(tuple(rules.nameservers))
        self._memory = body.MemoryBudget(body.LARGE_BODIES * max(rules.max_bytes, body.SMALL_BYTES))
        self._proxy = policy.proxy(rules)
        self._headers = (
            f"User-Agent: {policy.user_agent(rules)}\r\n"
            "Accept: image/*, */*;q=0.5\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
        )
        policy.host_list(tuple(rules.allow_hosts))
        policy.host_list(tuple(rules.deny_hosts))

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """GET a URL and read its body; returns a `FetchedBody`. Redirects are followed.

        Args:
            fullurl: The URL, or a `Request`, of which only the URL is used.
            data: Must be None.
            timeout: Seconds, instead of `timeout_s`.

        Raises `FetchError` with the reason, or `HTTPError` for a final status other than 200.
        """
        if data is not None:
            raise ValueError("expected data=None: only GET is supported")
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        timeout_s = timeout if isinstance(timeout, (int, float)) else self.timeout_s
        deadline = Deadline(timeout_s, time.monotonic() + self.rules.deadline_s)
        tries_left = self.retries
        while True:
            try:
                return self._follow_redirects(url, deadline, self._read_image, self.robots)
            except OSError as error:
                reason = reason_of(str(error))
                pause_s = random.uniform(0.1, 0.5)
                if (
                    not tries_left
                    or not is_transient(reason)
                    or reason in _NOT_AT_ONCE
                    or deadline.remaining_s() < pause_s
                ):
                    raise
            tries_left -= 1
            time.sleep(pause_s)

    def fetch_robots(self, url: str) -> tuple[int, bytes]:
        """Fetch a robots.txt, redirects followed: its status and up to `MAX_ROBOTS_BYTES` of its body.

        The policy and the rate limits hold for it too, but no robots.txt does; it has its own deadline. Raises `FetchError`.
        """
        deadline = Deadline(self.timeout_s, time.monotonic() + self.rules.deadline_s)
        return self._follow_redirects(url, deadline, self._read_robots_txt, None)

    def release_body(self, size_bytes: int) -> None:
        """Return the memory budget of a body that was read. To be called once for each body, whatever its outcome."""
        if size_bytes > body.SMALL_BYTES:
            self._memory.release(size_bytes)

    def _follow_redirects(
        self, url: str, deadline: Deadline, read_response: Callable[..., Result], robots: RobotsRules | None
    ) -> Result:
        seen: set[str] = set()
        for _ in range(self.rules.max_redirects + 1):
            target = policy.check_url(self.rules, url)
            url = target.url
            if url in seen:
                raise FetchError("too_many_redirects", "a loop")
            seen.add(url)
            crawl_delay_s = 0.0
            if robots:
                if not robots.allows(url, deadline.at_s):
                    raise FetchError("robots_txt", f"{target.netloc} forbids it")
                crawl_delay_s = robots.crawl_delay_s(url, deadline.at_s)
                deadline.next_timeout_s()  # raises if waiting for the site's robots.txt, with its own deadline, took too long
            result = self._request_once(target, deadline, read_response, crawl_delay_s)
            if not isinstance(result, _Redirect):
                return result
            url = urls.join(url, result)
        raise FetchError("too_many_redirects", f"more than {self.rules.max_redirects}")

    def _request_once(
        self, target: Target, deadline: Deadline, read_response: Callable[..., Result], crawl_delay_s: float
    ) -> Result | _Redirect:
        """One request, under a permit of the host."""
        if self.limiter:
            self.limiter.acquire(target.netloc, deadline.at_s, crawl_delay_s=crawl_delay_s)
        began_s = time.monotonic()
        outcome: dict[str, Any] = {}
        sock = None
        try:
            addresses = policy.allowed_addresses(self.rules, target.host, self._addresses(target, deadline))
            proxy = self._proxy and (self._addresses(self._proxy, deadline), self._proxy.port)
            with connected(target, addresses, deadline, proxy) as raw_sock:
                sock = DeadlineSocket(raw_sock, deadline, MAX_HEADER_BYTES)
                response = sock.request(
                    f"GET {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\n{self._headers}".encode()
                )
                if response.status in _BUSY:
                    outcome = {"busy": True, "retry_after_s": _retry_after_s(response.headers.get("Retry-After", ""))}
                if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                    return _Redirect(location.strip())
                return read_response(target, response, sock, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            named_error = _as_named_error(error, deadline)
            reason = reason_of(str(named_error))
            slow = reason == "too_slow" and not isinstance(error, body.NoMemoryLeftError)
            # A host that got less than one timeout, because earlier redirects used up the deadline, has not failed.
            if reason in _HOST_FAILED or (slow and time.monotonic() - began_s > deadline.timeout_s):
                outcome = {"failed": True}
            if named_error is error:
                raise
            raise named_error from error
        finally:
            if self.limiter:
                self.limiter.release(target.netloc, size_bytes=sock.received_bytes if sock else 0, **outcome)

    def _addresses(self, target: Target, deadline: Deadline) -> tuple[str, ...]:
        return (target.host,) if target.is_address else self.resolver.addresses(target.host, deadline.at_s)

    def _read_image(
        self, target: Target, response: http.client.HTTPResponse, sock: DeadlineSocket, deadline: Deadline
    ) -> FetchedBody:
        status, headers = response.status, response.headers
        if status != http.client.OK:
            phrase = http.client.responses.get(status, "")  # the server's own phrase could look like another reason
            raise urllib.error.HTTPError(target.url, status, phrase, headers, io.BytesIO())
        if self.rules.opt_out:
            directive = opt_out.opt_out_directive(headers.get_all("X-Robots-Tag", ()), policy.AGENT)
            if directive:
                raise FetchError("opted_out", f"X-Robots-Tag: {directive}")
        content = body.read(response, sock, self.rules.max_bytes, self._memory, deadline)
        if not content:
            raise FetchError("not_an_image", "an empty response")
        return FetchedBody(content, target.url, headers, self)

    def _read_robots_txt(
        self, _: Target, response: http.client.HTTPResponse, sock: DeadlineSocket, __: Deadline
    ) -> tuple[int, bytes]:
        content = b""
        for piece in body.decompressed(response, sock, self.rules.max_bytes):
            content += piece
            if len(content) >= MAX_ROBOTS_BYTES:
                break
        return response.status, content[:MAX_ROBOTS_BYTES]


def install(
    rules: FetchPolicy,
    *,
    timeout_s: float,
    retries: int = 0,
    limiter: HostLimiter | None = None,
    robots: RobotsRules | None = None,
) -> Opener:
    """Make `urllib.request.urlopen` obey the policy in this whole process. The arguments are those of `Opener`.

    An implementation of `RobotsRules` can fetch by `Opener(rules, timeout_s=..., limiter=limiter).fetch_robots`.
    """
    opener = Opener(rules, timeout_s=timeout_s, retries=retries, limiter=limiter, robots=robots)
    urllib.request.install_opener(opener)
    return opener


@functools.lru_cache(maxsize=4)
def _resolver(nameservers: tuple[str, ...]) -> Resolver:
    """One resolver per process, so that the next shard reuses this one's lookups."""
    return Resolver(nameservers)


def _as_named_error(error: Exception, deadline: Deadline) -> Exception:
    """The error as a `FetchError` with its reason first. Text from the server is cut short and comes after the reason."""
    text = str(error)[:200]
    if isinstance(error, (FetchError, urllib.error.HTTPError)):
        return error
    if isinstance(error, TimeoutError):
        return (
            deadline.error()
            if deadline.remaining_s() <= 0
            else FetchError("timeout", f"silent for {deadline.timeout_s} s")
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
    """Seconds that `Retry-After` asks for, given as seconds or as a date; 0 if it cannot be parsed."""
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
