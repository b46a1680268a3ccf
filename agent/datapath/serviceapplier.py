"""Services of one host in the kernel: the rules and the programs that balance them, the ways back
that sandboxes need, and the end of connections to what has gone.

What stands opposite: applier.py, which says when; balancer.py, socketbalancer.py, waysback.py,
connections.py and ledsockets.py know how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from agent.datapath.backlog import Attempt
from agent.datapath.balancer import Balancer, Publication
from agent.datapath.connections import Connections
from agent.datapath.ledsockets import LedSockets
from agent.datapath.networks import Networks
from agent.datapath.rowapplier import RowApplier
from agent.datapath.socketbalancer import SocketBalancer
from agent.datapath.tallies import Tallies
from agent.datapath.waysback import WaysBack
from agent.drivers.balancing import FrontendKey
from agent.drivers.base import DesiredState


class ServiceApplier:
    """Those of one host."""

    def __init__(
        self,
        desired: DesiredState,
        networks: Networks,
        rows: RowApplier,
        attempt: Attempt,
        netns: Path,
        host_netns: str,
        at_sockets: bool,
    ) -> None:
        """`netns` and `host_netns` are the paths of our namespace and the host's; `attempt` notes
        what fails; `at_sockets` whether services are balanced at connect(2) where that can be."""
        self._desired, self._networks, self._rows = desired, networks, rows
        self._attempt = attempt
        self.opened: set[Publication] = set()  # published ports, since the rules were loaded
        self.are_rules_stale = False  # whether the host's rules lead there
        with contextlib.ExitStack() as stack:
            self.balancer = stack.enter_context(contextlib.closing(Balancer(netns)))
            self.sockets = SocketBalancer(networks.held, at_sockets)
            stack.callback(self.sockets.close)
            self.tallies = Tallies(self.balancer, self.sockets)
            self.connections = Connections(netns, host_netns)
            led = LedSockets(networks.held, self.balancer.ways)
            self._led = stack.enter_context(contextlib.closing(led))
            self.ways_back = WaysBack(networks.held, attempt)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close. What the rules balance goes on; the programs end, and all goes by the rules."""
        self._stack.close()

    async def apply(self, keys: Collection[FrontendKey] | None) -> None:
        """Services as the frontends of these keys say, or as all there are; and the ways back.
        VxmeshError, OSError."""
        held = self._networks.held
        local = frozenset(e for each in held.values() for e in each.ports)
        try:
            if keys is None:
                outcome = await self.balancer.load(self._desired.frontends(), local)
            else:
                changes = {key: self._desired.frontend(key) for key in keys}
                outcome = await self.balancer.alter(changes, local)
        finally:
            altered, self.balancer.altered = self.balancer.altered, set()
            at_sockets = self.sockets.alter(
                self.balancer.placed, self.balancer.networks, None if keys is None else altered
            )
            await self._attempt(("sockets", 0, ""), at_sockets)
        self.are_rules_stale |= outcome.published
        self.opened |= outcome.opened
        for vni in outcome.networks & held.keys():
            await self._attempt(("rows", vni, ""), self._rows.all(vni))
        for vni in outcome.vips.keys() - outcome.networks:
            rows = self._rows.write(vni, [], outcome.vips[vni])
            await self._attempt(("rows", vni, ""), rows, whole=False)
        await self.ways_back.furnish(self.balancer.networks)
        if outcome.gone:
            self._led.end(outcome.gone)
            await self.connections.end(outcome.gone)
        if keys is None and self._desired.complete():
            ways = self.balancer.ways()
            await self.connections.end_others(ways)
            await self._led.end_others(ways)
