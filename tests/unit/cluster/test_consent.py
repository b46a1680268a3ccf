"""Removal and leaving over real streams and pings, on loopback: consent, delivery, refusal."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from agent.cluster.consent import Consent
from agent.cluster.detector import Detector
from agent.cluster.peers import Peers
from agent.core.membership import PRESETS, Rumour, State
from agent.core.removal import Ask, Verdict
from agent.core.replica import Delta
from agent.errors import Unavailable, VxmeshError
from agent.model import Node
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network
from agent.rpc import peer_pb2 as pb
from agent.views import Status
from tests.directories import run_dir
from tests.identities import authority
from tests.ports import free_port


class Agent:
    """A node with its streams and its failure detection, and nothing else."""

    def __init__(self, number: int, seeds: list[str]) -> None:
        port = free_port()
        id = f"{number:016x}"
        self.me = Node(id, f"n{number}", "127.0.0.1", port, "127.0.0.1", 4789, "", 0.0, 1500)
        self.node = NodeState(self.me, time.time, random.Random(number))
        self.seeds = seeds
        self.errors: list[VxmeshError] = []
        self.node.on_expelled = self.errors.append
        self.node.listeners.append(
            lambda change: self.node.replica.publish(self.node.replica.written())
        )
        self.node.describe(self.me)
        self.boots = 0
        self.run_dir = run_dir()

    async def start(self) -> Agent:
        self.boots, self.is_up = self.boots + 1, True
        boot = f"{self.me.id}-{self.boots}"
        self.peers = Peers(
            self.node, self.me, boot, self._durable, authority().keyring(self.me.id), self.run_dir
        )
        self.node.listeners.append(lambda change: self.peers.wake())
        links = self.peers.links
        self.detector = Detector(
            self.node, PRESETS["local"], self.boots << 20, lambda: links, self.peers.dialer
        )
        self.peers.server.pings = self.detector
        self.peers.on_rumours = self.detector.take
        self.peers.on_link.append(self.detector.stream_changed)
        self.peers.live = self.detector.live
        self.detector.on_change.append(self.peers.membership_changed)
        await self.peers.start(self.seeds)
        await self.detector.start()
        return self

    async def stop(self) -> None:
        if self.is_up:
            self.is_up = False
            await self.detector.stop()
            await self.peers.stop()

    def sees(self, other: Agent) -> str:
        return self.node.condition(other.me.id).state

    async def _durable(self) -> None:
        return None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.me.port}"


async def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may be busy."""
    monkeypatch.setattr("agent.cluster.consent.ANSWER_WITHIN", 30.0)
    monkeypatch.setattr("agent.cluster.consent.DELIVER_WITHIN", 30.0)


@pytest.fixture
async def three() -> AsyncIterator[list[Agent]]:
    async with AsyncExitStack() as stack:
        agents: list[Agent] = []
        for number in (1, 2, 3):
            agent = Agent(number, [a.target for a in agents])
            agents.append(await agent.start())
            stack.push_async_callback(agent.stop)
        await until(lambda: all(len(a.peers.links) == 2 for a in agents))
        await until(lambda: all(len(a.node.nodes) == 3 for a in agents))
        await until(lambda: all(a.sees(b) == "alive" for a in agents for b in agents))
        yield agents


async def test_consent_brings_what_the_voter_knows_of_the_lost(three: list[Agent]) -> None:
    one, two, lost = three
    ask = Ask(one.me.id, frozenset({lost.me.id}))
    answer = await one.peers.consent.ask(two.me.id, ask)
    assert (answer.verdict, answer.about) == (Verdict.ALIVE, lost.me.id)

    web = lost.node.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    await until(lambda: two.node.catalogue.get(web.id) and one.node.catalogue.get(web.id))
    await lost.stop()
    await until(lambda: not (one.node.is_alive(lost.me.id) or two.node.is_alive(lost.me.id)))
    assert "agent" in one.node.condition(lost.me.id).reason  # dead, and counts as lost
    # Only two has this; it comes with the answer, by no stream.
    lost.node.create_endpoint(web.id, parse_endpoint("late"))
    two.node.merge(_all(lost.node, two.node.version(lost.me.id)))
    for link in one.peers.links.values():
        link.close()
    known = lost.node.version(lost.me.id)
    answer = await one.peers.consent.ask(two.me.id, ask)
    assert answer.verdict is Verdict.AGREED
    assert answer.versions[lost.me.id] == known == one.node.version(lost.me.id)
    assert answer.voters == {a.me.id for a in three}
    assert not two.node.is_heard(lost.me.id)
    await one.peers.consent.release(ask, [two.me.id])
    assert two.node.is_heard(lost.me.id)
    with pytest.raises(Unavailable):
        await one.peers.consent.ask(lost.me.id, ask)


async def test_who_missed_the_end_of_a_removal_by_force_asks_for_it(
    three: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, lost = three
    attempt = one.node.removing.begin({lost.me.id}, one.node.monotonic(), 7)
    answer = await one.peers.consent.ask(two.me.id, attempt.ask)
    assert answer.verdict is Verdict.AGREED  # though it lives
    (held,) = two.node.removing.open_ends()
    await two.peers.consent._enquire(held)
    assert not two.node.is_heard(lost.me.id)  # the attempt goes on
    one.node.removing.finish(attempt)  # and fails; nobody tells
    await two.peers.consent._enquire(held)
    assert two.node.is_heard(lost.me.id) and not two.node.removing.held


async def test_one_that_lives_is_cut_off_by_force(three: list[Agent]) -> None:
    one, two, lost = three
    attempt = one.node.removing.begin({lost.me.id}, one.node.monotonic(), 7)
    answer = await one.peers.consent.ask(two.me.id, attempt.ask)
    one.node.removing.take(attempt, two.me.id, answer)
    await until(lambda: one.node.removing.is_ready(attempt, one.node.monotonic()))
    one.node.inherit(attempt.ask.lost)
    one.node.removing.finish(attempt)
    await until(lambda: lost.errors)
    await until(lambda: lost.me.id not in two.node.nodes and lost.me.id not in two.peers.links)
    assert two.node.removing.open_ends() == []


async def test_a_removed_node_is_refused_and_told_why(three: list[Agent]) -> None:
    one, two, lost = three
    await lost.stop()
    await until(lambda: lost.me.id not in two.peers.links)
    one.node.inherit([lost.me.id])
    await until(lambda: lost.me.id not in two.node.nodes)
    await lost.start()
    await until(lambda: lost.errors)
    assert "was removed from the cluster by n1" in str(lost.errors[0])
    assert lost.me.id not in one.peers.links and lost.me.id not in two.node.nodes
    await lost.stop()


async def test_one_that_is_removed_while_a_stream_is_up_is_told_too(three: list[Agent]) -> None:
    one, two, lost = three
    one.node.inherit([lost.me.id])  # against the rules: it lives
    await until(lambda: lost.errors)
    await until(lambda: lost.me.id not in one.peers.links and lost.me.id not in two.peers.links)


async def test_a_removed_node_that_has_no_stream_learns_it_from_a_ping(three: list[Agent]) -> None:
    one, _, lost = three
    await lost.peers.stop()
    await until(lambda: not one.node.is_alive(lost.me.id))
    one.node.inherit([lost.me.id])
    assert not lost.errors
    await lost.detector.ping(one.me.id, 30.0)
    assert "was removed from the cluster by n1" in str(lost.errors[0])
    await lost.detector.stop()
    lost.is_up = False


async def test_what_is_said_of_a_removed_node_changes_nothing(three: list[Agent]) -> None:
    one, two, lost = three
    await lost.stop()
    await until(lambda: not one.node.is_alive(lost.me.id))
    one.node.inherit([lost.me.id])
    await until(lambda: lost.me.id not in two.node.nodes)
    for agent in (one, two):
        agent.detector.take(two.me.id, [Rumour(lost.me.id, 9 << 20, State.ALIVE, lost.me.id)])
        agent.detector.take(lost.me.id, [Rumour(lost.me.id, 9 << 20, State.ALIVE, lost.me.id)])
        agent.node.set_status(lost.me.id, Status("alive", "", 0.0))
        agent.node.set_status(lost.me.id, Status("unreachable", "", 0.0, True))
        assert lost.me.id not in agent.node.status and not agent.node.withdrawn
        assert agent.detector.live() == {one.me.id, two.me.id}
        assert lost.me.id not in agent.detector.membership.live()
        assert not agent.node.is_alive(lost.me.id)


async def test_nobody_waits_for_a_removed_node(three: list[Agent]) -> None:
    one, two, lost = three
    await lost.stop()
    await until(lambda: not one.node.is_alive(lost.me.id))
    one.node.inherit([lost.me.id])
    await until(lambda: lost.me.id not in two.node.nodes)
    stable: list[int] = []
    one.node.stable = stable.append  # type: ignore[assignment]
    for agent in (one, two):
        agent.node.kernel_has(agent.node.versions())
        agent.peers.wake()
    version = one.node.version(one.me.id)
    assert await one.peers.wait_applied(version, 30.0) == {}
    # Tombstones are collected by those that are left alone.
    await until(lambda: version in stable)


async def test_a_stream_that_has_fallen_silent_is_no_sign_of_life(three: list[Agent]) -> None:
    one, two, _ = three
    await until(lambda: one.node.is_linked(two.me.id))
    link = one.peers.links[two.me.id]
    link.session.heard -= 2.0
    assert not one.node.is_linked(two.me.id)


async def test_a_delivery_is_confirmed(three: list[Agent]) -> None:
    one, _, leaver = three
    web = leaver.node.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    await leaver.peers.consent.deliver(one.me.id)
    assert one.node.catalogue.get(web.id)
    assert one.sees(leaver) == "alive"


async def test_a_goodbye_has_arrived_when_it_was_said_and_holds_until_the_next_life(
    three: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.cluster.detector.FAREWELL_WITHIN", 10.0)  # on a busy machine
    one, two, leaver = three
    links = {two.me.id: leaver.peers.links[two.me.id]}  # who has no stream is told too
    monkeypatch.setattr(leaver.detector, "_streams", lambda: links)
    await leaver.detector.leave()
    for agent in (one, two):
        assert agent.sees(leaver) == "left"
        assert agent.node.withdrawn == {leaver.me.id}
        assert agent.node.voters() == {one.me.id, two.me.id}
    # A new stream of the same life does not bring it back.
    old = one.peers.links[leaver.me.id]
    old.close()
    await until(lambda: one.peers.links.get(leaver.me.id, old) is not old)
    await leaver.detector.ping(one.me.id, 30.0)
    assert one.sees(leaver) == two.sees(leaver) == "left"
    await leaver.stop()
    await leaver.start()
    await until(lambda: one.sees(leaver) == two.sees(leaver) == "alive")
    assert one.node.voters() == {a.me.id for a in three}
    assert not one.node.withdrawn
    await leaver.stop()


def _all(node: NodeState, known: int) -> Delta:
    return Delta(node.me, known, node.version(node.me), node.since(node.me, known))


async def test_what_a_voter_sends_and_nobody_can_read_is_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = Agent(1, [])
    nobody: Any = None
    consent = Consent(agent.node, nobody, nobody, nobody)

    async def answer(*arguments: object) -> pb.RemovalAnswer:
        return pb.RemovalAnswer(deltas=[pb.Delta(records=b"no records")])

    monkeypatch.setattr(consent, "_call", answer)
    with pytest.raises(Unavailable, match="cannot be read"):
        await consent.ask("2" * 16, Ask(agent.me.id, frozenset({"3" * 16})))
