"""The rules as text: whole in golden/, and how one ruleset becomes another.

tests/netns/test_datapath_parts.py loads the same into the kernel.
`VXMESH_GOLDEN=write` writes the files anew; read the difference before you keep it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.datapath import entrance, nft
from agent.drivers.base import Bridge, Forward, Port
from agent.drivers.marks import DOOR, OPEN, PROVEN
from agent.model import HANDED_OUT, Publish

GOLDEN = Path(__file__).parent / "golden"

WEB = Bridge(
    network="00000000000000aa",
    vni=4097,
    device="vxb4097",
    vxlan="vxl4097",
    mtu=1450,
    router_mac=b"\x0a\x00\x00\x00\x00\x01",
    gateways=("10.1.0.1/24", "fd00:1::1/64"),
    subnets=("10.1.0.0/24", "fd00:1::/64"),
    internal=False,
    vtep="192.0.2.1",
    data_port=4789,
    asked=True,
    ports={
        "00000000000000e2": Port(
            endpoint="00000000000000e2",
            device="vxp000000000e2",
            mac=bytes.fromhex("02005e005302"),
            addresses=("10.1.0.7/24", "fd00:1::7/64"),
            netns=HANDED_OUT,
            inode=0,
            ifname="eth0",
            gateways=(),
        )
    },
)
DATABASE = replace(
    WEB,
    asked=False,
    ports={},
    network="00000000000000bb",
    vni=4098,
    device="vxb4098",
    vxlan="vxl4098",
    gateways=("10.2.0.1/16",),
    subnets=("10.2.0.0/16",),
    internal=True,
)
FORWARDS = (
    Forward(Publish(8080, 80), "10.1.0.5"),
    Forward(Publish(8080, 80), "fd00:1::5"),
    Forward(Publish(53, 5353, "udp", "192.0.2.1"), "10.1.0.6"),
)


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("VXMESH_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_own_table() -> None:
    golden("own.nft", nft.render(nft.own([WEB, DATABASE])))


def test_own_table_of_no_network() -> None:
    golden("own-empty.nft", nft.render(nft.own([])))


@pytest.mark.parametrize(
    ("what", "group"),
    [
        ({}, OPEN),  # what comes by VXLAN was looked at elsewhere, or nowhere
        ({"vxlan": ""}, PROVEN),
        ({"vxlan": "", "spoof": True}, OPEN),
        ({"vxlan": "", "apart": frozenset(WEB.subnets[:1])}, OPEN),
        ({"vxlan": "", "apart": frozenset(WEB.subnets)}, 0),
        ({"vxlan": "", "internal": True}, 0),
        ({"vxlan": "", "subnets": ()}, 0),
    ],
)
def test_what_leads_out_is_told_by_the_bridges_group(what: dict[str, Any], group: int) -> None:
    assert replace(WEB, **what).group == group


def test_host_table() -> None:
    golden("host.nft", nft.render(nft.host([WEB, DATABASE], FORWARDS)))


def test_host_table_of_no_network() -> None:
    golden("host-empty.nft", nft.render(nft.host([], [])))


def test_the_table_that_keeps_wireguard_apart() -> None:
    golden("sealed.nft", nft.render(nft.sealed(4788)))


def test_published_ports_of_services() -> None:
    doors = {("doors4", "tcp . 8080"): f"{DOOR[4]} . 1", ("doors4_at", "192.0.2.1 . udp . 53"): ""}
    golden("entrance.nft", nft.render(entrance.ruleset(4, doors)))


@pytest.mark.parametrize("version", [4, 6])
def test_without_a_published_port_no_packet_is_looked_at_for_one(version: int) -> None:
    other = {(f"doors{10 - version}", "tcp . 8080"): ""}
    assert "chain" not in nft.render(entrance.ruleset(version, other))
    assert "hook input" in nft.render(entrance.ruleset(10 - version, other))


def test_elements_do_not_depend_on_the_order_of_networks() -> None:
    assert nft.render(nft.own([WEB, DATABASE])) == nft.render(nft.own([DATABASE, WEB]))


def test_what_is_the_same_needs_no_change() -> None:
    assert nft.delta(nft.own([WEB]), nft.own([WEB])) == ""


def test_a_network_that_comes_adds_its_elements_only() -> None:
    golden("own-delta-come.nft", nft.delta(nft.own([WEB]), nft.own([WEB, DATABASE])))


def test_a_network_that_goes_deletes_its_elements_only() -> None:
    golden("own-delta-go.nft", nft.delta(nft.own([WEB, DATABASE]), nft.own([DATABASE])))


def test_a_port_that_leads_elsewhere_is_deleted_and_added_in_one_transaction() -> None:
    old = nft.host([WEB], [Forward(Publish(8080, 80), "10.1.0.5")])
    new = nft.host([WEB], [Forward(Publish(8080, 80), "10.1.0.9")])
    assert nft.delta(old, new) == (
        "delete element inet vxmesh ports4 { tcp . 8080 : 10.1.0.5 . 80 }\n"
        "add element inet vxmesh ports4 { tcp . 8080 : 10.1.0.9 . 80 }\n"
    )


@pytest.mark.parametrize("address", ["10.2.0.5", "10.9.0.5", "fd00:9::5"])
def test_a_port_of_an_internal_or_unknown_network_is_left_out(address: str) -> None:
    ruleset = nft.host([WEB, DATABASE], [Forward(Publish(8080, 80), address)])
    assert not any(s.elements for name, s in ruleset.sets.items() if name.startswith("ports"))


def test_of_two_forwards_of_one_port_the_first_holds() -> None:
    twice = [Forward(Publish(80, 80), "10.1.0.5"), Forward(Publish(80, 81), "10.1.0.6")]
    assert nft.host([WEB], twice).sets["ports4"].elements == {"tcp . 80": "10.1.0.5 . 80"}


def test_the_unspecified_host_address_is_every_address() -> None:
    ruleset = nft.host([WEB], [Forward(Publish(80, 80, "tcp", "0.0.0.0"), "10.1.0.5")])
    assert ruleset.sets["ports4"].elements and not ruleset.sets["ports4_at"].elements


def test_overlapping_subnets_become_one_interval() -> None:
    inner = replace(DATABASE, internal=False, subnets=("10.1.0.0/16",))
    assert set(nft.host([WEB, inner], []).sets["subnets4"].elements) == {"10.1.0.0/16"}
    both = nft.own([WEB, inner]).sets["egress4"].elements
    assert set(both) == {'"vxb4097" . 10.1.0.0/24', '"vxb4098" . 10.1.0.0/16'}
