"""Changing calls about sandboxes: made, kept over a restart, given interfaces, taken apart.

What stands opposite: completion.py (how each ends), operations.py (the other calls), workload.py
(namespaces), datapath/sandbox.py (what is in them).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import structlog

from agent.completion import Completion, RemoteDriver
from agent.core.resolvconf import resolv_conf
from agent.core.waysout import led_by, with_interface, without
from agent.drivers import host, none
from agent.errors import Conflict, InUse, Invalid, NotFound, Timeout, Unsupported
from agent.lanmodel import (
    HOST_SIDE,
    NAMES_AT,
    host_side_name,
    is_host_side,
    is_on_lan,
    parse_lan,
)
from agent.model import (
    HANDED_OUT,
    HOST,
    NONE,
    PREDEFINED,
    Endpoint,
    Network,
    Publish,
    Sandbox,
    find_overlap,
    format_address,
    format_mac,
    holds,
    parse_name,
    plugin_of,
)
from agent.requests import EndpointSpec
from agent.workload import Namespace, find_interface, identify, is_alive, tell_resolver

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
                if sandbox.id not in self.node.sandboxes:
                    raise _ended(pid)
                own = msgspec.structs.replace(
                    spec,
                    name=name,
                    addresses=addresses,
                    mac=chosen.get(network.id, b""),
                    priority=len(order) - order.index(network) if network in order else 0,
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
        self.node.put_sandbox(msgspec.structs.replace(sandbox, publishes=()))
        if publishes:
            self.node.check_publishes(publishes)
            self.ports.hold(sandbox.id, publishes)
            self.node.put_sandbox(msgspec.structs.replace(sandbox, publishes=tuple(publishes)))

    # -- their interfaces --

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
        if self.remote and plugin_of(network):
            return await self._attach_remote(self.remote, sandbox, network, spec, ifname, is_kept)
        endpoint = await self.allocate(network.id, spec, sandbox.id)
        try:
            # Another node may have been asked for the address, which takes time.
            sandbox = self._still(sandbox, is_kept)
            self._check_fits(sandbox, network, ifname, endpoint.id)
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
        is_kept: bool,
    ) -> Endpoint:
        """The same with an interface of a plugin's: its name there is the plugin's choice."""
        sandbox = self.node.sandboxes.get(sandbox.id) or sandbox
        endpoint, name, gateways = await remote.attach(sandbox, network, spec, ifname)
        try:
            sandbox = self._still(sandbox, is_kept)
            fresh = with_interface(sandbox, endpoint.id, name, spec.priority)
            lent = {**sandbox.lent, endpoint.id: gateways}
            self.node.put_sandbox(msgspec.structs.replace(fresh, lent=lent))
        except BaseException:
            self.node.remove_endpoints([endpoint.id])
            raise
        return endpoint

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
                for endpoint, gateways in sandbox.lent.items():
                    led = led_by(sandbox, endpoint, gateways)
                    if led:
                        name = sandbox.ifnames[sandbox.endpoints.index(endpoint)]
                        try:
                            await self.remote.lead_out(sandbox, name, led)
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
