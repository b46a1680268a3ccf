"""Runs one target on many inputs: what it raises, how long it takes, what it leaves in memory.

Every input follows from (target, seed, number) alone, so that what failed can be run again.
What stands opposite: targets/ has the targets, inputs.py makes the inputs.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import VxmeshError
from tests.fuzz.inputs import mutate

CORPUS = Path(__file__).with_name("corpus")
# s; a decoder that holds the loop for longer lets failure detection slip (probe timeouts are
# 200 ms at the least). Twice as much, as this machine may be busy with something else.
SLOW = 0.4
# An input that is slow is run again up to this often before it counts, as the machine may have
# been busy for seconds: until it is fast once.
AGAIN = 20
# Part of the run after which all caches are taken to be full, and memory to stand still ...
WARM = 0.3
GROWTH_MAX = 24 << 20  # ... but for this many bytes: the allocator's own, seen up to 10 MB


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder. `run` raises one of `raises` on what it refuses, and nothing else."""

    name: str
    run: Callable[[bytes], object]
    make: Callable[[random.Random], bytes]  # an input that is sound, or nearly
    raises: tuple[type[Exception], ...] = (VxmeshError,)
    weight: float = 1.0  # of the long form's inputs; less for what costs a disk
    tokens: Sequence[bytes] = ()  # that a mutation may put in
    binary: bool = True  # else mutations keep to text

    def corpus(self) -> Iterator[Path]:
        """The inputs that were kept."""
        folder = CORPUS / self.name
        return iter(sorted(folder.iterdir()) if folder.is_dir() else [])


class Failed(Exception):
    """An input did what none may do. `data` is that input."""

    def __init__(self, target: str, why: str, data: bytes) -> None:
        super().__init__(f"{target}: {why}; the input is {data[:200]!r} ({len(data)} bytes)")
        self.data = data


@dataclass(slots=True)
class Report:
    """How a run went. Times in s, memory in bytes."""

    target: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    slowest_input: bytes = b""
    growth: int = 0
    reached: int = 0  # what the coverage-guided engine counts as reached; 0: not counted
    failures: list[Failed] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Inputs a second."""
        return self.inputs / self.seconds if self.seconds else 0.0


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory in memory, if there is such a place; gone when the process ends."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="vxmesh-fuzz-", dir=shared if os.access(shared, os.W_OK) else None
    )


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def attempt(target: Target, data: bytes) -> tuple[bool, float]:
    """Run one input: whether it was refused, and the seconds it took. Failed if it may not be."""
    begin = time.perf_counter()
    refused = False
    try:
        target.run(data)
    except target.raises:
        refused = True
    except Exception as error:
        raise Failed(target.name, f"raised {error!r}", data) from error
    return refused, time.perf_counter() - begin


def check_speed(target: Target, data: bytes, seconds: float) -> None:
    """Failed if an input is slow, and not only this once."""
    if seconds > SLOW:
        took = []
        for _ in range(AGAIN):
            took.append(attempt(target, data)[1])
            if took[-1] <= SLOW:
                return
        raise Failed(target.name, f"took {min(took):.2f} s", data)


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Inputs without an end: fresh ones, and mutations of those and of the corpus."""
    rng = random.Random(f"{target.name} {seed}")
    pool = [path.read_bytes() for path in target.corpus()]
    while True:
        fresh = target.make(rng)
        pool.append(fresh)
        if len(pool) > 64:
            del pool[rng.randrange(len(pool))]
        yield fresh
        for _ in range(3):
            yield mutate(rng.choice(pool), rng, pool, target.tokens)


class Meter:
    """Counts inputs into a report, and looks at memory on the way."""

    def __init__(self, target: Target, expected: int) -> None:
        self.report = Report(target.name)
        self._target = target
        self._warm_at = int(expected * WARM)
        self._base = 0
        self._begin = time.perf_counter()

    def take(self, data: bytes) -> None:
        """Run one input. Failed as `attempt` and `check_speed` say."""
        report = self.report
        refused, seconds = attempt(self._target, data)
        report.inputs += 1
        report.refused += refused
        if seconds > report.slowest:
            check_speed(self._target, data, seconds)
            report.slowest, report.slowest_input = seconds, data
        if report.inputs == self._warm_at:
            gc.collect()
            self._base = resident()

    def close(self) -> Report:
        """The report of what has been run."""
        gc.collect()
        self.report.seconds = time.perf_counter() - self._begin
        if self._base:
            self.report.growth = resident() - self._base
        return self.report


def run(
    target: Target,
    count: int,
    seed: int,
    seconds: float = float("inf"),
    told: Callable[[int], None] = lambda done: None,
) -> Report:
    """Run `count` inputs, or as many as there is time for, 16 at the least; stops at the first that
    fails.

    `told` is called with the number of inputs so far, now and then.
    """
    meter = Meter(target, count)
    deadline = time.perf_counter() + seconds
    for number, data in enumerate(inputs(target, seed)):
        if number == count or (number and number % 16 == 0 and time.perf_counter() > deadline):
            break
        try:
            meter.take(data)
        except Failed as failure:
            meter.report.failures.append(failure)
            break
        if number % 256 == 0:
            told(number)
    return meter.close()
