"""Which connections are ended of those that were led at the socket, and when."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from typing import Any
from unittest.mock import Mock

import pytest

from agent.datapath import ledsockets
from agent.datapath.balancer import Way
from agent.datapath.ledsockets import LedSockets
from agent.datapath.sockdiag import Socket
from agent.datapath.socketmaps import mark
from agent.model import parse_address

VIP, OTHER = parse_address("10.1.0.100"), parse_address("10.1.0.101")
ONE, TWO = parse_address("10.1.0.2"), parse_address("10.1.0.3")
CLIENT = parse_address("10.1.0.9")
MAPPED = bytes(10) + b"\xff\xff"
GONE = Way("tcp", VIP, 80, ONE, 8080)


def led(vip: bytes = VIP, backend: bytes = ONE, port: int = 8080, source: bytes = CLIENT) -> Socket:
    family = socket.AF_INET if len(backend) == 4 else socket.AF_INET6
    return Socket(family, mark(vip, 80), source, 40000, backend, port, b"")


SOCKETS = {
    "gone": led(),
    "mapped": led(backend=MAPPED + ONE, source=MAPPED + CLIENT),
    "by another VIP": led(vip=OTHER),
    "elsewhere": led(backend=TWO),
    "another port": led(port=8081),
    "itself": led(backend=ONE, port=40001, source=ONE),
}


class Kernel:
    """Sandboxes whose sockets are SOCKETS."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: list[set[str]] = []
        self.changed = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        monkeypatch.setattr(ledsockets, "_end_in", self.end)

    def end(self, ports: Collection[Any], ends: Callable[[Socket], bool]) -> int:
        self.looks.append({name for name, one in SOCKETS.items() if ends(one)})
        self.loop.call_soon_threadsafe(self.changed.set)
        return len(self.looks[-1])

    async def looked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.looks) < times:
                self.changed.clear()
                await self.changed.wait()


def sandboxes() -> Any:
    inside = Mock(netns="/n", inode=1)
    bridge = Mock(subnets=("10.1.0.0/24",))
    return {7: Mock(bridge=bridge, ports={"e": (Mock(inside=inside), 1)})}


@pytest.fixture
async def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


async def test_what_goes_is_ended_at_once_and_looked_for_once_more(kernel: Kernel) -> None:
    mine = LedSockets(sandboxes(), lambda vips: ())
    mine.end([GONE, Way("udp", VIP, 80, TWO, 8080)])
    await kernel.looked(2)
    assert kernel.looks == [{"gone", "mapped"}] * 2
    mine.end([Way("udp", VIP, 80, TWO, 8080)])
    mine.end([Way("tcp", parse_address("10.2.0.100"), 80, TWO, 8080)])  # of no network here
    mine.end([GONE])
    await kernel.looked(4)
    mine.close()


async def test_what_is_back_before_the_look_is_left_alone(kernel: Kernel) -> None:
    back: list[Way] = []
    mine = LedSockets(sandboxes(), lambda vips: back)
    mine.end([GONE, Way("tcp", VIP, 80, TWO, 8080)])
    back.append(GONE)
    await kernel.looked(1)
    assert kernel.looks[0] == {"elsewhere"}
    mine.close()


async def test_at_a_start_all_is_ended_that_goes_by_no_way_there_is(kernel: Kernel) -> None:
    mine = LedSockets(sandboxes(), lambda vips: ())
    await mine.end_others([GONE, Way("tcp", OTHER, 80, ONE, 8080)])
    assert kernel.looks == [{"elsewhere", "another port"}]
    await mine.end_others([])
    assert kernel.looks[1] == set(SOCKETS) - {"itself"}
