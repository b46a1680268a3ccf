"""Rows of which the kernel refuses one: all others are written nonetheless. Without a kernel.

tests/netns/test_datapath_parts.py writes them on the real one.
"""

from __future__ import annotations

import contextlib
import errno

import pytest

from agent.datapath import packing
from agent.datapath.bulk import Bulk, Dumped
from agent.datapath.packing import Batch
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
        self.there, self.refused = there, refused
        self.sent: set[bytes] = set()

    def _send(self, batch: Batch) -> int:
        data, rows = batch
        if data in self.refused:
            raise OSError(errno.EAFNOSUPPORT, "refused")
        self.sent.add(data)
        return rows

    def _dump(self, family: int, ifindex: int) -> list[Dumped]:
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
