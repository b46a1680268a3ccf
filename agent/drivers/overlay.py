"""The overlay driver: a bridge and a VXLAN device a network, rows for who lives elsewhere.

Learning is off and nothing is flooded (unless a network is to: flooding.py), so the rows written
here are the only way out of a host; ARP and ND are answered by the VXLAN device from the neighbour
rows. Every host answers for the gateway itself, each with a router MAC of its own.
Of an encrypted network rows lead to addresses inside WireGuard; see wireguard.py.
Source: RFC 7348; Linux drivers/net/vxlan (proxy, arp_reduce, neigh_reduce).
What stands opposite: datapath/reconciler.py makes it so.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping

from agent.core.members import Members
from agent.core.waysout import led_by, reached
from agent.drivers import wireguard
from agent.drivers.base import Bridge, Closed, Port, Rows
from agent.floodmodel import flood_rate
from agent.model import (
    SPOOF,
    VXLAN_OVERHEAD_V4,
    VXLAN_OVERHEAD_V6,
    Endpoint,
    Network,
    Node,
    Sandbox,
)
from agent.notation import format_address, holds, parse_address

UNDERLAY_MTU = 1500  # of a node that has not said
MTU_MIN_V4, MTU_MIN_V6 = 576 - VXLAN_OVERHEAD_V4, 1280  # bytes; the latter of RFC 8200, section 5
ROUTER_PREFIX = b"\x0a\x76"  # locally administered; no endpoint's MAC begins so


def mtu(network: Network, nodes: Iterable[Node], members: Collection[str] = ()) -> int:
    """The MTU of a network's interfaces: as asked, else what fits through every underlay; but no
    more than gets through the narrowest path between two of its `members` (node ids).

    All nodes come to the same: a frame that is larger than a device takes is dropped without a
    word, so one that sends has to know of the narrowest (docs/decisions/0019).
    """
    nodes = list(nodes)
    wanted = network.mtu or largest_mtu(network.encrypted, nodes)
    narrowest = [
        path.mtu - overhead(network.encrypted, node)
        for node in nodes
        if node.narrow and node.id in members
        for path in node.narrow
        if path.node in members
    ]
    if not narrowest:
        return wanted
    least = MTU_MIN_V6 if any(":" in subnet for subnet in network.subnets) else MTU_MIN_V4
    return min(wanted, max(min(narrowest), least))


def overhead(encrypted: bool, node: Node) -> int:
    """What is around a frame on its way to or from a node, bytes."""
    if encrypted:  # inside, the addresses are IPv6
        return wireguard.overhead([node.vtep]) + VXLAN_OVERHEAD_V6
    return VXLAN_OVERHEAD_V6 if ":" in node.vtep else VXLAN_OVERHEAD_V4


def largest_mtu(encrypted: bool, nodes: Iterable[Node]) -> int:
    """What fits through the underlays of all of `nodes`, bytes."""
    nodes = list(nodes)
    if encrypted:
        inside = wireguard.overhead(n.vtep for n in nodes) + VXLAN_OVERHEAD_V6
        return min(n.mtu or UNDERLAY_MTU for n in nodes) - inside
    return min((n.mtu or UNDERLAY_MTU) - overhead(False, n) for n in nodes)


def router_mac(network: str, node: str) -> bytes:
    """The MAC of a node's bridge in a network: its own, and the same after every restart.

    ROUTER_PREFIX, then four bytes that are the mark of a connection which came by this router
    (datapath/replies.py). In a mark the highest bit says whose it is; which byte has it depends
    on the machine, so here the first and the last have it.
    """
    digest = bytearray(hashlib.blake2s(f"{network}/{node}".encode(), digest_size=4).digest())
    digest[0] |= 0x80
    digest[3] |= 0x80
    return ROUTER_PREFIX + digest


def routers(network: str, vteps: Mapping[str, bytes]) -> dict[bytes, bytes]:
    """The MAC of each other node's bridge in a network, and the VTEP it is behind.

    Only where there are services is anything sent to them (datapath/replies.py).
    """
    return {router_mac(network, node): vtep for node, vtep in vteps.items()}


def bridge(
    network: Network,
    me: Node,
    nodes: Iterable[Node],
    ports: Mapping[str, Port],
    apart: frozenset[str] = frozenset(),
    members: Collection[str] = (),
) -> Bridge:
    """A network on this node, with these ports by endpoint.

    `apart` are those of its subnets that give way here to another network's, `members` the nodes
    (ids) between which its frames go.
    """
    return Bridge(
        network=network.id,
        vni=network.vni,
        device=f"vxb{network.vni}",
        vxlan=f"vxl{network.vni}",
        mtu=mtu(network, nodes, members),
        router_mac=router_mac(network.id, me.id),
        gateways=tuple(
            _interface(gateway, network.subnets)
            for gateway, subnet in zip(network.gateways, network.subnets, strict=True)
            if subnet not in apart
        ),
        subnets=network.subnets,
        internal=network.internal,
        vtep="" if network.encrypted else me.vtep,
        data_port=wireguard.data_port(me.data_port) if network.encrypted else me.data_port,
        ports=ports,
        apart=apart,
        encrypted=network.encrypted,
        asked=any(port.is_handed_out for port in ports.values()),
        spoof=network.options.get(SPOOF) == "allow",
        flood_rate=flood_rate(network),
    )


def port(network: Network, endpoint: Endpoint, sandbox: Sandbox, kind: str = "veth") -> Port:
    """The interface of an endpoint in its sandbox, of that kind of device."""
    position = sandbox.endpoints.index(endpoint.id)
    return Port(
        endpoint=endpoint.id,
        device=f"vxp{endpoint.id[:12]}",
        mac=endpoint.mac,
        addresses=tuple(_interface(format_address(a), network.subnets) for a in endpoint.addresses),
        netns=sandbox.netns,
        inode=sandbox.inode,
        ifname=sandbox.ifnames[position],
        gateways=led_by(sandbox, endpoint.id, reached(network, endpoint)),
        handed_on=tuple(
            family
            for family, default in ((4, sandbox.default), (6, sandbox.default6))
            if default not in ("", endpoint.id)
        ),
        moved=(sandbox.moved_to, sandbox.moved_inode, sandbox.moved_name)
        if sandbox.moved_to
        else None,
        kind=kind,
    )


def _interface(address: str, subnets: Iterable[str]) -> str:
    """`address` with the prefix length of the subnet that it is in."""
    parsed = ipaddress.ip_address(address)
    for text in subnets:
        subnet = ipaddress.ip_network(text)
        if parsed in subnet:
            return f"{address}/{subnet.prefixlen}"
    return f"{address}/{parsed.max_prefixlen}"


def rows(
    members: Members,
    vteps: Mapping[str, bytes],
    macs: Collection[bytes],
    addresses: Collection[bytes],
) -> Rows:
    """What the VXLAN device should hold for these keys: None where nothing, or a local one.

    `vteps` are the addresses to send to of the other nodes by id, 4 or 16 bytes: those of the
    underlay, or inside WireGuard. A node that has none gets no rows.
    """
    holders = zip(macs, members.with_macs(macs), strict=True)
    fdb = [(mac, vteps.get(member.node) if member else None) for mac, member in holders]
    holders = zip(addresses, members.with_addresses(addresses), strict=True)
    return Rows(
        fdb,
        [(a, m.endpoint.mac if m and m.node in vteps else None) for a, m in holders],
    )


def all_rows(members: Members, vteps: Mapping[str, bytes]) -> Rows:
    """Every row of a network; no value is None."""
    found = rows(members, vteps, members.by_mac.keys(), members.by_address.keys())
    return Rows([r for r in found.fdb if r[1]], [r for r in found.neighbours if r[1]])


def closed(me: Node, nodes: Iterable[Node], subnets: tuple[str, ...] = ()) -> Closed:
    """The ports of all agents, and where VXLAN is received.

    What a node states closes nothing that is not its own to close: of VXLAN's ports this node's
    counts alone (rows have no port, so what listens at another one has nothing to do with us),
    and of agents none whose address is in `subnets` (CIDR), those that lead to networks on this
    host and never out: a gateway there is where name servers are asked.
    """
    return Closed(
        carriers=frozenset((me.data_port,)),
        agents=frozenset(
            (address, port)
            for node in nodes
            for address in (node.address, node.vtep)
            if not _is_within(address, subnets)
            for port in (node.port, *node.closed)
        ),
        own=frozenset((me.port, *me.closed)),
    )


@functools.lru_cache(maxsize=8192)  # all nodes are looked at anew with each that comes
def _is_within(address: str, subnets: tuple[str, ...]) -> bool:
    return holds(subnets, parse_address(address))
