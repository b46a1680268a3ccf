"""Our namespace goes while no agent runs: a new one is made, and everything comes up again."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.syscalls import socket_in
from tests.netns.datapath_hosts import Fabric, Sandbox, opened, paired, pings, run, until

pytestmark = pytest.mark.netns

Pair = tuple[Fabric, Sandbox, Sandbox]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with opened(tmp_path) as made:
        yield await paired(made)


def cookie(netns: Path) -> int:
    """What tells a namespace from all others there ever were, as an inode does not."""
    with socket_in(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        told = sock.getsockopt(socket.SOL_SOCKET, 71, 8)  # SO_NETNS_COOKIE
    return int.from_bytes(told, sys.byteorder)


@pytest.mark.parametrize("held", [False, True], ids=["held by nobody", "held by a socket"])
@pytest.mark.parametrize("leave_file", [False, True], ids=["deleted", "unmounted"])
async def test_a_namespace_lost_while_no_agent_ran_is_made_anew(
    pair: Pair, held: bool, leave_file: bool
) -> None:
    """What the name server has open keeps the old one alive, its VXLAN device and ports too."""
    fabric, near, far = pair
    a = fabric.a
    rows = a.fdb(7), a.neighbours(7)
    old = cookie(a.own)
    keeper = socket_in(a.own, socket.AF_INET, socket.SOCK_DGRAM) if held else None
    await a.reconciler.stop()
    run("umount", "--lazy", str(a.own))
    if not leave_file:
        a.own.unlink()
    kernel = a.make()
    await kernel.start()
    if keeper:
        # Its end, as the agent has it end: until then the VNI and the sandbox's eth0 are taken.
        assert kernel.failures()
        keeper.close()
    await until(lambda: not kernel.failures() and len(a.links()) == 5, "all is made again")
    await kernel.settle()
    assert cookie(a.own) != old
    assert (a.fdb(7), a.neighbours(7)) == rows
    good = [(near.path, "10.7.0.3"), (far.path, "fd00:7::2"), (near.path, "10.98.0.9")]
    await until(lambda: all(pings(*good, (a.path, "10.7.0.2"), wait=0.3)), "traffic passes again")
    assert not a.gone
