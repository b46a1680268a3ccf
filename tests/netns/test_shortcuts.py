"""Shortcuts past the bridge, on the real kernel: what goes there, and what must not.

Which way TCP went is told by a rule of the test's own at the bridge, which counts what passes.
That all else works beside them, every other test of this folder tells: they are on in all of them.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from agent.datapath.shortcuts import Shortcuts
from agent.syscalls import in_netns
from tests.netns.datapath_hosts import (
    DEADLINE,
    Fabric,
    Host,
    Sandbox,
    opened,
    paired,
    restart,
    run,
    until,
)

COUNTING = """
table bridge watch {
	counter outwards { }
	counter inwards { }
	chain forward {
		type filter hook forward priority 0; policy accept;
		meta l4proto tcp iifname "vxp*" counter name outwards
		meta l4proto tcp iifname "vxl*" counter name inwards
	}
}
"""


class Bridged(NamedTuple):
    """Frames of TCP that went over the bridge."""

    outwards: int
    inwards: int


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


def shortcuts(host: Host) -> Shortcuts:
    applier = host.reconciler._applier
    assert applier and applier.shortcuts.is_on, "this kernel has what it takes"
    return applier.shortcuts


async def ready(*hosts: Host) -> None:
    """All that is to be is there, the shortcuts too."""
    for host in hosts:
        await host.reconciler.settle()
        await until(lambda host=host: not shortcuts(host).is_due, "the programs are attached")


def bridged(host: Host) -> Bridged:
    """Since the first call."""
    if "watch" not in host.inside("nft", "list", "tables"):
        run("nft", "-f", "-", netns=host.own, text=COUNTING)
    listed = host.inside("nft", "list", "table", "bridge", "watch")
    return Bridged(*map(int, re.findall(r"packets (\d+)", listed)))


async def talk(near: Sandbox, far: Sandbox, address: str, size: int = 1 << 20) -> None:
    """`size` bytes from one sandbox to another, at `address`, and back. OSError if they cannot."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def listen() -> socket.socket:
        return socket.create_server((address, 0), family=family)

    def connect() -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)

    async def answer() -> None:
        connection, _ = await loop.sock_accept(listening)
        with connection:
            left = size
            while left:
                data = await loop.sock_recv(connection, 1 << 16)
                assert data, "the client has ended"
                left -= len(data)
                await loop.sock_sendall(connection, data)

    async def ask(client: socket.socket) -> None:
        await loop.sock_connect(client, (address, port))
        await asyncio.gather(loop.sock_sendall(client, bytes(size)), take(client))

    async def take(client: socket.socket) -> None:
        left = size
        while left:
            data = await loop.sock_recv(client, 1 << 16)
            assert data, "the server has ended"
            left -= len(data)

    loop = asyncio.get_running_loop()
    with in_netns(far.path, listen) as listening, in_netns(near.path, connect) as client:
        port = listening.getsockname()[1]
        listening.setblocking(False)
        client.setblocking(False)
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(answer(), ask(client))


@pytest.mark.parametrize("address", ["10.7.0.3", "fd00:7::3"])
async def test_tcp_between_hosts_goes_past_the_bridge(fabric: Fabric, address: str) -> None:
    _, near, far = await paired(fabric)
    await ready(*fabric.hosts)
    before = [bridged(host) for host in fabric.hosts]
    await talk(near, far, address)
    assert [bridged(host) for host in fabric.hosts] == before


async def test_it_goes_by_the_bridge_without_an_agent_and_when_it_is_told_to(
    fabric: Fabric,
) -> None:
    _, near, far = await paired(fabric)
    await ready(*fabric.hosts)
    a, b = fabric.hosts
    await b.reconciler.stop()
    before = bridged(b)
    await talk(near, far, "10.7.0.3")
    assert all(now > then for now, then in zip(bridged(b), before, strict=True))
    await b.make(has_shortcuts=False).start()
    before = bridged(b)
    await talk(near, far, "10.7.0.3")
    assert all(now > then for now, then in zip(bridged(b), before, strict=True))
    await restart(b)
    await ready(b)
    before = bridged(a), bridged(b)
    await talk(near, far, "10.7.0.3")
    assert (bridged(a), bridged(b)) == before
