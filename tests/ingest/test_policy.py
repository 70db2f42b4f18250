import contextlib
import http.client
import socket
import threading
import urllib.error

import pytest

from ingest.policy import allows, opener
from roclip.config import FetchPolicy

LOOPBACK = ("0.0.0.0/0", "::/0")
PRIVATE = FetchPolicy(allow_networks=LOOPBACK)


@contextlib.contextmanager
def _server(answer, host="127.0.0.1"):
    """A server that sends the pieces of `answer`, with a pause where a piece is a number of seconds."""
    listener = socket.create_server((host, 0))
    ending = threading.Event()

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(65536)
                    for piece in answer:
                        if isinstance(piece, bytes):
                            client.sendall(piece)
                        elif ending.wait(piece):
                            break

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://{host}:{listener.getsockname()[1]}/x.jpg"
    finally:
        ending.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _get(url, policy, timeout=5.0):
    with opener(policy).open(url, timeout=timeout) as answer:
        return answer.read()


def _ok(body, *, length=None):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


NOT_PUBLIC = """
    127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
    ::1 :: fe80::1 fe80::1%eth0 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254
    64:ff9b::7f00:1 2002:7f00:1::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_private_address_is_refused_unless_allowed(address):
    assert not allows(FetchPolicy(), address)
    assert allows(PRIVATE, address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_address_is_allowed(address):
    assert allows(FetchPolicy(), address)


def test_body_is_read_from_loopback_when_allowed():
    with _server([_ok(b"image")]) as url:
        assert _get(url, PRIVATE) == b"image"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433"])
def test_loopback_is_refused_under_every_name(host):
    with _server([_ok(b"secret")]) as url, pytest.raises(urllib.error.URLError, match="refused_address"):
        _get(url.replace("127.0.0.1", host), FetchPolicy())


_ONE_HOST = FetchPolicy(allow_networks=("127.0.0.1/32",))


def test_redirect_to_a_forbidden_address_is_refused():
    with _server([_ok(b"secret")], host="127.0.0.2") as private:
        moved = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % private.encode()
        with _server([moved]) as url:
            with pytest.raises(urllib.error.URLError, match=r"refused_address: 127\.0\.0\.2"):
                _get(url, _ONE_HOST)
            assert _get(url, PRIVATE) == b"secret"


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://a.example/"]
)
def test_other_scheme_is_refused(url):
    with pytest.raises(OSError, match="refused_scheme: expected http or https"):
        _get(url, PRIVATE)


def test_redirect_to_a_file_is_refused():
    with _server([b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\nContent-Length: 0\r\n\r\n"]) as url:
        with pytest.raises(urllib.error.HTTPError, match="is not allowed") as refused:
            _get(url, PRIVATE)
        refused.value.close()


@pytest.mark.parametrize("endless", [False, True], ids=["promised", "without end"])
def test_body_above_the_cap_is_given_up(endless):
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    answer = [head, *[b"x" * 1000] * 100] if endless else [_ok(b"x" * 1001)]
    with _server(answer) as url, pytest.raises(OSError, match="too_large"):
        _get(url, FetchPolicy(allow_networks=LOOPBACK, max_bytes=1000))


def test_body_at_the_cap_is_read():
    with _server([_ok(b"x" * 1000)]) as url:
        assert len(_get(url, FetchPolicy(allow_networks=LOOPBACK, max_bytes=1000))) == 1000


def test_chunked_body_is_read_and_capped():
    answer = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n" * 4, b"0\r\n\r\n"]
    with _server(answer) as url:
        assert _get(url, PRIVATE) == b"abc" * 4
        with pytest.raises(OSError, match="too_large"):
            _get(url, FetchPolicy(allow_networks=LOOPBACK, max_bytes=11))


def test_dripping_body_is_given_up_before_the_server_ends_it():
    drip = [part for _ in range(200) for part in (b"x", 0.1)]
    policy = FetchPolicy(allow_networks=LOOPBACK, deadline_s=0.5)
    late = pytest.raises(OSError, match=r"too_slow: the body took more than 0\.5 s")
    with _server([_ok(b"", length=200), *drip]) as url, late:
        _get(url, policy, timeout=2)


def test_body_shorter_than_promised_is_an_error():
    with _server([_ok(b"half", length=8)]) as url, pytest.raises(http.client.IncompleteRead):
        _get(url, PRIVATE)


def test_error_status_is_raised():
    with _server([b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"]) as url:
        with pytest.raises(urllib.error.HTTPError, match="404") as missing:
            _get(url, PRIVATE)
        missing.value.close()
