"""robots.txt by RFC 9309: whether this crawler may fetch a URL.

Protego does the matching: longest pattern, `*` and `$`, percent-encoding. What RFC 9309 requires beyond that is done here: our
group is found by the whole product token, groups of one token are merged, records of other protocols do not end a group, and
`/` in a query equals `%2F` (2.2.2). Responses (2.3.1): 2xx is obeyed; a 3xx that leads nowhere and 4xx allow everything; 429,
5xx and no response forbid everything for a minute, after which the site is asked again. Rules are cached for a day (2.4); the
first 500 KiB are read (2.5).

A robots.txt can be hostile: more than `MAX_RULES` rules for us forbid everything, so that no URL takes long to check, and the
cache is bounded in bytes.
"""

import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urljoin, urlsplit

from protego import Protego

from roclip.data.outcomes import REASONS, FetchError, reason_of

MAX_BYTES = 500 * 2**10
"""Bytes of a robots.txt that are used; `fetch` need not read more."""
MAX_RULES = 5000
CACHE_S, FAILED_CACHE_S = 24 * 3600.0, 60.0
MAX_CRAWL_DELAY_S = 10.0
_CACHE_BYTES = 32 * 2**20
_PARSED_BYTES = 2 * 2**20
"""In bytes of source text; a parsed rule takes about 30 times its text."""
_FORBIDS_ALL = "Disallow: /"
_PORTS = {"http": 80, "https": 443}
_LINE = re.compile(
    r"(?P<agent>user[ -]?agent)(?:\s*:|\s)\s*(?P<token>[a-z_-]+|\*(?!\S))?"
    r"|(?P<rule>allow|dis+al+ow|diasllow|disallaw)(?:\s*:|\s)\s*(?P<path>.*)"
    r"|crawl-?delay\s*:\s*(?P<delay>.*)",
    re.IGNORECASE,
)
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?=[/?#]|$)", re.IGNORECASE)
_OUR_REASONS = ("host_busy", "host_down")
T = TypeVar("T")


class _LruCache(Generic[T]):
    """A least-recently-used cache, bounded by the total weight of its values."""

    def __init__(self, limit: int):
        self.limit, self.weight = limit, 0
        self._kept: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def get(self, key: str) -> T | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: str, value: T, weight: int) -> None:
        self.weight += weight - self._kept.pop(key, (None, 0))[1]
        self._kept[key] = value, weight
        while self.weight > self.limit and len(self._kept) > 1:
            self.weight -= self._kept.popitem(last=False)[1][1]


@dataclass(frozen=True)
class _SiteRules:
    """The rules of a site for us, or why they are not available. Valid until `expires_s`."""

    expires_s: float
    text: str = ""
    reason: str = ""
    why: str = ""

    def text_or_raise(self) -> str:
        if self.reason:
            raise FetchError(self.reason, self.why)
        return self.text


class Robots:
    """The robots.txt rules of all sites for one crawler. Thread-safe: a site's file is fetched once, and other callers wait for
    it.

    Args:
        fetch: Maps the URL of a robots.txt to its status and body, of which it need not read more than `MAX_BYTES`. It follows
            redirects,
            to other hosts too, without checking robots.txt for them. It may raise.
        agent: Our product token, such as `roclip`.
        clock: Seconds, for the age of cached rules.
    """

    def __init__(
        self, fetch: Callable[[str], tuple[int, bytes]], agent: str, *, clock: Callable[[], float] = time.monotonic
    ):
        if not re.fullmatch(r"[A-Za-z_-]+", agent):
            raise ValueError(f"agent: expected a product token of letters, _ and - (RFC 9309, 2.2.1), got {agent!r}.")
        self._fetch, self._agent, self._clock = fetch, agent.lower(), clock
        self._lock = threading.Lock()
        self._pending: dict[str, Future[_SiteRules]] = {}
        self._cached: _LruCache[_SiteRules] = _LruCache(_CACHE_BYTES)
        self._parsed: _LruCache[Protego] = _LruCache(_PARSED_BYTES)

    def allows(self, url: str, deadline_s: float = math.inf) -> bool:
        """Whether the URL may be fetched.

        Raises `FetchError` if robots.txt cannot be read now: with the reason, such as `timeout` or `no_host`, or with
        `robots_unreachable` for 429 and 5xx. RFC 9309 then forbids everything; it is not counted as `robots_txt`, so that later
        passes retry the URL. `too_slow` if another thread is still fetching the file at `deadline_s` (of `time.monotonic`).
        """
        rules = self._rules(url, deadline_s)
        return rules is None or all(rules.can_fetch(form, self._agent) for form in _variants(url))

    def crawl_delay_s(self, url: str, deadline_s: float = math.inf) -> float:
        """Seconds between two requests that the site asks for, at most `MAX_CRAWL_DELAY_S`; 0 without a Crawl-delay. Raises as
        `allows`.
        """
        rules = self._rules(url, deadline_s)
        return min(rules.crawl_delay(self._agent) or 0.0, MAX_CRAWL_DELAY_S) if rules else 0.0

    def _rules(self, url: str, deadline_s: float) -> Protego | None:
        text = self._lines_for_us(_origin(url), deadline_s)
        if not text:
            return None
        with self._lock:
            rules = self._parsed.get(text)
        if rules is None:
            rules = Protego.parse(f"User-agent: *\n{text}")
            with self._lock:
                self._parsed.put(text, rules, len(text))
        return rules

    def _lines_for_us(self, origin: str, deadline_s: float) -> str:
        """The lines of a site's robots.txt that apply to us."""
        with self._lock:
            site_rules = self._cached.get(origin)
            if site_rules is not None and self._clock() < site_rules.expires_s:
                return site_rules.text_or_raise()
            answer = self._pending.get(origin)
            if is_first := answer is None:
                answer = self._pending[origin] = Future()
        if is_first:
            self._fetch_and_cache(origin, answer)
        elif not wait([answer], None if math.isinf(deadline_s) else deadline_s - time.monotonic()).done:
            raise FetchError("too_slow", f"{origin}/robots.txt took longer than the deadline")
        return answer.result().text_or_raise()

    def _fetch_and_cache(self, origin: str, answer: "Future[_SiteRules]") -> None:
        try:
            site_rules = self._fetch_rules(origin)
        except BaseException as error:
            with self._lock:
                del self._pending[origin]
            answer.set_exception(error)
            raise
        with self._lock:
            del self._pending[origin]
            if (
                site_rules.reason not in _OUR_REASONS
            ):  # our own limits say nothing about the site: the next caller retries
                self._cached.put(origin, site_rules, len(origin) + len(site_rules.text) + 300)
        answer.set_result(site_rules)

    def _fetch_rules(self, origin: str) -> "_SiteRules":
        where = f"{origin}/robots.txt"
        try:
            status, body = self._fetch(where)
        except Exception as error:
            reason = reason_of(f"{error}")
            if reason == "too_many_redirects":  # RFC 9309, 2.3.1.2: as if there were no file
                return _SiteRules(self._clock() + CACHE_S)
            return self._unreachable(reason if reason in REASONS else "robots_unreachable", f"{where}: {error}")
        if 200 <= status < 300:
            return _SiteRules(self._clock() + CACHE_S, rules_for(body, self._agent))
        if 300 <= status < 500 and status != 429:
            return _SiteRules(self._clock() + CACHE_S)
        return self._unreachable("robots_unreachable", f"{where} answered {status}")

    def _unreachable(self, reason: str, why: str) -> "_SiteRules":
        return _SiteRules(self._clock() + FAILED_CACHE_S, reason=reason, why=why)


def rules_for(body: bytes, token: str) -> str:
    """The rules for a product token, one per line: those of all its groups, or of `*` if it has none (RFC 9309, 2.2.1).

    Linear in the first `MAX_BYTES` of the body. `Disallow: /` if there are more than `MAX_RULES`.
    """
    lines = body[:MAX_BYTES].decode("utf-8-sig", "replace").splitlines()
    if len(body) > MAX_BYTES:
        del lines[-1]  # a truncated rule could mean something else
    rules: dict[str, list[str]] = {}
    agents: set[str] = set()
    in_rules = False
    for line in lines:
        match = _LINE.match(line.partition("#")[0].strip())
        if match is None:
            continue
        if match["agent"]:
            agent = (match["token"] or "").lower()
            agents = {agent} if in_rules else agents | {agent}
            agents &= {token, "*"}
            in_rules = False
            rules.update({found: rules.get(found, []) for found in agents})
        elif match["rule"]:
            in_rules = True
            field = "Allow" if match["rule"].lower() == "allow" else "Disallow"
            _extend(rules, agents, f"{field}: {_plain_query(match['path'])}")
        else:
            _extend(rules, agents, f"Crawl-delay: {match['delay']}")
    found = rules.get(token, rules.get("*", []))
    return "\n".join(found) if len(found) <= MAX_RULES else _FORBIDS_ALL


def _extend(rules: dict[str, list[str]], agents: set[str], text: str) -> None:
    for agent in agents:
        rules[agent].append(text)


def _origin(url: str) -> str:
    """Scheme, host and port in canonical form."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError as error:
        raise FetchError("bad_url", f"{url[:100]!r}: {error}") from None
    if parts.scheme not in _PORTS:
        raise FetchError("refused_scheme", f"expected http or https, got {parts.scheme[:20]!r}")
    if not host:
        raise FetchError("bad_url", f"{url[:100]!r} names no host")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")


def _variants(url: str) -> list[str]:
    """The URLs to check for a URL: itself, and with `/../` resolved as a server would."""
    plain = _plain_query(url)
    if not _DOTS.search(plain):
        return [plain]
    parts = urlsplit(plain)
    path = "/" + re.sub("%2e", ".", parts.path, flags=re.IGNORECASE).lstrip("/")
    return [plain, parts._replace(path=urljoin("/", path)).geturl()]


def _plain_query(text: str) -> str:
    """Replaces `%2F` by `/` in the query of a URL or pattern, as both mean the same."""
    head, mark, query = text.partition("?")
    return head + mark + re.sub("%2f", "/", query, flags=re.IGNORECASE)
