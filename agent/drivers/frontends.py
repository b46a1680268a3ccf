"""Services as frontends: what this host is to balance, and to which backends. PURE.

What stands opposite: core/services.py, which says how backends are; drivers/balancing.py, which
says which slot leads to which; agent/plan.py asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.core.services import Row, taking
from agent.drivers.balancing import Backend, Frontend
from agent.model import Network, Node, holds, parse_address
from agent.servicemodel import Port, Service


def frontends(
    service: Service, network: Network, rows: Sequence[Row], nodes: Iterable[Node], me: str
) -> list[Frontend]:
    """One for each port and family of addresses, on the host of node `me`.

    A backend that takes no new connections is draining there: those that it has go on, also of
    one that is unhealthy for now. One that is gone, or was drained long enough, is left out.
    """
    ready = {row.endpoint.id for row in taking(service, rows)}
    living = [row for row in rows if not row.is_gone and not row.is_over]
    gateways = {parse_address(gateway) for gateway in network.gateways}
    others: set[bytes] = set()
    if any(port.published_at for port in service.ports):  # else not a look at every node
        others = {parse_address(node.address) for node in nodes if node.id != me}
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
                    draining=row.endpoint.id not in ready,
                )
                for row in living
                for address in [a for a in row.endpoint.addresses if len(a) == width][:1]
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
