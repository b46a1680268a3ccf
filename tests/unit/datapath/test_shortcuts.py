"""Shortcuts as they follow networks: what is in the maps after each step, whatever fails.

What the programs do with it: tests/netns/test_shortcuts.py.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from agent.datapath import filterpacking, shortcuts
from agent.datapath.netlinkmessages import attribute
from agent.datapath.networks import Held
from agent.datapath.packing import HEADER
from agent.datapath.shortcutprograms import (
    INWARDS,
    IPV4,
    IPV6,
    OUTWARDS,
    PORT,
    SOURCE,
    STATION,
    WAY,
)
from agent.datapath.shortcuts import Shortcuts
from agent.drivers.base import Bridge, Port

ROUTER = bytes.fromhex("0276ff000001")
BRIDGE = Bridge(
    "n" * 16, 7, "vxb7", "vxl7", 1450, ROUTER, ("10.7.0.1/24",), ("10.7.0.0/24",), False, "", 4789
)
MAPPED = bytes(10) + b"\xff\xff"


class Map:
    """One of the kernel's, which fails at the calls that it is told to."""

    def __init__(self, failing: set[int]) -> None:
        self.elements: dict[bytes, bytes] = {}
        self._failing, self._calls = failing, 0

    def update(self, elements: Mapping[bytes, bytes]) -> None:
        self._calls += 1
        failed = elements and self._calls in self._failing
        several = list(elements.items())
        self.elements.update(several[: len(several) // 2] if failed else several)
        if failed:
            raise OSError(7, "map: Argument list too long")

    def delete(self, keys: Collection[bytes]) -> None:
        self._calls += 1
        for key in keys:
            self.elements.pop(key, None)


def port(number: int, **changes: object) -> Port:
    made = Port(
        f"{number:016x}", f"vxp{number}", bytes([2, 0, 0, 0, 0, number]),
        (f"10.7.0.{number}/24", f"fd00:7::{number:x}/64"), "/x", 1, "eth0", (),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def opened(held: dict[int, Held], failing: set[int] | None = None) -> tuple[Shortcuts, Map, Map]:
    made = Shortcuts("/nowhere", held)
    failing = set() if failing is None else failing
    stations, sources = Map(failing), Map(failing)
    made._maps = {"stations": stations, "sources": sources}  # type: ignore[dict-item]
    made._programs = {0: -1}
    return made, stations, sources


def wanted(held: Mapping[int, Held]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """What should be in the maps, told once more."""
    stations, sources = {}, {}
    for one in held.values():
        way = one.vxlan
        stations[STATION.pack(way, one.bridge.router_mac)] = PORT.pack(0)
        for known in one.bridge.ports.values():
            stations[STATION.pack(way, known.mac)] = PORT.pack(0)
        for each, index in one.ports.values():
            number = each.mac[5]
            stations[STATION.pack(way, each.mac)] = PORT.pack(index)
            if one.bridge.flood_rate:
                continue
            for kind, address in (
                (IPV4, MAPPED + bytes([10, 7, 0, number])),
                (IPV6, bytes.fromhex("fd000007") + bytes(11) + bytes([number])),
            ):
                sources[SOURCE.pack(index, each.mac, kind, address)] = WAY.pack(way)
    return stations, sources


def test_what_is_about_to_come_is_here_and_what_came_has_its_ways() -> None:
    held = {7: Held(replace(BRIDGE, ports={"a": port(2)}), 10, 11)}
    made, stations, sources = opened(held)
    made.note(7)
    assert (stations.elements, sources.elements) == wanted(held)
    assert list(stations.elements.values()) == [PORT.pack(0)] * 2 and not sources.elements
    held[7].ports["a"] = (port(2), 12)
    made.note(7)
    assert (stations.elements, sources.elements) == wanted(held)
    assert len(sources.elements) == 2 and made.is_due
    del held[7]
    made.note(7)
    assert not stations.elements and not sources.elements and not made.is_due


def test_a_port_that_is_to_be_another_is_reached_by_the_bridge_until_it_is() -> None:
    """And sends nothing past it with an address that is no longer its own."""
    before = port(2)
    held = {7: Held(replace(BRIDGE, ports={"a": before}), 10, 11, {"a": (before, 12)})}
    made, stations, sources = opened(held)
    made.note(7)
    after = replace(before, addresses=("10.7.0.9/24",))
    held[7].bridge = replace(BRIDGE, ports={"a": after})
    made.note(7)
    assert stations.elements[STATION.pack(11, before.mac)] == PORT.pack(0)
    assert not sources.elements
    held[7].ports["a"] = (after, 13)
    made.note_port(7, "a")
    assert stations.elements[STATION.pack(11, before.mac)] == PORT.pack(13)
    (source,) = sources.elements
    assert SOURCE.unpack(source) == (13, before.mac, IPV4, MAPPED + bytes([10, 7, 0, 9]))
    assert made._wanted_at() == {11: 0, 13: 1}


def test_a_network_of_this_host_alone_has_none() -> None:
    held = {7: Held(replace(BRIDGE, vxlan=""), 10, 0, {"a": (port(2), 12)})}
    made, stations, sources = opened(held)
    made.note(7)
    assert not stations.elements and not sources.elements and not made.is_due


@pytest.mark.parametrize("seed", range(200))
def test_any_order_of_changes_and_failures_ends_in_what_should_be(seed: int) -> None:
    """Who is here is never taken for elsewhere, whatever could be written."""
    chance = random.Random(seed)
    held: dict[int, Held] = {}
    failing = {chance.randrange(1, 60) for _ in range(chance.randrange(6))}
    made, stations, sources = opened(held, failing)
    indexes = iter(range(100, 1000))
    for _ in range(30):
        vni = chance.choice((7, 8))
        if vni not in held:
            held[vni] = Held(replace(BRIDGE, vni=vni), next(indexes), next(indexes))
        one = held[vni]
        what = chance.randrange(7)
        if what == 0:
            del held[vni]
        elif what == 1:
            one.vxlan = next(indexes)
        elif what == 2:
            one.bridge = replace(one.bridge, flood_rate=chance.choice((0, 100)))
        elif what == 3 and one.ports:
            endpoint = chance.choice(sorted(one.ports))
            one.bridge = replace(
                one.bridge, ports={e: p for e, p in one.bridge.ports.items() if e != endpoint}
            )
            made.note(vni)
            del one.ports[endpoint]
        elif what == 4 and one.ports:
            endpoint = chance.choice(sorted(one.ports))
            one.ports[endpoint] = (one.ports[endpoint][0], next(indexes))
            made.note_port(vni, endpoint)
            to = stations.elements.get(STATION.pack(one.vxlan, one.ports[endpoint][0].mac))
            assert to in (None, PORT.pack(one.ports[endpoint][1]))
        else:
            new = port(chance.randrange(2, 9) + 16 * vni)
            one.bridge = replace(one.bridge, ports={**one.bridge.ports, new.endpoint: new})
            leaves = chance.choice(sorted(one.ports)) if one.ports else ""
            if leaves not in ("", new.endpoint) and chance.random() < 0.3:
                ports = {e: p for e, p in one.bridge.ports.items() if e != leaves}
                one.bridge = replace(one.bridge, ports=ports)
                del one.ports[leaves]
            made.note(vni)
            if vni in held and any(STATION.pack(one.vxlan, ROUTER) == k for k in stations.elements):
                assert STATION.pack(one.vxlan, new.mac) in stations.elements
            one.ports[new.endpoint] = (new, next(indexes))
            if chance.random() < 0.5:
                made.note_port(vni, new.endpoint)
        made.note(vni)
        right = wanted(held)
        for have, should in zip((stations.elements, sources.elements), right, strict=True):
            assert have.items() <= should.items(), "what is there is as it should be"
        ways = {WAY.unpack(value)[0] for value in sources.elements.values()}
        for each in held.values():
            if each.vxlan in ways:
                here = {k: v for k, v in right[0].items() if STATION.unpack(k)[0] == each.vxlan}
                assert here.items() <= stations.elements.items(), "who is here is known to be"
    failing.clear()
    for vni in (7, 8):
        made.note(vni)
    assert (stations.elements, sources.elements) == wanted(held)
    devices = {one.vxlan: INWARDS for one in held.values()}
    for one in held.values():
        floods = one.bridge.flood_rate
        devices |= {} if floods else {index: OUTWARDS for _, index in one.ports.values()}
    assert made._wanted_at() == devices


def test_programs_at_a_device_as_messages(tmp_path: Path) -> None:
    message = filterpacking.new_program(5, 9, "x")
    length, kind, *_ = HEADER.unpack_from(message)
    assert (length, kind) == (len(message), filterpacking.RTM_NEWTFILTER)
    head = message[16:36]
    told = head + attribute(1, b"bpf\0") + attribute(2, attribute(11, (77).to_bytes(4, "little")))
    assert filterpacking.read_program(told) == 77
    assert filterpacking.read_program(head + attribute(1, b"u32\0")) is None
    assert filterpacking.read_program(head + attribute(1, b"bpf\0")) is None


def test_what_a_port_may_send_is_told_by_its_own_addresses() -> None:
    head = shortcuts._Head(11, ROUTER, True)
    one = port(2)
    stations, sources = shortcuts.of_port(head, one, 12)
    assert stations == {STATION.pack(11, one.mac): PORT.pack(12)}
    assert set(sources) == {
        SOURCE.pack(12, one.mac, IPV4, MAPPED + bytes([10, 7, 0, 2])),
        SOURCE.pack(12, one.mac, IPV6, bytes.fromhex("fd000007") + bytes(11) + b"\2"),
    }
    assert shortcuts.of_port(head, port(2, mac=b""), 12) == ({}, {})


def test_who_comes_with_the_mac_of_one_that_goes_is_reached_by_the_bridge_until_it_is_there() -> (
    None
):
    before, after = port(2), port(2, endpoint="b", device="vxpb")
    held = {7: Held(replace(BRIDGE, ports={"a": before}), 10, 11, {"a": (before, 12)})}
    made, stations, _ = opened(held)
    made.note(7)
    held[7].bridge = replace(BRIDGE, ports={"b": after})
    made.note(7)
    assert stations.elements[STATION.pack(11, before.mac)] == PORT.pack(0)


def test_what_went_in_the_pass_in_which_another_came_is_gone_from_the_maps() -> None:
    """As Applier.bridge does it: one is deleted, another one made, and only of that it is told."""
    old, new = port(2), port(3)
    held = {7: Held(replace(BRIDGE, ports={old.endpoint: old}), 10, 11, {old.endpoint: (old, 12)})}
    made, stations, sources = opened(held)
    made.note(7)
    held[7].bridge = replace(BRIDGE, ports={new.endpoint: new})
    made.note(7)
    del held[7].ports[old.endpoint]
    held[7].ports[new.endpoint] = (new, 13)
    made.note_port(7, new.endpoint)
    made.note(7)
    assert (stations.elements, sources.elements) == wanted(held)
    assert made._wanted_at() == {11: 0, 13: 1}


def test_what_could_not_be_made_is_here_all_the_same_when_another_could() -> None:
    """A frame for it from another host must not go to a device that has gone."""
    one, other = port(2), port(3)
    both = {one.endpoint: one, other.endpoint: other}
    held = {7: Held(replace(BRIDGE, ports=both), 10, 11)}
    held[7].ports.update({one.endpoint: (one, 12), other.endpoint: (other, 13)})
    made, stations, sources = opened(held)
    made.note(7)
    del held[7].ports[one.endpoint]
    made.note_port(7, one.endpoint)
    held[7].ports[other.endpoint] = (other, 14)
    made.note_port(7, other.endpoint)
    made.note(7)
    assert (stations.elements, sources.elements) == wanted(held)
