"""Rows of which the kernel refuses one: all others are written nonetheless; and what is known of
default rows without a look. Without a kernel.

tests/netns/test_datapath_parts.py writes them on the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.datapath import monitor, packing
from agent.datapath.bulk import Bulk, Dumped
from agent.datapath.monitor import Events
from agent.datapath.packing import Batch, Defaults
from agent.drivers.base import DEFAULT, Rows

INDEX = 7
MAC, ASTRAY = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
VTEPS = [bytes([10, 99, 0, number]) for number in range(1, 9)]
OTHER_FAMILY = b"\xfd" + bytes(15)


class Kernel(Bulk):
    """Answers in the kernel's place: `there` are its rows, `refused` the requests it refuses."""

    def __init__(self, there: list[Dumped], refused: set[bytes]) -> None:
        self._muting = lambda *_: contextlib.nullcontext()
        self._defaults: dict[int, frozenset[bytes]] = {}
        self._pool = ThreadPoolExecutor(1)
        self.there, self.refused = there, refused
        self.sent: set[bytes] = set()
        self.dumps = 0
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def _send(self, batch: Batch) -> int:
        data, rows = batch
        self.is_asked.set()
        assert self.may_go_on.wait(60)
        if data in self.refused:
            raise OSError(errno.EAFNOSUPPORT, "refused")
        self.sent.add(data)
        return rows

    def _dump(self, family: int, ifindex: int) -> list[Dumped]:
        self.dumps += 1
        return self.there if family == packing.AF_BRIDGE else []


def default(vtep: bytes, come: bool = True) -> bytes:
    return packing.pack_default(INDEX, vtep, come)


@pytest.mark.parametrize("vtep", [*VTEPS, OTHER_FAMILY])
def test_a_default_row_that_is_refused_ends_nothing(vtep: bytes) -> None:
    wanted = frozenset([*VTEPS, OTHER_FAMILY])
    kernel = Kernel([], {default(vtep)})
    with pytest.raises(OSError, match="refused"):
        kernel._write(INDEX, Rows([], [], True, wanted))
    assert kernel.sent == {default(other) for other in wanted - {vtep}}
    kernel.refused = set()
    kernel._write(INDEX, Rows([], [], True, wanted))
    assert default(vtep) in kernel.sent, "what was not written is not taken for written"
    kernel.sent = set()
    kernel._write(INDEX, Rows([], [], True, wanted))
    assert not kernel.sent


def test_one_that_cannot_be_deleted_keeps_none_from_coming() -> None:
    there = [(DEFAULT, OTHER_FAMILY, packing.NTF_SELF, packing.NUD_PERMANENT)]
    kernel = Kernel(there, {default(OTHER_FAMILY, False)})
    with pytest.raises(OSError, match="refused"):
        kernel._write(INDEX, Rows([], [], True, frozenset(VTEPS)))
    assert kernel.sent >= {default(vtep) for vtep in VTEPS}


@pytest.mark.parametrize("way", ["reconcile", "correct"])
def test_a_row_that_is_refused_keeps_no_default_row_back(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    astray: Dumped = (ASTRAY, b"", 0, packing.NUD_NOARP)
    [(row, _)] = packing.pack_fdb(INDEX, [(MAC, OTHER_FAMILY)])
    kernel = Kernel([astray], {row})
    monkeypatch.setattr(kernel, "_get", lambda request: [], raising=True)
    want = Rows([(MAC, OTHER_FAMILY)], [], True, frozenset(VTEPS))
    with pytest.raises(OSError, match="refused"):
        if way == "reconcile":
            kernel._reconcile(INDEX, want, False)
        else:
            kernel._correct(INDEX, want)
    assert kernel.sent >= {default(vtep) for vtep in VTEPS}
    if way == "reconcile":
        assert packing.pack_drop_static(INDEX, ASTRAY) in kernel.sent


def leading(*vteps: bytes) -> Rows:
    return Rows([], [], True, frozenset(vteps))


@pytest.mark.parametrize(
    ("seen", "dumps"),
    [
        ([(VTEPS[0], False), (VTEPS[2], True)], 0),  # as we wrote it ourselves
        ([(VTEPS[1], False)], 1),
        ([(VTEPS[1], False), (VTEPS[1], True)], 1),
        ([(VTEPS[0], True)], 1),
        ([(b"", True)], 1),
    ],
)
async def test_all_rows_are_read_again_only_if_default_rows_are_not_as_they_were_written(
    seen: Defaults, dumps: int
) -> None:
    kernel = Kernel([], set())
    try:
        await kernel.write(INDEX, leading(*VTEPS[:2]))
        await kernel.write(INDEX, leading(*VTEPS[1:3]))
        assert kernel.dumps == 1
        kernel.note_defaults(INDEX, seen)
        await kernel.write(INDEX, leading(VTEPS[1]))
        assert kernel.dumps == 1 + dumps
    finally:
        kernel._pool.shutdown()


@pytest.mark.parametrize(("vtep", "came", "dumps"), [(VTEPS[1], True, 0), (VTEPS[0], False, 1)])
async def test_what_is_heard_of_default_rows_during_a_write_is_judged_after_it(
    vtep: bytes, came: bool, dumps: int
) -> None:
    kernel = Kernel([], set())
    try:
        await kernel.write(INDEX, leading(VTEPS[0]))
        kernel.is_asked.clear()
        kernel.may_go_on.clear()
        writing = kernel.write(INDEX, leading(*VTEPS[:2]))
        assert await asyncio.to_thread(kernel.is_asked.wait, 60)
        kernel.note_defaults(INDEX, [(vtep, came)])
        kernel.may_go_on.set()
        await writing
        await kernel.write(INDEX, leading(VTEPS[0]))
        assert kernel.dumps == 1 + dumps
    finally:
        kernel.may_go_on.set()
        kernel._pool.shutdown()


def test_a_default_row_that_leads_by_another_port_is_none_of_ours() -> None:
    events = Events()
    for other in (b"", packing.ATTRIBUTE.pack(6, packing.NDA_PORT) + b"\x12\xb5\0\0"):
        for come in (True, False):
            monitor._row(default(VTEPS[0], come) + other, come, events)
    assert events.defaults == {
        INDEX: [(VTEPS[0], True), (VTEPS[0], False), (b"", True), (VTEPS[0], False)]
    }
