"""Subnets and addresses that plugins give out: asked for, and given back once nobody has them.

What a plugin gave is written down with what gives it back as soon as it has answered. Nobody who
asks waits longer than one call may take; an answer that comes later is still heard, and given
back at once, since there is no other way to name what was given.
Source: libnetwork's docs/ipam.md.
What stands opposite: undoing.py gives back, client.py asks, completion.py and operations.py call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import structlog

from agent.drivers import remote, remote_ipam
from agent.drivers.remote_ipam import Capabilities, Pool
from agent.errors import Conflict, Exhausted, Invalid, Timeout, VxmeshError
from agent.model import REMOTE, Ipam, Network
from agent.node import NodeState
from agent.notation import find_overlap, format_address, parse_address, parse_subnet
from agent.remote.client import IPAM_DRIVER, NETWORK_DRIVER, Plugins, Refused, is_away
from agent.remote.ledger import Step
from agent.remote.undoing import RETRY_EVERY, Undoer
from agent.requests import EndpointSpec, NetworkSpec

log = structlog.get_logger()

LATE = 120.0  # s that an answer is listened for which nobody waits for any more
TRIES = 8  # subnets that a plugin may offer until one is free here


class RemoteIpam:
    """All networks whose addresses plugins give out."""

    def __init__(
        self,
        node: NodeState,
        plugins: Plugins,
        undoer: Undoer,
        late: float = LATE,
        retry_every: float = RETRY_EVERY,
    ) -> None:
        self._node, self._plugins, self._undoer = node, plugins, undoer
        self._ledger = undoer.ledger
        self._late, self._retry_every = late, retry_every
        self._capabilities: dict[str, Capabilities] = {}
        self._told: set[str] = set()  # networks of which their plugin knows, in this life
        self._telling: dict[str, asyncio.Lock] = {}  # plugin -> held while it is told
        self._pooling: dict[str, asyncio.Lock] = {}  # plugin -> held while it is asked for pools
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Tell plugins that want it what they gave out in this agent's earlier lives."""
        self._keep(asyncio.create_task(self._replay()))

    async def stop(self) -> None:
        """Hear no late answers any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- subnets --

    @contextlib.asynccontextmanager
    async def pools(self, spec: NetworkSpec, id: str) -> AsyncIterator[NetworkSpec]:
        """`spec`, of a network that is to have this id, with the subnets that its plugin gives;
        given back if what is done inside fails."""
        assert spec.ipam
        # One at a time, so that a pool which one got is not given back for another.
        pooling = self._pooling.setdefault(spec.ipam.plugin, asyncio.Lock())
        async with pooling, self._undoer.making(f"pool:{id}"):
            yield await self._request_pools(f"pool:{id}", spec, spec.ipam)

    async def _request_pools(self, owner: str, spec: NetworkSpec, ipam: Ipam) -> NetworkSpec:
        space = await self._space(spec, ipam.plugin)
        wanted = [(subnet, ":" in subnet) for subnet in spec.subnets]
        if not wanted:
            wanted = [("", False)] * spec.ipv4 + [("", True)] * spec.ipv6
        found: list[Pool] = []
        gateways: list[str] = []
        for subnet, ipv6 in wanted:
            part = remote_ipam.part_of(subnet, spec.ip_ranges)
            body = remote_ipam.pool_request(space, subnet, part, ipam.options, ipv6)
            pool = await self._request_pool(owner, ipam.plugin, body, spec.driver, found)
            found.append(pool)
            gateways.append(await self._gateway(owner, ipam.plugin, pool, spec.gateways))
            for address in remote_ipam.aux_names(spec.options).values():
                if remote_ipam.is_in(pool.subnet, address):
                    body = remote_ipam.address_request(pool.id, address)
                    await self._reserve(owner, ipam.plugin, pool, body)
        subnets = tuple(pool.subnet for pool in found)
        return dataclasses.replace(
            spec,
            subnets=subnets,
            gateways=tuple(gateways),
            ip_ranges=tuple(part for part in spec.ip_ranges if part not in subnets),
            ipam=Ipam(ipam.plugin, tuple(pool.id for pool in found), space, ipam.options),
        )

    async def _space(self, spec: NetworkSpec, plugin: str) -> str:
        """The address space that a network's addresses are of."""
        scope = ""
        if spec.driver.startswith(REMOTE):
            driver = spec.driver.removeprefix(REMOTE)
            answer = await self._plugins.call(driver, f"{NETWORK_DRIVER}.GetCapabilities", {})
            scope = remote.parse_scope(answer, driver)
        answer = await self._ask(plugin, "GetDefaultAddressSpaces", {})
        return remote_ipam.parse_space(answer, plugin, remote_ipam.is_local(spec.driver, scope))

    async def _request_pool(
        self, owner: str, plugin: str, body: dict[str, Any], driver: str, others: list[Pool]
    ) -> Pool:
        """A pool that the network can have; those that overlap something here are held until
        one is found, so that the plugin offers another each time."""
        unfit: dict[str, Step | None] = {}
        while True:
            answer = await self._obtain(plugin, "RequestPool", body, self._pool_back)
            step = self._pool_back(plugin, answer)
            if step and step not in self._ledger.steps.get(owner, []):
                await self._ledger.add(owner, step)
            pool = remote_ipam.parse_pool(answer, plugin, body)
            clash = find_overlap(parse_subnet(pool.subnet), [("", o.subnet) for o in others])
            try:
                if clash:
                    raise Conflict(f"subnet {pool.subnet}", f"overlaps {clash[1]} beside it")
                self._node.check_free(pool.subnet, driver)
                break
            except Conflict as error:
                if body["Pool"] or len(unfit) == TRIES or pool.id in unfit:
                    why = f"offers {pool.subnet}, which {error.why}"
                    raise Conflict(f"plugin {plugin}", why, "Give a --subnet") from None
                unfit[pool.id] = step
        for held in filter(None, unfit.values()):
            await self._undoer.undo_one(owner, held)
        return pool

    def _pool_back(self, plugin: str, answer: bytes) -> Step | None:
        """What gives back a pool that a plugin answered; None if it is another network's already,
        which would lose it."""
        step = _release_of(plugin, answer)
        for network in self._node.catalogue.all():
            ipam = network.ipam
            if ipam and ipam.plugin == plugin and step.body["PoolID"] in ipam.pools:
                return None
        return step

    async def _gateway(self, owner: str, plugin: str, pool: Pool, wanted: tuple[str, ...]) -> str:
        """The gateway of a pool: the one that is wanted, or the plugin's choice, or else the first
        address, as every network of ours has one."""
        given = next((g for g in wanted if remote_ipam.is_in(pool.subnet, g)), "")
        if pool.gateway and not given:
            return pool.gateway
        body = remote_ipam.gateway_request(pool.id, given)
        if address := await self._reserve(owner, plugin, pool, body):
            return format_address(address)
        first = given or remote_ipam.first_host(pool.subnet)
        await self._reserve(owner, plugin, pool, remote_ipam.gateway_request(pool.id, first))
        return first

    async def _reserve(self, owner: str, plugin: str, pool: Pool, body: dict[str, Any]) -> bytes:
        """Have an address that no endpoint is to have; empty if the plugin gives none."""
        answer = await self._obtain(plugin, "RequestAddress", body, _address_back(body))
        if step := _address_back(body)(plugin, answer):
            await self._ledger.add(owner, step)
        return remote_ipam.parse_given(answer, plugin, pool.subnet, body["Address"])

    # -- addresses --

    @contextlib.asynccontextmanager
    async def addresses(self, network: Network, spec: EndpointSpec) -> AsyncIterator[EndpointSpec]:
        """`spec` with an address of each family of `network` that its plugin gives, and the MAC
        that the plugin was told; given back if what is done inside fails."""
        assert network.ipam
        await self._ready(network, network.ipam)
        mac = spec.mac
        if not mac and (await self._wants(network.ipam.plugin)).needs_mac:
            mac = b"\x06" + self._node.rng.randbytes(5)
        # What of them was somebody's until now is given back first. All before any is held: two who
        # want the same ones must not wait for each other.
        for address in spec.addresses:
            await self._undoer.done_with(_owner(network, format_address(address)))
        found: list[bytes] = []
        async with contextlib.AsyncExitStack() as stack:
            for address in spec.addresses:
                text = format_address(address)
                pools = remote_ipam.pools_for(network, network.ipam, address)
                # Of an address that is in no subnet, or somebody's, who makes the endpoint says so.
                if pools and not self._is_taken(network, address):
                    await self._request(stack, network, network.ipam, pools, text, mac)
                found.append(address)
            given = {len(address) for address in found}
            for width in (4, 16):
                pools = remote_ipam.pools_of(network, network.ipam, width)
                if pools and width not in given:
                    found.append(await self._request(stack, network, network.ipam, pools, "", mac))
            yield msgspec.structs.replace(spec, addresses=tuple(found), mac=mac)

    async def _request(
        self,
        stack: contextlib.AsyncExitStack,
        network: Network,
        ipam: Ipam,
        pools: list[tuple[str, str]],
        text: str,
        mac: bytes,
    ) -> bytes:
        """An address out of the first pool that has one: `text`, or any."""
        refused: Refused | None = None
        for pool, subnet in pools:
            body = remote_ipam.address_request(pool, text, mac)
            try:
                answer = await self._obtain(
                    ipam.plugin, "RequestAddress", body, _address_back(body)
                )
            except Refused as error:
                refused = refused or error
                continue
            step = _address_back(body)(ipam.plugin, answer)
            said = remote_ipam.parse_said(answer, ipam.plugin)
            if said and self._is_taken(network, said):
                # It is not given back: somebody has it, whatever the plugin believes.
                why = f"gave {format_address(said)}, which is somebody's or no endpoint's to have"
                raise Conflict(f"plugin {ipam.plugin}", why, "See its log, or try again")
            owner = _owner(network, format_address(said) if said else "0.0.0.0")
            await stack.enter_async_context(self._undoer.making(owner))
            await self._ledger.put(owner, [step] if step else [])
            if address := remote_ipam.parse_given(answer, ipam.plugin, subnet, text):
                return address
        if refused:
            raise refused
        raise Exhausted(
            f"network {self._node.catalogue.name(network.id)}",
            f"has no free address, as plugin {ipam.plugin} has it",
            "Remove endpoints, or see the plugin's log",
        )

    def _is_taken(self, network: Network, address: bytes) -> bool:
        """Whether somebody has an address, the gateway among them."""
        addresses = self._node.addresses.get(network.id)
        members = self._node.members.get(network.id)
        return bool(
            (members and members.with_address(address))
            or (addresses and addresses.space.reserved(address))
            or self._node.services.with_address(network.id, address)
        )

    # -- what a plugin wants to be told anew --

    async def _ready(self, network: Network, ipam: Ipam) -> None:
        """See to it that a plugin knows of a network's pools, and of what of them is given out
        here: it was told so in this life, or remembers by itself."""
        if network.id in self._told or not (await self._wants(ipam.plugin)).needs_replay:
            return
        async with self._telling.setdefault(ipam.plugin, asyncio.Lock()):
            if network.id not in self._told:
                await self._tell(network, ipam)
                self._told.add(network.id)

    async def _tell(self, network: Network, ipam: Ipam) -> None:
        owner = f"pool:{network.id}"
        async with self._undoer.held(owner):
            bodies = remote_ipam.asked_again(network, ipam)
            for id, body in zip(ipam.pools, bodies, strict=True):
                answer = await self._ask(ipam.plugin, "RequestPool", body)
                step = _release_of(ipam.plugin, answer)
                if step not in self._ledger.steps.get(owner, []):
                    await self._ledger.add(owner, step)
                if remote_ipam.parse_pool_id(answer, ipam.plugin) != id:
                    why = f"does not know pool {id} of network {network.name} any more"
                    raise Invalid(f"plugin {ipam.plugin}", why, "See its log")
        members = self._node.members.get(network.id)
        local = list(members.local.values()) if members else []
        asked = [
            remote_ipam.gateway_request(id, gateway)
            for id, gateway in zip(ipam.pools, network.gateways, strict=True)
        ]
        for text in remote_ipam.aux_names(network.options).values():
            pools = remote_ipam.pools_for(network, ipam, parse_address(text))
            asked += [remote_ipam.address_request(pool, text) for pool, _ in pools]
        for endpoint in local:
            for address in endpoint.addresses:
                pools = remote_ipam.pools_for(network, ipam, address)
                text = format_address(address)
                asked += [
                    remote_ipam.address_request(pool, text, endpoint.mac) for pool, _ in pools
                ]
        for body in asked:
            with contextlib.suppress(Refused):  # it remembers that one
                await self._ask(ipam.plugin, "RequestAddress", body)

    async def _replay(self) -> None:
        failed: set[str] = set()
        while True:
            left = False
            for network in list(self._node.catalogue.all()):
                members = self._node.members.get(network.id)
                if network.ipam is None or network.id in failed:
                    continue
                if network.creator != self._node.me and not (members and members.local):
                    continue
                try:
                    await self._ready(network, network.ipam)
                except VxmeshError as error:
                    log.warning("plugin.replay", network=network.id, error=str(error))
                    left = left or is_away(error)
                    if not is_away(error):
                        failed.add(network.id)
            if not left:
                return
            await asyncio.sleep(self._retry_every)

    # -- asking --

    async def _wants(self, plugin: str) -> Capabilities:
        """What a plugin wants; one that does not know the question wants nothing."""
        if plugin not in self._capabilities:
            try:
                answer = await self._ask(plugin, "GetCapabilities", {})
            except Refused as error:
                if not error.is_unknown:
                    raise
                answer = b""
            self._capabilities[plugin] = remote_ipam.parse_capabilities(answer, plugin)
        return self._capabilities[plugin]

    async def _ask(self, plugin: str, method: str, body: dict[str, Any]) -> bytes:
        return await self._plugins.call(plugin, f"{IPAM_DRIVER}.{method}", body)

    async def _obtain(self, plugin: str, method: str, body: dict[str, Any], back: Back) -> bytes:
        """Ask for something that is to be given back one day. If nobody waits any more when the
        answer comes, it is given back then."""
        call = f"{IPAM_DRIVER}.{method}"
        task = asyncio.create_task(self._plugins.call(plugin, call, body, self._late))
        within = self._plugins.within
        try:
            async with asyncio.timeout(within):
                return await asyncio.shield(task)
        except TimeoutError:
            self._keep(asyncio.create_task(self._give_back_late(plugin, task, back)))
            raise Timeout(
                f"plugin {plugin}",
                f"has not answered {call} after {within:g} s",
                "See the plugin's log, or start it anew",
            ) from None
        except asyncio.CancelledError:
            self._keep(asyncio.create_task(self._give_back_late(plugin, task, back)))
            raise

    async def _give_back_late(self, plugin: str, task: asyncio.Task[bytes], back: Back) -> None:
        try:
            step = back(plugin, await task)
        except VxmeshError as error:
            log.warning("plugin.late", plugin=plugin, error=str(error))
            return
        finally:
            task.cancel()
        if step:
            log.warning("plugin.late", plugin=plugin, undo=step.method)
            await self._ledger.add(f"late:{plugin}", step)
            self._undoer.wake()

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


Back = Callable[[str, bytes], Step | None]  # (plugin, answer) -> what gives back what it gave


def _owner(network: Network, address: str) -> str:
    return f"addr:{network.id}:{address}"


def _release_of(plugin: str, answer: bytes) -> Step:
    """What gives back the pool that RequestPool answered."""
    body = {"PoolID": remote_ipam.parse_pool_id(answer, plugin)}
    return Step(plugin, f"{IPAM_DRIVER}.ReleasePool", body)


def _address_back(asked: dict[str, Any]) -> Back:
    """For an answer to RequestAddress with this body; None if it gave nothing."""

    def back(plugin: str, answer: bytes) -> Step | None:
        said = remote_ipam.parse_said(answer, plugin)
        if not said:
            return None
        body = {"PoolID": asked["PoolID"], "Address": format_address(said)}
        return Step(plugin, f"{IPAM_DRIVER}.ReleaseAddress", body)

    return back
