"""Bad input: each case is refused with its own words, and sound input is taken as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import notation, requests
from agent.errors import Invalid, VxmeshError
from agent.requests import (
    parse_endpoint,
    parse_ifname,
    parse_lines,
    parse_network,
    parse_publish,
)

NETWORKS: list[tuple[dict[str, Any], str]] = [
    ({"subnets": ["10.0.0.0/33"]}, "subnet '10.0.0.0/33': is malformed"),
    ({"subnets": ["banana"]}, "is malformed"),
    ({"subnets": ["10.0.0.1/24"]}, "Write it as 10.0.0.0/24"),
    ({"subnets": ["10.0.0.0/31"]}, "no room"),
    ({"subnets": ["127.0.0.0/8"]}, "is reserved"),
    ({"subnets": ["224.0.0.0/24"]}, "is reserved"),
    ({"subnets": ["10.0.0.0/24", "10.0.0.128/25"]}, "overlaps 10.0.0.0/24"),
    ({"subnets": ["10.0.0.0/24"], "gateways": ["10.0.1.1"]}, "is in none of the subnets"),
    ({"subnets": ["10.0.0.0/24"], "gateways": ["10.0.0.255"]}, "no host's address"),
    ({"subnets": ["10.0.0.0/24"], "ip_ranges": ["10.0.1.0/28"]}, "lies in none"),
    ({"subnets": ["10.0.0.0/24"], "ip_ranges": ["10.0.0.0/26", "10.0.0.32/27"]}, "overlaps"),
    ({"subnets": ["10.0.0.0/24"], "ip_ranges": ["10.0.0.0/26", "fd00::/126"]}, "lies in none"),
    ({"subnets": ["10.0.0.0/24"], "ip_ranges": ["10.0.0.4"]}, "lies in none"),
    ({"mtu": 10}, "MTU 10: is out of range"),
    ({"mtu": 1279, "subnets": ["fd00::/64"]}, "Use 1280"),
    ({"mtu": 1279, "ipv6_only": True}, "Use 1280"),
    ({"ipv6": True, "ipv6_only": True}, "one of --ipv6 and --ipv6-only"),
    ({"subnets": ["10.1.0.0/24"], "ipv6_only": True}, "--subnet of IPv6 alone"),
    ({"vni": 1 << 24}, "VNI 16777216: is out of range"),
    ({"driver": "carrier-pigeon"}, "driver 'carrier-pigeon': is unknown"),
    ({"labels": {"a": "x" * 1_000_000}}, "label 'a': is too long (1 bytes of key, 1000000"),
    ({"labels": {"": "x"}}, "label key '': is malformed"),
    ({"options": {str(i): "" for i in range(65)}}, "65 are too many"),
]


@pytest.mark.parametrize(("fields", "words"), NETWORKS)
def test_bad_networks(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_network("web", **fields)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a_b", "ü", "a" * 64, "a b", "a\n"])
def test_names_are_dns_labels(name: str) -> None:
    with pytest.raises(Invalid, match="is not a DNS label"):
        parse_network(name)
    with pytest.raises(Invalid, match="is not a DNS label"):
        parse_endpoint(name)


def test_names_are_taken_in_lower_case() -> None:
    assert parse_network("WEB").name == "web"


def test_a_sound_network() -> None:
    spec = parse_network(
        "web", subnets=["10.1.0.0/24", "fd00:1::/64"], gateways=["10.1.0.254"], mtu=1400
    )
    assert spec.subnets == ("10.1.0.0/24", "fd00:1::/64")
    assert spec.driver == "overlay"


@pytest.mark.parametrize(
    "mac",
    ["", "02:00:00:00:00", "02:00:00:00:00:0g", "01:00:5e:00:00:01", "00:00:00:00:00:00",
     "02-00:00:00:00:01", "020000000001"],
)  # fmt: skip
def test_bad_macs(mac: str) -> None:
    with pytest.raises(Invalid, match="MAC"):
        notation.parse_mac(mac)


def test_macs_are_six_bytes() -> None:
    assert notation.parse_mac("02:00:5e:00:53:AF") == bytes.fromhex("02005e0053af")
    assert notation.parse_mac("02-00-5E-00-53-01") == bytes.fromhex("02005e005301")
    assert notation.format_mac(bytes.fromhex("02005e0053af")) == "02:00:5e:00:53:af"


@pytest.mark.parametrize("text", ["", "10.0.0", "10.0.0.256", "fd00::g", "10.0.0.1/24", "\0"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(Invalid, match="is malformed"):
        notation.parse_address(text)


LINES: list[tuple[bytes, str]] = [
    (b"nonsense", "line 7: is no endpoint"),
    (b'{"name": "a"}', "line 7: is no endpoint"),
    (b'{"name": "a", "mac": "02:00:00:00:00:01"}', "lacks a MAC or an address"),
    (b'{"name": "a", "mac": "x", "addresses": ["10.0.0.1"]}', "line 7, MAC 'x': is malformed"),
    (b'{"name": "a", "mac": "02:00:00:00:00:01", "addresses": [1]}', "line 7: is no endpoint"),
    (b'{"name": "a", "mac": "02:00:00:00:00:01", "adresses": []}', "unknown field"),
    (b"\xff\xfe", "line 7: is no endpoint"),
]


@pytest.mark.parametrize(("line", "words"), LINES)
def test_bad_lines_are_named(line: bytes, words: str) -> None:
    good = b'{"name": "g", "mac": "02:00:00:00:00:02", "addresses": ["10.0.0.2"]}'
    with pytest.raises(Invalid) as caught:
        parse_lines([good, b"", line, good], 5)
    assert words in str(caught.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_line_or_a_clear_error(line: bytes) -> None:
    try:
        specs = parse_lines([line], 1)
    except VxmeshError as error:
        assert error.what.startswith("line 1")
    else:
        assert len(specs) == bool(line.strip())


# Beside plain lines, what could slip through where many are looked at together.
ODD = [
    {"name": "Web-1"}, {"name": "-a"}, {"name": "a-"}, {"name": ""}, {"name": "---"},
    {"name": "\u00b2"}, {"name": "a" * 64}, {"mac": "02-00-00-00-00-01"},
    {"mac": "02:00:00:00:00:A1"},
    {"mac": "01:00:00:00:00:01"}, {"mac": "00:00:00:00:00:00"}, {"mac": "02:00:00:00:00:0"},
    {"mac": "0200:00:00:00:001"}, {"mac": "02:00:00:00:00: 1"}, {"mac": ""},
    {"mac": "02:00:00:00::011"}, {"addresses": []}, {"addresses": ["fd00::1"]},
    {"addresses": ["10.1.0.1", "10.1.0.1", "fd00::2"]},
    {"addresses": ["10.1.0"]}, {"addresses": ["10.1.0.1\0"]}, {"addresses": ["\u0661.1.1.1"]},
    {"aliases": ["db"]}, {"labels": {"a": "b"}}, {"labels": {"": "b"}},
]  # fmt: skip


@given(st.lists(st.sampled_from([{}, {}, *ODD]), max_size=6))
def test_lines_looked_at_together_are_what_each_is_by_itself(odd: list[dict[str, Any]]) -> None:
    plain = {"name": "w", "mac": "02:00:00:00:00:01", "addresses": ["10.1.0.9"]}
    lines = [json.dumps({**plain, **changed}).encode() for changed in odd]

    def outcome() -> list[requests.EndpointSpec] | str:
        try:
            return parse_lines(lines, 1)
        except Invalid as error:
            return str(error)

    together = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "_plain", lambda lines: int("not together"))
        assert outcome() == together


@given(st.text(max_size=80))
def test_any_text_is_a_subnet_or_a_clear_error(text: str) -> None:
    try:
        notation.parse_subnet(text)
    except Invalid as error:
        assert "subnet" in error.what


def test_ifnames_and_ports() -> None:
    assert parse_ifname("eth0.100") == "eth0.100"
    for bad in ("", "a" * 16, "a/b", "a b", ".."):
        with pytest.raises(Invalid, match="interface name"):
            parse_ifname(bad)
    assert parse_publish(8080, 80).protocol == "tcp"
    for port in (0, 65536):
        with pytest.raises(Invalid, match="out of range"):
            parse_publish(port, 80)
    with pytest.raises(Invalid, match="protocol"):
        parse_publish(80, 80, "sctp")


def test_whether_spoofing_is_allowed_is_said_in_one_of_two_words() -> None:
    assert parse_network("n", options={"spoof": "allow"}).options == {"spoof": "allow"}
    with pytest.raises(Invalid, match="spoof='yes': is unknown"):
        parse_network("n", options={"spoof": "yes"})
