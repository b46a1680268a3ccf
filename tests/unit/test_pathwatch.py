"""What follows from narrow paths: records, the MTU of networks on each host, events."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from agent.core.pathmtu import Measure, State
from agent.core.paths import Found
from agent.core.replica import Delta
from agent.core.tunnels import Tunnel, Turn
from agent.drivers import overlay
from agent.model import Narrow, Network, Node, Notice, Sandbox
from agent.node import NodeState
from agent.pathwatch import PathWatch, keep_known
from agent.plan import Plan, Touched
from agent.requests import parse_endpoint, parse_network
from agent.views import Change

IDS = {name: str(number) * 16 for number, name in enumerate(("h1", "h2", "h3"), 1)}
UNKNOWN = Measure(State.UNKNOWN, 0, 1500)


@dataclass
class Host:
    state: NodeState
    plan: Plan
    touched: list[Touched] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def heard(self, change: Change) -> None:
        self.touched.append(self.plan.touched(change))
        self.notices += change.notices


class World:
    """Three nodes that hear all of each other at once when told to, with network web."""

    def __init__(self, *options: str, underlay: str = "10.99.0.", **more: object) -> None:
        self.hosts: dict[str, Host] = {}
        for name, id in IDS.items():
            address = f"{underlay}{name[1]}"
            me = Node(id, name, address, 7946, address, 4789, "0", 0.0, 1500)
            state = NodeState(me, lambda: 1.0, random.Random(int(name[1])))
            state.describe(me)
            host = self.hosts[name] = Host(state, Plan(state))
            state.listeners.append(host.heard)
        spec = parse_network("web", subnets=list(options) or ["10.1.0.0/24"], **more)  # type: ignore[arg-type]
        self.web: Network = self.hosts["h1"].state.create_network(spec)
        self.spread()
        for name in ("h2", "h3"):
            self.hosts["h1"].state.donate(self.web.id, IDS[name], 4, [])
            self.hosts["h1"].state.donate(self.web.id, IDS[name], 6, [])
        self.spread()

    def spread(self) -> None:
        for one in self.hosts.values():
            one.state.replica.publish(one.state.replica.written())
            for other in self.hosts.values():
                if other is not one:
                    known = other.state.version(one.state.me)
                    records = one.state.since(one.state.me, known)
                    delta = Delta(one.state.me, known, one.state.version(one.state.me), records)
                    assert other.state.merge(delta)

    def join(self, name: str) -> None:
        """A workload of a host in the network."""
        state = self.hosts[name].state
        box = Sandbox(name[1] * 16, f"w{name}", "/proc/9/ns/net", 9, 9, 9, 0.0)
        state.put_sandbox(box)
        made = state.create_endpoint(self.web.id, parse_endpoint(f"w{name}"), box.id)
        state.put_sandbox(
            msgspec.structs.replace(box, endpoints=(made.id,), ifnames=("eth0",), default=made.id)
        )
        self.spread()

    def find(self, start: str, end: str, mtu: int) -> None:
        """A host has measured its path to another."""
        state = self.hosts[start].state
        watch = PathWatch(state)
        others = {path.node: path.mtu for path in state.nodes[state.me].narrow}
        others.pop(IDS[end], None)
        after = Measure(State.NARROW if mtu < 1500 else State.WHOLE, mtu, 1500)
        watch.narrow = lambda: {**others, **({IDS[end]: mtu} if mtu < 1500 else {})}
        watch.found([Found(IDS[end], UNKNOWN, after)])
        self.spread()

    def mtus(self) -> list[int]:
        """What each host that has the network gives it."""
        bridges = (host.plan.bridge(self.web.vni) for host in self.hosts.values())
        return [bridge.mtu for bridge in bridges if bridge]

    def touched(self) -> list[bool]:
        """Whether each host was to look at the network's bridge since it was asked last."""
        out = []
        for host in self.hosts.values():
            out.append(any(self.web.vni in t.bridges or t.everything for t in host.touched))
            host.touched.clear()
        return out


def test_the_narrowest_path_between_two_members_counts_on_all_hosts() -> None:
    world = World()
    for name in world.hosts:
        world.join(name)
    assert world.mtus() == [1450] * 3
    world.touched()
    world.find("h1", "h2", 1400)
    assert world.mtus() == [1350] * 3 and world.touched() == [True] * 3
    world.find("h3", "h1", 1300)
    assert world.mtus() == [1250] * 3 and world.touched() == [True] * 3
    world.find("h2", "h1", 1400)  # that changes nothing
    assert world.mtus() == [1250] * 3 and world.touched() == [False] * 3
    world.find("h3", "h1", 1500)
    assert world.mtus() == [1350] * 3 and world.touched() == [True] * 3
    world.find("h1", "h2", 1500)
    world.find("h2", "h1", 1500)
    assert world.mtus() == [1450] * 3 and world.touched() == [True] * 3


def test_a_path_between_hosts_without_members_counts_once_they_have() -> None:
    world = World()
    world.join("h1")
    world.join("h3")
    world.touched()
    world.find("h1", "h2", 1400)
    assert world.mtus() == [1450] * 2
    world.touched()
    world.join("h2")
    assert world.mtus() == [1350] * 3 and world.touched() == [True] * 3
    state = world.hosts["h2"].state
    for sandbox in list(state.sandboxes):
        state.drop_sandbox(sandbox)
    world.spread()
    assert world.mtus() == [1450] * 2 and world.touched()[0]


def test_an_mtu_that_was_asked_for_is_kept_if_it_fits() -> None:
    world = World(mtu=1360)
    world.join("h1")
    world.join("h2")
    world.find("h1", "h2", 1420)
    assert world.mtus() == [1360] * 2
    world.find("h1", "h2", 1400)
    assert world.mtus() == [1350] * 2


@pytest.mark.parametrize(
    ("subnet", "underlay", "encrypted", "mtu"),
    [
        ("10.1.0.0/24", "10.99.0.", False, 1350),
        ("10.1.0.0/24", "fd99::", False, 1330),
        ("10.1.0.0/24", "10.99.0.", True, 1270),
        ("10.1.0.0/24", "fd99::", True, 1250),
        ("fd00:1::/64", "fd99::", False, 1330),
    ],
)
def test_what_is_around_a_frame(subnet: str, underlay: str, encrypted: bool, mtu: int) -> None:
    world = World(subnet, underlay=underlay)
    nodes = [
        msgspec.structs.replace(
            node, narrow=(Narrow(IDS["h2"], 1400),) if node.id[0] == "1" else ()
        )
        for node in world.hosts["h1"].state.nodes.values()
    ]
    network = msgspec.structs.replace(world.web, encrypted=encrypted)
    assert overlay.mtu(network, nodes, {IDS["h1"], IDS["h2"]}) == mtu
    assert overlay.mtu(network, nodes, {IDS["h1"], IDS["h3"]}) == mtu + 100


def test_ipv6_keeps_what_it_needs_whatever_fits() -> None:
    world = World("fd00:1::/64")
    world.join("h1")
    world.join("h2")
    world.find("h1", "h2", 1200)
    assert world.mtus() == [1280] * 2


def test_what_is_told() -> None:
    world = World()
    world.join("h1")
    world.join("h2")
    host = world.hosts["h1"]
    watch = PathWatch(host.state)
    measures = {IDS["h2"]: 1400}
    watch.narrow = lambda: {n: mtu for n, mtu in measures.items() if mtu < 1500}

    def found(state: State, mtu: int) -> list[str]:
        measures[IDS["h2"]] = mtu
        watch.found([Found(IDS["h2"], UNKNOWN, Measure(state, mtu, 1500))])
        told = [n.kind for n in host.notices]
        host.notices.clear()
        return told

    assert found(State.WHOLE, 1500) == []
    measures[IDS["h2"]] = 1400
    watch.found([Found(IDS["h2"], UNKNOWN, Measure(State.NARROW, 1400, 1500))])
    [notice] = host.notices
    assert notice.message == (
        "path from h1 to h2 takes packets of 1400 bytes, and should take 1500; web has an MTU of "
        "1350. Let 1500 bytes through between them, or give the interface of one an MTU of 1400"
    )
    assert notice.fields == {
        "node": IDS["h2"], "name": "h2", "mtu": "1400", "expected": "1500", "networks": "web",
    }  # fmt: skip
    host.notices.clear()
    assert found(State.SILENT, 1400) == []
    assert found(State.NARROW, 1400) == []
    assert found(State.NARROW, 1300) == ["path.narrow"]
    assert found(State.WHOLE, 1500) == ["path.mended"]
    assert found(State.WHOLE, 1500) == []


def test_what_is_told_of_frames_through_vxlan() -> None:
    host = World().hosts["h1"]
    watch = PathWatch(host.state)

    def turned(before: Tunnel, after: Tunnel) -> list[tuple[str, str]]:
        host.notices.clear()
        watch.turned([Turn(IDS["h2"], before, after)], "ens3")
        return [(n.kind, n.message.rpartition(". ")[2]) for n in host.notices]

    assert turned(Tunnel.UNKNOWN, Tunnel.SOUND) == []
    mends = "Run 'ethtool -K ens3 tx off' on h1"
    assert turned(Tunnel.SOUND, Tunnel.CHECKSUMS) == [("tunnel.checksums", mends)]
    opens = "Let UDP port 4789 through between them"
    assert turned(Tunnel.UNKNOWN, Tunnel.BLOCKED) == [("tunnel.blocked", opens)]
    [(kind, _)] = turned(Tunnel.BLOCKED, Tunnel.SOUND)
    assert kind == "tunnel.mended"


def test_a_restart_keeps_what_was_found_and_a_node_that_is_gone_takes_it_along() -> None:
    world = World()
    world.find("h1", "h2", 1400)
    state = world.hosts["h1"].state
    fresh = msgspec.structs.replace(state.nodes[state.me], narrow=())
    kept = keep_known(fresh, state)
    assert kept.narrow == (Narrow(IDS["h2"], 1400),)
    watch = PathWatch(state)
    assert watch.known() == {IDS["h2"]: 1400}
    watch.narrow = lambda: {IDS["h2"]: 1400}
    del state.nodes[IDS["h2"]]
    watch.found([])
    assert state.nodes[state.me].narrow == ()
