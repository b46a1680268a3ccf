"""The NetworkDriver calls: an engine's networks and endpoints are made as ours.

libnetwork makes an endpoint (CreateEndpoint), asks for its interface (Join), moves that into the
container and gives it addresses and routes itself; so here an interface is handed out, and never
looked into. Egress and published ports are ours too: no endpoint asks for docker_gwbridge.
Source: libnetwork docs/remote.md. Opposite: server.py (HTTP), agent/operations.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from agent.api.docker.bindings import Bindings, Bound
from agent.api.docker.bodies import (
    FOLLOWS,
    GENERIC,
    ID,
    INTERNAL,
    IPV6,
    MTU,
    NETWORK,
    PORTS,
    CreateNetwork,
    Interface,
    OfEndpoint,
    OfNetwork,
    Pool,
    read,
)
from agent.api.docker.ipam import SPACE, Ipam
from agent.core.waysout import reached
from agent.errors import Conflict, Invalid, NotFound
from agent.model import AUX, Endpoint, Network, Publish
from agent.node import NodeState
from agent.notation import format_address, format_mac, holds, parse_address, parse_subnet
from agent.operations import Operations
from agent.requests import parse_endpoint, parse_network

LABEL = "docker.endpoint"  # of our endpoints: the engine's id
PROTOCOLS = {6: "tcp", 17: "udp"}  # IANA protocol numbers
# libnetwork resolvconf: whom containers ask where the host's resolv.conf names nobody.
DEFAULT_RESOLVERS = ("8.8.8.8", "8.8.4.4")
PREFIX = "eth"  # libnetwork appends a number


class Driver:
    """The methods have the names of the protocol's calls, and take and give its bodies."""

    def __init__(
        self, node: NodeState, operations: Operations, bindings: Bindings, ipam: Ipam
    ) -> None:
        self.node, self._operations = node, operations
        self._bindings, self._ipam = bindings, ipam
        self._joined: dict[str, str] = {}  # endpoints with routes to resolvers -> their namespace
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.resolv_conf = Path("/etc/resolv.conf")

    async def get_capabilities(self, _: bytes) -> dict[str, Any]:
        """Scope local: what ties the hosts together is our own, and no Swarm is needed."""
        return {"Scope": "local", "ConnectivityScope": "global"}

    async def create_network(self, body: bytes) -> dict[str, Any]:
        """Make a network, or bind the one that -o vxmesh.network names."""
        asked = read(body, CreateNetwork)
        if not asked.id:
            raise Invalid("NetworkID", "is missing")
        async with self._turn(asked.id):
            self._bindings.making.add(asked.id)
            try:
                return await self._create_network(asked)
            finally:
                self._bindings.making.discard(asked.id)

    async def _create_network(self, asked: CreateNetwork) -> dict[str, Any]:
        bound = self._bindings.all().get(asked.id)
        if bound and self.node.catalogue.get(bound.network):
            return {}  # it asks again, as it was not answered
        made = next((n for n in self.node.catalogue.all() if n.labels.get(ID) == asked.id), None)
        if made:  # by an agent that was killed before it had written that down
            await self._bindings.put(asked.id, Bound(made.id, made=True))
            return {}
        options = asked.options or {}
        given = {str(k): str(v) for k, v in (options.get(GENERIC) or {}).items()}
        pools = [*(asked.ipv4 or ()), *(asked.ipv6 or ())]
        wanted = given.pop(NETWORK, "")
        if wanted:
            network = self.node.find_network(wanted)
            self._operations.check_handed_out(network)
            for pool in pools:
                _check_pool(network, pool)
            await self._bindings.put(asked.id, Bound(network.id, made=bool(given.get(FOLLOWS))))
            return {}
        mtu = given.pop(MTU, "0")
        if not mtu.isdecimal():
            raise Invalid(f"option {MTU}={mtu[:20]}", "is no number", "Give bytes, as 1400")
        for pool in pools:
            given |= {AUX + name: a.partition("/")[0] for name, a in (pool.aux or {}).items()}
        spec = parse_network(
            f"docker-{asked.id[:12]}",
            subnets=[pool.pool for pool in pools],
            gateways=[pool.gateway.partition("/")[0] for pool in pools if pool.gateway],
            ip_ranges=[self._ipam.part_of([pool.pool for pool in pools]) or _upper_half(pools)],
            internal=bool(options.get(INTERNAL)),
            ipv6=bool(options.get(IPV6)),
            mtu=int(mtu),
            encrypted=given.pop("encrypted", "false").lower() in ("", "1", "true"),
            options=given,
            labels={ID: asked.id},
        )
        try:
            network = await self._operations.create_network(spec)
        except Conflict as error:
            # The engine knows this host's subnets only, and would choose the same one again.
            fix = "Give --ipam-driver vxmesh, which chooses one that no host uses, or --subnet"
            raise Conflict(error.what, error.why, fix) from None
        try:
            await self._bindings.put(asked.id, Bound(network.id, made=True))
        except OSError:
            await self._operations.remove_networks([network.id])
            raise
        return {}

    async def delete_network(self, body: bytes) -> dict[str, Any]:
        """Remove a network that was made for the engine's; one of -o vxmesh.network stays.

        InUse if it has endpoints, on whichever host; the engine forgets it all the same, and is
        given it again (mirror.py).
        """
        asked = read(body, OfNetwork)
        bound = self._bindings.get(asked.id)
        if bound.made and self.node.catalogue.get(bound.network):
            await self._operations.remove_networks([bound.network])
        await self._bindings.drop(asked.id)
        return {}

    async def create_endpoint(self, body: bytes) -> dict[str, Any]:
        """Make an endpoint with the addresses that the engine's IPAM chose."""
        asked = read(body, OfEndpoint)
        if not asked.id:
            raise Invalid("EndpointID", "is missing")
        async with self._turn(asked.id):
            return await self._create_endpoint(asked, asked.interface or Interface())

    async def _create_endpoint(self, asked: OfEndpoint, interface: Interface) -> dict[str, Any]:
        texts = [a.partition("/")[0] for a in (interface.address, interface.address6) if a]
        spec = parse_endpoint(
            f"docker-{asked.id[:12]}",
            addresses=texts,
            mac=interface.mac,
            labels={LABEL: asked.id},
        )
        spec = msgspec.structs.replace(spec, held=True)
        network = self._bindings.get(asked.network).network
        try:
            _, endpoint = self._find(asked)  # it asks again, as it was not answered
        except NotFound:
            endpoint, _ = await self._operations.hand_out(network, spec)
        if not set(spec.addresses) <= {*endpoint.addresses} or spec.mac not in (b"", endpoint.mac):
            raise Conflict(f"Docker's endpoint {asked.id[:12]}", "is there with other addresses")
        chosen: dict[str, str] = {}
        if not interface.mac:
            chosen["MacAddress"] = format_mac(endpoint.mac)
        found = self.node.find_network(network)
        for key, text, width in (("Address", interface.address, 4),
                                 ("AddressIPv6", interface.address6, 16)):  # fmt: skip
            own = next((a for a in endpoint.addresses if len(a) == width), None)
            if own and not text:
                chosen[key] = f"{format_address(own)}/{_prefix(found, own)}"
        return {"Interface": chosen}

    async def delete_endpoint(self, body: bytes) -> dict[str, Any]:
        """Remove an endpoint; no error if it went already, or the engine would keep it for ever."""
        asked = read(body, OfEndpoint)
        try:
            _, endpoint = self._find(asked)
        except NotFound:
            return {}
        await self._operations.remove_endpoints([endpoint.id])
        return {}

    async def endpoint_oper_info(self, body: bytes) -> dict[str, Any]:
        """Nothing but what the engine knows already."""
        self._find(read(body, OfEndpoint))
        return {"Value": {}}

    async def join(self, body: bytes) -> dict[str, Any]:
        """The interface that the engine is to move into the container, and its ways out."""
        asked = read(body, OfEndpoint)
        network, endpoint = self._find(asked)
        sandbox = self.node.sandboxes[endpoint.sandbox]
        joined: dict[str, Any] = {
            "InterfaceName": {"SrcName": sandbox.ifnames[0], "DstPrefix": PREFIX},
            "DisableGatewayService": True,
        }
        # Whichever network has the default route. Only once: of a second route to the same place
        # the kernel says that it exists, and the container would not start.
        if not self._has_another(asked.sandbox, endpoint.id):
            self._joined[endpoint.id] = asked.sandbox
            joined["StaticRoutes"] = _to_resolvers(network, endpoint, self._resolvers())
        if not network.internal:
            for gateway in reached(network, endpoint):
                joined["GatewayIPv6" if ":" in gateway else "Gateway"] = gateway
        return joined

    def _has_another(self, netns: str, endpoint: str) -> bool:
        """Whether a container has an endpoint of ours besides that one, by its namespace: one
        that joined just now, or one that the engine has told of."""
        self._joined = {id: at for id, at in self._joined.items() if self.node.local_endpoint(id)}
        if not netns:
            return False
        if any(at == netns and id != endpoint for id, at in self._joined.items()):
            return True
        own = _inode(netns)
        return any(
            endpoint not in sandbox.endpoints
            and (sandbox.moved_to == netns or own == sandbox.moved_inode != 0)
            for sandbox in self.node.sandboxes.values()
        )

    def _resolvers(self) -> list[str]:
        """The name servers that the engine's containers ask for what the engine does not know:
        as it does, those of the host without loopback addresses, or else Google's."""
        try:
            lines = self.resolv_conf.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        words = [line.split() for line in lines]
        found = [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]
        return [a for a in found if _is_elsewhere(a)] or list(DEFAULT_RESOLVERS)

    async def leave(self, body: bytes) -> dict[str, Any]:
        """The engine takes the interface out by itself, and the routes with it."""
        asked = read(body, OfEndpoint)
        with contextlib.suppress(NotFound):
            self._joined.pop(self._find(asked)[1].id, None)
        return {}

    async def program_external_connectivity(self, body: bytes) -> dict[str, Any]:
        """Publish the ports of -p."""
        asked = read(body, OfEndpoint)
        _, endpoint = self._find(asked)
        mapped = (asked.options or {}).get(PORTS) or []
        self._operations.publish(endpoint.id, [_publish(each) for each in mapped])
        await self._operations.done()
        return {}

    async def revoke_external_connectivity(self, body: bytes) -> dict[str, Any]:
        """Publish them no more."""
        try:
            _, endpoint = self._find(read(body, OfEndpoint))
        except NotFound:
            return {}
        self._operations.publish(endpoint.id, [])
        await self._operations.done()
        return {}

    async def discover_new(self, _: bytes) -> dict[str, Any]:
        """Other hosts are found by our own agents."""
        return {}

    discover_delete = discover_new

    def _turn(self, id: str) -> asyncio.Lock:
        """Of calls that make what has one id of the engine's: one at a time."""
        return self._turns.setdefault(id, asyncio.Lock())

    def _find(self, asked: OfEndpoint) -> tuple[Network, Endpoint]:
        network = self.node.find_network(self._bindings.get(asked.network).network)
        members = self.node.members.get(network.id)
        for endpoint in members.local.values() if members else ():
            if endpoint.labels.get(LABEL) == asked.id and endpoint.sandbox in self.node.sandboxes:
                return network, endpoint
        raise NotFound(f"Docker's endpoint {asked.id[:12]}", "is not known to this agent")


def _check_pool(network: Network, pool: Pool) -> None:
    """Invalid if the engine would give out addresses that are not the network's."""
    if pool.pool not in network.subnets:
        raise Invalid(
            f"subnet {pool.pool[:50]}",
            f"is not that of network {network.name}",
            "Give --subnet " + " --subnet ".join(network.subnets),
        )
    gateway = pool.gateway.partition("/")[0]
    if gateway and gateway not in network.gateways:
        raise Invalid(
            f"gateway {gateway[:50]}",
            f"is not that of network {network.name}",
            "Give --gateway " + " --gateway ".join(network.gateways),
        )


def _upper_half(pools: Iterable[Pool]) -> str:
    """Where we choose addresses if the engine's own IPAM does so too, from below; empty: anywhere.

    It takes the lowest one that is free, again and again, also if that was refused.
    """
    for pool in pools:
        if pool.address_space != SPACE and pool.pool:
            subnet = parse_subnet(pool.pool)
            if subnet.version == 4:
                return str(list(subnet.subnets())[1]) if subnet.prefixlen <= 29 else ""
    return ""


def _inode(netns: str) -> int:
    """What tells that namespace from others; 0 if it is not there."""
    try:
        return os.stat(netns).st_ino  # noqa: PTH116 (a file of the kernel's: does not block)
    except (OSError, ValueError):
        return 0


def _is_elsewhere(address: str) -> bool:
    try:
        return not ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _to_resolvers(
    network: Network, endpoint: Endpoint, resolvers: Iterable[str]
) -> list[dict[str, Any]]:
    """Routes of a container to the name servers that it asks, and in whose place ours answers. Of
    a network without a way out nothing else gets through."""
    gateways = {":" in gateway: gateway for gateway in reached(network, endpoint)}
    return [
        {"Destination": f"{a}/{128 if ':' in a else 32}", "RouteType": 0,
         "NextHop": gateways[":" in a]}
        for a in dict.fromkeys(resolvers)
        if (":" in a) in gateways and not holds(network.subnets, parse_address(a))
    ]  # fmt: skip


def _prefix(network: Network, address: bytes) -> int:
    parsed = ipaddress.ip_address(address)
    subnets = map(ipaddress.ip_network, network.subnets)
    return next((s.prefixlen for s in subnets if parsed in s), parsed.max_prefixlen)


def _publish(mapped: dict[str, Any]) -> Publish:
    protocol = PROTOCOLS.get(int(mapped.get("Proto") or 0), "")
    host, target = int(mapped.get("HostPort") or 0), int(mapped.get("Port") or 0)
    if not protocol:
        raise Invalid("a published port", "is neither TCP nor UDP", "Publish one of these")
    if not (0 < host < 65536 and 0 < target < 65536):
        raise Invalid("a published port", "has no number", "Give both, as -p 8080:80")
    address = str(mapped.get("HostIP") or "")
    return Publish(host, target, protocol, "" if address in ("0.0.0.0", "::") else address)
