"""The short form: a few seconds of hostile input for each decoder, and all that was ever found.

The seed is in each failure's text: `python -m tests.fuzz --only TARGET --seed SEED` replays it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.engine import CORPUS, Target, attempt, check_speed, run
from tests.fuzz.quiet import quiet
from tests.fuzz.targets import TARGETS

# A new one each time: what is run a thousand times is not to be the same thousand inputs.
SEED = int(os.environ.get("VXMESH_FUZZ_SEED", random.SystemRandom().randrange(1 << 31)))
SECONDS = 0.2  # a target
INPUTS = 2000  # a target, at most

KEPT = [(path.parent.name, path) for path in sorted(CORPUS.glob("*/*"))]


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_hostile_input_is_refused_as_it_should_be(target: Target) -> None:
    report = run(target, INPUTS, SEED, SECONDS)
    print(f"{target.name}: {report.inputs} inputs, seed {SEED}")
    for failed in report.failures:
        text = f"seed {SEED}: {failed} ({failed.data.hex()[:4000]})"
        raise AssertionError(text) from failed.__cause__
    assert report.inputs > 3


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_what_was_found_once_is_not_found_again(name: str, path: Path) -> None:
    data = path.read_bytes()
    _, seconds = attempt(TARGETS[name], data)
    check_speed(TARGETS[name], data, seconds)


def test_every_kept_input_is_of_a_target() -> None:
    assert {name for name, _ in KEPT} <= TARGETS.keys()


def test_the_harness_tells_a_failure_a_hang_and_a_refusal_apart() -> None:
    def decode(data: bytes) -> None:
        if data[:1] == b"k":
            raise KeyError("not declared")
        if data[:1] == b"v":
            raise ValueError("declared")

    target = Target("test", decode, lambda rng: b"ok", (ValueError,))
    assert attempt(target, b"fine")[0] is False
    assert attempt(target, b"v")[0] is True
    with pytest.raises(Exception, match="KeyError"):
        attempt(target, b"k")
    check_speed(target, b"fine", 100.0)  # slow once, and fast when it is run again


def test_the_long_form_runs_and_counts(tmp_path: Path) -> None:
    name = min(TARGETS)
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "20", "--only", name]
    command += ["--guided", "no", "--artifacts", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 inputs in" in done.stdout and "0 failures" in done.stdout
