"""What callers ask for, from beginning to end: check, change the node, see it in the kernel.

Each either does the whole of it or leaves nothing behind. api/ translates requests into these
calls; the Docker plugin will make the same ones.
What stands opposite: node.py (state), datapath/ (kernel), cluster/ (other nodes), store.py.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import msgspec
import structlog

from agent.allocator import Donors, with_space
from agent.errors import Conflict, Invalid, NotFound, Timeout, Unsupported
from agent.model import (
    HANDED_OUT,
    Endpoint,
    Network,
    Publish,
    Sandbox,
    format_address,
    holds,
    parse_name,
    plugin_of,
)
from agent.node import NodeState
from agent.ports import PortHolder
from agent.requests import EndpointSpec, NetworkSpec, parse_lines
from agent.workload import Namespace, find_interface, identify, is_alive

log = structlog.get_logger()

POLL = 0.02  # s
CHUNK = 2000  # endpoints a turn of the loop when there are many: some 10 ms of work


class Kernel(Protocol):
    """What datapath/ offers to those who wait for it."""

    async def settle(self, endpoint: str | None = None) -> None:
        """Return when all that was touched is applied; raise what failed for `endpoint`."""


class Cluster(Donors, Protocol):
    """What cluster/ offers to those who wait for it."""

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        """The nodes that lack `version` of ours, or something of these networks, when the time
        is up, and why."""


class Encrypter(Protocol):
    """What encryption.py offers."""

    async def require(self) -> None:
        """Return if this host can take part in encrypted networks; Unsupported says why not."""


class RemoteDriver(Protocol):
    """What remote/ offers for networks that a plugin drives."""

    async def ensure_network(self, network: Network) -> None:
        """Have the plugin make the network on this host, if it has not yet."""

    async def attach(
        self, sandbox: Sandbox, network: Network, spec: EndpointSpec, ifname: str
    ) -> tuple[Endpoint, str]:
        """Make an endpoint with the plugin's interface in `sandbox`, or leave nothing of it;
        and what the interface is called there."""

    async def settle(self) -> None:
        """Have plugins undo what is not wanted any more."""


class Operations:
    """Every changing call of this node."""

    def __init__(
        self,
        node: NodeState,
        cluster: Cluster,
        kernel: Kernel,
        durable: Callable[[], Awaitable[None]],
    ) -> None:
        self.node = node
        self._cluster = cluster
        self._kernel = kernel
        self._durable = durable
        self.ports = PortHolder()
        self.encrypter: Encrypter | None = None
        self.remote: RemoteDriver | None = None

    async def done(self, wait: float = 0.0, networks: Sequence[str] = ()) -> None:
        """Make what was changed last, and wait up to `wait` s for every live node's kernel.

        `networks` (ids) are those that it concerns: what is in another one's way on some node
        is no reason to wait. Timeout names the nodes that lack it, and why.
        """
        version = self.node.replica.written()
        await self._durable()
        if not wait:
            return
        deadline = time.monotonic() + wait
        try:
            async with asyncio.timeout(wait):
                await self._kernel.settle()
                while self.node.applied(self.node.me) < version:
                    await asyncio.sleep(POLL)  # something failed, and is being tried again
                while self.node.why_withheld(networks):
                    await asyncio.sleep(POLL)
        except TimeoutError:
            why = self.node.why_withheld(networks)
            raise Timeout(
                "the change",
                f"is not in this node's kernel after {wait:g} s" + (f" ({why})" if why else ""),
                "See its log",
            ) from None
        left = deadline - time.monotonic()
        lacking = await self._cluster.wait_applied(version, left, networks)
        if lacking:
            names = ", ".join(sorted(self._lagging(id, why) for id, why in lacking.items()))
            raise Timeout(
                "the change",
                f"was made, but is not in the kernel of {names} after {wait:g} s",
                "It will be as soon as they can; see 'vxmesh node ls'",
            )

    def _lagging(self, id: str, why: str) -> str:
        """A node that lacks a change, by name, and why, where that is known."""
        if self.node.condition(id).state == "unreachable":
            why = "its agent does not answer"
        return self.node.node_name(id) + (f" ({why})" if why else "")

    # -- networks --

    async def create_network(self, spec: NetworkSpec, wait: float = 0.0) -> Network:
        """Make a network."""
        await self._check_encryption(spec.encrypted, f"network {spec.name}")
        network = self.node.create_network(spec)
        if self.remote and plugin_of(network):
            try:
                await self.remote.ensure_network(network)
            except BaseException:
                self.node.remove_network(network.id)
                raise
        await self.done(wait, [network.id])
        return network

    async def _check_encryption(self, encrypted: bool, what: str) -> None:
        """Unsupported if something encrypted cannot be on this host."""
        if not encrypted or self.encrypter is None:
            return
        try:
            await self.encrypter.require()
        except Unsupported as error:
            raise Unsupported(what, f"is encrypted, but {error.why}", error.fix) from None

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
        self, network: str, spec: EndpointSpec, netns: str = "", ifname: str = "", wait: float = 0.0
    ) -> Endpoint:
        """Make an endpoint; with `netns` (name or path), an interface in that namespace."""
        found = self.node.find_network(network)
        await self._check_encryption(found.encrypted, f"network {network}")
        if not netns:
            endpoint = await self._allocate(found.id, spec, "")
            await self.done(wait, [found.id])
            return endpoint
        space = identify(netns)
        sandbox = self._sandbox_in(space) or Sandbox(
            id=self._id(),
            name=self._free_name(spec.name),
            netns=space.path,
            inode=space.inode,
            pid=0,
            start_time=0,
            created=self.node.clock(),
        )
        if ifname and ifname in sandbox.ifnames:
            raise Conflict(f"interface {ifname}", "exists in that sandbox", "Choose another")
        endpoint = await self._attach(sandbox, found, spec, ifname)
        await self.done(wait, [found.id])
        return endpoint

    async def announce(self, network: str, pieces: AsyncIterator[bytes], wait: float = 0.0) -> int:
        """Make endpoints of existing interfaces, all of them or none; how many.

        `pieces` are JSON lines, cut anywhere. What has come is checked and reserved while the
        rest is on its way, so an error may come before the end.
        """
        found = self.node.find_network(network)
        await self._check_encryption(found.encrypted, f"network {network}")
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
        for start in range(0, len(reserved), CHUNK):
            self.node.commit(reserved[start : start + CHUNK])
            await asyncio.sleep(0)

    async def remove_endpoints(
        self, refs: Sequence[str], network: str = "", wait: float = 0.0, every: bool = False
    ) -> list[str]:
        """Remove endpoints of this node by name, id or prefix; with `every`, all in a network."""
        if every:
            found = self.node.find_network(network).id
            members = self.node.members.get(found)
            local = list(members.local) if members else []
            ids = [id for id in local if self.node.is_committed(id)]
        else:
            ids = []
            for ref in refs:
                ids.append(self.node.find_endpoint(ref, network)[1].endpoint.id)
                await asyncio.sleep(0)  # a prefix is looked for among all
        networks = list(dict.fromkeys(self.node.network_of(id) for id in ids))
        await asyncio.shield(asyncio.ensure_future(self._remove(ids)))
        await self.done(wait, networks)
        return ids

    async def _remove(self, ids: Sequence[str]) -> None:
        try:
            for start in range(0, len(ids), CHUNK):
                self.node.remove_endpoints(ids[start : start + CHUNK])
                await asyncio.sleep(0)
        finally:
            self._shrink({id for id in ids if not self.node.network_of(id)})

    async def _allocate(self, network: str, spec: EndpointSpec, sandbox: str) -> Endpoint:
        return await with_space(
            self.node,
            self._cluster,
            lambda: self.node.create_endpoint(network, spec, sandbox),
        )

    async def hold_address(self, network: str, family: int, address: bytes = b"") -> bytes:
        """Keep `address`, or a free one of `family`, for an endpoint that is to come."""
        found = self.node.find_network(network)
        return await with_space(
            self.node,
            self._cluster,
            lambda: self.node.hold_address(found.id, family, address),
        )

    async def hand_out(self, network: str, spec: EndpointSpec) -> tuple[Endpoint, str]:
        """Make an endpoint whose interface waits in the host's namespace, and its name there.

        Who asked moves it into the workload and furnishes it. It lives until it is removed.
        """
        found = self.node.find_network(network)
        await self._check_encryption(found.encrypted, f"network {network}")
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
        endpoint = await self._attach(sandbox, found, spec, ifname)
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

    # -- sandboxes --

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
        found = [self.node.find_network(ref) for ref in dict.fromkeys(networks)]
        for each in found:
            await self._check_encryption(each.encrypted, f"network {each.name}")
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
        self.node.check_publishes(sandbox.publishes)
        self.ports.hold(sandbox.id, sandbox.publishes)
        try:
            self.node.put_sandbox(sandbox)
            for network, addresses in zip(found, split, strict=True):
                own = msgspec.structs.replace(spec, name=name, addresses=addresses)
                await self._attach(self.node.sandboxes[sandbox.id], network, own, "")
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
        # An endpoint that was stored before its sandbox, when the agent was killed in between.
        stray = [
            id
            for members in self.node.members.values()
            for id, endpoint in members.local.items()
            if endpoint.sandbox and id not in held
        ]
        self.node.remove_endpoints(stray)

    def drop_sandbox(self, id: str) -> None:
        """A sandbox is gone: its endpoints, names and ports too. No error if it was already."""
        self.ports.release(id)
        self.node.drop_sandbox(id)

    def lost_port(self, endpoint: str) -> None:
        """The namespace that an endpoint's interface was in does not exist any more."""
        for sandbox in list(self.node.sandboxes.values()):
            if endpoint in sandbox.endpoints and not is_alive(sandbox):
                self.drop_sandbox(sandbox.id)

    async def _attach(
        self, sandbox: Sandbox, network: Network, spec: EndpointSpec, ifname: str
    ) -> Endpoint:
        """Make an endpoint with an interface in `sandbox`, or leave nothing of it."""
        if self.remote and plugin_of(network):
            return await self._attach_remote(self.remote, sandbox, network, spec, ifname)
        endpoint = await self._allocate(network.id, spec, sandbox.id)
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
        except BaseException:
            if endpoint.id in self.node.members[network.id].local:
                self.node.remove_endpoints([endpoint.id])
            self._shrink({endpoint.id})
            raise
        return endpoint

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

    def _shrink(self, endpoints: set[str]) -> None:
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

    def _networks_of(self, sandboxes: Sequence[str]) -> list[str]:
        ids = (e for id in sandboxes for e in self.node.sandboxes[id].endpoints)
        return list(dict.fromkeys(self.node.network_of(id) for id in ids))

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
