"""Figures that are none, in the table and against their targets."""

from __future__ import annotations

import math

from tests.bench.report import Line, Target, render


def test_what_took_too_long_is_more_than_the_limit_and_missed() -> None:
    line = Line("withdrawn", "s", "Swarm", [6.0, 7.0], [math.inf, math.inf], limit=20.0)
    target = Target(line, 2.0, of_ratio=False)
    assert target.render() == ["withdrawn", "> 20 s", "2 s or less", "missed"]
    assert line.ratio() is None
    assert "> 20" in render([line], [target])


def test_one_that_took_too_long_does_not_hide_the_median() -> None:
    line = Line("back", "s", ours=[0.2, math.inf, 0.3], limit=60.0)
    assert Target(line, 0.5, of_ratio=False).render()[1:] == ["0.300 s", "0.5 s or less", "met"]


def test_a_remark_stands_where_there_is_no_figure() -> None:
    line = Line("lost", "packets", "Swarm", ours=[0.0], remark="containers end")
    assert "containers end" in render([line], [])
    assert Target(line, 0.0, of_ratio=False).render()[-1] == "met"
    assert Target(line, 0.0, of_ratio=True).render()[1:] == [
        "not measured", "0 x Swarm or less", "",
    ]  # fmt: skip


def test_nothing_has_no_ratio_to_nothing() -> None:
    assert Line("lost", "packets", "Swarm", theirs=[0.0], ours=[0.0]).ratio() is None
