"""Hybrid logical clocks: order that no wall clock can break, and that no broken one can poison."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.clock import MAX_AHEAD, HybridClock, stamp_at
from agent.model import STAMP_MAX

NOW = 1_700_000_000.0
DAY = 86_400.0


def test_stamps_follow_the_wall_clock() -> None:
    clock = HybridClock()
    assert clock.next(NOW) == stamp_at(NOW)
    assert clock.next(NOW + 1) == stamp_at(NOW + 1)


@given(st.lists(st.floats(NOW - 1000, NOW + 1000), min_size=2))
def test_stamps_rise_however_the_wall_clock_jumps(times: list[float]) -> None:
    clock = HybridClock()
    stamps = [clock.next(now) for now in times]
    assert stamps == sorted(set(stamps))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60),
    st.lists(st.floats(-3600, 3600), min_size=4, max_size=4),
)
def test_what_is_written_after_something_was_seen_is_stamped_higher(
    steps: list[tuple[int, int]], skews: list[float]
) -> None:
    clocks = [HybridClock() for _ in range(4)]
    seen = [0, 0, 0, 0]  # the highest stamp that each has written or heard of
    for number, (source, target) in enumerate(steps):
        now = NOW + number / 1000
        stamp = clocks[source].next(now + skews[source])
        assert stamp > seen[source]
        seen[source] = stamp
        assert clocks[target].receive(stamp, now + skews[target])
        seen[target] = max(seen[target], stamp)


def test_one_broken_clock_does_not_take_the_others_along() -> None:
    clock = HybridClock()
    first = clock.next(NOW)
    assert clock.receive(stamp_at(NOW + MAX_AHEAD - 1), NOW)
    far = stamp_at(NOW + 100 * 365 * DAY)
    assert not clock.receive(far, NOW)
    assert first < clock.next(NOW) < stamp_at(NOW + MAX_AHEAD)


def test_what_a_broken_clock_wrote_can_be_written_over() -> None:
    clock = HybridClock()
    far = stamp_at(NOW + 100 * 365 * DAY)
    assert clock.next(NOW, above=far) == far + 1
    assert clock.next(NOW) < stamp_at(NOW + 1), "and the clock has not followed"
    near = stamp_at(NOW + 60)
    assert clock.next(NOW, above=near) == near + 1
    assert clock.next(NOW) == near + 2


def test_own_stamps_are_never_gone_below() -> None:
    clock = HybridClock()
    far = stamp_at(NOW + 2 * DAY)
    assert clock.receive(far, NOW, own=True)
    assert clock.next(NOW) == far + 1


def test_stamps_stay_where_peers_take_them() -> None:
    assert HybridClock().next(NOW, above=STAMP_MAX) == STAMP_MAX
    assert stamp_at(1e300) == STAMP_MAX
    assert stamp_at(-5.0) == 0
