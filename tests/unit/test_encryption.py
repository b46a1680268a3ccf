"""Changing a key step by step, and telling of who cannot take part."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from agent import encryption
from agent.core.replica import Delta, Record
from agent.encryption import Encryption, without_key
from agent.errors import Timeout, Unsupported
from agent.keys import WireguardKeys
from agent.model import Endpoint, Node, WireguardKey, encode
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network
from agent.views import Change, Status

ME, OTHER = "1" * 16, "2" * 16
PEER = WireguardKey(b"o" * 32, 51850, 1)


def host(id: str, *keys: WireguardKey) -> Node:
    address = f"10.99.0.{id[0]}"
    return Node(id, f"n{id[0]}", address, 7946, address, 4789, "0", 0.0, 1500, wireguard=keys)


class World:
    """A node whose cluster, kernel and WireGuard a test plays."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.keys = WireguardKeys(folder, ME, 51850, lambda: self.now)
        self.node = NodeState(host(ME), lambda: self.now, random.Random(1))
        self.node.describe(host(ME))
        self.node.listeners.append(self._note)
        self.steps: list[tuple[object, ...]] = []
        self.notices: list[str] = []
        self.here = True
        self.lacking = False
        self.held: dict[bytes, float] = {PEER.public: 1.0}
        self.asked = 0
        self.disputed: set[tuple[str, str]] = set()
        self.encryption = Encryption(
            self.node, self.keys, self, self, self.check, self.spread, 3600.0
        )
        self.version = 0
        self.told(f"n/{OTHER}", host(OTHER, PEER))
        self.node.set_status(OTHER, Status("alive", "", 1.0))

    def told(self, key: str, value: Node | Endpoint) -> None:
        self.version += 1
        record = Record(key, self.version, encode(value))
        self.node.merge(Delta(OTHER, self.version - 1, self.version, [record]))

    def _note(self, change: Change) -> None:
        self.notices += [notice.kind for notice in change.notices]
        if ME in change.nodes:
            self.steps.append(("say", *(k.generation for k in self.node.nodes[ME].wireguard)))

    async def check(self) -> None:
        if not self.here:
            raise Unsupported("encrypted networks", "there is no WireGuard", "Install it")

    async def spread(self, seconds: float) -> None:
        self.steps.append(("wait",))
        if self.lacking:
            raise Timeout("the change", "is not in the kernel of n2")

    async def sessions(self, device: str) -> dict[bytes, float]:
        self.asked += 1
        self.steps.append(("sessions", device))
        return self.held

    def devices_by_key(self) -> dict[bytes, str]:
        return {k.public: f"vxw{k.generation % 2}" for k in self.keys.records()}

    def disputed_keys(self) -> set[tuple[str, str]]:
        return self.disputed

    def partners(self) -> set[str]:
        return {ME, OTHER}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(encryption, "LINGER", 0.0)
    monkeypatch.setattr(encryption, "POLL", 0.001)
    return World(tmp_path)


async def test_a_key_is_told_then_used_then_alone(world: World) -> None:
    await world.encryption.require()
    world.steps.clear()
    await world.encryption.rotate()
    assert world.steps == [
        ("say", 1, 2),
        ("wait",),
        ("sessions", "vxw0"),
        ("say", 2, 1),
        ("wait",),
        ("say", 2),
    ]
    assert world.notices[-1] == "encryption.rotated"


async def test_it_is_not_used_before_there_are_sessions(world: World) -> None:
    await world.encryption.require()
    world.held = {PEER.public: 0.0}
    rotating = asyncio.create_task(world.encryption.rotate())
    while world.asked < 3:
        await asyncio.sleep(0.001)
    assert world.keys.is_changing and not world.keys.is_flipped
    world.held = {PEER.public: 5.0}
    await rotating
    assert [k.generation for k in world.keys.records()] == [2]


@pytest.mark.parametrize("spoil", ["unreachable", "no key"])
async def test_who_is_away_or_has_no_key_is_not_waited_for(world: World, spoil: str) -> None:
    await world.encryption.require()
    world.held = {}
    if spoil == "unreachable":
        world.node.set_status(OTHER, Status("unreachable", "", 1.0))
    else:
        world.told(f"n/{OTHER}", host(OTHER))
    await world.encryption.rotate()
    assert [k.generation for k in world.keys.records()] == [2]


async def test_a_node_that_does_not_follow_does_not_keep_the_old_key_alive(world: World) -> None:
    await world.encryption.require()
    world.lacking = True
    await world.encryption.rotate()
    assert [k.generation for k in world.keys.records()] == [2]


@pytest.mark.parametrize("flipped", [False, True])
async def test_a_change_that_a_restart_broke_off_is_brought_to_its_end(
    world: World, flipped: bool
) -> None:
    await world.encryption.require()
    world.keys.begin()
    if flipped:
        world.keys.flip()
    world.steps.clear()
    await world.encryption.rotate()
    assert [k.generation for k in world.keys.records()] == [2]
    assert (("say", 1, 2) in world.steps) is not flipped
    assert world.steps[-1] == ("say", 2)


async def test_it_is_changed_by_itself_when_its_time_has_come(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "RETRY", 0.001)
    await world.encryption.require()
    world.encryption.start()
    await asyncio.sleep(0.02)
    assert [k.generation for k in world.keys.records()] == [1]
    world.now += 3600 * (1 + encryption.SPREAD)
    while "encryption.rotated" not in world.notices:
        await asyncio.sleep(0.001)
    await world.encryption.stop()
    assert world.keys.records()[0].generation == 2


async def test_what_somebody_changes_is_not_changed_again_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "RETRY", 0.001)
    await world.encryption.require()
    world.encryption.start()
    world.held = {PEER.public: 0.0}
    rotating = asyncio.create_task(world.encryption.rotate())
    looked, clock = 0, world.encryption._due_in

    def due_in() -> float:
        nonlocal looked
        looked += 1
        return clock()

    monkeypatch.setattr(world.encryption, "_due_in", due_in)
    while not (looked and world.asked):
        await asyncio.sleep(0.001)
    world.held = {PEER.public: 5.0}
    await rotating
    seen = looked
    while looked < seen + 3:  # it has looked since
        await asyncio.sleep(0.001)
    await world.encryption.stop()
    assert world.notices.count("encryption.rotated") == 1
    assert [k.generation for k in world.keys.records()] == [2]


async def test_a_host_without_wireguard_is_looked_at_anew_each_time(world: World) -> None:
    world.here = False
    with pytest.raises(Unsupported, match="there is no WireGuard"):
        await world.encryption.require()
    assert world.node.nodes[ME].wireguard == () and world.keys.records() == ()
    world.here = True
    await world.encryption.require()
    assert [k.generation for k in world.node.nodes[ME].wireguard] == [1]


async def test_who_has_no_key_is_told_once_and_shown(world: World) -> None:
    await world.encryption.require()
    world.encryption.start()
    network = world.node.create_network(
        parse_network("web", subnets=["10.1.0.0/24"], encrypted=True)
    )
    held = Endpoint("e" * 16, network.id, "far", b"\2\0\0\0\0\1", (bytes([10, 1, 0, 9]),))
    world.told(f"n/{OTHER}", host(OTHER))
    world.told(f"e/{held.id}", held)
    assert without_key(world.node, network.id) == [OTHER]
    assert "encryption.no_key" not in world.notices, "of no concern here yet"
    world.node.create_endpoint(network.id, parse_endpoint("near"), "")
    assert world.notices.count("encryption.no_key") == 1
    world.node.create_endpoint(network.id, parse_endpoint("near2"), "")
    assert world.notices.count("encryption.no_key") == 1
    world.told(f"n/{OTHER}", host(OTHER, PEER))
    assert without_key(world.node, network.id) == []
    world.told(f"n/{OTHER}", host(OTHER))
    assert world.notices.count("encryption.no_key") == 2
    await world.encryption.stop()


async def test_who_states_anothers_key_is_named_once(world: World) -> None:
    world.encryption.start()
    try:
        world.told(f"n/{OTHER}", host(OTHER, PEER))
        assert "encryption.key_disputed" not in world.notices
        for disputed in ({(OTHER, ME)}, set(), {(OTHER, ME)}):  # on and off
            world.disputed = disputed
            world.told(f"n/{OTHER}", host(OTHER, PEER))
        assert world.notices.count("encryption.key_disputed") == 1
    finally:
        await world.encryption.stop()
