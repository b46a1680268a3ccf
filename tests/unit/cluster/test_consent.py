"""Removal and leaving over real streams, on loopback: consent, delivery, and the refusal."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from agent.cluster.peers import Peers
from agent.core.removal import Ask, Verdict
from agent.core.replica import Delta
from agent.errors import Unavailable, VxmeshError
from agent.model import Node
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network


class Agent:
    """A node with its streams and nothing else."""

    def __init__(self, number: int, seeds: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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

    async def start(self) -> Agent:
        self.boots, self.is_up = self.boots + 1, True
        self.peers = Peers(self.node, self.me, f"{self.me.id}-{self.boots}", self._durable)
        self.node.listeners.append(lambda change: self.peers.wake())
        await self.peers.start(self.seeds)
        return self

    async def stop(self) -> None:
        if self.is_up:
            self.is_up = False
            await self.peers.stop()

    async def _durable(self) -> None:
        return None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.me.port}"


async def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


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
        yield agents


async def test_consent_brings_what_the_voter_knows_of_the_lost(three: list[Agent]) -> None:
    one, two, lost = three
    ask = Ask(one.me.id, frozenset({lost.me.id}))
    answer = await one.peers.consent.ask(two.me.id, ask)
    assert (answer.verdict, answer.about) == (Verdict.ALIVE, lost.me.id)

    web = lost.node.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    await until(lambda: two.node.catalogue.get(web.id) and one.node.catalogue.get(web.id))
    await lost.stop()
    await until(lambda: lost.me.id not in two.peers.links and lost.me.id not in one.peers.links)
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


async def test_a_delivery_is_confirmed_and_a_goodbye_holds_until_the_next_start(
    three: list[Agent],
) -> None:
    one, _, leaver = three
    web = leaver.node.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    await leaver.peers.consent.deliver(one.me.id, leaves=False)
    assert one.node.catalogue.get(web.id)
    assert leaver.me.id not in one.node.status
    await leaver.peers.consent.deliver(one.me.id, leaves=True)
    assert one.node.status[leaver.me.id].state == "left"
    assert one.node.voters() == {a.me.id for a in three[:2]}
    # A new stream of the same life does not bring it back.
    old = one.peers.links[leaver.me.id]
    old.close()
    await until(lambda: one.peers.links.get(leaver.me.id, old) is not old)
    assert one.node.status[leaver.me.id].state == "left"
    await leaver.stop()
    await leaver.start()
    await until(lambda: one.node.status[leaver.me.id].state == "alive")
    await leaver.stop()


def _all(node: NodeState, known: int) -> Delta:
    return Delta(node.me, known, node.version(node.me), node.since(node.me, known))
