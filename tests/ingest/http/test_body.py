"""Bodies: capped, unpacked, whole, and within the memory of the process."""

import gzip
import threading
import time
import zlib

import pytest
from scripted import Server, head, ok

from ingest.http.body import LARGE_BODIES, SMALL_BYTES, MemoryBudget, NoMemoryLeftError
from ingest.http.connection import Opener
from ingest.http.deadline_socket import Deadline
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError

LOOPBACK = ("127.0.0.0/8",)


def opener(**rules):
    return Opener(FetchPolicy(allow_networks=LOOPBACK, **rules), timeout_s=5.0)


def get(url, **rules):
    with opener(**rules).open(url) as answer:
        return answer.read()


def chunked(*chunks, end=b"0\r\n\r\n", headers=()):
    sent = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head("200 OK", "Transfer-Encoding: chunked", *headers) + sent + end


@pytest.mark.parametrize("size", [1, 1000, SMALL_BYTES, SMALL_BYTES + 1, 3 * SMALL_BYTES])
@pytest.mark.parametrize("form", ["length", "chunked", "until the end", "gzip"])
def test_body_is_read_whole(size, form):
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    answer = {
        "length": ok(body),
        "chunked": chunked(*(body[at : at + 70_000] for at in range(0, size, 70_000))),
        "until the end": head("200 OK") + body,
        "gzip": ok(gzip.compress(body), "Content-Encoding: gzip"),
    }[form]
    with Server([answer]) as server:
        assert get(server.url()) == body


@pytest.mark.parametrize(
    "pieces",
    [
        [ok(b"x" * 1001)],
        [head("200 OK"), *[b"x" * 1000] * 100],
        [chunked(*[b"x" * 100] * 11)],
        [ok(gzip.compress(b"x" * 1001), "Content-Encoding: gzip")],
        [head("200 OK", "Content-Encoding: gzip"), gzip.compress(bytes(1 << 24))],
        [ok(b"", length=10**18)],
        [ok(b"", "Content-Encoding: gzip", length=10**18)],
    ],
    ids=["promised", "without end", "chunked", "gzip", "bomb", "lie", "packed lie"],
)
def test_body_above_the_cap_is_given_up(pieces):
    with Server(pieces) as server, pytest.raises(FetchError, match="too_large: more than 1000 bytes"):
        get(server.url(), max_bytes=1000)


def test_packed_body_that_never_unpacks_is_capped_as_sent():
    stored = zlib.compressobj(wbits=31)
    empty = b"".join(stored.compress(b"") + stored.flush(zlib.Z_FULL_FLUSH) for _ in range(1000))
    with (
        Server([head("200 OK", "Content-Encoding: gzip"), empty]) as server,
        pytest.raises(FetchError, match="too_large"),
    ):
        get(server.url(), max_bytes=1000)


def test_body_at_the_cap_is_read():
    for answer in (ok(b"x" * 1000), head("200 OK") + b"x" * 1000, chunked(b"x" * 500, b"x" * 500)):
        with Server([answer]) as server:
            assert len(get(server.url(), max_bytes=1000)) == 1000


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"half", length=8),
        ok(b"x" * 100_000, length=2_000_000),
        chunked(b"half", end=b"8\r\nhalf"),
        chunked(b"x", end=b""),
    ],
)
def test_body_shorter_than_promised_is_truncated(answer):
    with Server([answer]) as server, pytest.raises(FetchError, match="truncated_image"):
        get(server.url())


@pytest.mark.parametrize("end", [b"zz\r\nx", b"-5\r\nhello world", b"-1\r\nhello world", b"x" * 70_000])
def test_broken_chunks_are_a_bad_response(end):
    with Server([chunked(b"hello", end=end), 5.0]) as server, pytest.raises(FetchError, match="bad_response"):
        get(server.url())


def test_bytes_after_the_promised_ones_are_not_read():
    with Server([ok(b"image") + b"HTTP/1.1 200 OK\r\n\r\nmore"]) as server:
        assert get(server.url()) == b"image"


def test_empty_body_is_no_image():
    with Server([ok(b"")]) as server, pytest.raises(FetchError, match="not_an_image"):
        get(server.url())


def raw_deflate(body):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("X-GZip ", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
        ("", bytes),
    ],
)
@pytest.mark.parametrize("size", [1, 65_536, 200_000])
def test_packed_body_is_unpacked_though_not_asked_for(encoding, pack, size):
    body = bytes(n % 251 for n in range(size))
    with Server(
        [
            chunked(
                *(pack(body)[at : at + 7000] for at in range(0, len(pack(body)), 7000)),
                headers=[f"Content-Encoding: {encoding}"],
            )
        ]
    ) as server:
        assert get(server.url()) == body
    assert b"\r\nAccept-Encoding: identity\r\n" in server.requests[0]


@pytest.mark.parametrize("more", [1, 100, 257])
def test_packed_body_that_ends_within_a_match_is_unpacked_whole(more):
    body = bytes(65_536 + more)  # the unpacker takes all that was sent, and still holds some of what it gives
    with Server([ok(raw_deflate(body), "Content-Encoding: deflate")]) as server:
        assert get(server.url()) == body


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"no gzip at all"),
        ("gzip", gzip.compress(b"x" * 1000)[:-9]),
        ("gzip", gzip.compress(b"x" * 1000)[:-8] + bytes(8)),
        ("deflate", b"\xff no deflate"),
        ("br", b"whatever"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"x"))),
        ("x" * 1000, b"whatever"),
    ],
    # A gzip holds the time, and two workers must call the tests alike.
    ids=["no gzip", "cut off", "wrong sum", "no deflate", "br", "twice", "unknown"],
)
def test_body_that_cannot_be_unpacked_has_a_bad_encoding(encoding, body):
    with Server([ok(body, f"Content-Encoding: {encoding}")]) as server, pytest.raises(FetchError, match="bad_encoding"):
        get(server.url())


def test_memory_is_lent_in_turn_and_never_above_its_size():
    memory = MemoryBudget(10)
    deadline = Deadline(5.0, time.monotonic() + 20)
    memory.reserve(6, deadline)
    order = []

    def large():
        memory.reserve(8, deadline)
        order.append("large")

    def small():
        memory.reserve(1, deadline)
        order.append("small")

    threads = [threading.Thread(target=large), threading.Thread(target=small)]
    threads[0].start()
    while not memory._queue_lock.locked():
        time.sleep(0.001)
    threads[1].start()  # there is room for it, but another came first
    with pytest.raises(NoMemoryLeftError, match="too_slow"):
        memory.reserve(1, Deadline(5.0, time.monotonic() + 0.1))
    assert order == []
    memory.release(6)
    for thread in threads:
        thread.join()
    assert sorted(order) == ["large", "small"]
    assert memory.free_bytes == 1
    memory.release(100)
    assert memory.free_bytes == 10


def test_large_bodies_wait_for_room_until_their_deadline():
    size = 2 * SMALL_BYTES
    with Server([ok(b"x" * size)]) as server:
        ours = opener(max_bytes=size, deadline_s=1.0)
        answers = [ours.open(server.url()) for _ in range(LARGE_BODIES)]
        with pytest.raises(NoMemoryLeftError):
            ours.open(server.url())
        for answer in answers[1:]:
            assert len(answer.read()) == size
            answer.close()
        with pytest.raises(NoMemoryLeftError):  # what was read is still somewhere
            ours.open(server.url())
        answers[0].close()  # what was not read is not
        ours.release_body(size)
        ours.release_body(SMALL_BYTES)  # a small body has nothing to give back
        for _ in range(2):
            with ours.open(server.url()) as answer:
                answer.read()
        with pytest.raises(NoMemoryLeftError):
            ours.open(server.url())


def test_room_of_a_body_that_failed_is_given_back():
    cut = ok(b"x" * (SMALL_BYTES + 1), length=2 * SMALL_BYTES)
    with Server([cut]) as server:
        ours = opener(max_bytes=2 * SMALL_BYTES)
        for _ in range(2 * LARGE_BODIES):
            with pytest.raises(FetchError, match="truncated_image"):
                ours.open(server.url())
        assert ours._memory.free_bytes == LARGE_BODIES * 2 * SMALL_BYTES


def test_body_of_unknown_size_gives_back_what_it_did_not_need():
    size = SMALL_BYTES + 7
    with Server([head("200 OK") + b"x" * size]) as server:
        ours = opener(max_bytes=4 * SMALL_BYTES)
        with ours.open(server.url()) as answer:
            answer.read()
        assert ours._memory.free_bytes == LARGE_BODIES * 4 * SMALL_BYTES - size
        ours.release_body(size)
        assert ours._memory.free_bytes == LARGE_BODIES * 4 * SMALL_BYTES


def test_many_threads_hold_few_large_bodies():
    size, most, held = 2 * SMALL_BYTES, [0], [0]
    lock = threading.Lock()
    with Server([ok(b"x" * size)]) as server:
        ours = opener(max_bytes=size)

        def work():
            with ours.open(server.url()) as answer:
                content = answer.read()
            with lock:
                held[0] += 1
                most[0] = max(most[0], held[0])
            time.sleep(0.02)
            with lock:
                held[0] -= 1
            ours.release_body(len(content))

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 <= most[0] <= LARGE_BODIES
    assert ours._memory.free_bytes == LARGE_BODIES * size
