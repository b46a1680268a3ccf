"""The simulation. A failure prints its seed; `python -m tests.sim --seed N --trace` replays it."""

from __future__ import annotations

import os

import pytest

from tests.sim.scenario import Run

SEEDS = int(os.environ.get("VXMESH_SIM_SEEDS", "1000"))
BATCH = 50


@pytest.mark.parametrize("first", range(1, SEEDS + 1, BATCH))
def test_seeds(first: int) -> None:
    done = 0
    for seed in range(first, min(first + BATCH, SEEDS + 1)):
        done += Run(seed).play().done
    assert done > 10 * min(BATCH, SEEDS), "hardly anything was allowed: the load tests nothing"


@pytest.mark.parametrize("first", range(1, SEEDS // 10 + 1, BATCH))  # each costs six times as much
def test_seeds_with_streams_to_a_few(first: int) -> None:
    done = 0
    for seed in range(first, min(first + BATCH, SEEDS // 10 + 1)):
        done += Run(seed, bounded=True).play().done
    assert done > 10 * min(BATCH, SEEDS // 10), (
        "hardly anything was allowed: the load tests nothing"
    )


@pytest.mark.parametrize("bounded", [False, True])
def test_a_seed_replays(bounded: bool) -> None:
    traces: list[list[str]] = []
    for _ in range(2):
        lines: list[str] = []
        Run(11, lines.append, bounded).play()
        traces.append(lines)
    assert traces[0] == traces[1]
    assert len(traces[0]) > 50
