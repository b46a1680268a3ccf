"""Sessions over a perfect pipe and over broken ones. The simulation has the rest."""

from __future__ import annotations

import random

from agent.core.replica import Delta, Record, Replica
from agent.core.session import BATCH, Applied, Digest, Hello, Message, Session


class Store:
    """A replica as a session sees it."""

    def __init__(self, me: str) -> None:
        self.me = me
        self.replica = Replica(me)
        self.kernel: dict[str, int] = {}

    def write(self, count: int, start: int = 0) -> None:
        for number in range(start, start + count):
            self.replica.put(f"e/{number}", b"v")
        self.replica.publish(self.replica.written())

    def digest(self) -> dict[str, tuple[int, int]]:
        return self.replica.digest()

    def version(self, origin: str) -> int:
        return self.replica.version(origin)

    def floor(self, origin: str) -> int:
        return self.replica.floor(origin)

    def since(self, origin: str, version: int) -> list[Record]:
        return self.replica.since(origin, version)

    def merge(self, delta: Delta) -> bool:
        return self.replica.merge(delta) is not None

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        pass

    def stable(self, version: int) -> None:
        self.replica.collect(self.me, version)

    def applied(self, origin: str) -> int:
        return self.kernel.get(origin, 0)


class Pair:
    def __init__(self) -> None:
        self.now = 0.0
        self.stores = Store("a"), Store("b")
        self.open()

    def open(self) -> None:
        self.sessions = [
            Session(s, Hello(s.me, "1", "0", s.me), random.Random(1), self.now) for s in self.stores
        ]

    def exchange(self, lose: type[Message] | None = None, rounds: int = 4) -> list[Message]:
        """Let both send what they want; messages of kind `lose` do not arrive."""
        carried: list[Message] = []
        for _ in range(rounds):
            for sender, receiver in ((0, 1), (1, 0)):
                for message in list(self.sessions[sender].to_send(self.now)):
                    carried.append(message)
                    if lose is None or not isinstance(message, lose):
                        self.sessions[receiver].receive(message, self.now)
        return carried

    def later(self, seconds: float) -> None:
        self.now += seconds


def test_hello_then_digest_then_everything() -> None:
    pair = Pair()
    pair.stores[0].write(3)
    carried = pair.exchange()
    assert isinstance(carried[0], Hello)
    assert isinstance(carried[1], Digest)
    assert pair.stores[1].version("a") == 3
    assert pair.sessions[1].peer is not None
    assert pair.sessions[1].peer.node == "a"


def test_a_new_record_is_pushed_at_once_and_once() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].write(1)
    deltas = [m for m in pair.exchange() if isinstance(m, Delta)]
    assert [(d.base, d.upto) for d in deltas] == [(0, 1)]


def test_many_records_go_in_batches() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].write(BATCH * 2 + 1)
    deltas = [m for m in pair.exchange() if isinstance(m, Delta)]
    assert [len(d.records) for d in deltas] == [BATCH, BATCH, 1]
    assert pair.stores[1].version("a") == BATCH * 2 + 1


def test_a_lost_push_is_repaired_by_digests() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].write(1)
    pair.exchange(lose=Delta)
    assert pair.stores[1].version("a") == 0
    for _ in range(6):
        pair.later(1.2)
        pair.exchange()
    assert pair.stores[1].version("a") == 1


def test_data_on_its_way_is_not_sent_again() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].write(1)
    list(pair.sessions[0].to_send(pair.now))  # on its way, not there yet
    pair.later(1.2)
    for message in pair.sessions[1].to_send(pair.now):
        pair.sessions[0].receive(message, pair.now)  # a digest that lacks it
    assert not [m for m in pair.sessions[0].to_send(pair.now) if isinstance(m, Delta)]


def test_a_third_nodes_records_are_relayed_at_the_opening() -> None:
    pair = Pair()
    pair.stores[0].merge(Delta("c", 0, 1, [Record("n/c", 1, b"x")]))
    pair.exchange()
    assert pair.stores[1].version("c") == 1


def test_a_third_nodes_records_are_left_to_it_until_it_stands_still() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].merge(Delta("c", 0, 1, [Record("n/c", 1, b"x")]))
    assert not [m for m in pair.exchange() if isinstance(m, Delta)]
    for _ in range(4):
        pair.later(1.2)
        pair.exchange()
    assert pair.stores[1].version("c") == 1


def test_who_was_away_past_the_floor_gets_a_whole_state() -> None:
    pair = Pair()
    a, b = pair.stores
    a.write(3)
    pair.exchange()
    a.replica.delete("e/1")
    a.replica.publish(a.replica.written())
    a.replica.collect("a", 4)
    pair.open()  # b comes back with version 3, below the floor
    deltas = [m for m in pair.exchange() if isinstance(m, Delta)]
    assert [d.reset and d.complete for d in deltas] == [True]
    assert [r.key for r in b.replica.items("a")] == ["e/0", "e/2"]


def test_applied_is_told_when_it_rises() -> None:
    pair = Pair()
    pair.stores[0].write(2)
    pair.exchange()
    pair.stores[1].kernel["a"] = 2
    told = [m for m in pair.exchange() if isinstance(m, Applied)]
    assert told == [Applied(2)]
    assert pair.sessions[0].peer_applied == 2


def test_round_trip_time_comes_from_digests() -> None:
    pair = Pair()
    pair.exchange()
    for _ in range(3):
        pair.later(1.2)
        pair.exchange()
    assert pair.sessions[0].rtt == 0.0


def test_after_a_restart_of_the_stream_nothing_is_sent_twice() -> None:
    pair = Pair()
    pair.stores[0].write(5)
    pair.exchange()
    pair.open()
    assert not [m for m in pair.exchange() if isinstance(m, Delta)]


def test_a_digest_during_a_long_push_does_not_tear_it() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].write(BATCH * 5)
    sending = pair.sessions[0].to_send(pair.now)
    first = next(m for m in sending if isinstance(m, Delta))
    # The peer hears the rest from another meanwhile, and says so while we wait to write.
    pair.sessions[0].receive(Digest({"b": (0, 0), "a": (BATCH * 4, 0)}), pair.now)
    rest = [m for m in sending if isinstance(m, Delta)]
    rest += [m for m in pair.sessions[0].to_send(pair.now) if isinstance(m, Delta)]
    for delta in (first, *rest):
        assert delta.base < delta.upto
        assert all(delta.base < r.version <= delta.upto for r in delta.records)
    assert rest[0].base == BATCH * 4
