"""A URL is read as the socket will see it."""

import ipaddress
import socket
import string
import urllib.parse

import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.urls import BAD_PORTS, MAX_URL_CHARS, canonical_host, join, parse
from roclip.data.outcomes import FetchError


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("HTTP://Example.COM", "http://example.com/"),
        ("https://example.com:443/a?b#c", "https://example.com/a?b"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("http://example.com:/", "http://example.com/"),
        ("http://example.com:000080/", "http://example.com/"),
        ("http://example.com./x", "http://example.com/x"),
        ("http://example.com?q=/@:", "http://example.com/?q=/@:"),
        ("http://b\u00fccher.example/", "http://xn--bcher-kva.example/"),
        ("http://B%C3%9CCHER.example/", "http://xn--bcher-kva.example/"),
        ("http://fa\u00df.example/", "http://xn--fa-hia.example/"),
        ("http://my_host.\u2615.example/", "http://my_host.xn--53h.example/"),
        ("http://a\u3002example/", "http://a.example/"),
        ("http://a.example/\u00fc /%41\\|", "http://a.example/%C3%BC%20/%41%5C%7C"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://127.1./", "http://127.0.0.1/"),
        ("http://017700000001/", "http://127.0.0.1/"),
        ("http://%31%32%37.0.0.1/", "http://127.0.0.1/"),
        ("http://\uff11\uff12\uff17.0.0.1/", "http://127.0.0.1/"),
        ("http://[0:0::1]:8080/", "http://[::1]:8080/"),
        ("http://[::FFFF:127.0.0.1]/", f"http://[{ipaddress.IPv6Address('::ffff:7f00:1').compressed}]/"),
    ],
)
def test_url_has_one_spelling(url, same):
    assert parse(url).url == same


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"),
        ("no url", "bad_url"),
        ("//example.com/", "bad_url"),
        ("http:example.com", "bad_url"),
        ("http:/example.com", "bad_url"),
        ("http:///x", "bad_url"),
        ("http:\\\\example.com", "bad_url"),
        ("http://good.example\\@evil.example/", "refused_credentials"),
        ("http://good.example\\.evil.example/", "bad_url"),
        ("http://a b.example/", "bad_url"),
        ("http://a.example /", "bad_url"),
        ("http://a.exa\tmple/", "bad_url"),
        ("http://a.example/\n", "bad_url"),
        ("http://a.example/\x00", "bad_url"),
        ("http://a.example/\x7f", "bad_url"),
        ("http://a%00.example/", "bad_url"),
        ("http://a%2f.example/", "bad_url"),
        ("http://a%2540b.example/", "bad_url"),
        ("http://%ff.example/", "bad_url"),
        ("http://a\u00a0b.example/", "bad_url"),
        ("http://a..example/", "bad_url"),
        ("http://example.com../", "bad_url"),
        ("http://.example/", "bad_url"),
        (f"http://{'a' * 64}.example/", "bad_url"),
        (f"http://{'a.' * 126}ab/", "bad_url"),
        (f"http://{chr(0xFC) * 3000}/", "bad_url"),
        (f"http://a.example/{'x' * MAX_URL_CHARS}", "bad_url"),
        ("http://a.example/\ud800", "bad_url"),
        ("http://\ud800.example/", "bad_url"),
        ("http://256.1.1.1/", "bad_url"),
        ("http://08/", "bad_url"),
        ("http://1.2.3.4.5/", "bad_url"),
        ("http://example.0x7/", "bad_url"),
        ("http://example.com:80x/", "bad_url"),
        ("http://example.com:\u0661/", "bad_url"),
        ("http://example.com:65536/", "bad_url"),
        ("http://example.com:99999980/", "bad_url"),
        ("http://example.com:-80/", "bad_url"),
        ("http://example.com:80:80/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://[::1]x/", "bad_url"),
        ("http://[::1]:x/", "bad_url"),
        ("http://[fe80::1%25eth0]/", "bad_url"),
        ("http://[fe80::1%eth0]/", "bad_url"),
        ("http://[127.0.0.1]/", "bad_url"),
        ("http://::1/", "bad_url"),
        ("ftp://example.com/", "refused_scheme"),
        ("file:///etc/passwd", "refused_scheme"),
        ("FILE:/etc/passwd", "refused_scheme"),
        ("data:text/plain,x", "refused_scheme"),
        ("javascript:alert(1)", "refused_scheme"),
        ("http://user@example.com/", "refused_credentials"),
        ("http://user:secret@example.com/", "refused_credentials"),
        ("http://@example.com/", "refused_credentials"),
        ("http://127.0.0.1:80@example.com/", "refused_credentials"),
        ("http://example.com:22/", "refused_port"),
        ("https://example.com:0/", "refused_port"),
        ("http://example.com:06000/", "refused_port"),
    ],
)
def test_url_is_refused_with_its_reason(url, reason):
    with pytest.raises(FetchError, match=f"^{reason}: ") as error:
        parse(url)
    assert len(str(error.value)) < 1000
    assert "secret" not in str(error.value)


def test_ports_of_other_services_are_refused_and_those_of_web_servers_are_not():
    assert {21, 22, 25, 110, 6667, 10080} < BAD_PORTS
    assert not {80, 443, 8000, 8080, 8443} & BAD_PORTS


@settings(max_examples=150, **SETTINGS)
@given(
    st.one_of(st.text(), st.text().map("http://".__add__), st.text(string.printable).map("https://a.example".__add__))
)
def test_any_text_is_a_target_or_a_named_failure(url):
    try:
        target = parse(url)
    except FetchError:
        return
    assert target.url.isascii()
    assert target.url.isprintable()
    assert not set(target.url) & set(' "<>\\')
    assert parse(target.url) == target
    seen = urllib.parse.urlsplit(target.url)  # another parser finds the same host and port
    assert (seen.hostname, seen.port or {"http": 80, "https": 443}[seen.scheme]) == (target.host, target.port)
    assert seen.username is None


NUMBERS = (str, "0{:o}".format, "00{:o}".format, "0x{:x}".format, "0X{:X}".format, "0x00{:x}".format)


@st.composite
def spelled_ipv4(draw, address: int) -> str:
    """One of the ways to write an IPv4 address that a socket understands."""
    parts = draw(st.integers(1, 4))
    octets = list(address.to_bytes(4, "big"))
    numbers = [*octets[: parts - 1], int.from_bytes(octets[parts - 1 :], "big")]
    text = ".".join(draw(st.sampled_from(NUMBERS))(number) for number in numbers) + draw(st.sampled_from(["", "."]))
    disguise = draw(st.sampled_from(["none", "percent", "wide"]))
    if disguise == "percent":
        return "".join(f"%{ord(c):02x}" if draw(st.booleans()) else c for c in text)
    return "".join(chr(ord(c) + 0xFEE0) for c in text) if disguise == "wide" else text


@settings(max_examples=150, **SETTINGS)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_any_spelling_of_an_ipv4_address_is_that_address(data, address):
    text = data.draw(spelled_ipv4(address))
    assert canonical_host(text) == str(ipaddress.IPv4Address(address))
    assert parse(f"http://{text}/").is_address


@settings(max_examples=200, **SETTINGS)
@given(st.lists(st.sampled_from([*"0123789afx", "0x", "255", "256", "65536", "4294967295"]), min_size=1, max_size=5))
def test_what_the_c_library_takes_for_an_address_is_one_here(parts):
    for text in ("".join(parts), ".".join(parts)):
        try:
            seen = socket.inet_ntoa(socket.inet_aton(text))
        except OSError:
            continue
        assert canonical_host(text) == seen


@settings(max_examples=100, **SETTINGS)
@given(st.integers(0, 2**128 - 1), st.sampled_from(["compressed", "exploded"]), st.booleans())
def test_any_spelling_of_an_ipv6_address_is_that_address(address, style, upper):
    text = getattr(ipaddress.IPv6Address(address), style)
    target = parse(f"http://[{text.upper() if upper else text}]:8080/")
    assert int(ipaddress.IPv6Address(target.host)) == address
    assert target.is_address


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/b", "http://a.example/b"),
        ("?b", "http://a.example/x?b"),
        ("//b.example/", "http://b.example/"),
        ("https://b.example/ \xc3\xbc", "https://b.example/%20%C3%BC"),
        ("file:///etc/passwd", "file:///etc/passwd"),
        ("http://b\xc3\xbccher.example/", "http://b%C3%BCcher.example/"),
    ],
)
def test_location_is_joined(location, url):
    assert join("http://a.example/x", location) == url


def test_location_that_no_parser_takes_is_a_bad_url():
    with pytest.raises(FetchError, match="bad_url"):
        join("http://a.example/x", "http://[::1/")
