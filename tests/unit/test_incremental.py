"""What is kept as a node changes is what is found by looking at all of it."""

from __future__ import annotations

import contextlib
import random
from collections import Counter

import msgspec

from agent.core.replica import Delta
from agent.core.waysout import with_interface, without
from agent.drivers.base import DEFAULT, Bridge, Forward
from agent.errors import VxmeshError
from agent.model import HANDED_OUT, WORKLOAD, Network, Node, Publish, Sandbox
from agent.node import NodeState
from agent.node.endpoints import NeedSpace
from agent.plan import Plan
from agent.requests import EndpointSpec, parse_network
from agent.resolver.feed import View
from agent.sights import Sights

ME, OTHER = "1" * 16, "2" * 16
SEEDS, STEPS = 20, 150


def host(id: str, mtu: int = 1500) -> Node:
    return Node(id, f"n{id[0]}", f"10.99.0.{id[0]}", 7946, f"10.99.0.{id[0]}", 4789, "0", 0.0, mtu)


class Walk:
    """A node to which things happen by chance."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.state = NodeState(host(ME), lambda: 1.0, random.Random(seed))
        self.state.describe(host(ME))
        self.other = NodeState(host(OTHER), lambda: 1.0, random.Random(~seed))
        self.other.describe(host(OTHER))
        # Of this one's networks it never hears, and so makes some with the same addresses.
        self.other.merge(_since(self.state, 0))
        self.plan = Plan(self.state)
        self.sights = Sights(self.state)
        self.told: dict[bytes, View] = {}
        self.tables: tuple[Forward, ...] = ()
        self.loads = 0
        self.bridges: dict[int, Bridge] = {}
        self.defaults: dict[int, frozenset[bytes] | None] = {}
        self.state.listeners.append(self._changed)
        self.number = self.version = 0

    def _changed(self, change: object) -> None:
        touched = self.plan.touched(change)  # type: ignore[arg-type]
        # A bridge that comes brings all rows; else just those that are touched are looked at.
        whole = set(self.plan.bridges()) - self.bridges.keys()
        whole |= set(self.plan.bridges()) if touched.everything else set()
        whole |= {vni for vni, macs in touched.macs.items() if DEFAULT in macs}
        for vni in whole:
            self.defaults[vni] = self.plan.all_rows(vni).defaults
        if touched.forwards:
            self.loads += 1
            self.tables = self.plan.forwards()
        for vni in set(touched.bridges) | (
            set(self.plan.bridges()) if touched.everything else set()
        ):
            found = self.plan.bridge(vni)
            self.bridges.pop(vni, None)
            if found:
                self.bridges[vni] = found
        for key in self.sights.changed(change):  # type: ignore[arg-type]
            self.told.pop(key, None)
            if key in self.sights.views:
                self.told[key] = self.sights.views[key]

    def networks(self) -> list[Network]:
        return sorted(self.state.catalogue.all(), key=lambda network: network.name)

    def step(self) -> None:
        acts = [self.make, self.make, self.connect, self.connect, self.connect, self.end]
        acts += [self.disconnect, self.rename, self.move, self.network, self.remove, self.node]
        acts += [self.announce, self.publish]
        act = self.rng.choice(acts)
        # What is asked for by chance may not be possible.
        with contextlib.suppress(VxmeshError, NeedSpace, IndexError):
            act()

    def box(self) -> Sandbox:
        return self.rng.choice(list(self.state.sandboxes.values()))

    def make(self) -> None:
        self.number += 1
        path = self.rng.choice([f"/proc/{self.number}/ns/net", HANDED_OUT])
        self.state.put_sandbox(
            Sandbox(
                f"{self.number:016x}", f"s{self.number}", path, self.number, self.number, 1, 0.0
            )
        )

    def connect(self) -> None:
        if not self.state.sandboxes:
            self.make()
        box, network = self.box(), self.rng.choice(self.networks())
        labels = {WORKLOAD: self.rng.choice("ab")} if self.rng.random() < 0.3 else {}
        self.number += 1
        made = self.state.create_endpoint(
            network.id, EndpointSpec(f"e{self.number}", labels=labels), box.id
        )
        fresh = with_interface(box, made.id, f"eth{len(box.endpoints)}", self.rng.randrange(3))
        self.state.put_sandbox(fresh)

    def disconnect(self) -> None:
        held = [(box, e) for box in self.state.sandboxes.values() for e in box.endpoints]
        if held:
            box, endpoint = self.rng.choice(held)
            if self.state.local_endpoint(endpoint):
                self.state.remove_endpoints([endpoint])
            if self.rng.random() < 0.8:  # else it is left in the sandbox for now
                self.state.put_sandbox(without(box, [endpoint]))

    def end(self) -> None:
        if self.state.sandboxes:
            self.state.drop_sandbox(self.box().id)

    def rename(self) -> None:
        if self.state.sandboxes:
            for endpoint in self.box().endpoints[:1]:
                self.number += 1
                labels = {WORKLOAD: self.rng.choice("ab")}
                self.state.rename_endpoint(endpoint, f"e{self.number}", [], labels)

    def move(self) -> None:
        if self.state.sandboxes:
            box = self.box()
            self.state.put_sandbox(msgspec.structs.replace(box, moved_to="/x", moved_inode=1))

    def publish(self) -> None:
        if self.state.sandboxes:
            ports = tuple(Publish(self.rng.randrange(80, 90), 80) for _ in range(2))
            self.state.put_sandbox(msgspec.structs.replace(self.box(), publishes=ports))

    def network(self) -> None:
        self.number += 1
        driver = self.rng.choice(["overlay", "bridge", "macvlan"])
        options = {"parent": "eth9"} if driver == "macvlan" else {}
        if driver == "overlay" and self.rng.random() < 0.5:
            options = {"flood": "on"}
        # Of these some have the same addresses, and then one of two gives way.
        subnets = [f"10.{self.rng.randrange(4)}.0.0/24"]
        spec = parse_network(f"w{self.number}", driver=driver, subnets=subnets, options=options)
        if self.rng.random() < 0.5:
            self.state.create_network(spec)
            return
        made = self.other.create_network(spec)
        self.other.donate(made.id, ME, 4, [])
        self.hear()

    def hear(self) -> None:
        """What the other node has written by now."""
        delta = _since(self.other, self.version)
        self.version = delta.upto
        self.state.merge(delta)

    def remove(self) -> None:
        if len(self.networks()) > 2:
            self.state.remove_network(self.rng.choice(self.networks()).id)

    def node(self) -> None:
        if self.rng.random() < 0.5:
            self.other.describe(host(OTHER, self.rng.choice([1400, 1500])))
            self.hear()
        else:
            self.state.describe(host(ME, self.rng.choice([1400, 1500, 9000])))

    def announce(self) -> None:
        self.number += 1
        who = self.rng.choice([self.state, self.other])
        network = self.rng.choice(list(who.catalogue.all()))
        who.create_endpoint(network.id, EndpointSpec(f"e{self.number}"))
        self.hear()


def _since(node: NodeState, before: int) -> Delta:
    version = node.replica.written()
    node.replica.publish(version)
    return Delta(node.me, before, version, node.since(node.me, before))


def test_what_is_kept_is_what_is_there() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        walk = Walk(seed)
        walk.state.create_network(parse_network("first", subnets=["10.0.0.0/24"]))
        walk.state.create_network(parse_network("own", driver="bridge", subnets=["10.1.0.0/24"]))
        for _ in range(STEPS):
            walk.step()
            fresh, anew = Plan(walk.state), Sights(walk.state)
            anew.renew()
            bridges = walk.plan.bridges()
            assert bridges == fresh.bridges() == walk.bridges, seed
            assert walk.plan.lans() == fresh.lans(), seed
            assert walk.plan.forwards() == fresh.forwards() == walk.tables, seed
            assert walk.sights.networks == anew.networks, seed
            assert walk.sights.views == anew.views == walk.told, seed
            defaults = {vni: fresh.all_rows(vni).defaults for vni in bridges}
            assert defaults == {vni: walk.defaults[vni] for vni in bridges}, seed
            seen["defaults"] += sum(bool(found) for found in defaults.values())
            seen["ports"] += sum(len(bridge.ports) for bridge in bridges.values())
            seen["apart"] += sum(bool(bridge.apart) for bridge in bridges.values())
            seen["forwards"] += len(walk.tables)
            seen["together"] += sum(len(view.networks) > 1 for view in walk.told.values())
            seen["inside"] += sum(view.place is not None for view in walk.told.values())
    assert min(seen.values()) > STEPS, seen


def test_ports_that_a_change_is_not_about_stay_the_same_objects() -> None:
    walk = Walk(1)
    web = walk.state.create_network(parse_network("web", subnets=["10.0.0.0/24"]))
    for _ in range(3):
        walk.make()
    boxes = list(walk.state.sandboxes.values())
    for number, box in enumerate(boxes[:2]):
        made = walk.state.create_endpoint(web.id, EndpointSpec(f"e{number}"), box.id)
        walk.state.put_sandbox(with_interface(box, made.id, "eth0", 0))
    before = walk.bridges[web.vni]
    made = walk.state.create_endpoint(web.id, EndpointSpec("more"), boxes[2].id)
    walk.state.put_sandbox(with_interface(boxes[2], made.id, "eth0", 0))
    after = walk.bridges[web.vni]
    assert after.ports.keys() - before.ports.keys() == {made.id}
    assert all(after.ports[id] is port for id, port in before.ports.items())
    assert walk.plan.bridge(web.vni) is after and walk.loads == 0
