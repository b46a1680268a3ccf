"""What the name server is told of sandboxes on the hosts' wire: to listen in them."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from agent.feed import ToResolver
from agent.model import Node, Sandbox
from agent.node import NodeState
from agent.requests import EndpointSpec, parse_network
from agent.resolver.feed import Batch, Changes, Place
from agent.sights import ROOM

BOX = Sandbox("5" * 16, "box", "/proc/9/ns/net", 7, 9, 11, 0.0)
KEY = ROOM + BOX.id.encode()


def _changes(sent: list[Batch]) -> list[Changes]:
    found = [change for batch in sent for change in batch.changes()]
    sent.clear()
    return found


def test_the_name_server_listens_in_sandboxes_that_are_on_the_wire(tmp_path: Path) -> None:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    feed = ToResolver(node, tmp_path, tmp_path / "netns")
    sent: list[Batch] = []
    feed._client.send = sent.append  # type: ignore[method-assign,assignment]
    node.listeners.append(feed._changed)
    plain = node.create_network(parse_network("plain"))
    lan = node.create_network(parse_network("lan", driver="macvlan", options={"parent": "eth1"}))
    node.put_sandbox(BOX)
    one = node.create_endpoint(plain.id, EndpointSpec("one"), BOX.id)
    node.put_sandbox(msgspec.structs.replace(BOX, endpoints=(one.id,), ifnames=("eth0",)))
    views = [view for change in _changes(sent) for view in change.views]
    assert views and not any(view.place for view in views), "the gateway is there to be asked"
    two = node.create_endpoint(lan.id, EndpointSpec("two"), BOX.id)
    both = (one.id, two.id)
    node.put_sandbox(msgspec.structs.replace(BOX, endpoints=both, ifnames=("eth0", "eth1")))
    [room] = [view for change in _changes(sent) for view in change.views if view.place]
    assert (room.address, room.networks) == (KEY, (plain.id, lan.id))
    assert room.place == Place("/proc/9/ns/net", 7, 9, 11)
    assert room in feed._snapshot().views, "a name server that is started anew is told as well"
    node.drop_sandbox(BOX.id)
    assert KEY in [key for change in _changes(sent) for key in change.dropped_views]
