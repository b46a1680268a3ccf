"""Frames between two nodes by a device of the test's, reports by real datagrams on loopback."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from agent.cluster import tunnelprober
from agent.cluster.pathwire import FRAME, build
from agent.cluster.tunnelprober import TunnelProber
from agent.core import tunnels
from agent.core.tunnels import Tunnel, Turn
from tests.unit.cluster.test_pathprober import HOSTS, KEY, ONE, TWO, Pair, until

Taken = Callable[[bytes, bool], None]


class Device:
    """Hands frames over to the other's; `right`: what becomes of those that are offloaded."""

    def __init__(self, devices: dict[str, Device], taken: Taken) -> None:
        self._devices, self._taken = devices, taken
        self.is_open = False
        self.failures = 0  # of the next attempts to open it
        self.right: bool | None = True  # None: they are lost
        self.frames: list[bytes] = []

    async def open(self, vtep: str, port: int) -> None:
        if self.failures:
            self.failures -= 1
            raise FileExistsError(17, "taken")
        self._devices[vtep] = self
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    async def send(self, vtep: str, data: bytes, offloaded: bool) -> None:
        self.frames.append(data)
        if vtep in self._devices and (self.right is not None or not offloaded):
            self._devices[vtep].take(data, bool(self.right) or not offloaded)

    def take(self, data: bytes, is_right: bool) -> None:
        self._taken(data, is_right)


class World:
    def __init__(self) -> None:
        self.pair = Pair()
        self.turns: list[Turn] = []
        self.devices: dict[str, Device] = {}
        self.device = {id: Device(self.devices, self.pair.probers[id].take_frame) for id in HOSTS}
        self.probers = {
            id: TunnelProber(self.pair.nodes[id], self.pair.probers[id], 3600.0, self.note)
            for id in HOSTS
        }

    async def note(self, turns: list[Turn]) -> None:
        self.turns += turns


@asynccontextmanager
async def started(prepare: Callable[[World], None] = lambda world: None) -> AsyncIterator[World]:
    world = World()
    prepare(world)
    for id in HOSTS:
        await world.pair.probers[id].start()
        world.probers[id].start(world.device[id])
    try:
        yield world
    finally:
        for id in HOSTS:
            await world.probers[id].stop()
            await world.pair.probers[id].stop()
        assert not any(device.is_open for device in world.device.values())


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "GAP", 0.01)
    monkeypatch.setattr(tunnels, "LAST", 0.2)
    monkeypatch.setattr(tunnels, "PACE", 1000.0)
    monkeypatch.setattr(tunnelprober, "AGAIN_SOON", 0.01)


async def test_frames_that_come_right_are_sound_both_ways() -> None:
    async with started() as world:
        await until(lambda: len(world.turns) == 2)
        assert {turn.after for turn in world.turns} == {Tunnel.SOUND}
        assert world.probers[ONE].states() == {TWO: Tunnel.SOUND}


@pytest.mark.parametrize("right", [False, None])
async def test_what_the_device_breaks_is_told_by_the_sender(right: bool | None) -> None:
    def prepare(world: World) -> None:
        world.device[ONE].right = right

    async with started(prepare) as world:
        await until(lambda: len(world.turns) == 2)
        assert world.probers[ONE].states() == {TWO: Tunnel.CHECKSUMS}
        assert world.probers[TWO].states() == {ONE: Tunnel.SOUND}
        world.device[ONE].right = True
        world.probers[ONE].hasten()
        await until(lambda: world.probers[ONE].states() == {TWO: Tunnel.SOUND})


async def test_a_way_that_is_closed() -> None:
    def prepare(world: World) -> None:
        world.device[TWO].take = lambda data, is_right: None  # type: ignore[method-assign]

    async with started(prepare) as world:
        await until(lambda: world.probers[ONE].states() == {TWO: Tunnel.BLOCKED})


async def test_who_cannot_take_frames_is_sent_none_until_it_can() -> None:
    def prepare(world: World) -> None:
        world.device[TWO].failures = 3

    async with started(prepare) as world:
        await until(lambda: world.device[TWO].is_open)
        await until(lambda: world.pair.probers[ONE].measures()[TWO].mtu == 1500)
        world.pair.probers[ONE].hasten()
        await until(lambda: world.probers[ONE].states() == {TWO: Tunnel.SOUND})


async def test_frames_of_strangers_are_not_reported() -> None:
    async with started() as world:
        await until(lambda: len(world.turns) == 2)
        prober, sent = world.pair.probers[ONE], []
        prober._reply = lambda *args: sent.append(args)  # type: ignore[method-assign]
        good = prober._keys.key(TWO)
        assert good is not None
        rng = random.Random(1)
        for data in (
            build(FRAME, 2, 0, TWO, KEY, 4),
            build(FRAME, 2, 0, "3" * 16, good, 4),
            build(FRAME, 2, 0, ONE, good, 4),
            b"",
            rng.randbytes(200),
        ):
            prober.take_frame(data, True)
        assert sent == []
        prober.take_frame(build(FRAME, 2, 0, TWO, good, 4), True)
        assert len(sent) == 1


@pytest.mark.parametrize("where", ["open", "send"])
async def test_after_what_nobody_expected_it_goes_on(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnelprober, "AFTER_FAULT", 0.01)
    faults: list[str] = []

    def prepare(world: World) -> None:
        device = world.device[ONE]
        real = getattr(device, where)

        async def once(*args: object) -> None:
            if not faults:
                faults.append(where)
                raise ValueError("nobody expected this")
            await real(*args)

        monkeypatch.setattr(device, where, once)

    async with started(prepare) as world:
        await until(lambda: faults and world.device[ONE].is_open)
        await until(lambda: world.pair.probers[ONE].measures()[TWO].mtu == 1500)
        world.pair.probers[ONE].hasten()
        world.probers[ONE].hasten()
        await until(lambda: world.probers[ONE].states() == {TWO: Tunnel.SOUND})
