"""A node that counts as gone: what becomes of its rows, its names and what they stand for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import msgspec
import pytest

from agent.core.replica import Delta
from agent.drivers.overlay import router_mac
from agent.errors import Conflict
from agent.feed import ToResolver
from agent.listeners import ToKernel, Touch
from agent.model import Endpoint, Network, Node, Sandbox
from agent.node import NodeState
from agent.plan import Plan
from agent.requests import parse_endpoint, parse_network
from agent.resolver.feed import Batch
from agent.servicemodel import Port
from agent.servicespec import ServiceSpec
from agent.views import Change, Status

GONE = Status("unreachable", "silent for 1.5 s", 1000.0, withdrawn=True)
THERE = Status("alive", "", 1001.0)
AGENT_DOWN = Status("unreachable", "agent: connection refused", 1000.0)


def make(number: int) -> NodeState:
    address = f"10.99.0.{number}"
    me = Node(str(number) * 16, f"h{number}", address, 7946, address, 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(number))
    node.describe(me)
    node.replica.publish(node.replica.written())
    return node


def send(source: NodeState, target: NodeState) -> None:
    source.replica.publish(source.replica.written())
    known = target.version(source.me)
    records = source.since(source.me, known)
    assert target.merge(Delta(source.me, known, source.version(source.me), records))


class Pair:
    """h1, which has a sandbox in a network, and h2, of whose endpoints h1 has heard."""

    def __init__(self) -> None:
        self.here, self.there = make(1), make(2)
        self.web: Network = self.here.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
        send(self.here, self.there)
        send(self.there, self.here)
        self.here.donate(self.web.id, self.there.me, 4, [])
        send(self.here, self.there)
        box = Sandbox("b" * 16, "sb", "/proc/1/ns/net", 1, 1, 1, 0.0)
        self.here.put_sandbox(box)
        one = self.here.create_endpoint(self.web.id, parse_endpoint("one"), box.id)
        self.here.put_sandbox(msgspec.structs.replace(box, endpoints=(one.id,), ifnames=("eth0",)))
        self.two: Endpoint = self.there.create_endpoint(self.web.id, parse_endpoint("two"))
        send(self.there, self.here)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_rows_of_a_node_that_is_gone_are_taken_back_and_come_again(pair: Pair) -> None:
    plan = Plan(pair.here)
    changes: list[Change] = []
    pair.here.listeners.append(changes.append)
    vni, mac, address = pair.web.vni, pair.two.mac, pair.two.addresses[0]
    vtep = bytes([10, 99, 0, 2])
    assert plan.all_rows(vni).fdb == [(mac, vtep)]
    for status, rows in ((AGENT_DOWN, True), (GONE, False), (GONE, False), (THERE, True)):
        before = len(changes)
        pair.here.set_status(pair.there.me, status)
        touched = [plan.touched(change) for change in changes[before:]]
        assert not any(t.everything for t in touched), "the cost is that node's endpoints"
        found = plan.rows(vni, [mac], [address])
        assert found.fdb == [(mac, vtep if rows else None)]
        assert found.neighbours == [(address, mac if rows else None)]
        looked = {m for t in touched for m in t.macs.get(vni, [])}
        flipped = (status.withdrawn and len(touched) == 1) or status is THERE
        assert looked == ({mac} if flipped else set())


def test_names_of_a_node_that_is_gone_are_taken_back_and_come_again(
    pair: Pair, tmp_path: Path
) -> None:
    feed = ToResolver(pair.here, tmp_path, tmp_path / "netns")
    sent: list[Batch] = []
    feed._client.send = sent.append  # type: ignore[method-assign,assignment]
    pair.here.listeners.append(feed._changed)
    assert {e.name for e in feed._snapshot().endpoints} == {"one", "two"}
    pair.here.set_status(pair.there.me, AGENT_DOWN)
    assert not sent, "a dead agent is not a dead host"
    pair.here.set_status(pair.there.me, GONE)
    (changes,) = list(sent.pop().changes())
    assert [tuple(d) for d in changes.dropped] == [(pair.web.id, pair.two.id)]
    assert {e.name for e in feed._snapshot().endpoints} == {"one"}
    late = pair.there.create_endpoint(pair.web.id, parse_endpoint("late"))
    send(pair.there, pair.here)  # heard through a third node
    for batch in sent:
        assert late.id not in [e.id for c in batch.changes() for e in c.endpoints]
    sent.clear()
    pair.here.set_status(pair.there.me, THERE)
    back = [e.id for batch in sent for c in batch.changes() for e in c.endpoints]
    assert set(back) == {pair.two.id, late.id}


def test_a_name_on_a_node_that_is_gone_may_be_taken_again(pair: Pair) -> None:
    with pytest.raises(Conflict, match="exists"):
        pair.here.create_endpoint(pair.web.id, parse_endpoint("two"))
    pair.here.set_status(pair.there.me, GONE)
    again = pair.here.create_endpoint(pair.web.id, parse_endpoint("two"))
    assert again.addresses != pair.two.addresses, "its address is not free for that"


def test_of_two_claims_that_of_a_node_that_is_there_counts(pair: Pair) -> None:
    members = pair.here.members[pair.web.id]
    other = Endpoint("0" * 16, pair.web.id, "three", pair.two.mac, pair.two.addresses)
    members.put(other, "3" * 16)
    assert members.with_mac(pair.two.mac) == members.all[other.id], "the smaller id"
    pair.here.set_status("3" * 16, GONE)
    assert members.with_mac(pair.two.mac) == members.all[pair.two.id]
    assert members.with_address(pair.two.addresses[0]) == members.all[pair.two.id]


class Rows:
    """What the kernel is told to look at again."""

    def __init__(self) -> None:
        self.macs: list[bytes] = []

    def touch_rows(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None:
        self.macs += macs

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_the_router_of_a_node_without_endpoints_that_returns_is_looked_at_again(pair: Pair) -> None:
    """What it balances is answered through it, though no workload of the network is there."""
    pair.there.remove_endpoints([pair.two.id])
    send(pair.there, pair.here)
    ports = (Port(80, 80),)
    pair.here.create_service(ServiceSpec("s", pair.web.id, ports=ports))
    kernel = Rows()
    plan = Plan(pair.here)
    plan.frontends()
    ToKernel(pair.here, plan, cast(Touch, kernel))
    for status in (GONE, THERE):
        kernel.macs.clear()
        pair.here.set_status(pair.there.me, status)
        assert router_mac(pair.web.id, pair.there.me) in kernel.macs
