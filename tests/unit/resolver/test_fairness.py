"""Turns and pace, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.resolver.fairness import FairQueue, Pace

A, B, C = b"a", b"b", b"c"


def drained(queue: FairQueue[str]) -> list[str]:
    found = []
    while queue:
        found.append(queue.take())
    return found


def test_who_asks_once_is_answered_after_one_of_each_other() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for number in range(50):
        assert queue.put(A, f"a{number}")
    assert queue.put(B, "b0") and queue.put(C, "c0")
    assert drained(queue)[:5] == ["a0", "b0", "c0", "a1", "a2"]


def test_one_source_fills_only_its_own_place() -> None:
    queue: FairQueue[str] = FairQueue(3)
    assert [queue.put(A, "a") for _ in range(5)] == [True, True, True, False, False]
    assert queue.put(B, "b")
    assert drained(queue) == ["a", "b", "a", "a"]
    with pytest.raises(IndexError):
        queue.take()


@given(st.lists(st.sampled_from([A, B, C, None]), max_size=200))
def test_nothing_is_lost_and_each_source_keeps_its_order(steps: list[bytes | None]) -> None:
    queue: FairQueue[tuple[bytes, int]] = FairQueue(1000)
    put: list[tuple[bytes, int]] = []
    got: list[tuple[bytes, int]] = []
    for number, source in enumerate(steps):
        if source is not None:
            assert queue.put(source, (source, number))
            put.append((source, number))
        elif queue:
            got.append(queue.take())
    while queue:
        got.append(queue.take())
    for source in (A, B, C):
        assert [i for i in got if i[0] == source] == [i for i in put if i[0] == source]


def test_a_burst_goes_at_once_and_the_rest_at_its_pace() -> None:
    pace = Pace(rate=10, burst=5)
    delays = [pace.delay(A, 100.0) for _ in range(8)]
    assert delays == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2, 0.3])
    assert pace.delay(B, 100.0) == 0
    assert pace.delay(A, 200.0) == 0  # after silence there is a burst again


def test_sources_that_are_silent_are_forgotten() -> None:
    pace = Pace(rate=10, burst=5)
    for number in range(100_000):
        assert pace.delay(number.to_bytes(4, "big"), number / 1000) == 0
    assert len(pace._due) <= 1000
