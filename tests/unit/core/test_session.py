"""Sessions over a perfect pipe and over broken ones. The simulation has the rest."""

from __future__ import annotations

import random
from dataclasses import replace

from agent.core.plumtree import GRAFT_TRIES, Graft, Have, Mesh, Prune
from agent.core.replica import Delta, Record
from agent.core.session import BATCH, Applied, Digest, Hello, Message, Session
from agent.core.summary import Summary, bucket
from tests.sim.calm import Store
from tests.sim.keys import sealed


class Pair:
    def __init__(self, relays: bool = False) -> None:
        self.now = 0.0
        self.relays = relays
        self.stores = Store("a"), Store("b")
        self.open()

    def open(self) -> None:
        self.sessions = [
            Session(
                store,
                Hello(store.me, "1", "0", store.me),
                random.Random(1),
                self.now,
                Mesh(store.me, lambda: self.relays),
            )
            for store in self.stores
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
    pair.stores[0].merge(sealed(Delta("c", 0, 1, [Record("n/c", 1, b"x")])))
    pair.exchange()
    assert pair.stores[1].version("c") == 1


def test_a_third_nodes_records_are_left_to_it_until_it_stands_still() -> None:
    pair = Pair()
    pair.exchange()
    pair.stores[0].merge(sealed(Delta("c", 0, 1, [Record("n/c", 1, b"x")])))
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


class Middle:
    """Node m with streams to others that are played by the test."""

    def __init__(self, *peers: str, relays: bool = True) -> None:
        self.now = 0.0
        self.store = Store("m")
        self.mesh = Mesh("m", lambda: relays)
        self.sessions: dict[str, Session] = {}
        for peer in peers:
            self.open(peer, {})

    def open(self, peer: str, has: dict[str, tuple[int, int]]) -> list[Message]:
        """A new stream; what is sent once the peer has told what it has."""
        hello = Hello("m", "1", "0", "m")
        session = Session(self.store, hello, random.Random(1), self.now, self.mesh)
        list(session.to_send(self.now))
        session.receive(Hello(peer, "1", "0", peer), self.now)
        self.mesh.up(session)
        self.sessions[peer] = session
        session.receive(Digest(has, 1.0, self.now or 0.1), self.now)
        return self.sent(peer)

    def get(self, peer: str, message: Message) -> None:
        self.sessions[peer].receive(message, self.now)

    def sent(self, peer: str) -> list[Message]:
        session = self.sessions[peer]
        told = [m for m in session.to_send(self.now) if not isinstance(m, Digest | Summary)]
        told = [bare(m) if isinstance(m, Delta) else m for m in told]
        return [m for m in told if type(m).__name__ != "Seen"]

    def later(self, seconds: float) -> None:
        self.now += seconds


def delta(origin: str, upto: int, base: int | None = None) -> Delta:
    base = upto - 1 if base is None else base
    return sealed(Delta(origin, base, upto, [Record(f"e/{upto}", upto, b"v")]))


def bare(delta: Delta) -> Delta:
    """Without the certificate, which goes along only where it may be new."""
    return replace(delta, certificate=b"")


def test_what_comes_goes_on_to_the_others_and_not_back() -> None:
    node = Middle("a", "b", "c")
    node.get("a", delta("o", 1))
    assert node.sessions["b"].pending and not node.sessions["a"].pending
    assert [node.sent(peer) for peer in "abc"] == [[], [bare(delta("o", 1))], [bare(delta("o", 1))]]


def test_what_the_peer_has_is_not_sent_to_it() -> None:
    node = Middle("a", "b")
    node.get("b", Have({"o": 1}))
    node.get("a", delta("o", 1))
    assert node.sent("b") == []
    node.get("a", delta("o", 2))
    assert node.sent("b") == [bare(delta("o", 2))]


def test_its_own_node_is_not_told_of_its_records() -> None:
    node = Middle("a", "o")
    node.get("a", delta("o", 1))
    assert node.sent("o") == []


def test_a_second_stream_is_pruned_and_the_first_is_not() -> None:
    node = Middle("a", "b")
    node.get("a", delta("o", 1))
    node.get("b", delta("o", 1))
    assert node.sent("b") == [Prune(("o",))]
    node.get("b", delta("o", 2))  # was on its way when the prune went
    node.get("a", delta("o", 2))
    assert node.sent("a") == [], "or nobody would push any more"
    node.get("a", delta("o", 3))
    assert node.sent("b") == [], "it is lazy both ways"


def test_the_stream_with_the_origin_itself_wins() -> None:
    node = Middle("a", "o")
    node.get("a", delta("o", 1))
    node.get("o", delta("o", 1))
    assert node.sent("o") == []
    node.get("o", delta("o", 2))
    node.get("a", delta("o", 2))
    assert node.sent("a") == [Prune(("o",))]


def test_a_lazy_stream_is_told_a_little_later_of_many_at_once() -> None:
    node = Middle("a", "b")
    node.get("b", Prune(("o", "p")))
    node.get("a", delta("o", 1))
    node.get("a", delta("p", 1))
    assert node.sent("b") == []
    assert node.sessions["b"].next_timer() - node.now <= 0.15
    node.get("a", delta("o", 2))
    node.later(0.2)
    assert node.sent("b") == [Have({"o": 2, "p": 1})]
    node.later(0.2)
    assert node.sent("b") == []


def test_what_is_told_of_and_does_not_come_is_asked_for() -> None:
    node = Middle("a", "b")
    node.get("a", delta("o", 1))
    node.get("b", Have({"o": 3}))
    assert node.sent("b") == [], "it may be on its way"
    node.later(0.3)
    assert node.sent("b") == [Graft({"o": 1})]
    node.get("b", delta("o", 3, base=1))
    node.later(2.0)
    assert node.sent("b") == []


def test_what_comes_in_time_is_not_asked_for() -> None:
    node = Middle("a", "b")
    node.get("a", delta("o", 1))
    node.get("b", Have({"o": 2}))
    node.get("a", delta("o", 2))
    node.later(0.3)
    assert node.sent("b") == []


def test_one_is_asked_at_a_time_and_not_for_ever() -> None:
    node = Middle("a", "b", "c")
    node.get("a", delta("o", 1))
    for peer in "bc":
        node.get(peer, Have({"o": 2}))
    asked = []
    for _ in range(100):
        node.later(0.1)
        step = [peer for peer in "bc" if Graft({"o": 1}) in node.sent(peer)]
        assert len(step) <= 1
        asked += step
    assert asked[:2] in (["b", "c"], ["c", "b"])
    assert len(asked) == 2 * GRAFT_TRIES


def test_who_asks_gets_it_and_all_that_follows() -> None:
    node = Middle("a", "b")
    node.get("b", Prune(("o",)))
    for version in (1, 2, 3):
        node.get("a", delta("o", version))
    node.get("b", Graft({"o": 1}))
    (sent,) = node.sent("b")
    assert isinstance(sent, Delta) and (sent.base, sent.upto) == (1, 3)
    node.get("a", delta("o", 4))
    assert node.sent("b") == [bare(delta("o", 4))]


def test_a_delta_that_does_not_fit_is_asked_for_from_where_we_are() -> None:
    for relays in (True, False):
        node = Middle("o", relays=relays)
        node.get("o", delta("o", 1))
        node.get("o", delta("o", 3))
        node.later(0.3)
        assert node.sent("o") == [Graft({"o": 1})]


def test_a_node_that_nobody_knew_is_asked_for_at_once() -> None:
    node = Middle("a", relays=False)
    node.get("a", Digest({"o": (4, 0), "m": (0, 0)}))
    assert node.sent("a") == [Graft({"o": 0})]


def test_parts_of_much_keep_others_from_being_asked() -> None:
    node = Middle("a", "b")
    many = [Record(f"e/{n}", n, b"v") for n in range(1, BATCH + 1)]
    node.get("b", Have({"o": 5 * BATCH}))
    assert node.sent("b") == [Graft({"o": 0})]
    node.later(0.4)
    node.get("b", sealed(Delta("o", 0, BATCH, many)))
    node.get("a", Have({"o": 5 * BATCH}))
    node.later(0.4)
    assert node.sent("a") == node.sent("b") == [], "it is coming"
    node.later(0.4)
    assert Graft({"o": BATCH}) in node.sent("a") + node.sent("b"), "it was"


def test_a_stream_that_opens_late_is_not_to_carry_the_trees_again() -> None:
    node = Middle("a")
    node.get("a", delta("o", 1))
    sent = node.open("b", {"o": (1, 0)})
    assert Prune(("o",)) in sent
    node.get("a", delta("o", 2))
    assert node.sent("b") == []


def test_a_dead_parent_is_no_reason_to_wait() -> None:
    node = Middle("a", "b")
    node.get("a", delta("o", 1))
    node.mesh.down(node.sessions.pop("a"))
    node.get("b", Have({"o": 2}))
    assert node.sent("b") == [Graft({"o": 1})]


def test_summaries_that_differ_twice_bring_the_entries_of_their_buckets() -> None:
    pair = Pair(relays=True)
    pair.stores[0].write(1)
    pair.exchange()
    pair.later(1.2)
    pair.exchange()
    # Something that b has and nobody told a of.
    pair.stores[1].replica.merge(delta("o", 1))
    told: list[Message] = []
    for _ in range(3):
        pair.later(1.2)
        told += pair.exchange()
    digests = [m for m in told if isinstance(m, Digest)]
    assert digests and all(d.buckets >> bucket("o") & 1 for d in digests)
    assert all(set(d.entries) <= {"o"} for d in digests)
    assert Graft({"o": 0}) in told
    assert pair.stores[0].version("o") == 1
    pair.later(1.2)
    kinds = {type(m) for m in pair.exchange()}
    assert kinds == {Summary}, "and then they are quiet"


def test_how_much_is_missing_is_known_from_the_first_digest_on() -> None:
    node = Middle(relays=False)
    session = Session(node.store, Hello("m", "1", "0", "m"), random.Random(1), 0.0, node.mesh)
    session.receive(Hello("a", "1", "0", "a"), 0.0)
    assert session.missing == -1
    session.receive(Digest({"a": (2, 0), "o": (1, 0)}), 0.0)
    assert session.missing == 3
    session.receive(delta("a", 1), 0.0)
    assert session.missing == 2
    session.receive(delta("a", 2), 0.0)
    session.receive(delta("o", 1), 0.0)
    session.receive(Digest({"a": (9, 0)}), 0.0)
    assert session.missing == 0


def test_what_a_peer_still_has_of_a_removed_node_is_neither_asked_for_nor_missed() -> None:
    node = Middle(relays=False)
    session = Session(node.store, Hello("m", "1", "0", "m"), random.Random(1), 0.0, node.mesh)
    session.receive(Hello("a", "1", "0", "a"), 0.0)
    session.receive(Digest({"a": (1, 0), "lost": (5, 0), "gone": (3, 0)}), 0.0)
    assert session.missing == 9
    node.store.removed |= {"lost", "gone"}  # heard of from elsewhere meanwhile
    session.receive(delta("a", 1), 0.0)
    assert session.missing == 0
    node.store.removed |= {"late"}
    session.receive(Have({"late": 2}), 1.0)
    session.receive(Digest({"a": (1, 0), "late": (2, 0), "new": (1, 0)}), 1.0)
    asked = [m.entries for m in session.to_send(9.0) if isinstance(m, Graft)]
    assert asked == [{"new": 0}]


def test_what_changes_while_it_is_sent_is_begun_anew() -> None:
    origin, pair = Store("c"), Pair()
    pair.exchange()

    def tell(known: int) -> None:
        made = Delta("c", known, origin.version("c"), origin.since("c", known))
        assert origin.prove(made, introduce=True)
        assert pair.stores[0].merge(made, "c")

    origin.write(2 * BATCH)
    tell(0)
    pair.sessions[0].receive(Graft({"c": 0}), pair.now)
    for count, message in enumerate(pair.sessions[0].to_send(pair.now)):
        if count == 0:
            origin.write(2 * BATCH)  # so that the seals of what was to follow are dropped
            tell(2 * BATCH)
        pair.sessions[1].receive(message, pair.now)
    assert pair.stores[1].version("c") == 4 * BATCH
    assert pair.stores[1].replica.items("c") == origin.replica.items("c")


def test_what_cannot_be_proven_is_not_sent_nor_tried_for_ever() -> None:
    pair = Pair()
    pair.exchange()
    made = sealed(Delta("c", 0, 1, [Record("e/1", 1, b"x")]))
    made.seals = tuple(seal._replace(signature=bytes(64)) for seal in made.seals)
    assert pair.stores[0].merge(made, "c")
    pair.sessions[0].receive(Graft({"c": 0}), pair.now)
    assert not [m for m in pair.exchange() if isinstance(m, Delta)]


def test_an_origin_that_is_doubted_is_asked_for_all_it_holds() -> None:
    pair = Pair()
    a, b = pair.stores
    a.write(3)
    pair.exchange()
    relay = Store("r")
    a.write(1, start=3)
    made = Delta("a", 0, 4, a.since("a", 0))
    assert a.prove(made, introduce=True)
    assert relay.merge(made, "a")
    made.records, made.reset, made.complete = made.records[3:], True, True
    assert b.merge(made, "r")
    assert b.is_doubted("a")
    pair.later(1.2)
    carried = pair.exchange()
    assert Graft({"a": 0}, whole=True) in carried
    assert not b.is_doubted("a")
    assert b.replica.items("a") == a.replica.items("a")
