"""The IpamDriver calls: subnets that no host uses, and addresses of our own ring.

An engine asks for a subnet before it makes the network with it, and for an address before it
makes the endpoint; between the two an address is held (NodeState.hold_address), so that no host
hands it out twice. A pool's id says which subnet it is, and of which network of ours if that is
there already: so equal requests have equal ids, and nothing has to be remembered over a restart.
Source: libnetwork docs/ipam.md. Opposite: driver.py, agent/operations.py.
"""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any, NamedTuple

from agent.api.docker.bodies import (
    ADDRESS_TYPE,
    GATEWAY,
    NETWORK,
    OfAddress,
    OfPool,
    RequestPool,
    read,
)
from agent.api.docker.keeping import Keeper
from agent.errors import Conflict, Invalid, NotFound, VxmeshError
from agent.model import Network
from agent.notation import format_address, holds, parse_address, parse_subnet
from agent.operations import Operations
from agent.subnets import first_gateway

SPACE = "vxmesh"
NEW = "new"  # in a pool's id: of a network that is made with it, and not before


class _Pool(NamedTuple):
    """What a pool's id says."""

    network: str  # id; NEW
    subnet: str  # CIDR
    part: str  # CIDR that addresses are chosen from; empty: all of it

    def __str__(self) -> str:
        return ",".join(self)


class Ipam:
    """The methods have the names of the protocol's calls, and take and give its bodies."""

    def __init__(self, operations: Operations, keeper: Keeper) -> None:
        self._operations, self._node = operations, operations.node
        self._keeper = keeper
        self._parts: dict[str, str] = {}  # subnet of a network to come -> its part
        self._chosen: set[str] = set()  # subnets of networks to come

    async def get_capabilities(self, _: bytes) -> dict[str, Any]:
        """A MAC is made from the address, and what was given out is remembered here."""
        return {"RequiresMACAddress": False, "RequiresRequestReplay": False}

    async def get_default_address_spaces(self, _: bytes) -> dict[str, Any]:
        """There is one, of the whole cluster."""
        return {"LocalDefaultAddressSpace": SPACE, "GlobalDefaultAddressSpace": SPACE}

    async def request_pool(self, body: bytes) -> dict[str, Any]:
        """The subnet that is asked for, that of a network of ours, or a free one."""
        asked = read(body, RequestPool)
        if asked.space not in ("", SPACE):
            raise Invalid(f"address space {asked.space[:40]!r}", "is unknown", f"Use {SPACE}")
        if asked.part and not asked.pool:
            raise Invalid(f"IP range {asked.part[:50]}", "needs its subnet", "Give --subnet too")
        subnet = str(parse_subnet(asked.pool)) if asked.pool else ""
        part = str(parse_subnet(asked.part)) if asked.part else ""
        if part and not _lies_in(part, subnet):
            raise Invalid(f"IP range {part}", f"is not in {subnet}", "Give a part of the subnet")
        wanted = (asked.options or {}).get(NETWORK, "")
        if wanted:
            network = self._node.find_network(wanted)
            pool = _Pool(network.id, _subnet_of(network, subnet, asked.ipv6), part)
        else:
            pool = _Pool(NEW, subnet or self._choose(6 if asked.ipv6 else 4), part)
            self._parts[pool.subnet] = part
        return {"PoolID": str(pool), "Pool": pool.subnet, "Data": {}}

    async def release_pool(self, body: bytes) -> dict[str, Any]:
        """The network is gone, or was never made; no error if the subnet is not known."""
        pool = _parse(read(body, OfPool).id)
        self._parts.pop(pool.subnet, None)
        self._chosen.discard(pool.subnet)
        return {}

    async def request_address(self, body: bytes) -> dict[str, Any]:
        """A free address, or the one that is asked for, held until its endpoint is made."""
        asked = read(body, OfAddress)
        pool = _parse(asked.pool)
        parsed = ipaddress.ip_network(pool.subnet)
        text = asked.address.partition("/")[0]
        address = parse_address(text) if text else b""
        if address and not holds([pool.subnet], address):
            raise Invalid(f"address {text}", f"is not in {pool.subnet}", "Give one that is")
        network = self._find(pool)
        if (asked.options or {}).get(ADDRESS_TYPE) == GATEWAY:
            found = _gateway(network, pool, text)
        elif network is None:
            if not address:
                raise NotFound(f"a network with subnet {pool.subnet}", "does not exist")
            found = text  # --aux-address; the driver is told of it with the network
        else:
            found = format_address(await self._hold(network, parsed.version, address))
        return {"Address": f"{found}/{parsed.prefixlen}", "Data": {}}

    async def _hold(self, network: Network, family: int, address: bytes) -> bytes:
        """Hold that address, or the one that who asks had before, or a free one."""
        if not address:
            used = self._node.addresses[network.id].space.used
            if had := await self._keeper.wanted(network.id, family, used):
                with contextlib.suppress(VxmeshError):  # somebody has it now
                    return await self._operations.hold_address(network.id, family, had)
        return await self._operations.hold_address(network.id, family, address)

    async def release_address(self, body: bytes) -> dict[str, Any]:
        """No error if nobody has it: its endpoint may have gone before."""
        asked = read(body, OfAddress)
        pool = _parse(asked.pool)
        network = self._find(pool)
        if network and asked.address:
            self._node.let_go(network.id, parse_address(asked.address.partition("/")[0]))
        return {}

    def part_of(self, subnets: list[str]) -> str:
        """What `--ip-range` said of a network that is made with these; empty: nothing."""
        return next((self._parts[s] for s in subnets if self._parts.get(s)), "")

    def _choose(self, family: int) -> str:
        self._chosen -= {s for n in self._node.catalogue.all() for s in n.subnets}
        subnet = self._node.choose_subnet(family, self._chosen)
        self._chosen.add(subnet)
        return subnet

    def _find(self, pool: _Pool) -> Network | None:
        """The network that a pool is of; None if it is not made yet, or gone."""
        if pool.network != NEW:
            return self._node.catalogue.get(pool.network)
        networks = sorted(self._node.catalogue.all(), key=lambda n: n.id)
        return next((n for n in networks if pool.subnet in n.subnets), None)


def _parse(id: str) -> _Pool:
    """Invalid if it is no pool's id of ours."""
    parts = id.split(",")
    if len(parts) != 3 or not parts[0]:
        raise Invalid(f"pool {id[:60]!r}", "is not known to this agent")
    parse_subnet(parts[1])
    return _Pool(*parts)


def _lies_in(part: str, subnet: str) -> bool:
    inner, outer = ipaddress.ip_network(part), ipaddress.ip_network(subnet)
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _subnet_of(network: Network, subnet: str, ipv6: bool) -> str:
    """That subnet of a network, or its first of the family; Invalid if it has no such."""
    fitting = [s for s in network.subnets if (":" in s) == ipv6]
    if subnet and subnet not in network.subnets:
        raise Invalid(
            f"subnet {subnet}",
            f"is not that of network {network.name}",
            "Give --subnet " + " --subnet ".join(network.subnets),
        )
    if not subnet and not fitting:
        raise Invalid(
            f"network {network.name}",
            f"has no IPv{6 if ipv6 else 4}",
            "Leave --ipv6 out" if ipv6 else "Give the --subnet of IPv6 that it has",
        )
    return subnet or fitting[0]


def _gateway(network: Network | None, pool: _Pool, wanted: str) -> str:
    """The gateway of a subnet: as its network has it, as is wanted, or the first address."""
    if network is None:
        return wanted or first_gateway(pool.subnet, ())
    has = network.gateways[network.subnets.index(pool.subnet)]
    if wanted and parse_address(wanted) != parse_address(has) and pool.network != NEW:
        raise Conflict(
            f"gateway {wanted}", f"is not that of network {network.name}", f"Give --gateway {has}"
        )
    return wanted if pool.network == NEW and wanted else has
