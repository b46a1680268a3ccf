"""What is told of refusals: the first at once, of a flood its sum."""

from __future__ import annotations

import asyncio
import random

import pytest

from agent.api.refusals import KEYS, Refusals
from agent.model import Node, Notice
from agent.node import NodeState

INTERVAL = 0.05  # s


@pytest.fixture
def told() -> list[Notice]:
    return []


@pytest.fixture
def node(told: list[Notice]) -> NodeState:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    made = NodeState(me, lambda: 1000.0, random.Random(1))
    made.listeners.append(lambda change: told.extend(change.notices))
    return made


def counts(told: list[Notice]) -> list[tuple[str, int]]:
    return [(notice.fields["who"], int(notice.fields["count"])) for notice in told]


async def test_the_first_is_told_at_once_and_what_follows_together(
    node: NodeState, told: list[Notice]
) -> None:
    refusals = Refusals(node, INTERVAL)
    for _ in range(500):
        refusals.note("right", "uid 7", "uid 7 may not")
    refusals.note("right", "uid 8", "uid 8 may not")
    assert counts(told) == [("uid 7", 1), ("uid 8", 1)]
    async with asyncio.timeout(10):
        while len(told) < 3:
            await asyncio.sleep(INTERVAL / 5)
    assert counts(told)[2] == ("uid 7", 499)
    assert told[2].message == "uid 7 may not (499 times)"
    assert {notice.kind for notice in told} == {"control.refused"}
    refusals.close()


async def test_nothing_is_lost_at_the_end(node: NodeState, told: list[Notice]) -> None:
    refusals = Refusals(node, 3600.0)
    for _ in range(5):
        refusals.note("busy", "uid 7", "uid 7 has too many")
    refusals.close()
    assert sum(count for _, count in counts(told)) == 5


async def test_a_scan_from_everywhere_is_told_as_one(node: NodeState, told: list[Notice]) -> None:
    refusals = Refusals(node, 3600.0)
    for number in range(10 * KEYS):
        refusals.note("certificate", f"10.0.{number // 256}.{number % 256}", "no certificate")
    assert len(told) == KEYS + 1
    refusals.close()
    assert counts(told)[-1] == ("others", 9 * KEYS - 1)
