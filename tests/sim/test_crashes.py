"""The simulation with crashes. A failure prints its seed; replay it with
`python -m tests.sim --crashes --seed N --trace`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sim.crashrun import CrashRun

# A quarter of what the simulation without crashes runs: a run of these takes three times as long.
SEEDS = int(os.environ.get("VXMESH_SIM_SEEDS", "1000")) // 4
BATCH = 25


@pytest.mark.parametrize("first", range(1, SEEDS + 1, BATCH))
def test_seeds(first: int) -> None:
    done = crashes = 0
    for seed in range(first, min(first + BATCH, SEEDS + 1)):
        run = CrashRun(seed).play()
        done, crashes = done + run.done, crashes + run.crashes
    count = min(BATCH, SEEDS + 1 - first)
    assert done > 10 * count, "hardly anything was allowed: the load tests nothing"
    assert crashes > 5 * count


def test_a_seed_replays() -> None:
    traces: list[list[str]] = []
    for _ in range(2):
        lines: list[str] = []
        CrashRun(11, lines.append).play()
        traces.append(lines)
    assert traces[0] == traces[1]
    assert len(traces[0]) > 50


def test_a_seed_replays_in_another_process() -> None:
    """What was kept of peers went to disk in the order of a set, another one in each process."""
    script = "from tests.sim.crashrun import CrashRun; CrashRun(5, print).play()"
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": order},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0].count("\n") > 50
