"""Calls of one node that are under way: so many, whatever the others do."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest

from agent.cluster.callers import Caller
from agent.cluster.consent import LOST_MAX
from agent.cluster.inflight import InFlight
from agent.cluster.server import BEHIND_MAX, RANGES_MAX
from agent.rpc import peer_pb2 as pb
from tests.fuzz import world
from tests.fuzz.targets.unary import Aborted, Context, Peer


class Call:
    def __init__(self, node: str) -> None:
        self._name = Caller(node, "10.99.0.2").name
        self.status: Any = None

    def peer(self) -> str:
        return f"unix-abstract:vxmesh/1/{self._name}"

    async def abort(self, status: Any, details: str = "", metadata: Any = ()) -> None:
        self.status = status
        raise Aborted


async def test_one_node_has_so_many_calls_under_way_and_others_are_let_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.cluster.inflight.caller_of", lambda context: context.caller)
    going, inside = asyncio.Event(), InFlight(3)

    async def method(request: Any, context: Any) -> str:
        await going.wait()
        return "done"

    bounded = inside.bounded(method)

    def call(node: str) -> tuple[Call, asyncio.Task[str]]:
        made: Any = Call(node)
        made.caller = Caller(node, "10.99.0.2")
        return made, asyncio.ensure_future(bounded(None, made))

    first = [call("a") for _ in range(3)]
    await asyncio.sleep(0)
    refused, task = call("a")
    with pytest.raises(Aborted):
        await task
    assert refused.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    _, other = call("b")
    await asyncio.sleep(0)
    assert len(inside) == 4
    first[0][1].cancel()
    await asyncio.gather(first[0][1], return_exceptions=True)
    _, again = call("a")  # a place is free again, though that call ended badly
    going.set()
    assert await other == await again == "done"
    await asyncio.gather(*(task for _, task in first[1:]))
    assert len(inside) == 0 and not inside._calls


async def answer(number: int, request: Any, state: Any = None) -> Any:
    peer = Peer(state or world.make(), world.PEER)
    return await peer.methods[number](request, cast(Any, Context()))


async def test_a_request_for_addresses_names_so_many_ranges() -> None:
    request = pb.SpaceRequest(network=world.NET, requester=world.PEER, family=4)
    for _ in range(RANGES_MAX):
        request.ranges.add(start=b"\n\1\0\x50", end=b"\n\1\0\x50")
    assert (await answer(0, request)).HasField("delta")
    request.ranges.add(start=b"\n\1\0\x51", end=b"\n\1\0\x51")
    with pytest.raises(Aborted):
        await answer(0, request)


async def test_an_answer_to_a_removal_has_each_origin_once_and_so_many_records() -> None:
    state = world.make()
    ask = pb.RemovalAsk(remover=world.PEER, lost=[world.STRANGER])
    ask.known.extend([pb.DigestEntry(origin=state.me)] * 1000)
    assert len((await answer(4, ask, state)).deltas) == 1
    ask.lost.extend(f"{n:016x}" for n in range(LOST_MAX))
    with pytest.raises(Aborted):
        await answer(4, ask, state)
    assert BEHIND_MAX == 20_000
