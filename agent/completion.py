"""What every changing call has in common: the parts that it stands on, whether something encrypted
can be here, addresses for an endpoint, and the end: written, and seen in the kernels.

What stands opposite: node.py (state), datapath/ (kernel), cluster/ (other nodes), store.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from agent.allocator import Donors, with_space
from agent.drivers.base import Stack
from agent.errors import Timeout, Unsupported
from agent.model import Endpoint, Network, Sandbox
from agent.node import NodeState
from agent.ports import PortHolder
from agent.requests import EndpointSpec, NetworkSpec

POLL = 0.02  # s


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
    ) -> tuple[Endpoint, str, tuple[str, ...]]:
        """Make an endpoint with the plugin's interface in `sandbox`, or leave nothing of it;
        what the interface is called there, and its gateways."""

    async def lead_out(self, sandbox: Sandbox, ifname: str, gateways: tuple[str, ...]) -> None:
        """Have a sandbox's default routes go by a plugin's interface, and no more by ours."""

    async def settle(self) -> None:
        """Have plugins undo what is not wanted any more."""


class IpamDriver(Protocol):
    """What remote/ offers for networks whose addresses a plugin gives out."""

    def pools(self, spec: NetworkSpec, id: str) -> AbstractAsyncContextManager[NetworkSpec]:
        """`spec` with its subnets; given back if what is done inside fails."""

    def addresses(
        self, network: Network, spec: EndpointSpec
    ) -> AbstractAsyncContextManager[EndpointSpec]:
        """`spec` with its addresses; given back if what is done inside fails."""


class Completion:
    """The parts of this node that a changing call needs, and how it ends."""

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
        self.ipam: IpamDriver | None = None
        # Returns when the name server has what was changed so far.
        self.names_settled: Callable[[], Awaitable[None]] | None = None
        self._host_sides = asyncio.Lock()  # the host's interface in a network is made once
        # Makes a workload's stack so that has no interface of ours; NotFound, OSError.
        self.furnish: Callable[[Stack], Awaitable[None]] | None = None

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

    async def check_encryption(self, encrypted: bool, what: str) -> None:
        """Unsupported if something encrypted cannot be on this host."""
        if not encrypted or self.encrypter is None:
            return
        try:
            await self.encrypter.require()
        except Unsupported as error:
            raise Unsupported(what, f"is encrypted, but {error.why}", error.fix) from None

    async def hold_address(self, network: str, family: int, address: bytes = b"") -> bytes:
        """Keep `address`, or a free one of `family`, for an endpoint that is to come."""
        found = self.node.find_network(network)
        return await with_space(
            self.node,
            self._cluster,
            lambda: self.node.hold_address(found.id, family, address),
        )

    async def allocate(self, network: str, spec: EndpointSpec, sandbox: str) -> Endpoint:
        """Make an endpoint, with addresses of whoever gives them out in its network."""
        async with self.addressed(self.node.find_network(network), spec) as own:
            return await with_space(
                self.node,
                self._cluster,
                lambda: self.node.create_endpoint(network, own, sandbox),
            )

    def addressed(
        self, network: Network, spec: EndpointSpec
    ) -> AbstractAsyncContextManager[EndpointSpec]:
        """`spec` with the addresses that a plugin gives, where they are its to give."""
        if network.ipam and self.ipam:
            return self.ipam.addresses(network, spec)
        return contextlib.nullcontext(spec)
