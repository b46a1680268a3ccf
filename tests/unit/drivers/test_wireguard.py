"""Encrypted networks in the plan: where their rows lead, and which devices that takes."""

from __future__ import annotations

import random

import pytest

from agent.core.replica import Delta, Record
from agent.drivers import overlay, wireguard
from agent.errors import Invalid
from agent.model import (
    BARRED_DATA_PORTS,
    NAMES_PORT,
    Endpoint,
    Node,
    Sandbox,
    WireguardKey,
    encode,
)
from agent.node import NodeState
from agent.plan import Plan, Touched
from agent.requests import parse_endpoint, parse_network
from agent.views import Status

ME, OTHER, THIRD = "1" * 16, "2" * 16, "3" * 16


def key(number: int, generation: int = 1) -> WireguardKey:
    return WireguardKey(bytes([number]) * 32, 51850 + generation % 2, generation)


def host(id: str, *keys: WireguardKey, address: str = "", mtu: int = 1500) -> Node:
    address = address or f"10.99.0.{id[0]}"
    return Node(id, f"n{id[0]}", address, 7946, address, 4789, "0", 0.0, mtu, wireguard=tuple(keys))


class World:
    """A node with an encrypted network and an open one, a workload in both, and two others."""

    def __init__(self) -> None:
        self.private = {key(1).public: b"p" * 32, key(11, 2).public: b"q" * 32}
        self.state = NodeState(host(ME, key(1)), lambda: 1.0, random.Random(1))
        self.state.describe(host(ME, key(1)))
        self.plan = Plan(self.state, lambda: self.private)
        self.touched: list[Touched] = []
        self.state.listeners.append(lambda change: self.touched.append(self.plan.touched(change)))
        self.versions: dict[str, int] = {}
        make = self.state.create_network
        self.sealed = make(parse_network("sealed", subnets=["10.1.0.0/24"], encrypted=True))
        self.open = make(parse_network("open", subnets=["10.2.0.0/24"]))
        self.told(OTHER, (f"n/{OTHER}", encode(host(OTHER, key(2)))))
        self.told(THIRD, (f"n/{THIRD}", encode(host(THIRD))))

    def told(self, origin: str, *records: tuple[str, bytes]) -> None:
        base = self.versions.get(origin, 0)
        numbered = [Record(k, base + i + 1, v) for i, (k, v) in enumerate(records)]
        self.versions[origin] = base + len(records)
        self.state.merge(Delta(origin, base, self.versions[origin], numbered))

    def remote(self, origin: str, network: str, number: int) -> bytes:
        """An endpoint on another node; its MAC."""
        mac = bytes([2, 0, 0, 0, 0, number])
        subnet = 1 if network == self.sealed.id else 2
        held = Endpoint(f"{number:016x}", network, f"r{number}", mac, (bytes([10, subnet, 0, 9]),))
        self.told(origin, (f"e/{held.id}", encode(held)))
        return mac

    def workload(self) -> None:
        made = [
            self.state.create_endpoint(network.id, parse_endpoint("w"), "5" * 16).id
            for network in (self.sealed, self.open)
        ]
        self.state.put_sandbox(
            Sandbox("5" * 16, "w", "/proc/9/ns/net", 9, 9, 9, 0.0, tuple(made), ("eth0", "eth1"))
        )


@pytest.fixture
def world() -> World:
    return World()


def inner(node: str, held: WireguardKey) -> bytes:
    return wireguard.key_address(node, held)


def test_an_inner_address_is_in_the_prefix_and_follows_from_all_of_a_key() -> None:
    found = {
        inner(node, held)
        for node in (ME, OTHER)
        for held in (key(1), key(2), key(1, 2), WireguardKey(key(1).public, 51850, 3))
    }
    assert len(found) == 8
    assert all(len(a) == 16 and a[:6] == b"\xfdvxmwg" for a in found)
    assert inner(ME, key(1)) == inner(ME, WireguardKey(key(1).public, 9, 1)), "wherever it listens"


def test_rows_of_an_encrypted_network_lead_inside_and_those_of_others_outside(world: World) -> None:
    world.workload()
    sealed, opened = world.remote(OTHER, world.sealed.id, 1), world.remote(OTHER, world.open.id, 2)
    assert world.plan.all_rows(world.sealed.vni).fdb == [(sealed, inner(OTHER, key(2)))]
    assert world.plan.all_rows(world.open.vni).fdb == [(opened, bytes([10, 99, 0, 2]))]


def test_a_node_without_a_key_gets_no_rows_of_an_encrypted_network(world: World) -> None:
    world.workload()
    sealed, opened = world.remote(THIRD, world.sealed.id, 1), world.remote(THIRD, world.open.id, 2)
    assert world.plan.rows(world.sealed.vni, [sealed], []).fdb == [(sealed, None)]
    assert world.plan.rows(world.open.vni, [opened], []).fdb == [(opened, bytes([10, 99, 0, 3]))]
    world.told(THIRD, (f"n/{THIRD}", encode(host(THIRD, key(3)))))
    touched = world.touched[-1]
    assert touched.macs == {world.sealed.vni: [sealed]} and touched.wireguard
    assert not touched.everything
    assert world.plan.rows(world.sealed.vni, [sealed], []).fdb == [(sealed, inner(THIRD, key(3)))]


def test_the_bridge_of_an_encrypted_network_is_ipv6_at_a_port_of_its_own(world: World) -> None:
    world.workload()
    sealed, opened = world.plan.bridge(world.sealed.vni), world.plan.bridge(world.open.vni)
    assert sealed and opened
    assert (sealed.vtep, sealed.data_port, sealed.encrypted) == ("", 4788, True)
    assert (opened.vtep, opened.data_port, opened.encrypted) == ("10.99.0.1", 4789, False)


@pytest.mark.parametrize("outer", [1, 2, 4789, 65534, 65535])
def test_the_inner_port_is_a_port_and_another_one(outer: int) -> None:
    assert 1 <= wireguard.data_port(outer) <= 65535 and wireguard.data_port(outer) != outer


def test_no_port_that_a_node_can_have_makes_the_inner_one_that_of_name_servers() -> None:
    """The host's own table drops what is for the inner port: its DNS would be gone with it."""
    allowed = set(range(1, 65536)) - BARRED_DATA_PORTS
    assert NAMES_PORT not in allowed | {wireguard.data_port(outer) for outer in allowed}


def test_there_is_a_device_while_something_encrypted_is_here(world: World) -> None:
    assert world.plan.wireguard() == ()
    world.workload()
    (device,) = world.plan.wireguard()
    assert any(t.wireguard for t in world.touched)
    assert (device.device, device.port, device.mtu) == ("vxw1", 51851, 1440)
    assert device.private_key == b"p" * 32 and device.address == inner(ME, key(1))
    assert list(device.peers) == [key(2).public], "who has a key, and not this node itself"
    peer = device.peers[key(2).public]
    assert peer.endpoint == ("10.99.0.2", 51851) and peer.address == inner(OTHER, key(2))
    assert not peer.keepalive
    world.state.drop_sandbox("5" * 16)
    assert world.plan.wireguard() == () and world.touched[-1].wireguard


def test_a_session_is_held_with_those_that_have_something_in_common(world: World) -> None:
    world.workload()
    world.remote(OTHER, world.open.id, 2)
    assert not world.plan.wireguard()[0].peers[key(2).public].keepalive
    world.remote(OTHER, world.sealed.id, 1)
    assert world.touched[-1].wireguard and world.plan.partners() == {ME, OTHER}
    assert world.plan.wireguard()[0].peers[key(2).public].keepalive
    world.state.set_status(OTHER, Status("unreachable", "", 1.0, withdrawn=True))
    assert not world.plan.wireguard()[0].peers[key(2).public].keepalive
    assert world.touched[-1].wireguard


def test_a_peer_that_changes_its_key_is_known_by_both_and_sent_to_by_the_first(
    world: World,
) -> None:
    world.workload()
    mac = world.remote(OTHER, world.sealed.id, 1)
    new = key(22, 2)
    for keys, first in (((key(2), new), key(2)), ((new, key(2)), new), ((new,), new)):
        world.told(OTHER, (f"n/{OTHER}", encode(host(OTHER, *keys))))
        touched, flips = world.touched[-1], keys == (new, key(2))
        assert touched.wireguard is not flips, "by its order alone nothing changes but rows"
        assert touched.macs == ({world.sealed.vni: [mac]} if flips else {})
        (device,) = world.plan.wireguard()
        assert set(device.peers) == {k.public for k in keys}
        assert world.plan.all_rows(world.sealed.vni).fdb == [(mac, inner(OTHER, first))]


def test_one_own_key_more_is_one_device_more_and_the_first_is_sent_through(world: World) -> None:
    world.workload()
    new = key(11, 2)
    for keys, names in (
        ((key(1), new), ["vxw1", "vxw0"]),
        ((new, key(1)), ["vxw0", "vxw1"]),
        ((new,), ["vxw0"]),
    ):
        world.state.describe(host(ME, *keys))
        assert world.touched[-1].wireguard
        assert [d.device for d in world.plan.wireguard()] == names
    assert world.plan.devices_by_key() == {new.public: "vxw0"}


def test_a_key_whose_private_half_is_lost_has_no_device(world: World) -> None:
    world.private.clear()
    world.workload()
    assert world.plan.wireguard() == ()


def test_a_private_key_is_in_no_text(world: World) -> None:
    world.workload()
    assert "ppp" not in repr(world.plan.wireguard()) and "70" * 8 not in repr(world.plan)


def test_the_mtu_leaves_room_for_wireguard_and_vxlan_over_ipv6(world: World) -> None:
    nodes = [host(ME), host(OTHER, mtu=1400)]
    assert overlay.mtu(world.sealed, nodes) == 1400 - 60 - 70
    assert overlay.mtu(world.sealed, [host(ME), host(OTHER, address="fd99::2")]) == 1500 - 80 - 70
    assert overlay.mtu(world.open, nodes) == 1400 - 50


def test_an_mtu_that_does_not_fit_is_refused_where_it_would_lose_packets(world: World) -> None:
    make = world.state.create_network
    with pytest.raises(Invalid, match="1370"):
        make(parse_network("big", mtu=1371, encrypted=True))
    assert make(parse_network("fits", mtu=1370, encrypted=True)).mtu == 1370
    assert make(parse_network("plain", mtu=9000)).mtu == 9000
    world.told(OTHER, (f"n/{OTHER}", encode(host(OTHER, key(2), mtu=1400))))
    with pytest.raises(Invalid, match="IPv6 needs 1280"):
        make(parse_network("six", ipv6=True, encrypted=True))


@pytest.mark.parametrize("thief", ["0" * 16, THIRD])
def test_nobody_takes_a_peer_from_its_node_by_stating_its_key(world: World, thief: str) -> None:
    world.workload()
    (before,) = world.plan.wireguard()
    world.told(thief, (f"n/{thief}", encode(host(thief, key(2), key(3)))))
    (device,) = world.plan.wireguard()
    assert device.peers[key(2).public] == before.peers[key(2).public], "as it was"
    assert device.peers[key(3).public].address == inner(thief, key(3)), "its own is its own"
    assert world.plan.disputed_keys() == {(thief, OTHER)}
    world.told(OTHER, (f"n/{OTHER}", encode(host(OTHER, key(4)))))
    (device,) = world.plan.wireguard()
    assert device.peers[key(2).public].address == inner(thief, key(2)), "nobody else has it now"
    assert not world.plan.disputed_keys()


def test_it_is_so_of_keys_that_were_known_before_anything_was_encrypted_here(world: World) -> None:
    thief = "0" * 16
    world.told(thief, (f"n/{thief}", encode(host(thief, key(2)))))
    world.workload()
    (device,) = world.plan.wireguard()
    assert device.peers[key(2).public].address == inner(OTHER, key(2))


def test_no_node_is_a_peer_by_a_key_of_this_node(world: World) -> None:
    """Whether it is told to others already, or is to be the next one."""
    world.workload()
    world.told(THIRD, (f"n/{THIRD}", encode(host(THIRD, key(1), key(11, 2)))))
    (device,) = world.plan.wireguard()
    assert list(device.peers) == [key(2).public]
    assert world.plan.disputed_keys() == {(THIRD, ME)}
