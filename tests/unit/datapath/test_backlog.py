"""What failed is tried again, later each time, and only then."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from agent.datapath import backlog, reconciler
from agent.datapath.backlog import Backlog, Failures, Key, Passing, add_rows
from agent.drivers.base import DesiredState
from agent.errors import Conflict, VxmeshError

PORT: Key = ("port", 7, "00000000000000e1")
OTHER: Key = ("port", 7, "00000000000000e2")
BRIDGE: Key = ("bridge", 7, "")


def test_an_empty_backlog_is_false_and_any_entry_makes_it_true() -> None:
    assert not Backlog()
    names = [field.name for field in fields(Backlog)]
    assert len(names) == 23
    for name in names:
        entry = Backlog()
        kind = type(getattr(entry, name))
        setattr(entry, name, {bool: True, set: {7}, dict: {7: (set(), set())}}[kind])
        assert entry, name


def test_a_key_named_often_is_there_once() -> None:
    rows: backlog.Rows = {}
    add_rows(rows, 7, [b"a", b"b"], [b"x"])
    add_rows(rows, 7, [b"b"], [b"x"])
    add_rows(rows, 8, [b"c"], [])
    assert rows == {7: ({b"a", b"b"}, {b"x"}), 8: ({b"c"}, set())}


@pytest.fixture
async def stopped(monkeypatch: pytest.MonkeyPatch) -> float:
    """The loop's clock stands still, at this time: what is late by it was meant to be."""
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
    return 1000.0


async def test_delays_double_up_to_the_most(stopped: float) -> None:
    failures = Failures(lambda key: None)
    seen = []
    for _ in range(9):
        failures.failed(PORT, OSError(16, "busy"))
        seen.append(round(failures._failures[PORT].timer.when() - stopped, 1))
    assert seen == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    failures.clear()


async def test_services_are_tried_again_later_each_time(stopped: float) -> None:
    key: Key = ("services", 0, "")
    failures, noted = Failures(lambda key: None), Backlog()
    seen = []
    for _ in range(3):
        failures.failed(key, OSError(16, "busy"))
        seen.append(round(failures._failures[key].timer.when() - stopped, 1))
        backlog.note_again(key, noted, failures)
    assert noted.balancing and seen == [0.5, 1, 2]
    failures.clear()


async def test_what_is_about_to_pass_is_tried_again_soon(stopped: float) -> None:
    failures = Failures(lambda key: None)
    seen = []
    for _ in range(12):
        failures.failed(PORT, Passing("MAC", "is another's"))
        seen.append(round(failures._failures[PORT].timer.when() - stopped, 2))
    assert seen[:4] == [0.02, 0.04, 0.08, 0.16] and seen[-1] == 30
    failures.clear()


async def test_who_waits_for_a_port_waits_for_what_is_about_to_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    none = cast(DesiredState, SimpleNamespace(bridges=dict))
    made = reconciler.Reconciler(none, tmp_path)
    key: Key = ("port", 7, "e")
    made._failures.failed(key, Passing("MAC", "is another's"))
    waiting = asyncio.create_task(made.settle("e"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    made._failures.succeeded(key)
    made._backlog = Backlog()
    await waiting
    made._failures.failed(key, Conflict("device", "is there"))
    with pytest.raises(Conflict, match="is there"):
        await made.settle("e")
    monkeypatch.setattr(reconciler, "PASSES_WITHIN", -1.0)
    made._failures.failed(key, Passing("MAC", "is another's"))
    with pytest.raises(Conflict, match="is another's"):
        await made.settle("e")
    made._failures.clear()


async def test_the_next_attempt_comes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "RETRY_FIRST", 0.01)
    again: asyncio.Queue[Key] = asyncio.Queue()
    failures = Failures(again.put_nowait)
    failures.failed(PORT, OSError(16, "busy"))
    assert await asyncio.wait_for(again.get(), 30) == PORT
    assert failures.stands(PORT)  # until it succeeds


async def test_success_ends_it_and_begins_anew_with_the_first_delay() -> None:
    failures = Failures(lambda key: None)
    failures.failed(PORT, OSError(16, "busy"))
    failures.failed(PORT, OSError(16, "busy"))
    timer = failures._failures[PORT].timer
    failures.succeeded(PORT)
    assert timer.cancelled() and not failures.items()
    failures.failed(PORT, OSError(16, "busy"))
    assert failures._failures[PORT].times == 1
    failures.clear()


async def test_a_failure_for_people_is_kept_and_another_is_explained() -> None:
    failures = Failures(lambda key: None)
    conflict = Conflict("VNI 7", "is taken", "Delete it")
    failures.failed(BRIDGE, conflict)
    failures.failed(PORT, OSError(19, "No such device"))
    assert failures.items()[BRIDGE] is conflict
    error = failures.items()[PORT]
    assert type(error) is VxmeshError
    assert str(error).startswith("port of endpoint 00000000000000e1: [Errno 19] No such device.")
    failures.clear()


async def test_what_is_no_longer_wanted_is_forgotten() -> None:
    failures = Failures(lambda key: None)
    for key in (PORT, OTHER, BRIDGE):
        failures.failed(key, OSError(16, "busy"))
    assert not failures.forget(8)
    assert failures.forget(7, [OTHER[2]])
    assert set(failures.items()) == {OTHER, BRIDGE}
    assert not failures.forget(7, [OTHER[2]])
    assert failures.forget(7)
    assert not failures.items()
