"""robots.txt from a real server: RFC 9309's own examples, what servers answer, and what hostile ones do."""

import http.server
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.robots import CACHE_S, FAILED_CACHE_S, MAX_BYTES, MAX_CRAWL_DELAY_S, MAX_RULES, Robots, rules_for
from roclip.data.outcomes import FetchError, is_transient, reason_of

AGENT = "roclip"


class Server(http.server.ThreadingHTTPServer):
    """Answers what `pages` says: path -> (status, headers, pieces of the body)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.pages, self.asked, self.sent = {}, Counter(), 0
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, path="/"):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def robots(self, body, status=200, **headers):
        body = body.encode() if isinstance(body, str) else body
        self.pages["/robots.txt"] = status, headers, [body]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.asked[self.path] += 1
        status, headers, pieces = self.server.pages.get(self.path, (404, {}, [b"no"]))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in pieces:
            try:
                self.wfile.write(piece)
            except OSError:
                return
            self.server.sent += len(piece)

    def log_message(self, *_):
        pass


class _TooMany(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def http_error_302(self, req, fp, code, msg, headers):
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except urllib.error.HTTPError as error:
            error.close()
            raise FetchError("too_many_redirects", str(error)) from None

    http_error_301 = http_error_307 = http_error_302


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _TooMany())


def fetch(url):
    """As the connection does it: redirects followed, no more read than is needed."""
    try:
        with OPENER.open(url, timeout=10) as answer:
            return answer.status, answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(MAX_BYTES + 1)


@pytest.fixture(scope="module")
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running):
    running.pages.clear()
    running.asked.clear()
    running.sent = 0
    return running


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def judge(text, *paths, agent=AGENT):
    """What a robots.txt allows."""
    robots = Robots(lambda _: (200, text.encode() if isinstance(text, str) else text), agent)
    allowed = [robots.allows(f"https://www.example.com{path}") for path in paths]
    return allowed[0] if len(paths) == 1 else allowed


RFC_5_1 = """
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""


@pytest.mark.parametrize(
    ("agent", "allowed"),
    [
        (AGENT, [False, False, False, True, True]),
        ("foobot", [True, True, False, False, False]),
        ("barbot", [False, True, True, True, True]),
        ("BazBot", [False, True, True, True, True]),
        ("quxbot", [True, True, True, True, True]),
    ],
)
def test_rfc_9309_5_1_simple_example(agent, allowed):
    paths = ("/example/page.html", "/example/allowed.gif", "/a.gif", "/publications/a.html", "/")
    assert judge(RFC_5_1, *paths, agent=agent) == allowed


def test_rfc_9309_5_2_longest_match():
    text = "User-Agent: foobot\nAllow: /example/page/\nDisallow: /example/page/disallowed.gif\n"
    assert judge(text, "/example/page/disallowed.gif", "/example/page/a.gif", agent="foobot") == [False, True]


def test_rfc_9309_2_2_1_groups_of_one_token_are_one_group():
    text = """
User-Agent: ExampleBot
Disallow: /foo
Disallow: /bar

User-Agent: other
Disallow: /

User-Agent: ExampleBot
Disallow: /baz
"""
    assert judge(text, "/foo", "/bar", "/baz", "/", agent="examplebot") == [False, False, False, True]


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz"),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar"),
        ("/foo/bar?baz=https%3A%2F%2Ffoo.bar", "/foo/bar?baz=https://foo.bar"),
        ("/foo/bar/\u30c4", "/foo/bar/%E3%83%84"),
        ("/foo/bar/%E3%83%84", "/foo/bar/%e3%83%84"),
        ("/foo/bar/%E3%83%84", "/foo/bar/\u30c4"),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz"),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-*.html"),
        ("/path/foo-%24", "/path/foo-$"),
    ],
)
def test_rfc_9309_2_2_2_and_2_2_3_percent_encoding(pattern, path):
    assert judge(f"User-agent: *\nDisallow: {pattern}", path, path[:-1]) == [False, True]


@pytest.mark.parametrize(
    ("pattern", "refused", "allowed"),
    [
        ("/this/*/exactly", "/this/path/exactly", "/this/exactly"),
        ("/a*b*c$", "/a12b34c", "/a12b34cd"),
        ("/*.png$", "/x/y.png", "/x/y.png?v=1"),
        ("/Dir", "/Dir/x", "/dir/x"),
        ("/a%2Fb", "/a%2fb", "/a/b"),
        ("/*?session=", "/page?session=1", "/page?x=1"),
    ],
)
def test_special_characters(pattern, refused, allowed):
    assert judge(f"User-agent: *\nDisallow: {pattern} # why", refused, allowed) == [False, True]


def test_allow_wins_where_both_are_as_long():
    assert judge("User-agent: *\nDisallow: /page\nAllow: /page", "/page")


def test_what_stands_between_agents_ends_no_group():
    text = "User-agent: a\nSitemap: /s.xml\nCrawl-delay: 9\nContent-Signal: ai-train=no\nUser-agent: roclip\nDisallow: /x\n"
    assert judge(text, "/x", agent="a") is False
    assert judge(text, "/x") is False


def test_rules_before_any_group_are_for_nobody():
    assert judge("Disallow: /\nUser-agent: x\nDisallow: /y", "/")


@pytest.mark.parametrize("agent", ["roclipper", "roc", "ro*", "*clip", "my-roclip", ""])
def test_group_of_another_agent_is_not_ours(agent):
    assert judge(f"User-agent: {agent}\nDisallow: /\n", "/")


@pytest.mark.parametrize("line", ["user-agent:roclip", "USER-AGENT :  RoClip/1.0", "\ufeffUser-agent: roclip (x)"])
def test_our_group_is_found_however_it_is_written(line):
    text = f"{line}\r\nDisallow: /x\r\r\nUser-agent: *\rDisallow: /\n"
    assert judge(text, "/x", "/y") == [False, True]


def test_empty_group_of_ours_allows_what_others_may_not():
    assert judge("User-agent: *\nDisallow: /\nUser-agent: roclip\nDisallow:\n", "/x")


def test_dots_lead_nowhere_else():
    text = "User-agent: *\nDisallow: /private/"
    paths = ["/open/../private/a.jpg", "/open/%2e%2E/private/a.jpg", "/./private/a.jpg", "//x/../private/a", "/a/../b"]
    assert judge(text, *paths) == [False, False, False, False, True]
    assert judge("User-agent: *\nDisallow: /open/", "/open/../private/a.jpg") is False


def test_robots_txt_itself_is_always_allowed():
    assert judge("User-agent: *\nDisallow: /", "/robots.txt")


def test_crawl_delay_is_that_of_our_group_and_capped(server):
    server.robots("User-agent: *\nCrawl-delay: 3\nUser-agent: roclip\nCrawl-delay: 1.5\nDisallow: /x\n")
    # Between two agents it ends no group, so it is the delay of both, and what follows is for both.
    robots = Robots(fetch, AGENT)
    assert robots.crawl_delay_s(server.url()) == 1.5
    for value, delay_s in (("86400", MAX_CRAWL_DELAY_S), ("-1", 0), ("nan", 0), ("inf", 0), ("soon", 0)):
        server.robots(f"User-agent: *\nDisallow: /x\nCrawl-delay: {value}\n")
        assert Robots(fetch, AGENT).crawl_delay_s(server.url()) == delay_s


@pytest.mark.parametrize(("status", "allowed"), [(404, True), (401, True), (403, True), (410, True), (204, True)])
def test_status_that_says_there_is_none_allows_all(server, status, allowed):
    server.robots("" if status == 204 else "User-agent: *\nDisallow: /", status)
    assert Robots(fetch, AGENT).allows(server.url("/x")) is allowed


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_error_of_the_server_passes_and_is_asked_about_again(server, status):
    clock = Clock()
    robots = Robots(fetch, AGENT, clock=clock)
    server.robots("", status)
    for _ in range(3):
        with pytest.raises(FetchError, match=f"answered {status}") as error:
            robots.allows(server.url("/x"))
        assert is_transient(reason_of(str(error.value)))
    assert server.asked["/robots.txt"] == 1
    server.robots("User-agent: *\nDisallow: /y")
    clock.now_s += FAILED_CACHE_S
    assert robots.allows(server.url("/x"))
    assert not robots.allows(server.url("/y"))
    assert server.asked["/robots.txt"] == 2


def test_site_that_is_not_there_fails_for_that_reason():
    with Server() as gone:
        url = gone.url("/x")
    with pytest.raises(FetchError) as error:
        Robots(fetch, AGENT).allows(url)
    assert reason_of(str(error.value)) == "connection_refused"

    def late(_):
        raise FetchError("timeout", "nothing for 10 s")

    with pytest.raises(FetchError, match="timeout"):
        Robots(late, AGENT).allows(url)


def test_turn_that_did_not_come_is_not_remembered(server):
    outcomes = iter(["host_busy", "host_down", ""])

    def queued(url):
        if outcome := next(outcomes):
            raise FetchError(outcome, "no permit")
        return fetch(url)

    robots = Robots(queued, AGENT)
    for outcome in ("host_busy", "host_down"):
        with pytest.raises(FetchError, match=outcome):
            robots.allows(server.url("/x"))
    assert robots.allows(server.url("/x"))


def test_rules_are_kept_for_a_day(server):
    clock = Clock()
    robots = Robots(fetch, AGENT, clock=clock)
    server.robots("User-agent: *\nDisallow: /")
    assert not robots.allows(server.url("/x"))
    server.robots("")
    clock.now_s += CACHE_S - 1
    assert not robots.allows(server.url("/x"))
    clock.now_s += 1
    assert robots.allows(server.url("/x"))


def test_redirects_are_followed_and_a_loop_allows_all(server):
    server.pages["/moved.txt"] = 200, {}, [b"User-agent: *\nDisallow: /x"]
    server.robots("", 301, Location="/moved.txt")
    assert not Robots(fetch, AGENT).allows(server.url("/x"))
    server.robots("", 302, Location="/robots.txt")
    assert Robots(fetch, AGENT).allows(server.url("/x"))


def test_one_site_is_asked_once_by_many_threads(server):
    server.robots("User-agent: *\nDisallow: /x")

    def slowly(url):
        time.sleep(0.1)
        return fetch(url)

    robots = Robots(slowly, AGENT)
    with ThreadPoolExecutor(64) as pool:
        allowed = list(pool.map(lambda n: robots.allows(server.url("/x" if n % 2 else "/y")), range(256)))
    assert allowed == [True, False] * 128
    assert server.asked == {"/robots.txt": 1}


def test_one_who_waits_for_anothers_fetch_keeps_the_own_deadline(server):
    asked, go = threading.Event(), threading.Event()

    def hanging(url):
        asked.set()
        go.wait(30)
        return fetch(url)

    robots = Robots(hanging, AGENT)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(robots.allows, server.url("/x"))
        asked.wait(30)
        with pytest.raises(FetchError, match="too_slow"):
            robots.allows(server.url("/y"), time.monotonic() + 0.02)
        go.set()
        assert first.result()


def test_port_and_scheme_are_part_of_the_site():
    asked = []

    def note(url):
        asked.append(url)
        return 404, b""

    robots = Robots(note, AGENT)
    for url in (
        "http://a.example/1",
        "http://A.example:80/2",
        "http://a.example./3",
        "http://u:p@a.example/4",
        "https://a.example/",
        "https://a.example:444/",
        "http://[::1]:8080/",
    ):
        assert robots.allows(url)
    sites = ["http://a.example", "https://a.example", "https://a.example:444", "http://[::1]:8080"]
    assert asked == [f"{site}/robots.txt" for site in sites]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "refused_scheme"),
        ("http://", "bad_url"),
        ("http://[::1", "bad_url"),
        ("x", "refused_scheme"),
    ],
)
def test_url_of_no_site_is_refused(url, reason):
    with pytest.raises(FetchError, match=reason):
        Robots(fetch, AGENT).allows(url)


def test_no_more_than_the_limit_is_read(server):
    rule = b"User-agent: *\nDisallow: /x\n"
    filler = b"# nothing\n" * (2**20 // 10)
    server.pages["/robots.txt"] = 200, {}, [rule, *[filler] * 100, b"Disallow: /late\n"]
    robots = Robots(fetch, AGENT)
    assert [robots.allows(server.url(path)) for path in ("/x", "/late")] == [False, True]
    assert server.sent < 50 * 2**20


def test_line_that_the_limit_cuts_is_left_out():
    head = b"User-agent: *\nAllow: /a\n"
    body = head + b"#" * (MAX_BYTES - len(head) - 12) + b"\nDisallow: /private"
    assert judge(body, "/", "/private") == [True, True]
    assert rules_for(body[: MAX_BYTES - 8], AGENT).splitlines() == ["Allow: /a"]


@pytest.mark.parametrize(
    "text",
    [
        "Disallow: /" + "*a" * 240_000,
        "Disallow: /" + "*a" * 240_000 + "b$",
        "Disallow: /" + "*" * 480_000 + "x$",
        "\n".join(f"Disallow: /{'*a' * 20}{number}$" for number in range(MAX_RULES)),
        "\n".join(f"Disallow: /*{number}x" for number in range(30_000)),
        "User-agent: a\n" * 20_000 + "Disallow: /q\n" * 20_000,
        "".join(f"User-agent: {'b' * (number % 50)}c\n" for number in range(15_000)) + "Disallow: /q\n" * 10_000,
        "allow" + " " * 480_000 + "x",
        "allow:" + " x" * 240_000,
        "user-agent" + " " * 400_000,
        "Disallow: /" + "%" * 480_000,
        "Disallow: /" + "?%2f" * 120_000,
    ],
    ids=range(12),
)
def test_hostile_rules_take_no_time(text):
    """Each takes well under a second; one that blows up takes minutes."""
    robots = Robots(lambda _: (200, b"User-agent: *\n" + text.encode()), AGENT)
    begun_s = time.process_time()
    for path in ("/aaaa.jpg", "/" + "a" * 8000, "/" + "ab" * 4000 + "?%2f" * 1000):
        robots.allows(f"http://a.example{path}")
    assert time.process_time() - begun_s < 20


def test_more_rules_than_anyone_needs_forbid_all():
    many = "User-agent: *\n" + "".join(f"Disallow: /{number}\n" for number in range(MAX_RULES + 1))
    assert judge(many, "/", "/x.jpg") == [False, False]
    assert judge(many + "User-agent: roclip\nDisallow: /x\n", "/", "/x.jpg") == [True, False]


def test_memory_is_bounded_however_many_sites_there_are():
    padding = "y" * 900

    def answer(url):
        number = int(url.split("//")[1].split(".")[0])
        rules = "".join(f"Disallow: /{number}-{rule}-{padding}\n" for rule in range(400))
        return 200, f"User-agent: *\n{rules}".encode()

    robots = Robots(answer, AGENT)
    for number in range(120):
        assert not robots.allows(f"http://{number}.example/{number}-7-{padding}")
    assert robots._cached.weight <= 32 * 2**20
    assert robots._parsed.weight <= 2 * 2**20
    assert sum(len(said.text) for said, _ in robots._cached._kept.values()) <= 32 * 2**20


@given(st.binary(max_size=300), st.text(max_size=40))
@settings(max_examples=80, **SETTINGS)
def test_no_bytes_and_no_url_raise_anything_else(body, path):
    robots = Robots(lambda _: (200, b"User-agent: *\nDisallow: " + body), AGENT)
    for url in (f"http://a.example/{path}", path):
        outcome = ""
        try:
            robots.allows(url)
        except FetchError as error:
            outcome = reason_of(str(error))
        assert outcome in ("", "bad_url", "refused_scheme")


@given(st.text("/ab*$?%2F.", max_size=12), st.text("/ab*$?%2F.", max_size=12))
@settings(max_examples=100, **SETTINGS)
def test_disallowed_prefix_disallows_what_is_below(pattern, more):
    """A pattern without special characters matches every path that begins with it."""
    plain = "/" + "".join(letter for letter in pattern if letter in "/ab2F")
    url = f"http://a.example{plain}{more}"
    robots = Robots(lambda _: (200, f"User-agent: *\nDisallow: {plain}\n".encode()), AGENT)
    assert robots.allows(url) is (plain == "/robots.txt")
