"""The benchmark's probes see what is lost, late and wrong: on hosts where that is known."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from agent.testbed import Testbed, temporary
from tests.bench import echo, lookups
from tests.bench.lookups import Lookups, Nowhere, Workload


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Testbed, Workload, Workload]]:
    """Two hosts without agents, a process in each, and a name server that knows nothing."""
    with temporary(hosts=2, with_agents=False) as bed, contextlib.ExitStack() as stack:
        found = []
        for host in bed.hosts:
            process = host.popen(["sleep", "600"])
            stack.callback(process.wait)
            stack.callback(process.kill)
            found.append(Workload(process.pid, host.name, host.address, bed.client.address))
        stack.callback(Nowhere(bed.client.netns).close)
        yield bed, found[0], found[1]


def test_a_stream_counts_what_is_lost(pair: tuple[Testbed, Workload, Workload]) -> None:
    bed, near, far = pair
    with contextlib.closing(echo.Server(far)):
        assert echo.wait(near, far.address, 5.0) is not None
        assert echo.Stream(near, far.address, 200, 2000.0).result() == 0
        bed.cut("h2", "h1", one_way=True)  # there, and not back
        try:
            assert echo.wait(near, far.address, 0.2) is None
            assert echo.Stream(near, far.address, 200, 2000.0).result() == 200
        finally:
            bed.heal("h2")


def test_names_that_are_not_known_are_told_from_silence(
    pair: tuple[Testbed, Workload, Workload],
) -> None:
    bed, near, _ = pair
    assert lookups.wait(near, "h2", 5.0, resolves=False) is not None
    assert lookups.wait(near, "h2", 0.2, resolves=True) is None
    bed.cut("h1")
    try:
        assert lookups.wait(near, "h2", 0.2, resolves=False) is None
    finally:
        bed.heal("h1")


def test_every_lookup_that_fails_is_counted(pair: tuple[Testbed, Workload, Workload]) -> None:
    bed, near, _ = pair
    wrong = Lookups(near, "h2", "10.0.0.1", 1000.0)
    deadline = time.monotonic() + 60
    while not wrong.asked:
        assert time.monotonic() < deadline, "it never asked"
        time.sleep(0.001)
    bed.cut("h1")  # and what is not answered
    try:
        failed = wrong.stop()
    finally:
        bed.heal("h1")
    assert failed == wrong.asked > 0
