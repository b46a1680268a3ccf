"""Detectors of two and three nodes over real gRPC on loopback: dead agents, dead hosts, rejoin."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from agent.cluster.channels import Channels, knock
from agent.cluster.detector import Detector
from agent.cluster.dialer import Dialer
from agent.cluster.refusals import Refusals
from agent.cluster.server import PeerServer
from agent.core.membership import PRESETS, Outcome, Rumour, State
from agent.model import Node
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.views import Status
from tests.directories import run_dir
from tests.identities import authority
from tests.ports import free_port

TUNING = dataclasses.replace(PRESETS["local"], agent_grace=1.0)


class Peer:
    """A node with a detector and a port; no streams, so that pings carry all rumours."""

    def __init__(self, number: int, incarnation: int = 1, port: int = 0) -> None:
        self.record = Node(
            str(number) * 16, f"n{number}", "127.0.0.1", port or free_port(), "127.0.0.1", 4789,
            "0", 0.0, 1500, (), incarnation,
        )  # fmt: skip
        self.node = NodeState(self.record, lambda: 1000.0, random.Random(number))
        self.node.describe(self.record)
        self.run_dir = run_dir()
        dialer = Dialer(self.node, authority().keyring(self.record.id))
        self.detector = Detector(self.node, TUNING, incarnation, dict, dialer)
        self.server = PeerServer(
            self.node, _no_stream, _nothing, dialer, Refusals(self.node), self.run_dir
        )
        self.server.pings = self.detector

    def meet(self, *others: Peer) -> None:
        for other in others:
            self.node.nodes[other.record.id] = other.record

    async def start(self) -> None:
        await self.server.start("127.0.0.1", self.record.port)
        await self.detector.start()

    async def stop(self) -> None:
        await self.detector.stop()
        await self.server.stop()

    def sees(self, other: Peer) -> Status:
        return self.node.condition(other.record.id)


async def _no_stream(*_: Any) -> None:
    raise AssertionError("no stream here")


async def _nothing() -> None:
    pass


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def run(peers: list[Peer], body: Callable[[], Awaitable[None]]) -> None:
    for peer in peers:
        peer.meet(*(p for p in peers if p is not peer))
    for peer in peers:
        await peer.start()
    try:
        await body()
    finally:
        for peer in peers:
            await peer.stop()


async def test_an_agent_that_ends_is_unreachable_and_withdrawn_after_the_grace() -> None:
    a, b = Peer(1), Peer(2)

    async def body() -> None:
        await until(lambda: a.sees(b).state == b.sees(a).state == "alive")
        await b.stop()
        await until(lambda: a.sees(b).state == "unreachable")
        assert a.sees(b).reason.startswith("agent") and not a.sees(b).withdrawn
        await until(lambda: a.sees(b).withdrawn)
        assert "did not come back" in a.sees(b).reason
        again = Peer(2, incarnation=2, port=b.record.port)
        again.meet(a)
        await again.start()
        try:
            await until(lambda: a.sees(b).state == "alive")
            assert not a.sees(b).withdrawn and a.sees(b).incarnation >= 2
        finally:
            await again.stop()
        await b.server.start("127.0.0.1", b.record.port)  # for the end of the test
        await b.detector.start()

    await run([a, b], body)


async def test_how_long_an_answered_probe_took_is_told() -> None:
    a, b = Peer(1), Peer(2)
    took: list[float] = []

    async def body() -> None:
        a.detector.on_answered.append(took.append)
        await until(lambda: len(took) >= 2)
        assert all(seconds > 0 for seconds in took)
        await b.stop()
        await until(lambda: a.sees(b).state == "unreachable")
        before = len(took)
        await until(lambda: a.sees(b).withdrawn)
        assert len(took) == before  # who did not answer took no time
        await b.server.start("127.0.0.1", b.record.port)  # for the end of the test
        await b.detector.start()

    await run([a, b], body)


async def test_of_one_that_cannot_be_pinged_directly_others_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c = Peer(1), Peer(2), Peer(3)

    async def body() -> None:
        await until(lambda: all(p.sees(q).state == "alive" for p in (a, b, c)
                                for q in (a, b, c) if p is not q))  # fmt: skip
        asked = 0
        answer_for = c.detector.answer_for

        async def counting(request: Any) -> Any:
            nonlocal asked
            asked += 1
            return await answer_for(request)

        c.detector.answer_for = counting  # type: ignore[method-assign]
        once = a.detector._ping_once

        async def cut(node: Node, timeout: float) -> Any:
            return Outcome.SILENT if node.id == b.record.id else await once(node, timeout)

        async def silence(node: Node, timeout: float) -> Outcome:
            return Outcome.SILENT

        monkeypatch.setattr(a.detector, "_ping_once", cut)
        monkeypatch.setattr("agent.cluster.detector.knock", silence)
        await until(lambda: asked >= 5)
        assert a.sees(b).state != "unreachable"

    await run([a, b, c], body)


async def test_tables_that_differ_are_told_whole() -> None:
    a, b = Peer(1), Peer(2)

    async def body() -> None:
        await until(lambda: a.sees(b).state == b.sees(a).state == "alive")
        ghost = Peer(9)
        for peer in (a, b):
            peer.meet(ghost)
            peer.detector._add(ghost.record.id)
        # b alone has heard that it left, and told its peers so when none of them listened.
        rumour = Rumour(ghost.record.id, 5, State.LEFT, ghost.record.id)
        b.detector.membership.receive([rumour], asyncio.get_running_loop().time(), table=True)
        b.detector.membership.piggyback(limit=1000)
        await until(lambda: a.sees(ghost).state == "left")

    await run([a, b], body)


async def test_knocking_tells_refusal_from_silence_and_from_being_let_in() -> None:
    peer = Peer(1)
    assert await knock(peer.record, 30.0) is Outcome.REFUSED
    listener = socket.create_server(("127.0.0.1", peer.record.port))
    with listener:
        assert await knock(peer.record, 30.0) is None


async def test_channels_that_are_too_many_are_closed() -> None:
    peer = Peer(1)
    channels = Channels(Dialer(peer.node, authority().keyring(peer.record.id)))
    for number in range(70):
        node = Node(f"{number:016x}", f"n{number}", "127.0.0.1", 1, "127.0.0.1", 1, "0", 0.0, 1500)
        channels.stub(node)
    assert len(channels._channels) == 64
    assert f"{0:016x}" not in channels._channels
    await channels.close()
    assert not channels._channels


async def test_a_ping_that_times_out_leaves_the_others_alone() -> None:
    # They share a channel: closing it without grace ended all of them as if cancelled.
    a, b = Peer(1), Peer(2)
    slow = asyncio.Event()

    class Slow:
        def answer(self, request: Any) -> Any:
            return b.detector.answer(request)

        async def answer_for(self, request: Any) -> Any:
            await slow.wait()
            return await b.detector.answer_for(request)

    a.meet(b)
    b.meet(a)
    b.server.pings = Slow()
    await b.server.start("127.0.0.1", b.record.port)
    request = pb.PingForRequest(node=a.record.id, target=a.record.id, seconds=10.0)
    stub = a.detector._channels.stub(b.record)
    try:
        first = asyncio.ensure_future(stub.PingFor(request, timeout=30.0))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.PingFor(request, timeout=0.1)  # on the same channel
        a.detector._channels.drop(b.record.id)
        slow.set()
        assert (await first).outcome == 1, "nobody listens at a, whose host answers"
    finally:
        await a.detector._channels.close()
        await b.server.stop()


async def test_who_was_gone_before_a_restart_is_gone_until_it_answers() -> None:
    a, b = Peer(1), Peer(2)
    a.meet(b)
    b.meet(a)
    a.node.status[b.record.id] = Status("unreachable", "was gone", 0.0, True, 1)
    a.node.withdrawn.add(b.record.id)
    await a.server.start("127.0.0.1", a.record.port)
    await a.detector.start()
    try:
        assert a.detector.membership.state(b.record.id) is State.DEAD
        assert a.sees(b).withdrawn
        await b.start()
        await until(lambda: a.sees(b).state == "alive" and not a.sees(b).withdrawn)
    finally:
        await b.stop()
        await a.stop()


async def test_a_quiet_detector_sleeps() -> None:
    a, b = Peer(1), Peer(2)
    turns = 0
    next_timer = a.detector.membership.next_timer

    def counting() -> float:
        nonlocal turns
        turns += 1
        return next_timer()

    async def body() -> None:
        nonlocal turns
        await until(lambda: a.sees(b).state == b.sees(a).state == "alive")
        a.detector.membership.next_timer = counting  # type: ignore[method-assign]
        await asyncio.sleep(1.0)
        assert turns < 500, "it spins: some three pings a second go each way"

    await run([a, b], body)
