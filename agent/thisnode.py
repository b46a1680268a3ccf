"""What this node tells of itself and its host's underlay, and what it does when that changes.

The record that the others have of this node rests on the host: its address, its routes, its MTU,
the ports that are for operators. A cable that is back is no change of it, but a reason to hurry.
What stands opposite: daemon.py, which starts these; datapath/underlay.py and carrier.py read the
kernel; subnets and MTUs of networks rest on what is told (allocator.py, drivers/).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
import structlog

from agent import __version__, restart
from agent.config import Settings, default_address, parse_listen
from agent.datapath.carrier import CarrierMonitor
from agent.datapath.underlay import describe, forget_unresolved
from agent.errors import VxmeshError
from agent.model import Node, WireguardKey
from agent.node import NodeState

log = structlog.get_logger()

UNDERLAY_INTERVAL = 10.0  # s; routes and the MTU of the host change seldom, and cost 2 ms to read
INCARNATIONS_A_LIFE = 1 << 20  # room for refutations, which are not written down


async def describe_node(
    settings: Settings, life: restart.Life, wireguard: tuple[WireguardKey, ...] = ()
) -> Node:
    """This node's record, as it is at the start of a life."""
    address = settings.advertise or default_address()
    underlay = await describe(address)
    return Node(
        id=life.node,
        name=settings.name,
        address=address,
        port=settings.port,
        vtep=address,
        data_port=settings.data_port,
        version=__version__,
        since=time.time(),
        mtu=underlay.mtu,
        routes=underlay.routes,
        incarnation=life.incarnation * INCARNATIONS_A_LIFE,
        wireguard=wireguard,
        closed=_closed(settings),
    )


def _closed(settings: Settings) -> tuple[int, ...]:
    """The TCP ports, besides that for peers, that are for operators and not for sandboxes."""
    listens = {"metrics_listen": settings.metrics_listen, "control_listen": settings.control_listen}
    return tuple(sorted({parse_listen(text, name)[1] for name, text in listens.items() if text}))


async def watch_underlay(node: NodeState, changed: Callable[[], None]) -> None:
    """Tell the others when this host's routes or MTU change: subnets and MTUs rest on them; and
    call `changed`, as packets may take another way now."""
    while True:
        await asyncio.sleep(UNDERLAY_INTERVAL)
        try:
            underlay = await describe(node.nodes[node.me].vtep)
        except (OSError, VxmeshError) as error:
            log.warning("underlay.unreadable", error=str(error))
            continue
        known = node.nodes[node.me]
        if (underlay.mtu, underlay.routes) != (known.mtu, known.routes):
            log.info("underlay.changed", mtu=underlay.mtu, routes=len(underlay.routes))
            node.describe(msgspec.structs.replace(known, mtu=underlay.mtu, routes=underlay.routes))
            changed()


class Carrier:
    """Makes haste when a cable is back: the kernel's timers and ours have backed off."""

    def __init__(self, node: NodeState, redial: Callable[[], None]) -> None:
        self._node, self._redial = node, redial
        self._monitor = CarrierMonitor("/proc/self/ns/net", self._up)
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Stop listening."""
        self._monitor.close()
        if self._task:
            self._task.cancel()

    def _up(self) -> None:
        self._task = asyncio.create_task(self._make_haste())

    async def _make_haste(self) -> None:
        addresses = {n.address for n in self._node.nodes.values()}
        addresses |= {n.vtep for n in self._node.nodes.values()}
        try:
            await forget_unresolved(addresses)
        except OSError as error:
            log.warning("underlay.unreadable", error=str(error))
        self._redial()
