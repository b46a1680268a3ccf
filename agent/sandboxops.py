"""Changing calls about sandboxes: made, kept over a restart, given interfaces, taken apart.

What stands opposite: completion.py (how each ends), operations.py (the other calls), workload.py
(namespaces), datapath/sandbox.py (what is in them).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Sequence

import msgspec
import structlog

from agent.completion import Completion, RemoteDriver
from agent.drivers import host, none
from agent.errors import Conflict, Invalid, NotFound, Timeout, Unsupported
from agent.lanmodel import HOST_SIDE, host_side_name, is_host_side, is_on_lan, parse_lan
from agent.model import (
    HANDED_OUT,
    HOST,
    NONE,
    PREDEFINED,
    Endpoint,
    Network,
    Publish,
    Sandbox,
    format_address,
    holds,
    parse_name,
    plugin_of,
)
from agent.requests import EndpointSpec
from agent.workload import Namespace, identify, is_alive

log = structlog.get_logger()

NAMES_WITHIN = 2.0  # s; a sandbox without a name server is better than none
_STACKS = {NONE: none.stack, HOST: host.stack}


class SandboxOperations(Completion):
    """Every changing call that is about a sandbox."""

    async def create_sandbox(
        self,
        name: str,
        networks: Sequence[str],
        pid: int,
        *,
        spec: EndpointSpec,
        publishes: Sequence[Publish] = (),
        log: str = "",
        wait: float = 0.0,
    ) -> Sandbox:
        """Give the network namespace of `pid` an interface in each of `networks`.

        `spec` has the addresses, aliases and labels of the endpoints; each address goes to the
        network that it belongs to. The sandbox lives as long as the process.
        """
        if not networks:
            raise Invalid("sandbox", "has no network", "Give at least one --network")
        if any(ref.lower() in PREDEFINED for ref in networks):
            return await self._create_apart(name, networks, pid, spec, publishes, log, wait)
        found = [self.node.find_network(ref) for ref in dict.fromkeys(networks)]
        for each in found:
            await self.check_encryption(each.encrypted, f"network {each.name}")
        space = identify(f"/proc/{pid}/ns/net", pid)
        if self._sandbox_in(space):
            raise Conflict(f"process {pid}", "is in a sandbox already", "Use that one")
        name = self._free_name("sb") if not name else parse_name(name, "sandbox")
        split = _split_addresses(found, spec)
        sandbox = Sandbox(
            id=self._id(),
            name=name,
            netns=space.path,
            inode=space.inode,
            pid=pid,
            start_time=space.start_time,
            created=self.node.clock(),
            publishes=tuple(publishes),
            log=log,
        )
        default = next((n for n in found if not n.internal), None)
        if publishes and default and is_on_lan(default):
            raise Invalid(
                "--publish",
                f"has no use in network {default.name}: who is on its wire reaches the workload "
                "at its own address",
                "Leave it out, or name another network first",
            )
        self.node.check_publishes(sandbox.publishes)
        self.ports.hold(sandbox.id, sandbox.publishes)
        try:
            self.node.put_sandbox(sandbox)
            for network, addresses in zip(found, split, strict=True):
                own = msgspec.structs.replace(spec, name=name, addresses=addresses)
                await self.attach(self.node.sandboxes[sandbox.id], network, own, "")
            await self.done(wait, [n.id for n in found])
        except Timeout as error:
            self.drop_sandbox(sandbox.id)
            why = f"{error.why}, so it was undone"
            raise Timeout(
                f"sandbox {name}", why, "Give --wait more time, or leave it out"
            ) from None
        except BaseException:
            self.drop_sandbox(sandbox.id)
            raise
        if not is_alive(sandbox):
            self.drop_sandbox(sandbox.id)
            raise Conflict(f"process {pid}", "ended while its sandbox was made", "Start it again")
        return self.node.sandboxes[sandbox.id]

    async def _create_apart(
        self,
        name: str,
        networks: Sequence[str],
        pid: int,
        spec: EndpointSpec,
        publishes: Sequence[Publish],
        log: str,
        wait: float,
    ) -> Sandbox:
        """A sandbox in network none or host, which has no interface of ours.

        After host may come overlay networks, in which the workload has a name and the node's own
        address.
        """
        stack, others = networks[0].lower(), list(dict.fromkeys(networks[1:]))
        if stack not in PREDEFINED or (stack == NONE and others):
            raise Invalid(
                "networks none and host",
                "cannot be some of several",
                "Give none alone, and host first: the others are those it is known in",
            )
        known_in = [self.node.find_network(ref).id for ref in others]
        refused: list[tuple[str, Collection[object]]]
        refused = [("--ip", spec.addresses), ("--publish", publishes)]
        if not known_in:
            refused += [("--alias", spec.aliases), ("--label", spec.labels)]
        for what, given in refused:
            if given:
                raise Invalid(
                    what,
                    f"is an endpoint's, and in network {stack} is none",
                    "Leave it out, or use another network",
                )
        space = identify(f"/proc/{pid}/ns/net", pid, host=stack == HOST)
        if any(s.pid == pid for s in self.node.sandboxes.values() if is_alive(s)):
            raise Conflict(f"process {pid}", "is in a sandbox already", "Use that one")
        sandbox = Sandbox(
            id=self._id(),
            name=self._free_name("sb") if not name else parse_name(name, "sandbox"),
            netns=space.path,
            inode=space.inode,
            pid=pid,
            start_time=space.start_time,
            created=self.node.clock(),
            log=log,
            stack=stack,
        )
        self.node.put_sandbox(sandbox)
        try:
            if self.furnish:
                await self.furnish(_STACKS[stack](sandbox))
            own = msgspec.structs.replace(spec, name=sandbox.name)
            for network in known_in:
                made = self.node.create_host_endpoint(network, own, sandbox.id)
                sandbox = msgspec.structs.replace(
                    sandbox,
                    endpoints=(*sandbox.endpoints, made.id),
                    ifnames=(*sandbox.ifnames, ""),
                )
                self.node.put_sandbox(sandbox)
            await self.done(wait, known_in)
        except BaseException:
            self.drop_sandbox(sandbox.id)
            raise
        return sandbox

    async def remove_sandboxes(self, refs: Sequence[str], wait: float = 0.0) -> list[str]:
        """Take the interfaces of sandboxes away; the processes in them are left alone.

        Who is told NotFound, because it has just ended by itself, finds nothing of it in the
        kernel either.
        """
        try:
            ids = [self.node.find_sandbox(ref).id for ref in refs]
        except NotFound:
            await self._kernel.settle()
            raise
        networks = self._networks_of(ids)
        for id in ids:
            self.drop_sandbox(id)
        await self._kernel.settle()
        if self.remote:
            await self.remote.settle()
        await self.done(wait, networks)
        return ids

    def adopt(self, lives: Callable[[Sandbox], bool] = is_alive) -> None:
        """At start: keep the sandboxes that live, with their ports; drop those that ended."""
        for sandbox in list(self.node.sandboxes.values()):
            if not lives(sandbox):
                self.drop_sandbox(sandbox.id)
                continue
            try:
                self.ports.hold(sandbox.id, sandbox.publishes)
            except Conflict as error:
                log.warning("port.lost", sandbox=sandbox.id, error=str(error))
        held = {e for s in self.node.sandboxes.values() for e in s.endpoints}
        self.release_host_sides()
        # An endpoint that was stored before its sandbox, when the agent was killed in between.
        stray = [
            id
            for members in self.node.members.values()
            for id, endpoint in members.local.items()
            if endpoint.sandbox and id not in held and not is_host_side(endpoint)
        ]
        self.node.remove_endpoints(stray)

    def drop_sandbox(self, id: str) -> None:
        """A sandbox is gone: its endpoints, names and ports too. No error if it was already."""
        self.ports.release(id)
        self.node.drop_sandbox(id)
        self.release_host_sides()

    def lost_port(self, endpoint: str) -> None:
        """The namespace that an endpoint's interface was in does not exist any more."""
        for sandbox in list(self.node.sandboxes.values()):
            if endpoint in sandbox.endpoints and not is_alive(sandbox):
                self.drop_sandbox(sandbox.id)

    # -- handed out --

    async def hand_out(self, network: str, spec: EndpointSpec) -> tuple[Endpoint, str]:
        """Make an endpoint whose interface waits in the host's namespace, and its name there.

        Who asked moves it into the workload and furnishes it. It lives until it is removed.
        """
        found = self.node.find_network(network)
        await self.check_encryption(found.encrypted, f"network {network}")
        if is_on_lan(found):
            raise Unsupported(
                f"network {network}",
                f"is of driver {found.driver}, whose interfaces cannot be handed out",
                "Use the engine's own driver of that name",
            )
        id = self._id()
        sandbox = Sandbox(
            id=id,
            name=self._free_name(spec.name),
            netns=HANDED_OUT,
            inode=os.stat(HANDED_OUT).st_ino,  # noqa: PTH116 (proc: does not block)
            pid=0,
            start_time=0,
            created=self.node.clock(),
        )
        ifname = f"vxd{id[:12]}"
        endpoint = await self.attach(sandbox, found, spec, ifname)
        await self.done()
        return endpoint, ifname

    def publish(self, endpoint: str, publishes: Sequence[Publish]) -> None:
        """Have ports of this host lead to an endpoint that was handed out; none: no more.

        Conflict names the port that something else holds; then none is published.
        """
        sandbox = next(s for s in self.node.sandboxes.values() if endpoint in s.endpoints)
        self.ports.release(sandbox.id)
        self.node.put_sandbox(msgspec.structs.replace(sandbox, publishes=()))
        if publishes:
            self.node.check_publishes(publishes)
            self.ports.hold(sandbox.id, publishes)
            self.node.put_sandbox(msgspec.structs.replace(sandbox, publishes=tuple(publishes)))

    # -- their interfaces --

    async def attach(
        self, sandbox: Sandbox, network: Network, spec: EndpointSpec, ifname: str
    ) -> Endpoint:
        """Make an endpoint with an interface in `sandbox`, or leave nothing of it."""
        if self.remote and plugin_of(network):
            return await self._attach_remote(self.remote, sandbox, network, spec, ifname)
        endpoint = await self.allocate(network.id, spec, sandbox.id)
        before = self.node.sandboxes.get(sandbox.id)
        sandbox = before or sandbox
        taken = set(sandbox.ifnames)
        free = (f"eth{i}" for i in range(len(taken) + 1) if f"eth{i}" not in taken)
        try:
            self.node.put_sandbox(
                msgspec.structs.replace(
                    sandbox,
                    endpoints=(*sandbox.endpoints, endpoint.id),
                    ifnames=(*sandbox.ifnames, ifname or next(free)),
                    default=sandbox.default or ("" if network.internal else endpoint.id),
                )
            )
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
            await self._kernel.settle(made.id)

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
    ) -> Endpoint:
        """The same with an interface of a plugin's: its name there is the plugin's choice."""
        sandbox = self.node.sandboxes.get(sandbox.id) or sandbox
        endpoint, name = await remote.attach(sandbox, network, spec, ifname)
        try:
            self.node.put_sandbox(
                msgspec.structs.replace(
                    sandbox,
                    endpoints=(*sandbox.endpoints, endpoint.id),
                    ifnames=(*sandbox.ifnames, name),
                    default=sandbox.default or ("" if network.internal else endpoint.id),
                )
            )
        except BaseException:
            self.node.remove_endpoints([endpoint.id])
            raise
        return endpoint

    def shrink(self, endpoints: set[str]) -> None:
        """Take endpoints out of their sandboxes; a sandbox of the user's with none left goes."""
        for sandbox in list(self.node.sandboxes.values()):
            kept = [
                (e, i)
                for e, i in zip(sandbox.endpoints, sandbox.ifnames, strict=True)
                if e not in endpoints
            ]
            if len(kept) == len(sandbox.endpoints):
                continue
            if not kept and not sandbox.pid:
                self.drop_sandbox(sandbox.id)
                continue
            self.node.put_sandbox(
                msgspec.structs.replace(
                    sandbox,
                    endpoints=tuple(e for e, _ in kept),
                    ifnames=tuple(i for _, i in kept),
                    default="" if sandbox.default in endpoints else sandbox.default,
                )
            )
        self.release_host_sides()

    def _networks_of(self, sandboxes: Sequence[str]) -> list[str]:
        ids = (e for id in sandboxes for e in self.node.sandboxes[id].endpoints)
        return list(dict.fromkeys(self.node.network_of(id) for id in ids))

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


def _split_addresses(networks: Sequence[Network], spec: EndpointSpec) -> list[tuple[bytes, ...]]:
    """For each network the addresses that lie in one of its subnets; Invalid if one is in none."""
    split = [tuple(a for a in spec.addresses if holds(n.subnets, a)) for n in networks]
    for address in spec.addresses:
        if not any(address in part for part in split):
            raise Invalid(
                f"address {format_address(address)}",
                "is in no subnet of the networks given",
                "Use one of " + ", ".join(s for n in networks for s in n.subnets),
            )
    return split
