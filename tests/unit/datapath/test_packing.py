"""Rows as netlink messages: against a plain encoder written here, and back."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.datapath import packing
from agent.datapath.packing import Row

IFINDEX = 7
macs = st.binary(min_size=6, max_size=6)
addresses = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)


def attribute(kind: int, value: bytes) -> bytes:
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def split(data: bytes) -> list[bytes]:
    found = []
    while data:
        (length,) = struct.unpack_from("=I", data)
        assert length % 4 == 0 and length <= len(data)
        found.append(data[:length])
        data = data[length:]
    return found


def fdb_message(mac: bytes, vtep: bytes | None, last: bool) -> bytes:
    head = struct.pack("=BxxxiHBB", 7, IFINDEX, 0x80 | 0x40, 0x02, 0)
    flags = 0x1 | (0x4 if last else 0)
    if vtep is None:
        return message(29, flags, head + attribute(2, mac))
    return message(28, flags | 0x400 | 0x100, head + attribute(2, mac) + attribute(1, vtep))


def entry_message(mac: bytes, value: bytes | None, flags: int, last: bool) -> bytes:
    flags |= 0x1 | (0x4 if last else 0)
    if value is None:
        head = struct.pack("=BxxxiHBB", 7, IFINDEX, 0, 0x04, 0)
        return message(29, flags & 0x5, head + attribute(2, mac))
    head = struct.pack("=BxxxiHBB", 7, IFINDEX, 0x40, 0x04, 0)
    return message(28, flags, head + attribute(2, mac))


def neighbour_message(address: bytes, mac: bytes | None, last: bool) -> bytes:
    family = 2 if len(address) == 4 else 10
    head = struct.pack("=BxxxiHBB", family, IFINDEX, 0x80, 0, 0)
    flags = 0x1 | (0x4 if last else 0)
    if mac is None:
        return message(29, flags, head + attribute(1, address))
    return message(28, flags | 0x400 | 0x100, head + attribute(1, address) + attribute(2, mac))


@given(st.lists(st.tuples(macs, st.none() | addresses), min_size=1, max_size=20))
def test_fdb_rows(rows: list[Row]) -> None:
    ((data, count),) = packing.pack_fdb(IFINDEX, rows)
    assert count == len(rows)
    expected = [fdb_message(mac, vtep, i == len(rows) - 1) for i, (mac, vtep) in enumerate(rows)]
    assert split(data) == expected
    for exclusive, flags in ((False, 0x500), (True, 0x600)):
        ((data, count),) = packing.pack_entries(IFINDEX, rows, exclusive)
        assert count == len(rows)
        assert split(data) == [
            entry_message(mac, value, flags, i == len(rows) - 1)
            for i, (mac, value) in enumerate(rows)
        ]


@given(addresses)
def test_default_rows_are_appended_and_deleted_one_by_one(vtep: bytes) -> None:
    head = struct.pack("=BxxxiHBB", 7, IFINDEX, 0x80 | 0x40, 0x02, 0)
    body = head + attribute(2, bytes(6)) + attribute(1, vtep)
    assert packing.pack_default(IFINDEX, vtep, True) == message(28, 0x1 | 0x4 | 0x400 | 0x800, body)
    assert packing.pack_default(IFINDEX, vtep, False) == message(29, 0x1 | 0x4, body)


@given(st.lists(st.tuples(addresses, st.none() | macs), min_size=1, max_size=20))
def test_neighbour_rows(rows: list[Row]) -> None:
    ((data, count),) = packing.pack_neighbours(IFINDEX, rows)
    assert count == len(rows)
    last = len(rows) - 1
    assert split(data) == [neighbour_message(a, mac, i == last) for i, (a, mac) in enumerate(rows)]


def test_exclusive_rows_are_not_replaced() -> None:
    ((data, _),) = packing.pack_fdb(IFINDEX, [(bytes(6), bytes(4))], exclusive=True)
    assert struct.unpack_from("=H", data, 6)[0] == 0x1 | 0x4 | 0x400 | 0x200


def test_no_rows_are_no_batches() -> None:
    assert list(packing.pack_fdb(IFINDEX, [])) == []
    assert list(packing.pack_neighbours(IFINDEX, [])) == []


@pytest.mark.parametrize("n", [1, 999, 1000, 1001, 2500])
def test_batches_are_small_and_ask_for_one_answer_each(n: int) -> None:
    rows: list[Row] = [(i.to_bytes(16, "big"), bytes(6)) for i in range(n)]
    seen = 0
    for data, count in packing.pack_neighbours(IFINDEX, rows):
        assert len(data) <= 60_000
        messages = split(data)
        assert len(messages) == count
        assert [packing.is_last(m) for m in messages] == [False] * (count - 1) + [True]
        assert [m[32:48] for m in messages] == [key for key, _ in rows[seen : seen + count]]
        seen += count
    assert seen == n


# What a kernel sends in a dump of a VXLAN device that was made in another namespace.
def dumped(mac: bytes, vtep: bytes, extra: bytes = b"") -> bytes:
    head = struct.pack("=BxxxiHBB", 7, IFINDEX, 0x80 | 0x40, 0x02, 0)
    netns = attribute(10, bytes(4))
    return message(28, 2, head + netns + extra + attribute(2, mac) + attribute(1, vtep))


DONE = struct.pack("=IHHIIi", 20, 3, 2, 0, 0, 0)


@given(
    st.lists(
        st.tuples(macs, addresses, st.sampled_from([b"", attribute(6, b"\x12\xb5")])), max_size=20
    )
)
def test_a_dump_is_read_however_its_rows_are_laid_out(rows: list[tuple[bytes, ...]]) -> None:
    reader = packing.DumpReader()
    assert not reader.feed(b"".join(dumped(*row) for row in rows[:7]))
    assert reader.feed(b"".join(dumped(*row) for row in rows[7:]) + DONE)
    assert reader.rows == [(mac, vtep, 0x02, 0xC0) for mac, vtep, _ in rows]


def test_a_row_without_destination_is_read_as_such() -> None:
    head = struct.pack("=BxxxiHBB", 7, IFINDEX, 0x40, 0x04, 0)
    reader = packing.DumpReader()
    rows = [dumped(b"abcdef", b"1234"), message(28, 2, head + attribute(2, b"ghijkl"))]
    assert reader.feed(b"".join(rows) + DONE)
    assert reader.rows == [(b"abcdef", b"1234", 0x02, 0xC0), (b"ghijkl", b"", 0x04, 0x40)]


def test_a_disturbed_dump_says_so() -> None:
    reader = packing.DumpReader()
    assert reader.feed(struct.pack("=IHHIIi", 20, 3, 2 | 0x10, 0, 0, 0))
    assert reader.disturbed


def test_an_error_ends_a_dump() -> None:
    reader = packing.DumpReader()
    assert reader.feed(struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -19) + bytes(16))
    assert reader.error == 19


def test_answers_name_the_row() -> None:
    row = fdb_message(b"\x02\x00\x00\x00\x00\x01", b"\x0a\x00\x00\x01", False)
    error = struct.pack("=IHHIIi", 20 + len(row), 2, 0, 0, 0, -22) + row
    ((code, about),) = packing.answers(error)
    assert (code, packing.describe(about)) == (22, "02:00:00:00:00:01")
    row = neighbour_message(b"\x0a\x01\x00\x02", bytes(6), True)
    assert packing.describe(row) == "10.1.0.2"
    assert (
        packing.describe(neighbour_message(b"\xfd" + bytes(14) + b"\x02", None, True)) == "fd00::2"
    )
