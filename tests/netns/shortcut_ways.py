"""Which way TCP goes, past the bridge or by it: for tests of shortcuts.

A rule of the test's own at the bridge counts what passes there.
What stands opposite: test_shortcuts.py, test_shortcut_failures.py.
"""

from __future__ import annotations

import asyncio
import re
import socket
from typing import NamedTuple

from agent.datapath.shortcuts import Shortcuts
from agent.syscalls import in_netns
from tests.netns.datapath_hosts import (
    DEADLINE,
    Fabric,
    Host,
    Sandbox,
    run,
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


def shortcuts(host: Host) -> Shortcuts:
    applier = host.reconciler._applier
    assert applier and applier.shortcuts.is_on, "this kernel has what it takes"
    return applier.shortcuts


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


async def past(fabric: Fabric, near: Sandbox, far: Sandbox, address: str) -> list[bool]:
    """Whether what a, where `near` is, and b send and take goes past their bridges."""
    before = [count for host in fabric.hosts for count in bridged(host)]
    await talk(near, far, address)
    after = [count for host in fabric.hosts for count in bridged(host)]
    return [now == then for then, now in zip(before, after, strict=True)]
