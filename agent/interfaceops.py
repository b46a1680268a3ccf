"""Changing calls about a sandbox's interfaces: made, followed by routes and resolver, taken away.

What stands opposite: sandboxops.py (the sandboxes themselves), remote/ (plugins' interfaces),
datapath/sandbox.py (what is in a sandbox).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Collection, Sequence

import msgspec
import structlog

from agent.completion import Completion, RemoteDriver
from agent.core.resolvconf import resolv_conf
from agent.core.waysout import expected, lead, led_by, with_interface, without
from agent.errors import Conflict, InUse, NotFound
from agent.lanmodel import (
    HOST_SIDE,
    NAMES_AT,
    host_side_name,
    is_on_lan,
    parse_lan,
)
from agent.model import HANDED_OUT, Endpoint, Network, Sandbox, plugin_of
from agent.notation import find_overlap
from agent.requests import EndpointSpec
from agent.workload import Namespace, identify, is_alive, tell_resolver

log = structlog.get_logger()

NAMES_WITHIN = 2.0  # s; a sandbox without a name server is better than none


class InterfaceOperations(Completion):
    """Every changing call that is about an interface in a sandbox."""

    def drop_sandbox(self, id: str) -> None:
        """A sandbox is gone: its endpoints, names and ports too. No error if it was already."""
        self.ports.release(id)
        self.node.drop_sandbox(id)
        self.release_host_sides()

    async def connect(
        self, ref: str, network: Network, spec: EndpointSpec, ifname: str = ""
    ) -> Endpoint:
        """Give a sandbox that is there, while its workload runs, an interface more."""
        sandbox = self.node.find_sandbox(ref)
        check_not_lent(sandbox)
        if sandbox.stack:
            raise InUse(
                f"sandbox {sandbox.name}",
                f"is in network {sandbox.stack}, which is for good",
                "Run the command anew with --network",
            )
        endpoint = await self.attach(sandbox, network, spec, ifname)
        await self.follow([sandbox.id])
        if self.node.local_endpoint(endpoint.id) is None:
            raise NotFound(f"sandbox {sandbox.name}", "has ended meanwhile", "Start it again")
        return endpoint

    async def attach(
        self, sandbox: Sandbox, network: Network, spec: EndpointSpec, ifname: str
    ) -> Endpoint:
        """Make an endpoint with an interface in `sandbox`, or leave nothing of it."""
        is_kept = sandbox.id in self.node.sandboxes
        self._check_fits(sandbox, network, ifname)
        self._check_takeover(sandbox, network, spec.priority)
        if self.remote and plugin_of(network):
            return await self._attach_remote(self.remote, sandbox, network, spec, ifname, is_kept)
        endpoint = await self.allocate(network.id, spec, sandbox.id)
        try:
            # Another node may have been asked for the address, which takes time.
            sandbox = self._still(sandbox, is_kept)
            self._check_fits(sandbox, network, ifname, endpoint.id)
            self._check_takeover(sandbox, network, spec.priority)
            taken = set(sandbox.ifnames)
            free = (f"eth{i}" for i in range(len(taken) + 1) if f"eth{i}" not in taken)
            name = ifname or next(free)
            self.node.put_sandbox(with_interface(sandbox, endpoint.id, name, spec.priority))
            await self._kernel.settle(endpoint.id)
            if is_on_lan(network):
                await self._ensure_host_side(network)
                await self._wait_for_names()
        except BaseException:
            if endpoint.id in self.node.members[network.id].local:
                self.node.remove_endpoints([endpoint.id])
            self.shrink({endpoint.id})
            raise
        return endpoint

    async def _ensure_host_side(self, network: Network) -> None:
        """The host's own interface in a network on its wire, where that is asked for.

        It comes with the first workload here and goes with the last one.
        """
        if not parse_lan(network.driver, network.options).has_host_interface:
            return
        async with self._host_sides:
            if self.node.host_side(network.id):
                return
            name = host_side_name(self.node.nodes[self.node.me].name)
            made = await self.allocate(network.id, EndpointSpec(name), HOST_SIDE)
            try:
                await self._kernel.settle(made.id)
            finally:
                # The workload that it is for may have ended meanwhile, and looked in vain for it.
                self.release_host_sides()

    async def _wait_for_names(self) -> None:
        """For the name server to listen in a sandbox that reaches no gateway of ours: what asks
        before is told that nobody does."""
        if self.names_settled:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NAMES_WITHIN):
                    await self.names_settled()

    def release_host_sides(self) -> None:
        """Take away the host's own interfaces in networks without a workload here."""
        for network in self.node.catalogue.all():
            side = self.node.host_side(network.id) if is_on_lan(network) else None
            if side is None:
                continue
            sandboxes = self.node.sandboxes.values()
            used = (self.node.network_of(e) for s in sandboxes for e in s.endpoints)
            if network.id not in used:
                self.node.remove_endpoints([side.id])

    async def _attach_remote(
        self,
        remote: RemoteDriver,
        sandbox: Sandbox,
        network: Network,
        spec: EndpointSpec,
        ifname: str,
        is_kept: bool,
    ) -> Endpoint:
        """The same with an interface of a plugin's: its name there is the plugin's choice."""
        sandbox = self.node.sandboxes.get(sandbox.id) or sandbox
        async with self.addressed(network, spec) as own:
            endpoint, name, gateways = await remote.attach(sandbox, network, own, ifname)
            try:
                # Of two connects at once the second one looks at what the first made.
                sandbox = self._still(sandbox, is_kept)
                self._check_fits(sandbox, network, name, endpoint.id)
                fresh = with_interface(sandbox, endpoint.id, name, spec.priority)
                lent = {**sandbox.lent, endpoint.id: gateways}
                self.node.put_sandbox(msgspec.structs.replace(fresh, lent=lent))
                await self._lead(remote, self.node.sandboxes[sandbox.id], endpoint.id)
            except BaseException:
                if self.node.local_endpoint(endpoint.id):
                    self.node.remove_endpoints([endpoint.id])
                self.shrink({endpoint.id})
                await asyncio.shield(asyncio.ensure_future(self._taken_out(remote, sandbox.id)))
                raise
        return endpoint

    async def _taken_out(self, remote: RemoteDriver, sandbox: str) -> None:
        """Have a sandbox be as it was before a plugin's interface came, which did not stay."""
        await remote.settle()
        await self.follow([sandbox])

    async def _lead(self, remote: RemoteDriver, sandbox: Sandbox, endpoint: str) -> None:
        """Have the default routes go by a plugin's interface, where they are its. OSError."""
        if led := led_by(sandbox, endpoint, sandbox.lent[endpoint]):
            name = sandbox.ifnames[sandbox.endpoints.index(endpoint)]
            await remote.lead_out(sandbox, name, led)

    def _still(self, sandbox: Sandbox, is_kept: bool) -> Sandbox:
        """A sandbox as it is by now; NotFound if it was kept and has ended."""
        if is_kept and sandbox.id not in self.node.sandboxes:
            raise NotFound(f"sandbox {sandbox.name}", "has ended meanwhile", "Start it again")
        return self.node.sandboxes.get(sandbox.id, sandbox)

    def _check_fits(
        self, sandbox: Sandbox, network: Network, ifname: str, besides: str = ""
    ) -> None:
        """Conflict if a sandbox cannot have an interface in `network`; `besides` is that one."""
        if ifname and ifname in sandbox.ifnames:
            raise Conflict(f"interface {ifname}", "exists in that sandbox", "Choose another")
        for id in sandbox.endpoints:
            held = self.node.catalogue.get(self.node.network_of(id))
            if held is None or id == besides:
                continue
            if held.id == network.id:
                raise Conflict(
                    f"sandbox {sandbox.name}",
                    f"is in network {self.node.catalogue.name(network.id)} already",
                    "Use an alias for another name, or remove that endpoint first",
                )
            for subnet in network.subnets:
                clash = find_overlap(
                    ipaddress.ip_network(subnet), [(held.name, s) for s in held.subnets]
                )
                if clash:
                    raise Conflict(
                        f"subnet {subnet} of network {self.node.catalogue.name(network.id)}",
                        f"overlaps that of network {self.node.catalogue.name(held.id)}, in which "
                        f"sandbox {sandbox.name} is",
                        "Use networks whose subnets are apart",
                    )

    def _check_takeover(self, sandbox: Sandbox, network: Network, priority: int) -> None:
        """Conflict if `network` would take the default routes by which the published ports of a
        sandbox are answered, and has no use for them itself."""
        if not sandbox.publishes or not is_on_lan(network):
            return
        ways = self.node.ways_out(sandbox) or []
        for family in (4, 6):
            before = self.node.catalogue.get(self.node.network_of(lead(ways, family)))
            if before is None or is_on_lan(before):
                continue
            if lead([*ways, expected(network, priority)], family) == network.id:
                name = self.node.catalogue.name(network.id)
                raise Conflict(
                    f"sandbox {sandbox.name}",
                    f"has published ports, which would end if network {name} on the hosts' own "
                    "wire had its default routes",
                    "Leave --priority out, or give less than that of the network which has them",
                )

    def holders(self, endpoints: Collection[str]) -> list[str]:
        """The sandboxes (ids) that any of these endpoints is in."""
        wanted = set(endpoints)
        return [
            sandbox.id
            for sandbox in self.node.sandboxes.values()
            if not wanted.isdisjoint(sandbox.endpoints)
        ]

    async def follow(self, sandboxes: Sequence[str]) -> None:
        """Have what runs in sandboxes whose interfaces changed see that: default routes by
        plugins' interfaces, and the name server to ask."""
        await self._kernel.settle()
        for id in sandboxes:
            sandbox = self.node.sandboxes.get(id)
            if sandbox is None or sandbox.netns == HANDED_OUT:
                continue
            if self.remote:
                for endpoint in sandbox.lent:
                    try:
                        await self._lead(self.remote, sandbox, endpoint)
                    except OSError as error:
                        log.warning("sandbox.not_led", sandbox=id, error=str(error))
            if sandbox.pid and not sandbox.stack:
                await self._tell_resolver(id)

    async def _tell_resolver(self, id: str) -> None:
        """Have a sandbox's resolv.conf say what it is to say by now."""
        told = ""
        while (sandbox := self.node.sandboxes.get(id)) and told != self.resolv_conf(sandbox):
            told = self.resolv_conf(sandbox)  # of two calls at once, who ends last looks again
            await asyncio.to_thread(tell_resolver, sandbox.pid, sandbox.start_time, told)

    def resolv_conf(self, sandbox: Sandbox) -> str:
        """What /etc/resolv.conf is to say in a sandbox."""
        networks: list[Network] = []
        for id in () if sandbox.stack else sandbox.endpoints:
            network = self.node.catalogue.get(self.node.network_of(id))
            if network and network not in networks:
                networks.append(network)
        # At a plugin's gateways is no name server of ours.
        ours = (n.gateways for n in networks if not (plugin_of(n) or is_on_lan(n)))
        servers = [*next(ours, ())]
        if any(map(is_on_lan, networks)):
            servers.append(NAMES_AT)
        return resolv_conf(servers, [self.node.catalogue.name(n.id) for n in networks])

    def shrink(self, endpoints: set[str]) -> None:
        """Take endpoints out of their sandboxes; a sandbox of the user's with none left goes."""
        for id in self.holders(endpoints):
            sandbox = without(self.node.sandboxes[id], endpoints)
            if sandbox.endpoints or sandbox.pid:
                self.node.put_sandbox(sandbox)
            else:
                self.drop_sandbox(id)
        self.release_host_sides()

    def sandbox_at(self, netns: str, wanted: str) -> Sandbox:
        """The sandbox of a namespace (name or path); if it has none, a new one, not yet kept."""
        space = identify(netns)
        there = self._sandbox_in(space)
        if there and there.stack:
            raise Conflict(
                f"sandbox {there.name}",
                f"is in network {there.stack}, which is never one of several",
                "Make the endpoint in another sandbox",
            )
        return there or Sandbox(
            id=self._id(),
            name=self._free_name(wanted),
            netns=space.path,
            inode=space.inode,
            pid=0,
            start_time=0,
            created=self.node.clock(),
        )

    def _sandbox_in(self, space: Namespace) -> Sandbox | None:
        for sandbox in self.node.sandboxes.values():
            if sandbox.inode == space.inode and is_alive(sandbox):
                return sandbox
        return None

    def _free_name(self, wanted: str) -> str:
        taken = {s.name for s in self.node.sandboxes.values()}
        if wanted != "sb" and wanted not in taken:
            return wanted
        while (name := f"{wanted[:50]}-{self._id()[:6]}") in taken:
            pass
        return name

    def _id(self) -> str:
        return self.node.rng.randbytes(8).hex()


def check_not_lent(sandbox: Sandbox) -> None:
    """InUse if somebody else connects and disconnects a sandbox."""
    if sandbox.netns == HANDED_OUT:
        raise InUse(
            f"sandbox {sandbox.name}",
            "is that of a container of this host's Docker engine",
            "Use 'docker network connect' and 'docker network disconnect'",
        )
