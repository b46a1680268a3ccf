"""agent/model.py's values as proto/types.proto's messages: what users see."""

from __future__ import annotations

import base64
import datetime
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

from cryptography import x509

from agent.core.bounds import clip_time
from agent.core.members import Member
from agent.core.pathmtu import Measure, State
from agent.core.paths import expected
from agent.core.services import Row, taking
from agent.core.tunnels import Tunnel
from agent.core.waysout import priorities
from agent.departures import Handover
from agent.drivers import bridge, overlay
from agent.drivers.wireguard import key_address
from agent.encryption import without_key
from agent.lanmodel import is_on_lan
from agent.model import BRIDGE, REMOTE, Network, Node, Publish, Sandbox
from agent.node import NodeState, expelled_error
from agent.notation import format_address, format_mac
from agent.requests import IPAM_OURS
from agent.rpc import control_pb2 as control
from agent.rpc import types_pb2 as pb
from agent.servicemodel import UNKNOWN, Service
from agent.views import Status

# What was measured of the paths from this node, by the node at the other end.
Measures = Callable[[], Mapping[str, Measure]]

_MOST = (1 << 64) - 1  # an IPv6 subnet can have more addresses than a field holds


class Health(Protocol):
    """What cluster/ measures of other nodes."""

    def rtt(self, node: str) -> float:
        """Seconds."""


def time_text(seconds: float) -> str:
    """RFC 3339 in UTC."""
    moment = datetime.datetime.fromtimestamp(clip_time(seconds), datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def node(state: NodeState, health: Health, value: Node) -> pb.Node:
    """A node."""
    status = _status(state, value.id)
    host = f"[{value.address}]" if ":" in value.address else value.address
    count = sum(members.count.get(value.id, 0) for members in state.members.values())
    return pb.Node(
        id=value.id,
        name=value.name,
        address=f"{host}:{value.port}",
        vtep=value.vtep,
        state=status.state,
        reason=status.reason,
        incarnation=status.incarnation or value.incarnation,
        version=value.version,
        endpoints=count,
        rtt_ms=round(health.rtt(value.id) * 1000, 3),
        since=time_text(value.since),
        mtu=value.mtu,
        routes=value.routes,
        keeper=state.is_keeper(value),
        certificate_ends=_certificate_ends(value.certificate),
        trust=value.trust,
        wireguard=[
            pb.WireguardKey(
                public_key=base64.b64encode(key.public).decode(),
                port=key.port,
                generation=key.generation,
                address=format_address(key_address(value.id, key)),
            )
            for key in value.wireguard
        ],
    )


def paths(
    state: NodeState, measures: Measures, tunnels: Mapping[str, Tunnel], value: Node
) -> list[pb.Path]:
    """The paths from this node, if that is it; else the one to a node, and its own narrow ones."""
    me, nodes = state.nodes[state.me], state.nodes
    measured = measures()
    found = [
        pb.Path(
            from_node=me.name,
            to_node=nodes[id].name,
            mtu=measured[id].mtu,
            expected=measured[id].expected,
            state=measured[id].state.value,
            tunnel=tunnels.get(id, Tunnel.UNKNOWN).value,
        )
        for id in (measured if value.id == me.id else [value.id])
        if id in measured and id in nodes
    ]
    found.sort(key=lambda path: path.to_node)
    if value.id != me.id:
        found += [
            pb.Path(
                from_node=value.name,
                to_node=state.node_name(path.node),
                mtu=path.mtu,
                expected=expected(value, nodes[path.node]),
                state=State.NARROW.value,
            )
            for path in value.narrow
            if path.node in nodes
        ]
    return found


@functools.lru_cache(maxsize=4096)  # they are parsed anew at each look, and seldom change
def _certificate_ends(certificate: bytes) -> str:
    try:
        found = x509.load_der_x509_certificate(certificate)
    except ValueError:
        return ""
    return time_text(found.not_valid_after_utc.timestamp())


def _status(state: NodeState, node: str) -> Status:
    if node == state.me and state.expelled:
        why = expelled_error(state.expelled).why
        return Status("removed", why, state.expelled.when)
    return state.condition(node)


def handover(state: NodeState, value: Handover) -> control.Handover:
    """What a node that left gave to another."""
    return control.Handover(
        network=state.catalogue.name(value.network),
        node=state.node_name(value.to),
        addresses=str(value.addresses),
    )


def network(state: NodeState, value: Network, ranges: bool = False) -> pb.Network:
    """A network; with `ranges`, who owns which of its addresses."""
    members = state.members.get(value.id)
    message = pb.Network(
        id=value.id,
        name=value.name,
        driver=value.driver,
        subnets=value.subnets,
        gateways=value.gateways,
        ip_range=value.ip_range,
        ip_ranges=value.ranges,
        vni=value.vni,
        mtu=_mtu(state, value),
        internal=value.internal,
        encrypted=value.encrypted,
        options=value.options,
        labels=value.labels,
        created=time_text(value.created),
        creator=state.node_name(value.creator),
        endpoints=len(members.all) if members else 0,
        conflict="; ".join(map(state.describe_conflict, state.catalogue.conflicts_of(value.id))),
        without_key=map(state.node_name, without_key(state, value.id)),
        ipam_driver=f"{REMOTE}{value.ipam.plugin}" if value.ipam else IPAM_OURS,
    )
    addresses = state.addresses.get(value.id)
    if addresses:
        counts = [addresses.space.usage(family) for family in addresses.families()]
        total, used = max(counts, key=lambda c: (c[1] / max(c[0], 1), -c[0]), default=(0, 0))
        message.total, message.used = min(total, _MOST), min(used, _MOST)
        message.free = min(total - used, _MOST)
    if ranges and addresses:
        for family in addresses.families():
            usage = addresses.usage(family)
            for owner, (owned, taken) in usage.owned.items():
                message.usage.add(
                    node=state.node_name(owner),
                    family=family,
                    owned=min(owned, _MOST),
                    used=min(taken, _MOST),
                )
        for segment in addresses.ring.segments():
            message.ranges.add(
                first=format_address(segment.start),
                last=format_address(segment.end),
                node=state.node_name(segment.owner),
            )
    return message


def _mtu(state: NodeState, value: Network) -> int:
    """Of a network's interfaces; 0: on each host what the parent has there."""
    if is_on_lan(value):
        return value.mtu
    if value.driver == BRIDGE:
        return bridge.mtu(value, state.nodes.get(value.creator))
    return overlay.mtu(value, state.nodes.values(), state.partakers(value.id))


def endpoint(state: NodeState, value: Member) -> pb.Endpoint:
    """An endpoint."""
    held = value.endpoint
    if value.node in state.withdrawn:
        condition = "unreachable"  # with its node: its rows and names are taken back
    else:
        condition = "up" if held.sandbox else "announced"
    health = state.health_of(value)
    return pb.Endpoint(
        id=held.id,
        name=held.name,
        aliases=held.aliases,
        network=state.catalogue.name(held.network),
        network_id=held.network,
        node=state.node_name(value.node),
        sandbox=held.sandbox,
        mac=format_mac(held.mac),
        addresses=[format_address(a) for a in held.addresses],
        labels=held.labels,
        health=health.state if health else UNKNOWN,
        state=condition,
        health_reason=health.reason if health else "",
        health_since=time_text(health.since) if health else "",
    )


def service(state: NodeState, value: Service) -> pb.Service:
    """A service, with its backends as they are now."""
    found = state.backends_of(value, state.clock())
    takes = {row.endpoint.id for row in taking(value, found)}
    conflicts = state.services.conflicts_of(value.id)
    return pb.Service(
        id=value.id,
        name=value.name,
        network=state.catalogue.name(value.network),
        network_id=value.network,
        vips=map(format_address, value.vips),
        mode=value.mode,
        ports=[
            pb.ServicePort(
                port=port.port,
                target=port.target,
                protocol=port.protocol,
                published=port.published,
                published_at=port.published_at,
            )
            for port in value.ports
        ],
        selector=value.selector,
        affinity="client" if value.affinity else "none",
        affinity_timeout=value.affinity,
        health=pb.HealthCheck(
            kind=value.health.kind,
            path=value.health.path,
            port=value.health.port,
            interval=value.health.interval,
            timeout=value.health.timeout,
            rise=value.health.rise,
            fall=value.health.fall,
        ),
        publish_on=sorted(map(state.node_name, value.publish_on)),
        prefer_local=value.prefer_local,
        all_unhealthy=value.all_unhealthy,
        drain_timeout=value.drain_timeout,
        labels=value.labels,
        backends=[
            _backend(state, row, row.endpoint.id in takes)
            for row in sorted(found, key=lambda row: (row.endpoint.name, row.endpoint.id))
        ],
        created=time_text(value.created),
        creator=state.node_name(value.creator),
        state="up" if takes else "down" if found else "empty",
        conflict="; ".join(map(state.describe_service_conflict, conflicts)),
    )


def _backend(state: NodeState, row: Row, takes: bool) -> pb.Backend:
    addresses = [format_address(address) for address in row.endpoint.addresses]
    condition = "unreachable" if row.is_gone else "draining" if row.draining else "active"
    return pb.Backend(
        endpoint=row.endpoint.name,
        endpoint_id=row.endpoint.id,
        node=state.node_name(row.node),
        address=addresses[0] if addresses else "",
        addresses=addresses,
        weight=row.weight,
        health=row.health,
        state=condition,
        takes=takes,
        reason=row.why,
        since=time_text(row.since) if row.draining else "",
    )


def publish(value: Publish) -> pb.Publish:
    """A published port."""
    return pb.Publish(
        host_address=value.host_address,
        host_port=value.host_port,
        target_port=value.target_port,
        protocol=value.protocol,
    )


def sandbox(state: NodeState, value: Sandbox, resolv_conf: str) -> pb.Sandbox:
    """A sandbox of this node."""
    held = [state.local_endpoint(id) for id in value.endpoints]
    return pb.Sandbox(
        id=value.id,
        name=value.name,
        node=state.node_name(state.me),
        netns=value.netns,
        pid=value.pid,
        state="running",
        created=time_text(value.created),
        endpoints=[endpoint(state, Member(e, state.me)) for e in held if e],
        publishes=[publish(p) for p in value.publishes],
        resolv_conf=resolv_conf,
        log=value.log,
        interfaces=[
            pb.Interface(
                name=ifname,
                endpoint=id,
                network=state.catalogue.name(state.network_of(id)),
                priority=priority,
                default_routes=[
                    family
                    for family, led in (("ipv4", value.default), ("ipv6", value.default6))
                    if led == id
                ],
            )
            for id, ifname, priority in zip(
                value.endpoints, value.ifnames, priorities(value), strict=True
            )
        ],
        stack=value.stack,
    )
