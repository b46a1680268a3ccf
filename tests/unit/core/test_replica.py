from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.replica import Change, Delta, Record, Replica


def writer(*values: bytes, key: str = "k") -> Replica:
    replica = Replica("a")
    for number, value in enumerate(values):
        replica.put(f"{key}{number}", value)
    replica.publish(replica.written())
    return replica


def delta(replica: Replica, since: int, **more: bool) -> Delta:
    me = replica.me
    floor = replica.floor(me)
    records = replica.since(me, since)
    return Delta(me, since, replica.version(me), records, floor, **more)  # type: ignore[arg-type]


def test_a_delta_brings_what_came_after() -> None:
    a, b = writer(b"1", b"2"), Replica("b")
    assert b.merge(delta(a, 0)) == [Change("a", "k0", b"1"), Change("a", "k1", b"2")]
    a.put("k0", b"3")
    a.publish(3)
    assert [r.key for r in a.since("a", 2)] == ["k0"]
    assert b.merge(delta(a, 2)) == [Change("a", "k0", b"3")]
    assert b.digest() == {"b": (0, 0), "a": (3, 0)}


def test_a_delta_twice_or_late_changes_nothing() -> None:
    a, b = writer(b"1"), Replica("b")
    first = delta(a, 0)
    a.put("k0", b"2")
    a.publish(2)
    second = delta(a, 0)
    assert b.merge(second)
    assert b.merge(first) == []
    assert b.merge(second) == []
    assert b.get("a", "k0") == b"2"


def test_a_delta_over_a_hole_is_refused() -> None:
    a, b = writer(b"1", b"2", b"3"), Replica("b")
    assert b.merge(delta(a, 2)) is None
    assert b.version("a") == 0
    assert b.items("a") == []


def test_what_is_not_published_is_not_seen() -> None:
    a = Replica("a")
    a.put("x", b"1")
    assert a.since("a", 0) == []
    assert a.version("a") == 0
    assert a.written() == 1
    a.publish(1)
    assert a.since("a", 0) == [Record("x", 1, b"1")]


def test_an_overwritten_record_is_sent_once() -> None:
    a = writer(b"1")
    for number in range(5):
        a.put("k0", bytes([number]))
    a.publish(a.written())
    assert a.since("a", 0) == [Record("k0", 6, b"\x04")]


def test_tombstones_are_collected_and_who_was_away_gets_the_whole_state() -> None:
    a, b, away = writer(b"1", b"2"), Replica("b"), Replica("c")
    for replica in (b, away):
        replica.merge(delta(a, 0))
    a.delete("k0")
    a.publish(3)
    b.merge(delta(a, 2))
    assert a.collect("a", 3) == 1
    assert a.since("a", 0) == [Record("k1", 2, b"2")]
    # c has version 2, below the floor of 3: a normal delta could not tell it of the removal.
    whole = delta(a, 0, reset=True, complete=True)
    assert away.merge(whole) == [Change("a", "k0", b"")]
    assert away.items("a") == b.items("a")
    assert away.version("a") == 3
    assert away.floor("a") == 3


def test_a_whole_state_in_parts_replaces_only_when_complete() -> None:
    b = Replica("b")
    b.merge(Delta("a", 0, 5, [Record("old", 5, b"x")]))
    part = Delta("a", 0, 7, [Record("p", 7, b"1")], 9, reset=True)
    assert b.merge(part) == []
    assert b.get("a", "old") == b"x"
    lost = Delta("a", 8, 10, [Record("q", 10, b"2")], 9, reset=True, complete=True)
    assert b.merge(lost) is None
    last = Delta("a", 7, 10, [Record("q", 10, b"2")], 9, reset=True, complete=True)
    assert b.merge(last) == [
        Change("a", "old", b""),
        Change("a", "p", b"1"),
        Change("a", "q", b"2"),
    ]
    assert b.digest()["a"] == (10, 9)


def test_a_writer_that_lost_its_last_records_goes_on_above_them() -> None:
    a, b = writer(b"1", b"2"), Replica("b")
    b.merge(delta(a, 0))
    back = Replica("a")
    back.restore([Record("k0", 1, b"1")], 1, 0)
    assert back.surpass(b.version("a"))
    assert not back.surpass(1)
    back.publish(back.written())
    assert b.version("a") < back.floor("a"), "b must be given the whole state"
    changes = b.merge(delta(back, 0, reset=True, complete=True))
    assert changes == [Change("a", "k1", b"")]
    assert [(r.key, r.value) for r in b.items("a")] == [("k0", b"1")]


def test_until_a_newer_one_is_published_the_older_is_told() -> None:
    a = writer(b"1", b"2")
    assert a.put("k0", b"3").version == 3
    assert a.put("k0", b"4").version == 4
    a.delete("k1")
    assert [(r.key, r.version) for r in a.since("a", 0)] == [("k0", 1), ("k1", 2)]
    assert [(r.key, r.version) for r in a.since("a", 1)] == [("k1", 2)]
    a.publish(3)
    assert [(r.key, r.version) for r in a.since("a", 0)] == [("k1", 2), ("k0", 3)]
    assert [(r.key, r.version) for r in a.since("a", 2)] == [("k0", 3)]
    a.publish(4)
    assert [(r.key, r.version) for r in a.since("a", 0)] == [("k1", 2), ("k0", 4)]
    a.publish(5)
    assert [(r.key, r.version) for r in a.since("a", 0)] == [("k0", 4), ("k1", 5)]
    assert a._past == {}


@given(st.lists(st.tuples(st.sampled_from(["put", "delete", "publish"]), st.integers(0, 3))))
def test_who_follows_what_is_published_has_what_a_crash_would_leave(
    steps: list[tuple[str, int]],
) -> None:
    a, b = Replica("a"), Replica("b")
    written: list[Record] = []
    for number, (what, key) in enumerate(steps):
        if what == "put":
            written.append(a.put(f"k{key}", b"%d" % number))
        elif what == "delete":
            written.append(a.delete(f"k{key}"))
        else:
            a.publish(a.written() - key)
            assert b.merge(delta(a, b.version("a"))) is not None
        left = {record.key: record for record in written if record.version <= a.published}
        assert {r.key: r for r in b.records("a")} == left


def test_what_is_meant_for_one_who_has_nothing_is_not_put_on_top_of_a_part() -> None:
    a, b = writer(b"1", b"2"), Replica("b")
    b.merge(delta(a, 0))
    a.delete("k0")
    a.put("k2", b"3")
    a.publish(a.written())
    a.collect("a", 3)  # so nothing tells of k0's end any more
    assert b.merge(delta(a, 0)) is None, "sent to b when it had told that it has nothing"
    assert b.get("a", "k0") == b"1"
    whole = b.merge(delta(a, 0, reset=True, complete=True))
    assert whole and Change("a", "k0", b"") in whole
    # Who has nothing takes it, in as many parts as it comes.
    c = Replica("c")
    everything = a.since("a", 0)
    assert c.merge(Delta("a", 0, 2, everything[:1], 3)) is not None
    assert c.merge(Delta("a", 2, 4, everything[1:], 3)) is not None
    assert c.items("a") == a.items("a")


def test_nobody_writes_for_us() -> None:
    a = writer(b"1")
    assert a.merge(Delta("a", 0, 9, [Record("evil", 9, b"x")])) == []
    assert a.get("a", "evil") == b""


def test_forget_says_what_goes() -> None:
    b = Replica("b")
    b.merge(delta(writer(b"1", b""), 0))
    assert b.forget("a") == [Change("a", "k0", b"")]
    assert b.version("a") == 0


def test_a_delta_that_lost_tombstones_which_we_lack_is_not_taken() -> None:
    peer = Replica("b")
    peer.merge(Delta("a", 0, 3, [Record(f"e/{n}", n, b"v") for n in (1, 2, 3)]))
    # Of whom thinks that we have nothing: e/1 was deleted by version 4, and that is collected.
    rest = [Record("e/2", 2, b"v"), Record("e/3", 3, b"v"), Record("e/4", 5, b"v")]
    assert peer.merge(Delta("a", 0, 5, rest, floor=4)) is None
    assert peer.version("a") == 3
    assert peer.merge(Delta("a", 0, 5, rest, 4, reset=True, complete=True)) is not None
    assert [record.key for record in peer.items("a")] == ["e/2", "e/3", "e/4"]


def test_all_of_an_origin_may_come_in_parts_below_its_floor() -> None:
    peer = Replica("b")
    assert peer.merge(Delta("a", 0, 2, [Record("e/2", 2, b"v")], floor=4))
    assert peer.merge(Delta("a", 2, 3, [Record("e/3", 3, b"v")], floor=4))
    assert peer.merge(Delta("a", 3, 5, [Record("e/4", 5, b"v")], floor=4))
    assert peer.version("a") == 5 and len(peer.items("a")) == 3


def test_a_digest_is_made_anew_just_when_something_changed() -> None:
    a, b = writer(b"1", b"2"), Replica("b")
    told = b.digest()
    assert b.digest() is told
    b.merge(delta(a, 0))
    assert b.digest() == {"b": (0, 0), "a": (2, 0)}
    b.put("mine", b"1")
    assert b.digest()["b"] == (0, 0), "not published"
    b.publish(1)
    assert b.digest()["b"] == (1, 0)
    b.merge(Delta("a", 0, 5, [Record("k0", 5, b"9")], floor=4, reset=True, complete=True))
    assert b.digest()["a"] == (5, 4)
    b.collect("a", 5)
    assert b.digest()["a"] == (5, 5)
    b.surpass(7)
    assert b.digest()["b"][1] > 7
    b.restore_peer("c", [], 3, 1)
    b.forget("a")
    assert b.digest().keys() == {"b", "c"}
    assert told == {"b": (0, 0)}, "who keeps one has what it was"
