"""Services as frontends: what this host is to balance, and to which backends. PURE.

What stands opposite: core/services.py, which says how backends are; drivers/balancing.py, which
says which slot leads to which; agent/plan.py asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.core.services import Row, taking
from agent.drivers.balancing import Backend, Frontend
from agent.drivers.marks import is_barred
from agent.model import OVERLAY, Network, Node
from agent.notation import holds, masked, parse_address
from agent.servicemodel import Port, Service


def frontends(
    service: Service,
    network: Network,
    rows: Sequence[Row],
    nodes: Iterable[Node],
    me: str,
    taken: Sequence[str] = (),
) -> list[Frontend]:
    """One for each port and family of addresses, on the host of node `me`.

    A backend is led to at an address of its network, or at that of its own node if it is in that
    one's stack; never at one in `taken`, the subnets (CIDR) of networks here, by the latter.
    A backend that takes no new connections is draining there: those that it has go on, also of
    one that is unhealthy for now. One that is gone, or was drained long enough, is left out.
    """
    ready = {row.endpoint.id for row in taking(service, rows)}
    living = [row for row in rows if not row.is_gone and not row.is_over]
    gateways = {parse_address(gateway) for gateway in network.gateways}
    others: set[bytes] = set()
    outside = elsewhere(network, living)
    vteps: dict[str, bytes] = {}
    if outside or any(port.published_at for port in service.ports):
        known = list(nodes)  # else not a look at every node
        others = {parse_address(node.address) for node in known if node.id != me}
        vteps = _stacks(network, known, me, taken)
    is_published = not service.publish_on or me in service.publish_on
    found = []
    for version, width in ((4, 4), (6, 16)):
        if not any((":" in subnet) == (version == 6) for subnet in network.subnets):
            continue
        vip = next((vip for vip in service.vips if len(vip) == width), b"")
        if vip and (vip in gateways or not holds(network.subnets, vip)):
            vip = b""  # of a hostile record: who has the gateway's has all that leaves
        ports: dict[tuple[str, int], list[Port]] = {}
        for port in service.ports:
            ports.setdefault((port.protocol, port.port), []).append(port)
        for (protocol, number), same in ports.items():
            published = tuple(
                (at, port.published)
                for port in same
                if port.published and is_published
                for at in [parse_address(port.published_at) if port.published_at else b""]
                if (not at or len(at) == width) and at not in others
            )
            if not vip and not published:
                continue
            backends = tuple(
                Backend(
                    address, same[0].target, row.weight, row.endpoint.id,
                    draining=row.endpoint.id not in ready, outside=row.endpoint.id in outside,
                )
                for row in living
                for address in [a for a in row.endpoint.addresses if len(a) == width][:1]
                if not is_barred(address) and address not in gateways
                and (row.endpoint.id not in outside or vteps.get(row.node) == address)
            )  # fmt: skip
            found.append(
                Frontend(
                    service.id,
                    network.id,
                    network.vni,
                    "udp" if protocol == "udp" else "tcp",
                    vip,
                    number,
                    backends,
                    affinity=service.affinity,
                    published=published,
                    prefer_local=service.prefer_local,
                    version=6 if version == 6 else 4,
                )
            )
    return found


def elsewhere(network: Network, rows: Iterable[Row]) -> set[str]:
    """The endpoints (ids) that have an address in no subnet of their network.

    Those in their nodes' own stacks, and what a hostile record says: led there, this host would
    reach for others what only it may.
    """
    masks = [masked(subnet) for subnet in network.subnets]
    return {
        row.endpoint.id
        for row in rows
        for address in row.endpoint.addresses
        for number in [int.from_bytes(address, "big")]
        if not any(len(address) == w and number & mask == start for w, mask, start in masks)
    }


def _stacks(
    network: Network, nodes: Sequence[Node], me: str, taken: Sequence[str]
) -> dict[str, bytes]:
    """Node id -> the address of its own stack, where that may be a backend's in this network.

    Ours is ours, whatever another node says of itself.
    """
    if network.driver != OVERLAY or network.internal or network.encrypted:
        return {}
    found = {node.id: parse_address(node.vtep) for node in nodes}
    mine = {parse_address(a) for node in nodes if node.id == me for a in (node.vtep, node.address)}
    return {
        id: address
        for id, address in found.items()
        if id == me or (address not in mine and not holds(taken, address))
    }
