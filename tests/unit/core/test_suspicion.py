"""The suspicion's timeout (Lifeguard, 2018) and the local health multiplier."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.suspicion import Health, Lenience, Suspicion


def test_an_unconfirmed_suspicion_lasts_the_maximum() -> None:
    suspicion = Suspicion("a", 100.0, 1.0, 3.0, wanted=3)
    assert suspicion.deadline(possible=9) == 103.0


def test_each_confirmation_shortens_it_by_the_formula() -> None:
    suspicion = Suspicion("a", 0.0, 1.0, 3.0, wanted=3)
    for confirmed, by in enumerate("bcd", start=1):
        assert suspicion.confirm(by)
        expected = max(1.0, 3.0 - 2.0 * math.log(confirmed + 1) / math.log(4))
        assert suspicion.deadline(possible=9) == pytest.approx(expected)
    assert suspicion.deadline(possible=9) == pytest.approx(1.0)


def test_one_accuser_counts_once() -> None:
    suspicion = Suspicion("a", 0.0, 1.0, 3.0, wanted=3)
    assert not suspicion.confirm("a")
    assert suspicion.confirm("b")
    assert not suspicion.confirm("b")


def test_confirmations_that_change_nothing_are_not_passed_on() -> None:
    suspicion = Suspicion("a", 0.0, 1.0, 3.0, wanted=1)
    assert suspicion.confirm("b")
    assert not suspicion.confirm("c")


def test_where_nobody_could_confirm_the_minimum_holds_at_once() -> None:
    assert Suspicion("a", 0.0, 1.0, 3.0, wanted=0).deadline(possible=9) == 1.0
    assert Suspicion("a", 0.0, 1.0, 3.0, wanted=3).deadline(possible=0) == 1.0


@given(
    wanted=st.integers(0, 5),
    possible=st.integers(0, 8),
    accusers=st.lists(st.sampled_from("abcdefgh"), max_size=12),
)
def test_more_accusers_never_make_it_longer(
    wanted: int, possible: int, accusers: list[str]
) -> None:
    suspicion = Suspicion("x", 0.0, 1.0, 3.0, wanted)
    last = suspicion.deadline(possible)
    for by in accusers:
        suspicion.confirm(by)
        now = suspicion.deadline(possible)
        assert 1.0 <= now <= last <= 3.0
        last = now


def test_health_stays_within_its_bounds_and_scales() -> None:
    health = Health(limit=3)
    health.better()
    assert (health.factor, health.patience) == (1.0, 1.0)
    health.worse(9)
    assert (health.level, health.factor, health.patience) == (3, 4.0, 1.75)
    health.better()
    assert health.factor == 3.0


def test_lenience_grows_with_refutations_and_is_forgotten() -> None:
    lenience = Lenience(limit=3, decay=30.0)
    assert lenience.factor("a", 0.0) == 1
    factors = []
    for _ in range(5):
        lenience.refuted("a", 0.0)
        factors.append(lenience.factor("a", 0.0))
    assert factors == [2, 3, 4, 4, 4]
    assert [lenience.factor("a", t) for t in (29.0, 31.0, 61.0, 91.0)] == [4, 3, 2, 1]
    lenience.refuted("a", 91.0)
    assert lenience.factor("a", 92.0) == 2
