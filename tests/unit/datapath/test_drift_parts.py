"""The pure parts of drift repair: filter programs, links read by hand, repairs counted."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from agent.datapath import sockfilter
from agent.datapath.linkstate import LinkState, read_link
from agent.datapath.repairs import KINDS, Repair, Repairs


def evaluate(program: bytes, data: bytes) -> bool:
    """Whether a program of loads and tests accepts `data`, as the kernel would run it."""
    lines = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at, loaded = 0, 0
    while True:
        code, true, false, value = lines[at]
        if code == 0x06:
            return bool(value)
        if code == 0x15:
            at += true if loaded == value else false
        else:
            size = {0x30: 1, 0x28: 2, 0x20: 4}[code]
            loaded = int.from_bytes(data[value : value + size], "big")
        at += 1


def test_a_filter_jumps_to_its_labels() -> None:
    lines: list[sockfilter.Line] = [(0, 2), (7, 2, "seven"), "drop", "seven:", (4, 4)]
    lines += [(836_001, 4, "no"), "accept", "no:", "drop"]
    program = sockfilter.assemble(lines)
    for first, second, accepted in ((7, 1, True), (7, 836_001, False), (8, 1, False)):
        assert evaluate(program, struct.pack("=HxxI", first, second)) is accepted


def test_a_filter_with_an_unknown_label_is_refused() -> None:
    with pytest.raises(KeyError):
        sockfilter.assemble([(0, 1), (1, 1, "nowhere"), "drop"])


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(family: int, *attributes: bytes) -> bytes:
    body = struct.pack("=BxHiII", family, 1, 9, 0x1 | 0x10000, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), 16, 0, 0, 0) + body


COMMON = (
    attribute(3, b"vxl7\0"),
    attribute(1, b"\x02\0\0\0\0\x01"),
    attribute(4, struct.pack("=I", 1430)),
    attribute(10, struct.pack("=I", 5)),
)
PORT = attribute(8, b"\x01") + attribute(9, b"\0")  # learns, does not flood


def test_a_link_is_read() -> None:
    vxlan = attribute(1, b"vxlan\0") + attribute(2, attribute(7, b"\x01") + attribute(11, b"\0"))
    info = attribute(18, vxlan + attribute(4, b"bridge\0") + attribute(5, PORT))
    link = read_link(b"before" + message(0, *COMMON, attribute(20, b"vxmesh:net:x\0"), info), 6)
    mac = b"\x02\0\0\0\0\x01"
    assert link == LinkState(
        *(9, "vxl7", True, True, mac, 1430, 5, "vxmesh:net:x"),
        learning=True,
        flood=False,
        vxlan_learning=True,
        vxlan_proxy=False,
    )
    # A bridge's event has the port's settings elsewhere, and no alias.
    link = read_link(message(7, *COMMON, attribute(0x8000 | 12, PORT)))
    assert link == LinkState(9, "vxl7", True, True, mac, 1430, 5, None, True, False)
    # Nothing at all but a name.
    link = read_link(message(0, COMMON[0]))
    assert link == LinkState(9, "vxl7", True, True, b"", 0, 0, "")


def test_repairs_are_counted_and_told_once() -> None:
    repairs = Repairs()
    repairs.add("fdb", 2, "n1")
    repairs.add("fdb", 1, "n2")
    repairs.add("nft", 0)
    repairs.add("namespace")
    assert repairs.take() == [
        Repair("fdb", 3, frozenset({"n1", "n2"})),
        Repair("namespace", 1, frozenset()),
    ]
    assert repairs.take() == []
    assert repairs.total == {"fdb": 3, "namespace": 1}
    repairs.add("sysctl")
    repairs.clear()
    assert not repairs.total and not repairs.take()
    with pytest.raises(AssertionError):
        repairs.add("colour")


def test_repairs_in_words() -> None:
    none: frozenset[str] = frozenset()
    assert Repair("fdb", 12, none).describe(["web"]) == "12 FDB rows of network web put back"
    assert (
        Repair("link", 2, none).describe(["a", "b"]) == "2 device settings of 2 networks put back"
    )
    assert Repair("sysctl", 1, none).describe([]) == "1 sysctl put back"
    assert all(one != several for one, several in KINDS.values())


def test_the_documentation_has_every_kind() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/datapath.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text.split("## Drift")[1], re.M) == list(KINDS)
