"""A small cluster as one node sees it, for hostile messages to arrive in.

What stands opposite: targets/, which let them arrive; `look` asks for all that may follow from
them: what users and metrics see, what the kernel and the name server are told.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec

from agent.api import convert
from agent.core.members import Member
from agent.core.names import Names
from agent.core.plumtree import Mesh
from agent.core.replica import Delta, Record
from agent.core.session import Hello, Session
from agent.model import Claims, Endpoint, Network, Node, Removal, Sandbox, encode
from agent.node import NodeState
from agent.plan import Plan
from agent.requests import parse_endpoint, parse_network
from agent.resolver import feed
from agent.servicemodel import Health, Service
from agent.views import CLAIMS, ENDPOINT, HEALTH, NETWORK, NODE, REMOVAL, SERVICE
from tests.fuzz.shapes import Known, struct

ME, PEER, THIRD, STRANGER = "aa00000000000001", "bb00000000000002", "cc00000000000003", "dd" * 8
NET, OTHER = "1111111111111111", "2222222222222222"
LOCAL, REMOTE = "e1" * 8, "e2" * 8
NOW = 1_700_000_000.0
TEXTS_AS_NODES = ("", "x", "y" * 300, "\x1b[2J", "aa")
KINDS: dict[str, type[msgspec.Struct]] = {
    NODE: Node, NETWORK: Network, ENDPOINT: Endpoint, CLAIMS: Claims, REMOVAL: Removal,
    SERVICE: Service, HEALTH: Health,
}  # fmt: skip
BEARS = {CLAIMS: "network", REMOVAL: "node", HEALTH: "endpoint"}  # the field with the key's id
NODES = (ME, PEER, PEER, THIRD, STRANGER)
IDS = {
    NODE: NODES, NETWORK: (NET, OTHER, "33" * 8), ENDPOINT: (LOCAL, REMOTE, "e3" * 8),
    CLAIMS: (NET, OTHER, "33" * 8), REMOVAL: NODES,
    SERVICE: ("51" * 8, "52" * 8), HEALTH: (LOCAL, REMOTE, "e3" * 8),
}  # fmt: skip
KNOWN = Known({
    "origin": NODES, "node": NODES, "requester": NODES, "remover": NODES,
    "target": (*NODES, 80, 8000),
    "by": NODES, "lost": NODES, "owner": NODES, "creator": NODES, "origins": NODES,
    "winner": (NET, OTHER), "network": (NET, OTHER), "networks": (NET, OTHER, "web"),
    "version": (0, 1, 2, 3, 5, 8, 13), "base": (0, 0, 0, 1, 2, 3), "upto": (1, 2, 3, 8, 100),
    "floor": (0, 0, 0, 1, 2), "family": (4, 4, 6), "state": (0, 1, 2, 3, 4, "healthy", "unhealthy"),
    "incarnation": (0, 1, 2, 1 << 20, (1 << 20) + 1, 3 << 20), "known": (0, 1, 2),
    "subnets": (("10.1.0.0/24",), ("10.1.0.0/16", "fd00:1::/64"), ()), "mtu": (0, 1450, 1500),
    "gateways": (("10.1.0.1",), ("10.1.0.1", "fd00:1::1"), ()), "ip_range": ("", "10.1.0.64/26"),
    "vni": (4096, 4097, 5000), "address": ("10.99.0.2", "fd99::2"), "vtep": ("10.99.0.2",),
    "port": (7946,), "data_port": (4789,), "since": (NOW,), "created": (NOW,), "when": (NOW,),
    "stamp": (0, int(NOW * 1000) << 16, (int(NOW * 1000) << 16) + 5), "sandbox": ("", "5b" * 8),
    "mode": ("vip", "dnsrr"), "vips": ((b"\x0a\1\0\5",), (b"\x0a\1\0\1",), ()),
    "kind": ("tcp", "http", "runtime", "none"), "interval": (0.1, 2.0), "timeout": (1.0,),
    "rise": (1, 3), "fall": (1, 2), "protocol": ("tcp", "udp"), "all_unhealthy": ("refuse", "all"),
    "published": (0, 8080, 8081), "published_at": ("", "10.99.0.1"), "affinity": (0.0, 60.0),
    "told": ("", "healthy", "unhealthy"), "service": ("51" * 8, "52" * 8), "path": ("", "/x"),
    "drain_timeout": (0.0, 5.0), "endpoint": (LOCAL, REMOTE), "weight": (1,),
    "born": (0, int(NOW * 1000) << 16), "what": ("name", "vni", "port"),
    "routes": ((), ("10.99.0.0/24",)),
})  # fmt: skip


def describe(id: str, name: str, number: int) -> Node:
    """A node that is as it should be."""
    address = f"10.99.0.{number}"
    return Node(id, name, address, 7946, address, 4789, "0.1.0", NOW, 1500, (), 1 << 20)


def bare(me: Node) -> NodeState:
    """A node that knows nothing."""
    return NodeState(me, lambda: NOW, random.Random(0))


def make(seed: int = 0, networks: int = 2) -> NodeState:
    """This node: it knows PEER and THIRD, and has two networks and an endpoint in a sandbox."""
    me = describe(ME, "h1", 1)
    state = NodeState(me, lambda: NOW, random.Random(seed))
    state.describe(me)
    for id, name, number in ((PEER, "h2", 2), (THIRD, "h3", 3)):
        records = [Record(NODE + id, 1, encode(describe(id, name, number)))]
        state.merge(Delta(id, 0, 1, records))
    ids = iter((NET, OTHER))
    original, state._new_id = state._new_id, lambda: next(ids)  # type: ignore[method-assign]
    if networks > 0:
        state.create_network(parse_network("web", subnets=["10.1.0.0/24", "fd00:1::/64"]))
    if networks > 1:
        state.create_network(parse_network("db", subnets=["10.2.0.0/24"]))
    state._new_id = lambda: LOCAL  # type: ignore[method-assign]
    if networks:
        state.create_endpoint(NET, parse_endpoint("one", addresses=["10.1.0.9"]), "5b" * 8)
        state.put_sandbox(
            Sandbox(
                "5b" * 8, "one", "/run/netns/x", 7, 0, 0, NOW, (LOCAL,), ("eth0",), (), "", LOCAL
            )
        )
    state._new_id = original  # type: ignore[method-assign]
    state.replica.publish(state.replica.written())
    return state


class Rtt:
    """No round trip time is known."""

    def rtt(self, node: str) -> float:
        """As convert.Health."""
        return 0.0


def look(state: NodeState, plan: Plan) -> None:
    """Ask for everything that follows from the node's records."""
    health = Rtt()
    for node in list(state.nodes.values()):
        convert.node(state, health, node)
    for network in list(state.catalogue.all()):
        convert.network(state, network, ranges=True)
    for service in list(state.services.all()):
        convert.service(state, service)
    plan.frontends()
    for members in list(state.members.values()):
        for member in list(members.all.values()):
            convert.endpoint(state, Member(member.endpoint, member.node))
    for conflict in sorted(state.catalogue.conflicts()):
        state.describe_conflict(conflict)
    for addresses in state.addresses.values():
        addresses.ring.check()
        for family in addresses.families():
            addresses.donors(family)
            addresses.pick(family)
    for vni in plan.bridges():
        plan.all_rows(vni)
    plan.forwards()
    plan.mark()
    resolve(state)


def resolve(state: NodeState) -> Names:
    """What the name server would hold, all of it gone through its feed."""
    shown = [n for n in state.catalogue.all() if n.id in state.members]
    endpoints = [m.endpoint for n in shown for m in state.members[n.id].all.values()]
    names = Names()
    for changes in feed.state_changes(feed.State(shown, endpoints, ())):
        back = feed.to_resolver_decoder.decode(bytes(feed.frame(changes)[4:]))
        assert isinstance(back, feed.Changes)
        for network in back.networks:
            names.put_network(network.id, network.name, network.subnets, network.internal)
        for row in back.endpoints:
            names.put(row.network, row.id, row.name, row.aliases, row.addresses)
    return names


def session(state: NodeState, peer: str, mesh: Mesh) -> Session:
    """A stream of this node on which `peer` has greeted."""
    rng = random.Random(peer)
    made = Session(state, Hello(state.me, "boot", "0.1.0", "h1"), rng, 0.0, mesh)
    made.receive(Hello(peer, "boot", "0.1.0", "h"), 0.0)
    mesh.up(made)
    return made


def records(rng: random.Random, first: int = 2) -> list[Record]:
    """Records that a hostile node may write, under rising versions."""
    found = []
    version = first
    for _ in range(rng.randrange(1, 6)):
        kind = rng.choice(list(KINDS))
        id = rng.choice(IDS[kind])
        body = b"" if rng.random() < 0.2 else encode(sound(kind, id, rng))
        found.append(Record(kind + id, version, body))
        version += rng.choice((1, 1, 1, 3))
    return found


def sound(kind: str, id: str, rng: random.Random) -> msgspec.Struct:
    """A struct for a key, which bears the id that the key has, nearly always."""
    made = struct(KINDS[kind], rng, KNOWN)
    if rng.random() < 0.05:
        return made
    changes: dict[str, object] = {BEARS.get(kind, "id"): id}
    if kind == ENDPOINT and rng.random() < 0.8:
        changes["mac"] = b"\2\0^\0S\1"
    if isinstance(made, Network) and rng.random() < 0.8:
        changes["gateways"] = ("10.1.0.1", "fd00:1::1")[: len(made.subnets)]
    return msgspec.structs.replace(made, **changes)


def delta(origin: str, found: Iterable[Record], base: int = 0) -> Delta:
    """A delta with just these records."""
    found = list(found)
    return Delta(origin, base, max((r.version for r in found), default=base), found)
