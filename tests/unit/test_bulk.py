"""A bulk is taken in as its records one by one would be: whatever is in it, and whatever is there.

What stands opposite: agent/views.py (_take_many), core/bounds.py (are_plain), core/members.py
(put_fresh), core/replica.py (put_all).
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import views
from agent.core.replica import Delta, Record, Replica
from agent.model import Endpoint, encode
from agent.node import NodeState
from agent.views import Change
from tests.fuzz import world
from tests.fuzz.world import LOCAL, NET, OTHER, PEER, REMOTE

COUNT = views.MANY + 10
# What is done to one endpoint of a bulk: field, and a value. Some of it is fine.
ODD: list[tuple[str, Any]] = [
    ("id", "x" * 65), ("id", "é" * 16), ("id", REMOTE), ("id", LOCAL), ("id", f"{3:016x}"),
    ("network", OTHER), ("network", "f" * 16), ("network", "no id"),
    ("name", "e3"), ("name", "Upper"), ("name", "-a"), ("name", "a-"), ("name", ""),
    ("name", "a" * 63), ("name", "a" * 64), ("name", "a.b"), ("name", "ß"), ("name", "---"),
    ("mac", bytes(6)), ("mac", b"\1\0\0\0\0\1"), ("mac", b"\2\0\0"), ("mac", bytes(7)),
    ("mac", b"\2\0^\0\0\3"), ("addresses", ()), ("addresses", (b"123",)),
    ("addresses", (bytes([10, 1, 4, 3]),)),
    ("addresses", (bytes([10, 1, 0, 9]),)), ("addresses", (bytes(16), bytes([10, 1, 3, 3]))),
    ("addresses", (bytes([10, 1, 9, 1]),) * 2), ("addresses", (bytes([10, 1, 9, 2]),) * 65),
    ("aliases", ("db",)), ("aliases", ("Db",)), ("labels", {"a": "b"}), ("labels", {"": "b"}),
    ("sandbox", "s" * 16), ("sandbox", "no id"),
]  # fmt: skip


def endpoint(number: int) -> Endpoint:
    mac = b"\2\0^\0" + number.to_bytes(2, "big")
    address = bytes([10, 1]) + (number + 1024).to_bytes(2, "big")  # what world.make has is lower
    return Endpoint(f"{number:016x}", NET, f"e{number}", mac, (address,))


def taken(records: list[Record], together: bool) -> tuple[NodeState, list[Change]]:
    """A node and its changes after a peer's records, as one delta; `together`: by the bulk."""
    node = world.make()
    changes: list[Change] = []
    node.listeners.append(changes.append)
    base = node.version(PEER)
    rows = [Record(r.key, base + r.version, r.value) for r in records]
    with pytest.MonkeyPatch.context() as patch:
        if not together:
            patch.setattr(views, "MANY", 1 << 30)
        assert node.merge(Delta(PEER, base, base + len(rows), rows))
    return node, changes


def shown(node: NodeState, changes: list[Change]) -> object:
    """All that follows from the records, to be compared."""
    found: dict[str, object] = {
        "network of": node._network_of,
        "changes": [c.endpoints for c in changes],
    }
    for id, held in node.members.items():
        found[id] = [
            held.all, held.local, held.count,
            [(i.one, i._more) for i in (held.by_mac, held.by_name, held.by_address)],
        ]  # fmt: skip
    for id, addresses in node.addresses.items():
        found[f"space {id}"] = [(f.used, f.more) for f in addresses.space._families.values()]
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, COUNT - 1), st.sampled_from(ODD), max_size=3),
    st.sets(st.integers(0, COUNT - 1), max_size=2),
)
def test_the_same_as_one_by_one(odd: dict[int, tuple[str, Any]], deleted: set[int]) -> None:
    records = []
    for at in range(COUNT):
        made = endpoint(at + 1)
        if at in odd:
            field, value = odd[at]
            made = msgspec.structs.replace(made, **{field: value})
        key = views.ENDPOINT + (f"{at + 1:016x}" if at % 2 else made.id)
        records.append(Record(key, at + 1, b"" if at in deleted else encode(made)))
    assert shown(*taken(records, True)) == shown(*taken(records, False))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"{odd[0]} {odd[1]!r}"[:40])
def test_the_same_with_each_oddity(odd: tuple[str, Any]) -> None:
    made = [endpoint(number + 1) for number in range(COUNT)]
    made[5] = msgspec.structs.replace(made[5], **{odd[0]: odd[1]})
    records = [Record(views.ENDPOINT + e.id, at, encode(e)) for at, e in enumerate(made, 1)]
    assert shown(*taken(records, True)) == shown(*taken(records, False))


def test_a_plain_bulk_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparisons above would compare the long way with itself."""
    short: list[bool] = []
    take = views.Views._take_many

    def noted(*args: Any) -> bool:
        short.append(take(*args))
        return short[-1]

    monkeypatch.setattr(views.Views, "_take_many", noted)
    made = [endpoint(number + 1) for number in range(COUNT)]
    records = [Record(views.ENDPOINT + e.id, at, encode(e)) for at, e in enumerate(made, 1)]
    node, _ = taken(records, True)
    assert short == [True]
    assert node.members[NET].with_name("e7")


@pytest.mark.parametrize("seed", range(20))
def test_own_records_written_together_are_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    together, single = Replica("me"), Replica("me")
    for _ in range(6):
        rows = [(f"k{rng.randrange(12)}", rng.randbytes(2)) for _ in range(rng.randrange(1, 9))]
        if rng.random() < 0.5:
            rows = list(dict(rows).items())
        assert together.put_all(rows) == [single.put(*row) for row in rows]
        upto = rng.randint(single.published, single.written())
        for replica in (together, single):
            replica.publish(upto)
        assert together.records("me") == single.records("me")
        assert together.since("me", 0) == single.since("me", 0)
        assert (together.size("me"), together.written()) == (single.size("me"), single.written())
