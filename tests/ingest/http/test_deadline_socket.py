"""The connection: every wait is bounded, the head too; TLS is verified; a proxy is asked for the vetted address."""

import re
import socket
import ssl
import threading

import pytest
import trustme
from name_server import NameServer
from scripted import Server, connects, head, moved, ok

from ingest.http import connection
from ingest.http.connection import Opener
from ingest.http.deadline_socket import tls_context
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError

LOOPBACK = ("127.0.0.0/8",)


def get(url, timeout_s=5.0, **rules):
    """The body of a URL under a policy that allows loopback."""
    with Opener(FetchPolicy(allow_networks=LOOPBACK, **rules), timeout_s=timeout_s).open(url) as answer:
        return answer.read()


def drip(content, pause_s=0.05):
    return [part for byte in content for part in (bytes([byte]), pause_s)]


@pytest.mark.parametrize(
    "pieces",
    [
        drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 500),
        [b"HTTP/1.1 200 OK\r\n", *drip(b"X-A: 1\r\n" * 90)],
        [ok(b"", length=500), *drip(b"x" * 500)],
        [head("200 OK", "Transfer-Encoding: chunked"), *drip(b"1\r\nx\r\n" * 100)],
        [head("200 OK", "Transfer-Encoding: chunked"), b"1\r\nx\r\n0\r\n", *drip(b"X-Trailer: x\r\n" * 50)],
        [head("200 OK", "Content-Encoding: gzip"), *drip(b"\x1f\x8b\x08\x08\0\0\0\0\0\0" + b"n" * 500)],
        [part for _ in range(200) for part in (head("100 Continue"), 0.05)],
    ],
    ids=["status line and header", "headers", "body", "chunks", "trailers", "gzip", "100 Continue"],
)
def test_dripping_server_is_left_at_the_deadline(pieces):
    with Server(pieces) as server, pytest.raises(FetchError, match="too_slow"):
        get(server.url(), deadline_s=0.5)


@pytest.mark.parametrize("pieces", [[30.0], [b"HTTP/1.1 200", 30.0], [ok(b"x", length=9), 30.0]])
def test_silent_server_is_a_timeout(pieces):
    with Server(pieces) as server, pytest.raises(FetchError, match=r"timeout: silent for 0\.2 s"):
        get(server.url(), timeout_s=0.2)


def test_silent_handshake_is_a_timeout_and_a_dripping_one_is_bounded():
    def silent(client):
        client.recv(1 << 16)
        server.ending.wait(30)

    with Server(talk=silent) as server, pytest.raises(FetchError, match="timeout"):
        get(server.url(scheme="https"), timeout_s=0.2)

    def dripping(client):
        client.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB begins
        while not server.ending.wait(0.05):
            client.sendall(b"\x02")

    with Server(talk=dripping) as server, pytest.raises(FetchError, match="too_slow"):
        get(server.url(scheme="https"), timeout_s=5.0, deadline_s=0.5)


def test_connection_that_nobody_accepts_is_bounded():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(FetchError, match="connection_refused"):
            get(f"http://127.0.0.1:{closed.getsockname()[1]}/")


def test_second_address_is_tried_when_the_first_refuses():
    names = NameServer({"a.example": [["127.0.0.3", "127.0.0.2"]]})
    with Server([ok(b"image")], host="127.0.0.2") as server, names, connects() as tried:
        assert get(server.url(host="a.example"), nameservers=(names.address,)) == b"image"
    assert tried == [("127.0.0.3", server.port), ("127.0.0.2", server.port)]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"GET what?\r\n\r\n"], "BadStatusLine"),
        ([b"\xff\xd8\xff\xe0 an image as of HTTP/0.9"], "BadStatusLine"),
        ([b"HTTP/2.0 200 OK\r\n\r\n"], "UnknownProtocol"),
        ([b"HTTP/1.1 2x0 OK\r\n\r\n"], "BadStatusLine"),
        ([b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n"], "BadStatusLine"),
        ([b"x" * (1 << 17)], "a head of more than 65536 bytes"),
        ([head("200 OK", *["X: y"] * 101)], "got more than 100 headers"),
        ([head("200 OK", "X: " + "y" * (1 << 17))], "a head of more than 65536 bytes"),
        ([head("100 Continue", "X: " + "y" * 1000)] * 1000, "a head of more than 65536 bytes"),
        ([head("103 Early Hints", "Link: </a>")] * 100_000, "a head of more than 65536 bytes"),
        ([head("101 Switching Protocols"), b"\x82\x00\n"], "BadStatusLine"),
    ],
)
def test_what_is_no_http_is_a_bad_response(pieces, text):
    with Server(pieces) as server, pytest.raises(FetchError, match=f"bad_response: .*{re.escape(text)}") as error:
        get(server.url())
    assert len(str(error.value)) < 400


def test_head_may_be_as_large_as_allowed_and_no_larger(monkeypatch: pytest.MonkeyPatch):
    answer = ok(b"image", "X: " + "y" * 1000)
    size = answer.index(b"\r\n\r\n") + 4
    with Server([answer]) as server:
        monkeypatch.setattr(connection, "MAX_HEADER_BYTES", size)
        assert get(server.url()) == b"image"
        monkeypatch.setattr(connection, "MAX_HEADER_BYTES", size - 1)
        with pytest.raises(FetchError, match="bad_response"):
            get(server.url())


def test_interim_answers_are_passed_over():
    pieces = [head("100 Continue"), head("103 Early Hints", "Link: </a>"), head("102 Processing"), ok(b"image")]
    with Server(pieces) as server:
        assert get(server.url()) == b"image"
    with Server([b"".join(pieces)]) as server:
        assert get(server.url()) == b"image"


@pytest.mark.parametrize("pieces", [[], [b"HTTP/1.1 200 OK\r\n"]])
def test_server_that_hangs_up_within_the_head_has_reset_or_sent_nothing(pieces):
    with Server(pieces) as server, pytest.raises(FetchError, match=r"connection_reset|not_an_image"):
        get(server.url())


def test_reset_connection_is_named():
    def reset(client):
        client.recv(1 << 16)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with Server(talk=reset) as server, pytest.raises(FetchError, match="connection_reset"):
        get(server.url())


@pytest.fixture
def authority(tmp_path, monkeypatch):
    """A certificate authority that this process trusts, as SSL_CERT_FILE has it."""
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls_context.cache_clear()
    yield made
    tls_context.cache_clear()


def _context(authority, *names):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def test_tls_is_verified_for_the_name_though_the_address_is_connected_to(authority):
    context = _context(authority, "a.example")
    asked = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    with NameServer({"a.example": [["127.0.0.1"]], "b.example": [["127.0.0.1"]]}) as names:
        rules = {"nameservers": (names.address,)}
        with Server([ok(b"image")], tls=context) as server:
            assert get(server.url(host="a.example"), **rules) == b"image"
            assert get(server.url(host="A.Example."), **rules) == b"image"
            with pytest.raises(FetchError, match=r"tls_error: .*b\.example"):
                get(server.url(host="b.example"), **rules)
            with pytest.raises(FetchError, match=r"tls_error: .*127\.0\.0\.1"):
                get(server.url(), **rules)
    assert asked == ["a.example", "a.example", "b.example", None]


def test_tls_of_an_address_is_verified(authority):
    with Server([ok(b"image")], tls=_context(authority, "127.0.0.1")) as server:
        assert get(server.url()) == b"image"


def test_certificate_of_nobody_known_is_refused(authority):
    refused = pytest.raises(FetchError, match=r"tls_error: .*CERTIFICATE_VERIFY_FAILED")
    with Server([ok(b"secret")], tls=_context(trustme.CA(), "127.0.0.1")) as server, refused:
        get(server.url())
    assert server.requests == []


def test_old_tls_is_refused(authority):
    context = _context(authority, "127.0.0.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with Server([ok(b"secret")], tls=context) as server, pytest.raises(FetchError, match="tls_error"):
        get(server.url())


def test_plain_http_on_a_tls_port_is_a_tls_error():
    refused = pytest.raises(FetchError, match=r"tls_error|connection_reset")
    with Server(talk=lambda client: client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as server, refused:
        get(server.url(scheme="https"))


def test_https_may_lead_to_http(authority):
    with Server([ok(b"image")]) as plain, Server([moved(plain.url())], tls=_context(authority, "127.0.0.1")) as server:
        assert get(server.url()) == b"image"


class Proxy(Server):
    """A proxy that only makes tunnels; `tunnels` are the addresses that it was asked for."""

    def __init__(self):
        super().__init__(talk=self._tunnel)
        self.tunnels = []

    def _tunnel(self, client):
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(1 << 16)
        method, where, _ = request.split(b" ", 2)
        assert method == b"CONNECT"
        self.tunnels.append(where.decode())
        address, _, port = where.decode().rpartition(":")
        with socket.create_connection((address, int(port))) as origin:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self._copy, args=(origin, client))
            back.start()
            self._copy(client, origin)
            back.join()

    def _copy(self, source, sink):
        try:
            while content := source.recv(1 << 16):
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def test_proxy_is_asked_for_the_vetted_address(authority):
    names = {"a.example": [["127.0.0.2"]], "inside.example": [["127.0.0.3"]]}
    with NameServer(names) as dns, Proxy() as proxy:
        rules = FetchPolicy(
            allow_networks=("127.0.0.2/32",), nameservers=(dns.address,), proxy=f"http://127.0.0.1:{proxy.port}"
        )
        opener = Opener(rules, timeout_s=5.0)
        http = Server([ok(b"plain")], "127.0.0.2")
        https = Server([ok(b"secured")], "127.0.0.2", _context(authority, "a.example"))
        with http, https, connects() as tried:
            with opener.open(http.url(host="a.example")) as answer:
                assert answer.read() == b"plain"
            with opener.open(https.url(host="a.example")) as answer:
                assert answer.read() == b"secured"
            with pytest.raises(FetchError, match="refused_address"):
                opener.open("http://inside.example/")
    assert proxy.tunnels == [f"127.0.0.2:{http.port}", f"127.0.0.2:{https.port}"]
    assert f"Host: a.example:{http.port}".encode() in http.requests[0]
    assert [address for address, *_ in tried if address != "127.0.0.2"] == ["127.0.0.1", "127.0.0.1"]


def test_proxy_that_refuses_is_unreachable():
    with Server([head("403 Forbidden", "Content-Length: 0")]) as proxy:
        rules = FetchPolicy(allow_networks=LOOPBACK, proxy=f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(FetchError, match="unreachable: the proxy answered 403"):
            Opener(rules, timeout_s=5.0).open("http://127.0.0.1:8080/")


def test_proxy_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.9:9")
    with Server([ok(b"image")]) as server, connects() as tried:
        assert get(server.url()) == b"image"
    assert {address for address, *_ in tried} == {"127.0.0.1"}
