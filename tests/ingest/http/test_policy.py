"""What may be fetched: pure functions."""

import ipaddress

import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.policy import allowed_addresses, check_url, host_list, is_allowed_address, proxy, user_agent
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError
from roclip.errors import ConfigError

EVERYTHING = FetchPolicy(allow_networks=("0.0.0.0/0", "::/0"))
NOT_PUBLIC = """
    127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
    192.0.0.9 192.0.2.1 192.88.99.1 198.18.0.1 240.0.0.1
    ::1 :: fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1 100::1 ::7f00:1 ::5db8:d70e
    ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 2002:7f00:1::1
    2001:0:53aa:64c:0:fbfe:80ff:fffe 2001:db8::1 3fff::1 2606:4700::5efe:7f00:1 2606:4700::200:5efe:a00:1 4000::1
"""
PUBLIC = "93.184.215.14 8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2606:4700::5efe:808:808"


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_private_address_is_refused_unless_allowed(address):
    assert not is_allowed_address(FetchPolicy(), address)
    assert is_allowed_address(EVERYTHING, address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_address_is_allowed(address):
    assert is_allowed_address(FetchPolicy(), address)


def test_allowed_network_opens_no_more_than_itself():
    policy = FetchPolicy(allow_networks=("127.0.0.2/32", "fd00::/64"))
    assert is_allowed_address(policy, "127.0.0.2")
    assert is_allowed_address(policy, "::ffff:127.0.0.2")  # the same host to a socket
    assert is_allowed_address(policy, "fd00::7")
    assert not is_allowed_address(policy, "127.0.0.1")
    assert not is_allowed_address(policy, "64:ff9b::7f00:2")
    assert not is_allowed_address(policy, "fd00:0:0:1::7")


V4 = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0x7F000000, 0x0A000000, 0xA9FE0000, 0xC0A80000, 0x64400000]).flatmap(
        lambda network: st.integers(network, network + 0xFFFF)
    ),
)
INSIDE_IPV6 = {
    "mapped": lambda v4: 0xFFFF << 32 | v4,
    "compatible": lambda v4: v4,
    "nat64": lambda v4: 0x64FF9B << 96 | v4,
    "6to4": lambda v4: 0x2002 << 112 | v4 << 80 | 1,
    "isatap": lambda v4: 0x26064700 << 96 | 0x5EFE << 32 | v4,
    "isatap global": lambda v4: 0x26064700 << 96 | 0x2005EFE << 32 | v4,
    "teredo": lambda v4: 0x20010000 << 96 | 0x08080808 << 64 | v4 ^ 0xFFFFFFFF,
}


@settings(max_examples=150, **SETTINGS)
@given(V4, st.sampled_from(sorted(INSIDE_IPV6)))
def test_private_ipv4_address_stays_private_inside_ipv6(v4, form):
    inner = ipaddress.IPv4Address(v4)
    outer = ipaddress.IPv6Address(INSIDE_IPV6[form](v4))
    if not inner.is_global or inner.is_multicast:
        assert not is_allowed_address(FetchPolicy(), str(inner))
        assert not is_allowed_address(FetchPolicy(), str(outer))
        with pytest.raises(FetchError, match="refused_address"):
            check_url(FetchPolicy(), f"http://[{outer}]/")


@settings(max_examples=300, **SETTINGS)
@given(st.one_of(st.integers(0, 2**128 - 1), st.integers(0x2000 << 112, (0x4000 << 112) - 1), V4))
def test_what_is_allowed_is_global(number):
    address = ipaddress.ip_address(number)
    if is_allowed_address(FetchPolicy(), str(address)):
        known = getattr(address, "ipv4_mapped", None) or address
        if known in ipaddress.ip_network("64:ff9b::/96"):
            known = ipaddress.IPv4Address(int(known) & 0xFFFFFFFF)
        assert known.is_global
        special = ("private", "loopback", "link_local", "multicast", "unspecified", "reserved")
        assert not any(getattr(known, f"is_{kind}") for kind in special)


@settings(max_examples=100, **SETTINGS)
@given(V4)
def test_url_with_an_ipv4_address_is_judged_by_it_whatever_its_spelling(v4):
    public = is_allowed_address(FetchPolicy(), str(ipaddress.IPv4Address(v4)))
    for text in (str(v4), hex(v4), f"0{v4:o}", f"{v4 >> 24}.{v4 & 0xFFFFFF}", f"{ipaddress.IPv4Address(v4)}."):
        if public:
            assert check_url(FetchPolicy(), f"http://{text}/").host == str(ipaddress.IPv4Address(v4))
        else:
            with pytest.raises(FetchError, match=r"^refused_address: "):
                check_url(FetchPolicy(), f"http://{text}/")


def test_public_address_of_a_name_is_used_when_another_is_private():
    assert allowed_addresses(FetchPolicy(), "a.example", ["10.0.0.1", "8.8.8.8", "::1"]) == ["8.8.8.8"]
    with pytest.raises(FetchError, match=r"^refused_address: a\.example is at 10\.0\.0\.1, ::1, not a public address"):
        allowed_addresses(FetchPolicy(), "a.example", ["10.0.0.1", "::1"])


@pytest.mark.parametrize(
    ("host", "listed"),
    [
        ("example.com", True),
        ("a.example.com", True),
        ("a.b.EXAMPLE.com.", True),
        ("badexample.com", False),
        ("example.com.evil.example", False),
        ("com", False),
        ("www.b\u00fccher.example", True),
        ("8.8.4.4", True),
        ("8.8.8.8", False),
    ],
)
def test_host_lists_match_whole_labels(host, listed):
    entries = ("Example.com", "b\u00fccher.example", "8.8.1028")
    url = f"http://{host}/x"
    for policy, passes in (
        (FetchPolicy(allow_hosts=entries), listed),
        (FetchPolicy(deny_hosts=entries), not listed),
        (FetchPolicy(allow_hosts=entries, deny_hosts=entries), False),
    ):
        if passes:
            check_url(policy, url)
        else:
            with pytest.raises(FetchError, match="refused_host"):
                check_url(policy, url)


LABELS = st.lists(st.sampled_from(["a", "b", "ab", "example"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=100, **SETTINGS)
@given(LABELS, st.lists(LABELS, min_size=1, max_size=3))
def test_host_is_listed_when_an_entry_is_a_suffix_of_its_labels(host, entries):
    listed = any(host.split(".")[-len(entry.split(".")) :] == entry.split(".") for entry in entries)
    try:
        check_url(FetchPolicy(deny_hosts=tuple(entries)), f"http://{host}/")
        assert not listed
    except FetchError:
        assert listed


def test_host_list_is_read_from_a_file_once(tmp_path):
    path = tmp_path / "deny.txt"
    path.write_text("evil.example\n\n  b\u00fccher.example \n", encoding="utf-8")
    entries = (f"@{path}", "more.example")
    assert host_list(entries) == {"evil.example", "xn--bcher-kva.example", "more.example"}
    path.unlink()
    assert "evil.example" in host_list(entries)


def test_host_list_that_cannot_be_used_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        host_list((f"@{tmp_path / 'none'}",))
    with pytest.raises(ConfigError, match="expected host names"):
        host_list(("http://example.com/",))


def test_user_agent_says_who_and_how_to_reach():
    assert user_agent(FetchPolicy()).startswith("roclip/")
    assert "(" not in user_agent(FetchPolicy())
    assert user_agent(FetchPolicy(contact="https://a.example/bot")).endswith(" (+https://a.example/bot)")
    with pytest.raises(ConfigError, match=r"ingest\.policy\.contact"):
        user_agent(FetchPolicy(contact="a\r\nHost: evil.example"))


def test_proxy_is_a_host_and_a_port():
    assert proxy(FetchPolicy()) is None
    target = proxy(FetchPolicy(proxy="http://egress:3128"))
    assert target is not None
    assert (target.host, target.port) == ("egress", 3128)


@pytest.mark.parametrize(
    "text", ["https://a.example", "socks5://a.example", "http://u:p@a.example:1080", "http://a.example/x", "a"]
)
def test_proxy_of_another_kind_is_a_config_error(text):
    with pytest.raises(ConfigError, match=r"ingest\.policy\.proxy"):
        proxy(FetchPolicy(proxy=text))
