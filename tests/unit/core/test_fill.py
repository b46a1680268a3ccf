"""When a network counts as nearly full."""

from __future__ import annotations

import random

import pytest

from agent.core.fill import Fill


def test_it_is_told_once_on_the_way_up_and_again_only_after_a_while_down() -> None:
    fill = Fill()
    told = []
    for used in [0, 50, 79, 80, 79, 80, 100, 70, 80, 69, 79, 80, 81]:
        fill.is_due(100)
        if fill.look(4, 100, used):
            told.append(used)
    assert told == [80, 80]


def test_families_are_told_apart() -> None:
    fill = Fill()
    assert fill.look(4, 10, 8)
    assert not fill.look(6, 1 << 64, 8)
    assert not fill.look(4, 10, 9)


def test_what_has_no_addresses_is_not_full() -> None:
    assert not Fill().look(4, 0, 0)


@pytest.mark.parametrize("total", [5, 13, 100, 254, 4093])
def test_looking_only_when_due_misses_no_crossing(total: int) -> None:
    rng = random.Random(total)
    lazy, eager, used = Fill(), Fill(), 0
    looks = crossings = 0
    for _ in range(5000):
        step = rng.choice([-3, -1, 1, 1, 2]) if rng.random() < 0.9 else rng.randint(-total, total)
        new = min(total, max(0, used + step))
        moved, used = abs(new - used), new
        want = eager.look(4, total, used)
        got = lazy.is_due(moved) and lazy.look(4, total, used)
        looks += lazy._until > 0
        assert got == want
        crossings += want
    assert crossings > 5
