"""What watchers are told, and what of it is kept for those who come later."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from agent.api import watch
from agent.api.watch import Watchers
from agent.errors import Exhausted, Invalid
from agent.model import Node
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network
from agent.rpc import control_pb2 as pb
from agent.views import Status


class Health:
    def state(self, node: str) -> tuple[str, str]:
        return "alive", ""

    def rtt(self, node: str) -> float:
        return 0.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> NodeState:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    made = NodeState(me, clock, random.Random(1))
    made.describe(me)
    return made


@pytest.fixture
def watchers(node: NodeState) -> Watchers:
    return Watchers(node, Health())


async def history(watchers: Watchers, **fields: object) -> list[pb.Event]:
    request = pb.WatchRequest(history=True, end=True, **fields)  # type: ignore[arg-type]
    return [event async for event in watchers.watch(request)]


def kinds(events: list[pb.Event]) -> list[tuple[str, str | None]]:
    return [(event.action, event.WhichOneof("object")) for event in events]


async def test_notices_and_states_are_events(node: NodeState, watchers: Watchers) -> None:
    node.tell("drift.repaired", "2 FDB rows put back", kind="fdb", count="2")
    node.set_status(node.me, Status("suspect", "no answer", 1000.0))
    told, state, end = await history(watchers)
    assert (told.action, told.notice.kind) == ("notice", "drift.repaired")
    assert told.notice.message == "2 FDB rows put back"
    assert dict(told.notice.fields) == {"kind": "fdb", "count": "2"}
    assert told.time == "1970-01-01T00:16:40.000Z"
    assert (state.action, state.node.name) == ("update", "n1")
    assert (end.action, end.revision) == ("synced", node.revision)


async def test_the_history_names_what_is_gone(node: NodeState, watchers: Watchers) -> None:
    network = node.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
    made = node.create_endpoint(network.id, parse_endpoint("db"))
    node.remove_endpoints([made.id])
    node.remove_network(network.id)
    found = await history(watchers)
    assert kinds(found) == [
        ("create", "network"),
        ("create", "endpoint"),
        ("remove", "endpoint"),
        ("remove", "network"),
        ("synced", None),
    ]
    assert {e.endpoint.network for e in found if e.HasField("endpoint")} == {"web"}


async def test_only_what_happened_since(node: NodeState, watchers: Watchers, clock: Clock) -> None:
    for number in range(3):
        clock.now = 1010.0 + number
        node.tell("a.b", str(number))
    found = await history(watchers, not_before=1011.0)
    assert [e.notice.message for e in found] == ["1", "2", ""]
    # Further back than this agent goes.
    found = await history(watchers, not_before=999.0)
    assert [e.action for e in found] == ["trimmed", *3 * ["notice"], "synced"]
    assert found[0].time == "1970-01-01T00:16:40.000Z"
    revision = (await history(watchers))[0].revision
    found = await history(watchers, since=revision)
    assert [e.notice.message for e in found] == ["1", "2", ""]
    for wrong in (revision - 2, node.revision + 1):
        with pytest.raises(Invalid, match="is not in this agent's history"):
            await history(watchers, since=wrong)


async def test_the_history_is_bounded_and_says_where_it_begins(
    node: NodeState, watchers: Watchers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HISTORY", 10)
    for number in range(20):
        clock.now = 1010.0 + number
        node.tell("a.b", str(number))
    found = await history(watchers, not_before=1001.0)
    assert found[0].action == "trimmed"
    assert [e.notice.message for e in found[1:-1]] == ["15", "16", "17", "18", "19"]
    assert found[0].time == "1970-01-01T00:17:04.000Z"  # when what went last happened
    found = await history(watchers, not_before=1026.0)
    assert [e.action for e in found] == [*4 * ["notice"], "synced"]


async def test_following_goes_on_from_the_history(node: NodeState, watchers: Watchers) -> None:
    node.tell("a.b", "before")
    following = watchers.watch(pb.WatchRequest(history=True))
    assert (await anext(following)).notice.message == "before"
    assert (await anext(following)).action == "synced"
    node.tell("a.b", "after")
    assert (await anext(following)).notice.message == "after"
    watchers.close()
    with pytest.raises(Exhausted):
        await anext(following)


async def test_one_who_does_not_read_is_cut_off(
    node: NodeState, watchers: Watchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "BACKLOG", 5)
    slow: AsyncIterator[pb.Event] = watchers.watch(pb.WatchRequest())
    assert (await anext(slow)).action == "create"
    for number in range(10):
        node.tell("a.b", str(number))
    with pytest.raises(Exhausted, match="lagged too far"):
        async with asyncio.timeout(30):
            async for _ in slow:
                pass
