"""Rise, fall, and the time in which a backend starts."""

from __future__ import annotations

from agent.core.checking import START_EVERY, START_WITHIN, Streak
from agent.servicemodel import Check


def states(streak: Streak, looks: str, begin: float = 100.0) -> str:
    """`looks` of + and -; the state after each, as its first letter, h, u (unknown) or i (ill)."""
    letters = {"healthy": "h", "unhealthy": "i", "unknown": "u"}
    found = ""
    for number, look in enumerate(looks):
        before = streak.state
        assert streak.note(look == "+", begin + number) == (streak.state != before)
        found += letters[streak.state]
    return found


def test_one_look_turns_it_by_default() -> None:
    assert states(Streak(Check("tcp"), 0.0), "+-+") == "hih"


def test_rise_and_fall_count_in_a_row() -> None:
    streak = Streak(Check("tcp", rise=3, fall=2), 0.0, "healthy")
    assert states(streak, "-+--+-++-+++") == "hhhiiiiiiiih"


def test_the_first_good_look_makes_it_healthy_whatever_rise_says() -> None:
    assert states(Streak(Check("tcp", rise=5), 0.0), "+") == "h"


def test_what_fails_while_it_starts_says_nothing() -> None:
    streak = Streak(Check("tcp"), 100.0)
    assert states(streak, "---", begin=100.0) == "uuu"
    assert streak.note(False, 100.0 + START_WITHIN) and streak.state == "unhealthy"


def test_while_it_starts_it_is_looked_at_often_and_then_at_the_interval() -> None:
    streak = Streak(Check("tcp", interval=5.0), 100.0)
    assert streak.pause(100.0) == START_EVERY
    assert streak.pause(100.0 + START_WITHIN) == 5.0
    streak.note(True, 100.1)
    assert streak.pause(100.1) == 5.0
    assert Streak(Check("tcp", interval=0.1), 100.0).pause(100.0) == 0.1
