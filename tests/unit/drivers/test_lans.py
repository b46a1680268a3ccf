"""Networks on the hosts' wire: what macvlan and ipvlan say the kernel should hold."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from agent.drivers import ipvlan, macvlan
from agent.errors import Conflict, Invalid
from agent.lanmodel import HOST_SIDE, host_side_name, parse_lan
from agent.model import Endpoint, Network, Node, Sandbox
from agent.node import NodeState
from agent.plan import Plan
from agent.requests import EndpointSpec, parse_network

ID = "1" * 16
ONE = Endpoint("a" * 16, ID, "one", b"\x02\x76\x0a\0\0\x82", (b"\x0a\0\0\x82",), sandbox="5" * 16)
BOX = Sandbox(
    "5" * 16, "one", "/proc/9/ns/net", 9, 9, 9, 0.0, (ONE.id,), ("eth0",), default=ONE.id
)  # fmt: skip
SIDE = Endpoint(
    "b" * 16, ID, "host-n1", b"\x02\x76\x0a\0\0\x83", (b"\x0a\0\0\x83",), sandbox=HOST_SIDE
)
ME = Node("a" * 16, "n1", "10.0.0.1", 7946, "10.0.0.1", 4789, "0", 0.0, 1500, ("10.0.0.0/24",))


def _network(driver: str = "macvlan", mtu: int = 0, **options: str) -> Network:
    options = {"parent": "eth1", **{key.replace("_", "-"): v for key, v in options.items()}}
    return Network(
        ID, "lan", driver, ("10.0.0.0/24",), ("10.0.0.254",), "", 7, mtu, False, False, options,
        {}, 0.0, ME.id,
    )  # fmt: skip


def test_a_macvlan_network_is_a_port_on_the_parent_for_each_workload() -> None:
    lan = macvlan.lan(_network(mtu=1400, mode="private"), [ONE], {BOX.id: BOX})
    assert (lan.kind, lan.mode, lan.parent, lan.mtu) == ("macvlan", "private", "eth1", 1400)
    port = lan.ports[ONE.id]
    assert (port.kind, port.ifname, port.mac) == ("macvlan", "eth0", ONE.mac)
    assert port.addresses == ("10.0.0.130/24",)
    assert port.gateways == ("10.0.0.254",), "the wire's own"
    assert lan.host_side is None


def test_what_is_in_no_sandbox_here_has_no_port() -> None:
    assert not macvlan.lan(_network(), [ONE], {}).ports


def test_the_default_route_is_that_of_one_network_alone() -> None:
    box = Sandbox("5" * 16, "one", "/x", 9, 9, 9, 0.0, (ONE.id,), ("eth0",), default="c" * 16)
    assert macvlan.lan(_network(), [ONE], {box.id: box}).ports[ONE.id].gateways == ()


def test_the_host_has_an_interface_of_its_own_where_asked_for() -> None:
    asked = macvlan.lan(_network(host_interface="true"), [ONE, SIDE], {BOX.id: BOX}).host_side
    assert asked and (asked.endpoint, asked.mac, asked.addresses) == (
        SIDE.id, SIDE.mac, ("10.0.0.131",),
    )  # fmt: skip
    assert macvlan.lan(_network(), [ONE, SIDE], {BOX.id: BOX}).host_side is None


@pytest.mark.parametrize(
    ("parent", "trunk", "vlan"),
    [
        ("eth1.20", "eth1", 20),
        ("eth1", "", 0),
        ("eth1.x", "", 0),
        ("eth1.0", "", 0),
        ("eth1.4095", "", 0),
        ("bond0.7.30", "bond0.7", 30),
        (".20", "", 0),
    ],
)
def test_a_parent_can_be_a_vlan_by_its_name(parent: str, trunk: str, vlan: int) -> None:
    lan = macvlan.lan(_network(parent=parent), [], {})
    assert (lan.parent, lan.trunk, lan.vlan) == (parent, trunk, vlan)


def test_ipvlan_has_the_parents_mac_and_in_l3_no_gateway() -> None:
    l2 = ipvlan.lan(_network("ipvlan"), [ONE, SIDE], {BOX.id: BOX})
    assert (l2.kind, l2.mode) == ("ipvlan", "l2")
    assert (l2.ports[ONE.id].kind, l2.ports[ONE.id].mac) == ("ipvlan", b"")
    assert l2.ports[ONE.id].gateways == ("10.0.0.254",)
    l3 = ipvlan.lan(_network("ipvlan", mode="l3"), [ONE], {BOX.id: BOX})
    assert l3.ports[ONE.id].gateways == ("0.0.0.0",), "all is on the link: the host routes"
    side = ipvlan.lan(_network("ipvlan", host_interface="true"), [SIDE], {}).host_side
    assert side and side.mac == b""


BAD: list[tuple[str, dict[str, str], str]] = [
    ("macvlan", {}, "Give -O parent=eth1"),
    ("macvlan", {"parent": "e/1"}, "is no name of a device"),
    ("macvlan", {"parent": "x" * 16}, "is no name of a device"),
    ("macvlan", {"parent": "eth1", "mode": "l2"}, "Use one of bridge, private, vepa, passthru"),
    ("ipvlan", {"parent": "eth1", "mode": "bridge"}, "Use one of l2, l3"),
    ("ipvlan", {"parent": "eth1", "mode": "l3", "host-interface": "true"}, "Use mode l2"),
    ("macvlan", {"parent": "eth1", "host-interface": "yes"}, "Use true or false"),
    ("macvlan", {"parent": "eth1", "spoof": "allow"}, "is unknown to driver macvlan"),
]


@pytest.mark.parametrize(("driver", "options", "words"), BAD)
def test_bad_options_are_refused(driver: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_lan(driver, options)
    assert words in str(caught.value)
    with pytest.raises(Invalid, match=words[:10]):
        parse_network("lan", driver=driver, options=options)


# -- in a node --


def _node() -> NodeState:
    node = NodeState(ME, lambda: 1000.0, random.Random(1))
    node.describe(ME)
    return node


def _lan(node: NodeState, **more: Any) -> Network:
    spec: dict[str, Any] = {"driver": "macvlan", "options": {"parent": "eth1"}, **more}
    return node.create_network(parse_network("lan", subnets=["10.0.0.0/24"], **spec))


def test_its_subnet_may_be_the_hosts_own() -> None:
    node = _node()
    with pytest.raises(Conflict, match="a route of host n1"):
        node.create_network(parse_network("over", subnets=["10.0.0.0/24"]))
    _lan(node)
    with pytest.raises(Conflict, match=r"overlaps 10.0.0.0/24, network lan"):
        node.create_network(parse_network("lab", driver="bridge", subnets=["10.0.0.0/25"]))


def test_a_hosts_own_address_is_nobodys() -> None:
    node = _node()
    lan = _lan(node, gateways=["10.0.0.254"])
    made = node.create_endpoint(lan.id, EndpointSpec("one"))
    assert made.addresses == (b"\x0a\0\0\2",), "10.0.0.1 is n1's"
    with pytest.raises(Conflict, match=r"address 10.0.0.1: is that of host n1 itself"):
        node.create_endpoint(lan.id, EndpointSpec("two", addresses=(b"\x0a\0\0\1",)))
    many = [
        EndpointSpec(f"e{n}", mac=b"\2\0\0\0\0" + bytes([n]), addresses=(b"\x0a\0\0" + bytes([n]),))
        for n in (9, 1)
    ]
    with pytest.raises(Conflict, match=r"address 10.0.0.1: is that of host n1 itself"):
        node.reserve(lan.id, many)
    assert [e.name for e in node.reserve(lan.id, many[:1])] == ["e9"]


def test_it_has_no_bridge_and_closes_no_agent() -> None:
    node = _node()
    lan = _lan(node)
    node.put_sandbox(msgspec.structs.replace(BOX, endpoints=()))
    made = node.create_endpoint(lan.id, EndpointSpec("one"), BOX.id)
    node.put_sandbox(msgspec.structs.replace(BOX, endpoints=(made.id,)))
    plan = Plan(node)
    assert not plan.bridges() and plan.bridge(lan.vni) is None
    found = plan.lan(lan.vni)
    assert found and list(found.ports) == [made.id] and plan.lans() == {lan.vni: found}
    assert ("10.0.0.1", 7946) in plan.closed().agents, "the agent's address is in the subnet"


def test_the_hosts_own_interface_is_found_by_its_name() -> None:
    node = _node()
    lan = _lan(node)
    node.create_endpoint(lan.id, EndpointSpec(host_side_name("n1")))
    assert node.host_side(lan.id) is None, "a workload can be called so too"
    assert len(host_side_name("n" * 63)) <= 63


def test_options_that_another_node_wrote_stop_nothing() -> None:
    node = _node()
    lan = _lan(node)
    node.create_endpoint(lan.id, EndpointSpec("one"))
    plan = Plan(node)
    held = node.catalogue.get(lan.id)
    assert held is not None and plan.lan(lan.vni)
    held.options.pop("parent")
    assert plan.lan(lan.vni) is None and plan.lans() == {}
