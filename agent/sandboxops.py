"""Changing calls about sandboxes: made, kept over a restart, given interfaces, taken apart.

What stands opposite: completion.py (how each ends), operations.py (the other calls), workload.py
(namespaces), datapath/sandbox.py (what is in them).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import structlog

from agent.core.waysout import expected, lead
from agent.drivers import host, none
from agent.errors import Conflict, Invalid, NotFound, Timeout, Unsupported
from agent.interfaceops import InterfaceOperations, check_not_lent
from agent.lanmodel import (
    is_host_side,
    is_on_lan,
)
from agent.model import (
    BRIDGE,
    HANDED_OUT,
    HOST,
    NONE,
    OVERLAY,
    PREDEFINED,
    Endpoint,
    Network,
    Publish,
    Sandbox,
)
from agent.notation import format_address, format_mac, holds, parse_name
from agent.requests import EndpointSpec
from agent.workload import find_interface, identify, is_alive

log = structlog.get_logger()

_STACKS = {NONE: none.stack, HOST: host.stack}


class SandboxOperations(InterfaceOperations):
    """Every changing call that is about a sandbox."""

    async def create_sandbox(
        self,
        name: str,
        networks: Sequence[str],
        pid: int,
        *,
        spec: EndpointSpec,
        macs: Mapping[str, bytes] | None = None,
        defaults: Sequence[str] = (),
        publishes: Sequence[Publish] = (),
        log: str = "",
        wait: float = 0.0,
    ) -> Sandbox:
        """Give the network namespace of `pid` an interface in each of `networks`.

        `spec` has the addresses, aliases and labels of the endpoints; each address goes to the
        network that it belongs to. `macs` are by network, by "" of the only one; `defaults` those
        of the networks that are to have the default routes, the first one first. The sandbox
        lives as long as the process.
        """
        if not networks:
            raise Invalid("sandbox", "has no network", "Give at least one --network")
        if any(ref.lower() in PREDEFINED for ref in networks):
            if macs or defaults:
                raise Invalid(
                    "--mac" if macs else "--default",
                    "is an interface's, and in networks none and host is none of ours",
                    "Leave it out, or use another network",
                )
            return await self._create_apart(name, networks, pid, spec, publishes, log, wait)
        found = self._find_each(networks, "--network")
        chosen = self._find_macs(found, macs or {})
        order = self._find_each(defaults, "--default", found)
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
        ranks = {n.id: len(order) - order.index(n) if n in order else 0 for n in found}
        if publishes:
            self._check_published(found, ranks)
        self.node.check_publishes(sandbox.publishes)
        self.ports.hold(sandbox.id, sandbox.publishes)
        try:
            self.node.put_sandbox(sandbox)
            for network, addresses in zip(found, split, strict=True):
                if sandbox.id not in self.node.sandboxes:
                    raise _ended(pid)
                own = msgspec.structs.replace(
                    spec,
                    name=name,
                    addresses=addresses,
                    mac=chosen.get(network.id, b""),
                    priority=ranks[network.id],
                )
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
            raise _ended(pid)
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

    async def remove_sandboxes(
        self, refs: Sequence[str], wait: float = 0.0, *, by_user: bool = False
    ) -> list[str]:
        """Take the interfaces of sandboxes away; the processes in them are left alone.

        InUse if a user names one that a Docker engine has; then none is taken away.
        Who is told NotFound, because it has just ended by itself, finds nothing of it in the
        kernel either.
        """
        try:
            ids = [self.node.find_sandbox(ref).id for ref in refs]
        except NotFound:
            await self._kernel.settle()
            raise
        for id in ids if by_user else ():
            check_not_lent(self.node.sandboxes[id])
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
        self.check_handed_out(found)
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

    def check_handed_out(self, network: Network) -> None:
        """Unsupported if interfaces in `network` cannot be made in the host's namespace and moved
        by somebody else: on the hosts' wire, a plugin's, which would be furnished there, and those
        of a bridge on another node."""
        if network.ipam:
            raise Unsupported(
                f"network {network.name}",
                f"has addresses that plugin {network.ipam.plugin} gives out, and the engine has "
                "those of another",
                "Use a network whose addresses are ours",
            )
        if network.driver == OVERLAY:
            return
        if network.driver != BRIDGE:
            raise Unsupported(
                f"network {network.name}",
                f"is of driver {network.driver}, whose interfaces cannot be handed out",
                "Use an overlay network, or the engine's own driver of that name",
            )
        if network.creator != self.node.me:
            raise Unsupported(
                f"network {network.name}",
                "is a bridge on another node alone",
                "Use an overlay network, or do it on that node",
            )

    async def moved(self, endpoint: str, netns: str) -> None:
        """The interface of an endpoint that was handed out is in the namespace at path `netns` by
        now. On return what balanced connections need there is in it."""
        held = self.node.local_endpoint(endpoint)
        sandbox = self.node.sandboxes.get(held.sandbox) if held else None
        if held is None or sandbox is None or sandbox.netns != HANDED_OUT:
            raise NotFound(f"endpoint {endpoint}", "was not handed out")
        inode, name = await asyncio.to_thread(find_interface, netns, held.mac)
        fresh = msgspec.structs.replace(sandbox, moved_to=netns, moved_inode=inode, moved_name=name)
        if fresh != sandbox and sandbox.id in self.node.sandboxes:
            self.node.put_sandbox(fresh)
            await self._kernel.settle(endpoint)

    def publish(self, endpoint: str, publishes: Sequence[Publish]) -> None:
        """Have ports of this host lead to an endpoint that was handed out; none: no more.

        Conflict names the port that something else holds; then none is published.
        """
        sandbox = next(s for s in self.node.sandboxes.values() if endpoint in s.endpoints)
        self.ports.release(sandbox.id)
        if not publishes and not sandbox.publishes:
            return  # as of most containers, of which this is said at their start and end
        self.node.put_sandbox(msgspec.structs.replace(sandbox, publishes=()))
        if publishes:
            self.node.check_publishes(publishes)
            self.ports.hold(sandbox.id, publishes)
            self.node.put_sandbox(msgspec.structs.replace(sandbox, publishes=tuple(publishes)))

    def _find_each(
        self, refs: Sequence[str], flag: str, among: Sequence[Network] | None = None
    ) -> list[Network]:
        """Networks by what they are called, each once and, if given, one of `among`."""
        found: list[Network] = []
        for ref in refs:
            network = self.node.find_network(ref)
            if network in found:
                raise Invalid(f"{flag} {ref}", "is given twice", "Give each network once")
            if among is not None and network not in among:
                raise Invalid(f"{flag} {ref}", "is none of the networks given", "See --network")
            found.append(network)
        return found

    def _check_published(self, networks: Sequence[Network], ranks: Mapping[str, int]) -> None:
        """Invalid if ports published by a sandbox in these networks would lead nowhere, because
        its default routes all go straight onto a wire."""
        ways = [expected(network, ranks[network.id]) for network in networks]
        leading = {lead(ways, 4), lead(ways, 6)}
        leads = [network for network in networks if network.id in leading]
        if leads and all(map(is_on_lan, leads)):
            raise Invalid(
                "--publish",
                f"has no use in network {self.node.catalogue.name(leads[0].id)}, which has the "
                "default routes: who is on its wire reaches the workload at its own address",
                "Leave it out, or give another network the default routes with --default",
            )

    def _find_macs(
        self, networks: Sequence[Network], macs: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Network id -> the MAC that was asked for."""
        if "" in macs and (len(networks) > 1 or len(macs) > 1):
            raise Invalid(
                f"--mac {format_mac(macs[''])}",
                "does not say in which of the networks",
                "Write it as NET=MAC",
            )
        refs = [ref or networks[0].id for ref in macs]
        found = self._find_each(refs, "--mac", networks)
        return {n.id: mac for n, mac in zip(found, macs.values(), strict=True)}

    def _networks_of(self, sandboxes: Sequence[str]) -> list[str]:
        ids = (e for id in sandboxes for e in self.node.sandboxes[id].endpoints)
        return list(dict.fromkeys(self.node.network_of(id) for id in ids))


def _ended(pid: int) -> Conflict:
    return Conflict(f"process {pid}", "ended while its sandbox was made", "Start it again")


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
