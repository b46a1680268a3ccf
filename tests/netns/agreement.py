"""What every host should have in its kernel and answer to, computed from what lives where.

The truth is asked of each endpoint's own host; all that any host's kernel and name server say
is held against it. What stands opposite: world.py, which looks at one host at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from agent.client import Client
from agent.rpc import types_pb2 as types
from tests.netns.world import Failed, World


class Agreement:
    """One network of a testbed. Every host is to have an endpoint in it."""

    def __init__(self, world: World, network: str) -> None:
        self.world = world
        self.network = network
        self.vni = world.vni(network)

    def living(self) -> dict[str, list[types.Endpoint]]:
        """Host -> the endpoints that it says live there."""
        return asyncio.run(self._living())

    async def _living(self) -> dict[str, list[types.Endpoint]]:
        found = {}
        for host in self.world.bed.hosts:
            async with Client(host.target) as client:
                found[host.name] = await client.endpoints(self.network, host.name)
        return found

    def differences(self, group: Sequence[str] = ()) -> list[str]:
        """What is not as it should be on the hosts of `group` if only they are there."""
        hosts = [h for h in self.world.bed.hosts if not group or h.name in group]
        living = {name: e for name, e in self.living().items() if not group or name in group}
        wrong = []
        for host in hosts:
            away = {
                e.mac: (self.world.host(name).address, e.addresses[0])
                for name, endpoints in living.items()
                for e in endpoints
                if name != host.name
            }
            fdb = {mac: vtep for mac, (vtep, _) in away.items()}
            if (have := self.world.fdb(host.name, self.vni)) != fdb:
                wrong.append(f"{host.name}: FDB {sorted(have.items() ^ fdb.items())}")
            rows = {address: mac for mac, (_, address) in away.items()}
            if (have := self.world.neighbours(host.name, self.vni)) != rows:
                wrong.append(f"{host.name}: neighbours {sorted(have.items() ^ rows.items())}")
        return wrong + asyncio.run(self._names([h.name for h in hosts], living))

    async def _names(
        self, hosts: Sequence[str], living: dict[str, list[types.Endpoint]]
    ) -> list[str]:
        everything = {
            e.name: set(e.addresses) for found in (await self._living()).values() for e in found
        }
        there = {e.name for endpoints in living.values() for e in endpoints}
        wrong = []
        async with contextlib.AsyncExitStack() as stack:
            for name in hosts:
                client = await stack.enter_async_context(Client(self.world.host(name).target))
                for endpoint, addresses in everything.items():
                    reply = await client.resolve(endpoint, "A", self.network)
                    wanted = addresses if endpoint in there else set()
                    if (have := {r.data for r in reply.records}) != wanted:
                        wrong.append(f"{name}: {endpoint} is {have}, not {wanted}")
        return wrong

    def wait(self, group: Sequence[str] = (), seconds: float = 60.0) -> float:
        """Wait until there is no difference; how long it took, in seconds."""
        begin = time.monotonic()
        while wrong := self.differences(group):
            if time.monotonic() - begin > seconds:
                raise Failed(f"not within {seconds:g} s: {wrong}\n{self.world._picture()}")
            time.sleep(0.02)
        return time.monotonic() - begin
