"""Networks and endpoints that plugins make: asked in order, and undone in the reverse one.

Every call that makes something is written down with what undoes it before it is made, so that
whatever goes wrong, in the plugin or in this agent, is undone: at once, or when the plugin is
back. What is not in the node's records any more is undone in just the same way.
Source: libnetwork's docs/remote.md.
What stands opposite: client.py asks, datapath/guests.py moves interfaces, operations.py calls.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

import msgspec
import structlog

from agent.allocator import Donors, with_space
from agent.core.waysout import led_by, with_interface
from agent.drivers import remote
from agent.errors import InUse, VxmeshError
from agent.model import Endpoint, Network, Sandbox, plugin_of
from agent.node import NodeState
from agent.remote.client import NETWORK_DRIVER, Plugins, Refused, is_away
from agent.remote.ledger import Ledger, Step
from agent.requests import EndpointSpec

log = structlog.get_logger()

RETRY_EVERY = 5.0  # s between two tries to undo what a plugin did not


class Interfaces(Protocol):
    """What datapath/ offers."""

    async def move_in(
        self,
        sandbox: Sandbox,
        source: str,
        name: str,
        addresses: tuple[str, ...],
        mac: bytes,
        gateways: tuple[str, ...],
        routes: tuple[tuple[str, str], ...],
    ) -> bytes:
        """Move a plugin's interface into a sandbox; its MAC."""

    async def lead_out(self, sandbox: Sandbox, name: str, gateways: tuple[str, ...]) -> None:
        """Have default routes of a sandbox go by an interface that was moved in."""

    async def move_out(self, netns: str, inode: int, name: str, source: str) -> None:
        """Give it back to the host under its old name; fine if it is gone."""


class RemoteDriver:
    """All networks of this node that plugins drive."""

    def __init__(
        self,
        node: NodeState,
        donors: Donors,
        plugins: Plugins,
        ledger: Ledger,
        interfaces: Interfaces,
        retry_every: float = RETRY_EVERY,
    ) -> None:
        self._node, self._donors = node, donors
        self._plugins, self._ledger, self._interfaces = plugins, ledger, interfaces
        self._retry_every = retry_every
        self._busy: set[str] = set()  # owners that are being made or undone
        self._lock = asyncio.Lock()  # a network is made once
        self._settling = asyncio.Lock()  # who asks to settle waits for what another has begun
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        node.listeners.append(lambda change: self._wake.set())

    def start(self) -> None:
        """Begin to undo what is not wanted any more."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop; what is left is undone by the next agent."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def ensure_network(self, network: Network) -> None:
        """Have the plugin make a network on this host, if it has not yet.

        InUse if the plugin's networks do not span hosts and this one is another host's.
        """
        plugin, owner = plugin_of(network), f"net:{network.id}"
        async with self._lock:
            if owner in self._ledger.steps:
                return
            answer = await self._ask(plugin, "GetCapabilities", {})
            scope = remote.parse_scope(answer, plugin)
            if scope == "local" and network.creator != self._node.me:
                raise InUse(
                    f"network {network.name}",
                    f"is local to {self._node.node_name(network.creator)}, as plugin {plugin} "
                    "has it",
                    "Make endpoints there, or a network here",
                )
            async with self._making(owner):
                body = remote.network_request(network)
                await self._do(owner, plugin, "CreateNetwork", body, "DeleteNetwork")

    async def attach(
        self, sandbox: Sandbox, network: Network, spec: EndpointSpec, ifname: str
    ) -> tuple[Endpoint, str, tuple[str, ...]]:
        """Make an endpoint with the plugin's interface in `sandbox`, or leave nothing of it;
        what the interface is called there, and its gateways."""
        await self.ensure_network(network)

        def reserve() -> list[Endpoint]:
            return self._node.reserve(network.id, [spec])

        [endpoint] = await with_space(self._node, self._donors, reserve)
        owner = f"ep:{network.id}:{endpoint.id}"
        try:
            async with self._making(owner):
                return await self._connect(owner, sandbox, network, endpoint, spec, ifname)
        except BaseException:
            if not self._node.is_committed(endpoint.id):
                self._node.cancel([endpoint])
            raise

    async def _connect(
        self,
        owner: str,
        sandbox: Sandbox,
        network: Network,
        endpoint: Endpoint,
        spec: EndpointSpec,
        ifname: str,
    ) -> tuple[Endpoint, str, tuple[str, ...]]:
        plugin, mac = plugin_of(network), spec.mac
        body = remote.endpoint_request(network, endpoint, mac)
        answer = await self._do(owner, plugin, "CreateEndpoint", body, "DeleteEndpoint")
        mac = remote.parse_created(answer, plugin, network, body["Interface"]) or mac
        body = {
            **remote.ids(network.id, endpoint.id),
            "SandboxKey": sandbox.netns,
            "Options": {},
        }
        answer = await self._do(owner, plugin, "Join", body, "Leave")
        joined = remote.parse_join(answer, plugin)
        name = ifname or remote.free_name(sandbox, joined.prefix)
        there = with_interface(sandbox, endpoint.id, name, spec.priority)
        there = msgspec.structs.replace(there, lent={**sandbox.lent, endpoint.id: joined.gateways})
        led = led_by(self._node.with_ways(there), endpoint.id, joined.gateways)
        if joined.source:
            place = {"netns": sandbox.netns, "inode": sandbox.inode}
            step = Step("", "move_out", {**place, "name": name, "source": joined.source})
            await self._ledger.add(owner, step)
            mac = await self._interfaces.move_in(
                sandbox,
                joined.source,
                name,
                tuple(remote.with_prefix(network, a) for a in endpoint.addresses),
                mac,
                led,
                joined.routes,
            )
        if led and sandbox.publishes:
            body = {
                **remote.ids(network.id, endpoint.id),
                "Options": remote.connectivity_options(sandbox.publishes),
            }
            with contextlib.suppress(_Unknown):
                await self._do(
                    owner,
                    plugin,
                    "ProgramExternalConnectivity",
                    body,
                    "RevokeExternalConnectivity",
                )
        endpoint = self._node.amend(endpoint, mac or endpoint.mac, sandbox.id)
        self._node.commit([endpoint])
        return endpoint, name, joined.gateways

    async def lead_out(self, sandbox: Sandbox, ifname: str, gateways: tuple[str, ...]) -> None:
        """Have a sandbox's default routes go by a plugin's interface, and no more by ours."""
        await self._interfaces.lead_out(sandbox, ifname, gateways)

    # -- doing and undoing --

    async def _ask(self, plugin: str, method: str, body: dict[str, Any]) -> bytes:
        return await self._plugins.call(plugin, f"{NETWORK_DRIVER}.{method}", body)

    async def _do(
        self, owner: str, plugin: str, method: str, body: dict[str, Any], undo: str
    ) -> bytes:
        """Call, with what undoes it written down first. What a plugin refused it has not done."""
        named: dict[str, Any] = {
            key: body[key] for key in ("NetworkID", "EndpointID") if key in body
        }
        step = Step(plugin, f"{NETWORK_DRIVER}.{undo}", named)
        await self._ledger.add(owner, step)
        try:
            return await self._ask(plugin, method, body)
        except Refused as error:
            await self._ledger.drop(owner, step)
            if error.is_unknown:
                raise _Unknown(error.what, error.why, error.fix) from None
            raise

    @contextlib.asynccontextmanager
    async def _making(self, owner: str) -> Any:
        """What is made inside is undone if that fails, or whoever asked goes away."""
        self._busy.add(owner)
        try:
            yield
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._undo(owner)))
            raise
        finally:
            self._busy.discard(owner)
            self._wake.set()

    async def _undo(self, owner: str) -> bool:
        """Undo an owner's steps, last one first; False if the plugin is away: then the rest
        waits, as it may rest on it."""
        for step in reversed(self._ledger.steps.get(owner, ())):
            try:
                if step.plugin:
                    await self._plugins.call(step.plugin, step.method, step.body)
                else:
                    await self._interfaces.move_out(**step.body)
            except OSError as error:
                log.warning("plugin.interface_kept", owner=owner, error=str(error))
            except VxmeshError as error:
                log.warning("plugin.undo", owner=owner, method=step.method, error=str(error))
                if is_away(error):
                    return False
            await self._ledger.drop(owner, step)
        return True

    def _is_wanted(self, owner: str) -> bool:
        kind, network, *rest = owner.split(":")
        if kind == "net":
            prefix = f"ep:{network}:"
            return self._node.catalogue.get(network) is not None or any(
                other.startswith(prefix) for other in self._ledger.steps
            )
        return self._node.local_endpoint(rest[0]) is not None

    async def settle(self) -> None:
        """Undo all that is not wanted, as far as plugins answer: also what is being undone now."""
        async with self._settling:
            for kind in ("ep:", "net:"):  # a network goes after its endpoints
                for owner in list(self._ledger.steps):
                    if not owner.startswith(kind) or owner in self._busy or self._is_wanted(owner):
                        continue
                    self._busy.add(owner)
                    try:
                        await self._undo(owner)
                    finally:
                        self._busy.discard(owner)

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            await self.settle()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_every):
                    await self._wake.wait()


class _Unknown(VxmeshError):
    """The plugin does not know the method."""

    code = "UNIMPLEMENTED"
