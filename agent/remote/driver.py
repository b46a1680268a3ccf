"""Networks and endpoints that plugins make: asked in order, and undone in the reverse one.

Every call that makes something is written down with what undoes it before it is made.
Source: libnetwork's docs/remote.md.
What stands opposite: undoing.py undoes, client.py asks, datapath/guests.py moves interfaces,
interfaceops.py calls.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

import msgspec

from agent.allocator import Donors, with_space
from agent.core.waysout import led_by, with_interface
from agent.drivers import remote
from agent.errors import Conflict, InUse, VxmeshError
from agent.model import Endpoint, Network, Sandbox, plugin_of
from agent.node import NodeState
from agent.remote.client import NETWORK_DRIVER, Plugins, Refused
from agent.remote.ledger import Step
from agent.remote.undoing import Undoer
from agent.requests import EndpointSpec


class Interfaces(Protocol):
    """What datapath/ offers."""

    async def move_in(
        self,
        sandbox: Sandbox,
        source: str,
        name: str,
        addresses: tuple[str, ...],
        mac: bytes,
        routes: tuple[tuple[str, str], ...],
    ) -> bytes:
        """Move a plugin's interface into a sandbox; its MAC."""

    async def lead_out(self, sandbox: Sandbox, name: str, gateways: tuple[str, ...]) -> None:
        """Have default routes of a sandbox go by an interface that was moved in."""

    async def move_out(self, netns: str, inode: int, name: str, source: str) -> None:
        """Give it back to the host under its old name; fine if it is gone."""

    async def show(self, path: str, netns: str) -> None:
        """Have a sandbox's namespace be found at another path too. OSError."""


class RemoteDriver:
    """All networks of this node that plugins drive."""

    def __init__(
        self,
        node: NodeState,
        donors: Donors,
        plugins: Plugins,
        undoer: Undoer,
        interfaces: Interfaces,
    ) -> None:
        self._node, self._donors = node, donors
        self._plugins, self._undoer, self._interfaces = plugins, undoer, interfaces
        self._ledger = undoer.ledger
        self._lock = asyncio.Lock()  # a network is made once

    async def settle(self) -> None:
        """Have plugins undo what is not wanted any more."""
        await self._undoer.settle()

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
            async with self._undoer.making(owner):
                body = remote.network_request(network)
                await self._do(owner, plugin, "CreateNetwork", body, "DeleteNetwork")

    async def attach(
        self, sandbox: Sandbox, network: Network, spec: EndpointSpec, ifname: str
    ) -> tuple[Endpoint, str, tuple[str, ...]]:
        """Make an endpoint with the plugin's interface in `sandbox`, or leave nothing of it;
        what the interface is called there, and its gateways, by which no default route goes yet:
        those are changed last, since what others have to lose is not put back by undoing."""
        await self.ensure_network(network)

        def reserve() -> list[Endpoint]:
            return self._node.reserve(network.id, [spec])

        [endpoint] = await with_space(self._node, self._donors, reserve)
        owner = f"ep:{network.id}:{endpoint.id}"
        try:
            async with self._undoer.making(owner):
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
            "SandboxKey": await self._key(owner, sandbox),
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

    async def _key(self, owner: str, sandbox: Sandbox) -> str:
        """Where a plugin finds a sandbox's namespace: where Docker's are, as some look for it
        there and nowhere else."""
        path = remote.sandbox_key(sandbox)
        await self._ledger.add(owner, Step("", "hide", {"path": path}))
        try:
            await self._interfaces.show(path, sandbox.netns)
        except OSError as error:
            raise Conflict(
                f"sandbox {sandbox.name}",
                f"cannot be shown to plugins at {path} ({error.strerror})",
                "See who has that path",
            ) from None
        return path

    async def lead_out(self, sandbox: Sandbox, ifname: str, gateways: tuple[str, ...]) -> None:
        """Have a sandbox's default routes go by a plugin's interface, and no more by ours."""
        await self._interfaces.lead_out(sandbox, ifname, gateways)

    # -- doing --

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


class _Unknown(VxmeshError):
    """The plugin does not know the method."""

    code = "UNIMPLEMENTED"
