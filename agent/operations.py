"""What callers ask for, from beginning to end: check, change the node, see it in the kernel.

Each either does the whole of it or leaves nothing behind. api/ translates requests into these
calls; the Docker plugin makes the same ones. Here are those about networks and endpoints.
What stands opposite: sandboxops.py (those about sandboxes), completion.py (how each ends).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Sequence

from agent.allocator import with_space
from agent.errors import Unsupported
from agent.interfaceops import check_not_lent
from agent.model import HANDED_OUT, Endpoint, Network, plugin_of
from agent.requests import EndpointSpec, NetworkSpec, parse_lines
from agent.sandboxops import SandboxOperations

CHUNK = 2000  # endpoints a turn of the loop when there are many: some 10 ms of work
COMMIT = 1000  # to be made known in one turn: as many as a peer is sent in one message
FIRST = 250  # before those: peers are at work the sooner


class Operations(SandboxOperations):
    """Every changing call of this node that is not about a service."""

    # -- networks --

    async def create_network(self, spec: NetworkSpec, wait: float = 0.0) -> Network:
        """Make a network."""
        await self.check_encryption(spec.encrypted, f"network {spec.name}")
        if spec.ipam and self.ipam:
            id = self.node.new_network_id()
            async with self.ipam.pools(spec, id) as own:
                network = await self._make_network(own, id)
        else:
            network = await self._make_network(spec)
        await self.done(wait, [network.id])
        return network

    async def _make_network(self, spec: NetworkSpec, id: str = "") -> Network:
        network = self.node.create_network(spec, id)
        if self.remote and plugin_of(network):
            try:
                await self.remote.ensure_network(network)
            except BaseException:
                self.node.remove_network(network.id)
                raise
        return network

    async def remove_networks(self, refs: Sequence[str], wait: float = 0.0) -> list[str]:
        """Remove networks; those that can go are gone even if a later one raises."""
        ids = [self.node.find_network(ref).id for ref in refs]
        for id in ids:
            self.node.remove_network(id)
        if self.remote:
            await self.remote.settle()
        await self.done(wait, ids)
        return ids

    async def prune_networks(self, wait: float = 0.0) -> list[str]:
        """Remove the networks that have no endpoint on any node, and no service."""
        members, services = self.node.members, self.node.services
        unused = [
            n.id
            for n in self.node.catalogue.all()
            if (n.id not in members or not members[n.id].all) and not services.of(n.id)
        ]
        return await self.remove_networks(unused, wait)

    # -- endpoints --

    async def create_endpoint(
        self,
        network: str,
        spec: EndpointSpec,
        netns: str = "",
        ifname: str = "",
        wait: float = 0.0,
        sandbox: str = "",
    ) -> Endpoint:
        """Make an endpoint; with `netns` (name or path), an interface in that namespace, with
        `sandbox` (name, id or prefix) in one that is there."""
        found = self.node.find_network(network)
        await self.check_encryption(found.encrypted, f"network {network}")
        if sandbox:
            endpoint = await self.connect(sandbox, found, spec, ifname)
            await self.done(wait, [found.id])
            return endpoint
        if not netns:
            endpoint = await self.allocate(found.id, spec, "")
            await self.done(wait, [found.id])
            return endpoint
        endpoint = await self.attach(self.sandbox_at(netns, spec.name), found, spec, ifname)
        await self.done(wait, [found.id])
        return endpoint

    async def announce(self, network: str, pieces: AsyncIterator[bytes], wait: float = 0.0) -> int:
        """Make endpoints of existing interfaces, all of them or none; how many.

        `pieces` are JSON lines, cut anywhere. What has come is checked and reserved while the
        rest is on its way, so an error may come before the end.
        """
        found = self.node.find_network(network)
        await self.check_encryption(found.encrypted, f"network {network}")
        if found.ipam:
            raise Unsupported(
                f"network {network}",
                f"has addresses that plugin {found.ipam.plugin} gives out, one by one",
                "Make these endpoints with 'vxmesh endpoint create'",
            )
        reserved: list[Endpoint] = []
        number = 1  # of the next line
        try:
            async for lines in _whole_lines(pieces):
                for start in range(0, len(lines), CHUNK):
                    part = lines[start : start + CHUNK]
                    specs = parse_lines(part, number)
                    number += len(part)
                    reserve = functools.partial(self.node.reserve, found.id, specs)
                    reserved += await with_space(self.node, self._cluster, reserve)
                    await asyncio.sleep(0)
        except BaseException:
            self.node.cancel(reserved)
            raise
        # Shielded: a caller who goes away now leaves all of them known, not some.
        await asyncio.shield(asyncio.ensure_future(self._commit(reserved)))
        await self.done(wait, [found.id])
        return len(reserved)

    async def _commit(self, reserved: Sequence[Endpoint]) -> None:
        cuts = [0, *range(FIRST, len(reserved), COMMIT), len(reserved)]
        for start, end in itertools.pairwise(cuts if reserved else ()):
            self.node.commit(reserved[start:end])
            if start == 0:
                # Peers are to be at work on the first while we are at the rest. If the disk
                # fails, `done` will say so.
                with contextlib.suppress(Exception):
                    await self._durable()
            await asyncio.sleep(0)

    async def remove_endpoints(
        self,
        refs: Sequence[str],
        network: str = "",
        wait: float = 0.0,
        every: bool = False,
        *,
        by_user: bool = False,
    ) -> list[str]:
        """Remove endpoints of this node by name, id or prefix; with `every`, all in a network.

        InUse if a user names one that a Docker engine has, which would not know of it; then
        none is removed.
        """
        if every:
            found = self.node.find_network(network).id
            members = self.node.members.get(found)
            local = list(members.local) if members else []
            ids = [id for id in local if self.node.is_committed(id)]
            for holder in self.holders(ids) if by_user else ():
                check_not_lent(self.node.sandboxes[holder])
        else:
            ids = []
            for ref in refs:
                endpoint = self.node.find_endpoint(ref, network)[1].endpoint
                sandbox = self.node.sandboxes.get(endpoint.sandbox)
                if by_user and sandbox:
                    check_not_lent(sandbox)
                ids.append(endpoint.id)
                await asyncio.sleep(0)  # a prefix is looked for among all
        networks = list(dict.fromkeys(self.node.network_of(id) for id in ids))
        # An engine takes an interface that it was handed out away by itself, and has no use for
        # waiting until a network's last one has taken the network's devices along (0.1 s).
        sandboxes = self.node.sandboxes
        holders = [id for id in self.holders(ids) if sandboxes[id].netns != HANDED_OUT]
        await asyncio.shield(asyncio.ensure_future(self._remove(ids)))
        if holders:
            await self.follow(holders)
        await self.done(wait, networks)
        return ids

    async def _remove(self, ids: Sequence[str]) -> None:
        try:
            for start in range(0, len(ids), CHUNK):
                self.node.remove_endpoints(ids[start : start + CHUNK])
                await asyncio.sleep(0)
        finally:
            self.shrink({id for id in ids if not self.node.network_of(id)})


async def _whole_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The lines of a text that comes in pieces, cut anywhere, as soon as they are whole."""
    rest: list[bytes] = []  # of a line whose end has not come
    async for piece in pieces:
        first, *lines = piece.split(b"\n")
        rest.append(first)
        if lines:
            lines.insert(0, b"".join(rest))
            rest = [lines.pop()]
            yield lines
    yield [b"".join(rest)]
