"""Devices as netlink messages: read back by pyroute2, which has its own idea of them."""

from __future__ import annotations

from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from agent.datapath import linkpacking

NEW, CHANGE = 0x1 | 0x4 | 0x200 | 0x400, 0x1 | 0x4  # REQUEST, ACK; EXCL, CREATE
MAC, MAC_TEXT = bytes([2, 0, 0, 0, 0, 9]), "02:00:00:00:00:09"


def read(data: bytes, kind: int = 16) -> Any:
    message = (ifaddrmsg if kind == 20 else ifinfmsg)(data)
    message.decode()
    assert message["header"]["length"] == len(data)
    assert message["header"]["type"] == kind
    return message


def info(message: Any) -> tuple[str, Any]:
    found = message.get_attr("IFLA_LINKINFO")
    return found.get_attr("IFLA_INFO_KIND"), found.get_attr("IFLA_INFO_DATA")


def test_a_bridge() -> None:
    message = read(linkpacking.new_bridge("vxb7", MAC, 1450, 0x76786D01))
    assert message["header"]["flags"] == NEW
    assert (message["flags"], message["change"]) == (1, 1)  # up
    assert message.get_attr("IFLA_IFNAME") == "vxb7"
    assert message.get_attr("IFLA_MTU") == 1450
    assert message.get_attr("IFLA_ADDRESS") == MAC_TEXT
    assert message.get_attr("IFLA_GROUP") == 0x76786D01
    kind, data = info(message)
    assert kind == "bridge"
    assert dict(data["attrs"]) == {
        "IFLA_BR_FORWARD_DELAY": 0,
        "IFLA_BR_STP_STATE": 0,
        "IFLA_BR_MCAST_SNOOPING": 0,
    }


@pytest.mark.parametrize(
    ("local", "name", "told"),
    [("10.0.0.1", "LOCAL", "10.0.0.1"), ("fd00::1", "LOCAL6", "fd00::1"), ("", "LOCAL6", "::")],
)
def test_a_vxlan_device(local: str, name: str, told: str) -> None:
    message = read(linkpacking.new_vxlan("vxl7", 7, local, 4789, 1450, 12, 5))
    assert message["header"]["flags"] == NEW
    assert (message["flags"], message["change"]) == (0, 0)  # down
    assert message.get_attr("IFLA_MASTER") == 12
    assert message.get_attr("IFLA_NET_NS_FD") == 5
    kind, data = info(message)
    assert kind == "vxlan"
    assert dict(data["attrs"]) == {
        "IFLA_VXLAN_ID": 7,
        f"IFLA_VXLAN_{name}": told,
        "IFLA_VXLAN_PORT": 4789,
        "IFLA_VXLAN_LEARNING": 0,
        "IFLA_VXLAN_PROXY": 1,
    }


def test_a_pair() -> None:
    message = read(linkpacking.new_pair("vxp1", "eth0", 5, 1450, 12, MAC))
    assert message["header"]["flags"] == NEW
    assert (message["flags"], message.get_attr("IFLA_MASTER")) == (0, 12)
    assert message.get_attr("IFLA_NET_NS_FD") is None  # our own end stays
    kind, data = info(message)
    peer = data.get_attr("VETH_INFO_PEER")
    assert kind == "veth"
    assert dict(peer["attrs"]) == {
        "IFLA_IFNAME": "eth0",
        "IFLA_MTU": 1450,
        "IFLA_NET_NS_FD": 5,
        "IFLA_ADDRESS": MAC_TEXT,
    }


@pytest.mark.parametrize("flood", [False, True])
def test_a_port_is_marked_as_it_comes_up(flood: bool) -> None:
    message = read(linkpacking.mark_port("vxp1", "vxmesh:ep:1", flood=flood))
    assert message["header"]["flags"] == CHANGE
    assert (message["flags"], message["change"]) == (1, 1)
    assert message.get_attr("IFLA_IFALIAS") == "vxmesh:ep:1"
    found = message.get_attr("IFLA_LINKINFO")
    assert found.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge"
    data = found.get_attr("IFLA_INFO_SLAVE_DATA")
    assert dict(data["attrs"]) == {"IFLA_BRPORT_LEARNING": 0, "IFLA_BRPORT_UNICAST_FLOOD": flood}


def test_what_is_changed_and_deleted_is_named_alone() -> None:
    message = read(linkpacking.mark("vxb7", "vxmesh:net:1"))
    assert (message["header"]["flags"], message["index"], message["change"]) == (CHANGE, 0, 0)
    assert dict(message["attrs"]) == {"IFLA_IFNAME": "vxb7", "IFLA_IFALIAS": "vxmesh:net:1"}
    message = read(linkpacking.delete("vxp1"), kind=17)
    assert dict(message["attrs"]) == {"IFLA_IFNAME": "vxp1"}


@pytest.mark.parametrize(
    ("interface", "family", "flags"), [("10.1.0.1/24", 2, 0), ("fd00::1/64", 10, 0x02)]
)
def test_an_address(interface: str, family: int, flags: int) -> None:
    message = read(linkpacking.new_address(9, interface), kind=20)
    address, prefix = interface.split("/")
    assert message["header"]["flags"] == NEW
    assert (message["family"], message["prefixlen"], message["flags"], message["index"]) == (
        *(family, int(prefix), flags, 9),
    )
    assert dict(message["attrs"]) == {"IFA_LOCAL": address, "IFA_ADDRESS": address}


def test_a_message_gets_its_number_and_nothing_else() -> None:
    data = linkpacking.mark("vxb7", "x")
    numbered = linkpacking.numbered(data, 0x01020304)
    assert read(numbered)["header"]["sequence_number"] == 0x01020304
    assert numbered[:8] + numbered[12:] == data[:8] + data[12:]
