"""robots.txt by RFC 9309: may this program fetch that URL?

Protego does the matching: longest pattern, `*` and `$`, percent-encoding. What RFC 9309 asks for beyond is done here: our group
is found by the whole product token, groups of one token are merged, records of other protocols end no group, and `/` in a query
is the same as `%2F` (2.2.2). Answers (2.3.1): 2xx is obeyed; 3xx that leads nowhere and 4xx allow all; 429, 5xx and no answer
forbid all, for a minute, and then the site is asked again. Kept for a day (2.4), the first 500 KiB are read (2.5).

robots.txt is hostile too: more than `MAX_RULES` rules for us forbid all, so that no URL takes long to judge, and what is kept is
bounded in bytes.
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
"""What is read of a robots.txt; `fetch` need not read more."""
MAX_RULES = 5000
KEPT_S, FAILED_KEPT_S = 24 * 3600.0, 60.0
MAX_CRAWL_DELAY_S = 10.0
_CACHE_BYTES = 32 * 2**20
_PARSED_BYTES = 2 * 2**20
"""Of text; parsed, a rule takes some 30 times its text."""
_FORBIDS_ALL = "Disallow: /"
_PORTS = {"http": 80, "https": 443}
_LINE = re.compile(
    r"(?P<agent>user[ -]?agent)(?:\s*:|\s)\s*(?P<token>[a-z_-]+|\*(?!\S))?"
    r"|(?P<rule>allow|dis+al+ow|diasllow|disallaw)(?:\s*:|\s)\s*(?P<path>.*)"
    r"|crawl-?delay\s*:\s*(?P<delay>.*)",
    re.IGNORECASE,
)
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?=[/?#]|$)", re.IGNORECASE)
_LOCAL = ("host_busy", "host_down")
T = TypeVar("T")


class _Bounded(Generic[T]):
    """A cache that forgets what was used least recently, by weight."""

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
class _Said:
    """What a site said: the lines for us, or why there are none to be had. Good until `until_s`."""

    until_s: float
    text: str = ""
    reason: str = ""
    why: str = ""

    def text_or_raise(self) -> str:
        if self.reason:
            raise FetchError(self.reason, self.why)
        return self.text


class Robots:
    """What the robots.txt of all sites say about one program. Thread-safe: a site is asked once, whoever else asks waits.

    Args:
        fetch: URL of a robots.txt -> status and body, of which it need not read more than `MAX_BYTES`. It follows redirects, to
            other hosts too, and asks no robots.txt about them. It may raise.
        agent: Our product token, such as `roclip`.
        clock: Seconds, for the age of what is kept.
    """

    def __init__(
        self, fetch: Callable[[str], tuple[int, bytes]], agent: str, *, clock: Callable[[], float] = time.monotonic
    ):
        if not re.fullmatch(r"[A-Za-z_-]+", agent):
            raise ValueError(f"agent: expected a product token of letters, _ and - (RFC 9309, 2.2.1), got {agent!r}.")
        self._fetch, self._agent, self._clock = fetch, agent.lower(), clock
        self._lock = threading.Lock()
        self._asking: dict[str, Future[_Said]] = {}
        self._said: _Bounded[_Said] = _Bounded(_CACHE_BYTES)
        self._parsed: _Bounded[Protego] = _Bounded(_PARSED_BYTES)

    def allows(self, url: str, deadline_s: float = math.inf) -> bool:
        """Whether the URL may be fetched.

        Raises `FetchError` when robots.txt cannot be read now: with the reason why, such as `timeout` or `no_host`, or with
        `robots_unreachable` for 429 and 5xx. RFC 9309 forbids all then; that it is no `robots_txt` has later passes try again.
        `too_slow` when another thread still reads it at `deadline_s` (of `time.monotonic`).
        """
        rules = self._rules(url, deadline_s)
        return rules is None or all(rules.can_fetch(form, self._agent) for form in _forms(url))

    def crawl_delay_s(self, url: str, deadline_s: float = math.inf) -> float:
        """What the site asks for between two requests, at most `MAX_CRAWL_DELAY_S`; 0 if it does not say. Raises as `allows`."""
        rules = self._rules(url, deadline_s)
        return min(rules.crawl_delay(self._agent) or 0.0, MAX_CRAWL_DELAY_S) if rules else 0.0

    def _rules(self, url: str, deadline_s: float) -> Protego | None:
        text = self._text(_origin(url), deadline_s)
        if not text:
            return None
        with self._lock:
            rules = self._parsed.get(text)
        if rules is None:
            rules = Protego.parse(f"User-agent: *\n{text}")
            with self._lock:
                self._parsed.put(text, rules, len(text))
        return rules

    def _text(self, origin: str, deadline_s: float) -> str:
        """The lines of a site's robots.txt that are for us."""
        with self._lock:
            said = self._said.get(origin)
            if said is not None and self._clock() < said.until_s:
                return said.text_or_raise()
            answer = self._asking.get(origin)
            if mine := answer is None:
                answer = self._asking[origin] = Future()
        if mine:
            self._ask(origin, answer)
        elif not wait([answer], None if math.isinf(deadline_s) else deadline_s - time.monotonic()).done:
            raise FetchError("too_slow", f"{origin}/robots.txt took longer than the deadline")
        return answer.result().text_or_raise()

    def _ask(self, origin: str, answer: "Future[_Said]") -> None:
        try:
            said = self._judge(origin)
        except BaseException as error:
            with self._lock:
                del self._asking[origin]
            answer.set_exception(error)
            raise
        with self._lock:
            del self._asking[origin]
            if said.reason not in _LOCAL:  # these say nothing about the site: the next one may ask
                self._said.put(origin, said, len(origin) + len(said.text) + 300)
        answer.set_result(said)

    def _judge(self, origin: str) -> "_Said":
        where = f"{origin}/robots.txt"
        try:
            status, body = self._fetch(where)
        except Exception as error:
            reason = reason_of(f"{error}")
            if reason == "too_many_redirects":  # RFC 9309, 2.3.1.2: as if there were none
                return _Said(self._clock() + KEPT_S)
            return self._unreachable(reason if reason in REASONS else "robots_unreachable", f"{where}: {error}")
        if 200 <= status < 300:
            return _Said(self._clock() + KEPT_S, ours(body, self._agent))
        if 300 <= status < 500 and status != 429:
            return _Said(self._clock() + KEPT_S)
        return self._unreachable("robots_unreachable", f"{where} answered {status}")

    def _unreachable(self, reason: str, why: str) -> "_Said":
        return _Said(self._clock() + FAILED_KEPT_S, reason=reason, why=why)


def ours(body: bytes, token: str) -> str:
    """The rules for a product token, a line each: those of all its groups, or of `*` where it has none (RFC 9309, 2.2.1).

    Linear in the first `MAX_BYTES` of the body. `Disallow: /` when there are more than `MAX_RULES`.
    """
    lines = body[:MAX_BYTES].decode("utf-8-sig", "replace").splitlines()
    if len(body) > MAX_BYTES:
        del lines[-1]  # cut short, it might say something else
    rules: dict[str, list[str]] = {}
    agents: set[str] = set()
    in_rules = False
    for line in lines:
        said = _LINE.match(line.partition("#")[0].strip())
        if said is None:
            continue
        if said["agent"]:
            agent = (said["token"] or "").lower()
            agents = {agent} if in_rules else agents | {agent}
            agents &= {token, "*"}
            in_rules = False
            rules.update({found: rules.get(found, []) for found in agents})
        elif said["rule"]:
            in_rules = True
            field = "Allow" if said["rule"].lower() == "allow" else "Disallow"
            _extend(rules, agents, f"{field}: {_plain_query(said['path'])}")
        else:
            _extend(rules, agents, f"Crawl-delay: {said['delay']}")
    found = rules.get(token, rules.get("*", []))
    return "\n".join(found) if len(found) <= MAX_RULES else _FORBIDS_ALL


def _extend(rules: dict[str, list[str]], agents: set[str], text: str) -> None:
    for agent in agents:
        rules[agent].append(text)


def _origin(url: str) -> str:
    """Scheme, host and port, written in one way."""
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


def _forms(url: str) -> list[str]:
    """What is looked up for a URL: itself, and where `/../` would lead a server."""
    plain = _plain_query(url)
    if not _DOTS.search(plain):
        return [plain]
    parts = urlsplit(plain)
    path = "/" + re.sub("%2e", ".", parts.path, flags=re.IGNORECASE).lstrip("/")
    return [plain, parts._replace(path=urljoin("/", path)).geturl()]


def _plain_query(text: str) -> str:
    """With `/` for `%2F` in the query of a URL or a pattern, where both mean the same."""
    head, mark, query = text.partition("?")
    return head + mark + re.sub("%2f", "/", query, flags=re.IGNORECASE)
