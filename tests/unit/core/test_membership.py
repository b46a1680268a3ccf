"""Each rule of membership, driven by hand. The simulator has clusters of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.membership import (
    AHEAD_MAX,
    PRESETS,
    Ask,
    Membership,
    Outcome,
    Probe,
    Rumour,
    State,
    Transition,
    Tuning,
)
from agent.core.probing import REPORT

ALIVE, SUSPECT, REFUSED, DEAD, LEFT = State
LAN = PRESETS["lan"]


class Node:
    """A membership and its clock. `silence` says who does not answer, `refuse` whose host does."""

    def __init__(self, others: str = "bc", tuning: Tuning = LAN, seed: int = 1) -> None:
        self.now = 1000.0
        self.core = Membership("a", 5, tuning, random.Random(seed), self.now)
        for other in others:
            self.core.add(other, self.now)
            self.core.heard(other, 1, self.now)
        self.silence: set[str] = set()
        self.refuse: set[str] = set()
        self.hang: set[str] = set()  # silent too, but their hosts take connections
        self.deaf_helpers: set[str] = set()
        self.probes: list[tuple[float, str]] = []
        self.asks: list[Ask] = []
        self.seen: list[Transition] = []
        self.incarnations = dict.fromkeys(others, 1)
        while self.core.piggyback():  # what the start has to tell
            pass

    def receive(self, *rumours: Rumour) -> None:
        self.core.receive(rumours, self.now)
        self.settle()

    def settle(self) -> None:
        """Carry the actions out: all answer at once, or not at all."""
        while actions := self.core.actions():
            for action in actions:
                match action:
                    case Probe(seq, target, _):
                        self.probes.append((self.now, target))
                        if target in self.refuse:
                            self.core.refused(seq, self.now)
                        elif target in self.hang:
                            self.core.host_answers(seq, self.now)
                        elif target not in self.silence:
                            self.core.acked(seq, self.incarnations[target], self.now)
                    case Ask(seq, target, helpers, _):
                        self.asks.append(action)
                        for helper in set(helpers) - self.deaf_helpers:
                            self.core.answered(seq, helper, self.outcome(target), self.now)
        self.seen += self.core.transitions()

    def outcome(self, target: str) -> Outcome:
        if target in self.refuse:
            return Outcome.REFUSED
        return Outcome.SILENT if target in self.silence | self.hang else Outcome.ACK

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Let time pass; the time that it took."""
        begin, end = self.now, self.now + seconds
        while not until() and (due := self.core.next_timer()) <= end:
            self.now = max(self.now, due)
            self.core.handle_timer(self.now)
            self.settle()
            self.core.gossip(self.now, [])
        if not until():
            self.now = end
        return self.now - begin

    def until_state(self, node: str, state: State, within: float = 60.0) -> float:
        took = self.run(within, lambda: self.core.state(node) is state)
        assert self.core.state(node) is state, f"{node} is {self.core.state(node)!r}"
        return took

    def claimed(self, node: str) -> Rumour:
        return next(r for r in self.core.table() if r.node == node)


# -- the lattice --

CLAIMS = st.builds(
    Rumour,
    st.sampled_from("abcd"),
    st.integers(0, 3),
    st.sampled_from(State),
    st.sampled_from("bcd"),
)


def merged(batches: list[list[Rumour]]) -> Membership:
    core = Membership("z", 1, LAN, random.Random(1), 0.0)
    for batch in batches:
        core.receive(batch, 0.0)
    return core


def claims(core: Membership) -> set[tuple[str, int, State]]:
    return {(r.node, r.incarnation, r.state) for r in core.table()}


@given(st.lists(CLAIMS, max_size=12), st.randoms(use_true_random=False))
def test_claims_merge_in_any_order_any_number_of_times(
    rumours: list[Rumour], rng: random.Random
) -> None:
    once = merged([rumours])
    shuffled = rumours * 2
    rng.shuffle(shuffled)
    again = merged([[rumour] for rumour in shuffled])
    assert claims(once) == claims(again)
    assert once.digest() == again.digest()


@given(st.lists(CLAIMS, max_size=8), st.lists(CLAIMS, max_size=8))
def test_exchanged_tables_are_equal(left: list[Rumour], right: list[Rumour]) -> None:
    a, b = merged([left]), merged([right])
    a_table = a.table()
    a.receive(b.table(), 0.0)
    b.receive(a_table, 0.0)
    assert claims(a) == claims(b)
    assert a.digest() == b.digest()


@given(st.lists(CLAIMS, max_size=12))
def test_the_greatest_claim_holds(rumours: list[Rumour]) -> None:
    greatest: dict[str, tuple[int, State]] = {}
    for rumour in rumours:
        claim = (rumour.incarnation, rumour.state)
        greatest[rumour.node] = max(greatest.get(rumour.node, claim), claim)
    core = merged([rumours])
    table = {r.node: (r.incarnation, r.state) for r in core.table() if r.node != "z"}
    assert table == greatest


@given(st.lists(CLAIMS, max_size=12))
def test_the_digest_is_of_the_claims_alone(rumours: list[Rumour]) -> None:
    core = merged([rumours])
    digest = core.digest()
    core.receive([Rumour("e", 0, ALIVE)], 0.0)
    assert core.digest() != digest
    core.forget("e")
    assert core.digest() == digest


def test_a_rumour_of_a_lower_incarnation_changes_nothing() -> None:
    node = Node()
    node.core.heard("b", 7, node.now)
    for state in (SUSPECT, REFUSED, DEAD, LEFT):
        node.receive(Rumour("b", 6, state, "c"))
        assert node.core.state("b") is ALIVE
    assert node.seen == []


# -- who is known --


def test_a_node_known_from_its_record_is_alive_without_a_transition() -> None:
    node = Node("")
    node.core.add("b", node.now)
    node.core.add("b", node.now)
    assert node.core.state("b") is ALIVE
    assert node.core.live() == ["a", "b"]
    assert node.core.transitions() == []


def test_the_table_is_never_empty() -> None:
    assert Node("").core.table() == [Rumour("a", 5, ALIVE, "a")]


def test_what_is_forgotten_stays_forgotten_until_it_is_added_again() -> None:
    node = Node()
    node.core.forget("b")
    node.receive(Rumour("b", 9, ALIVE))
    node.core.heard("b", 9, node.now)
    assert "b" not in node.core.live()
    assert node.core.state("b") is LEFT
    node.core.add("b", node.now)
    assert "b" in node.core.live()


def test_a_stranger_that_speaks_is_passed_on() -> None:
    node = Node()
    node.core.heard("d", 3, node.now)
    assert Rumour("d", 3, ALIVE) in node.core.piggyback("b")


def test_strangers_of_a_whole_table_are_known_but_no_news() -> None:
    node = Node()
    node.core.receive([Rumour(f"n{i}", 1, ALIVE) for i in range(100)], node.now, table=True)
    assert len(node.core.live()) == 103
    assert node.core.piggyback("b") == []


# -- a silent host --


def test_a_silent_node_is_suspected_and_then_dead() -> None:
    node = Node()
    node.silence = {"b"}
    assert node.until_state("b", SUSPECT) < 3 * LAN.probe_interval
    node.receive(Rumour("b", 1, SUSPECT, "c"))  # c finds the same
    assert node.until_state("b", DEAD) == pytest.approx(LAN.suspicion_min, abs=0.05)
    assert [(t.before, t.after) for t in node.seen] == [(ALIVE, SUSPECT), (SUSPECT, DEAD)]
    assert node.seen[1].reason == "silent for 1.1 s; suspected by 2 nodes"
    assert node.seen[1].by == "a"


def test_without_confirmation_the_suspicion_lasts_its_maximum() -> None:
    node = Node()
    node.silence = {"b"}
    node.until_state("b", SUSPECT)
    expected = LAN.suspicion_min * LAN.suspicion_max_factor
    assert node.until_state("b", DEAD) == pytest.approx(expected, abs=0.05)


def test_where_there_is_no_third_node_the_minimum_holds() -> None:
    node = Node("b")
    node.silence = {"b"}
    node.until_state("b", SUSPECT)
    assert node.until_state("b", DEAD) == pytest.approx(LAN.suspicion_min, abs=0.05)


def test_those_that_are_silent_themselves_are_not_waited_for() -> None:
    node = Node("bcde")
    node.silence = {"b", "c"}
    node.until_state("b", SUSPECT)
    node.until_state("c", SUSPECT)
    node.deaf_helpers = node.silence = set("bcde")
    node.run(12.0)
    gone = {t.node for t in node.seen if t.after is DEAD}
    assert gone == set("bcde")  # unconfirmed and with K = 3 it would have taken longer


def test_accusations_need_a_helper_that_answers_or_a_second_look() -> None:
    node = Node("bc")
    node.silence = node.deaf_helpers = {"b", "c"}
    first = node.run(9, lambda: any(target == "b" for _, target in node.probes))
    begun = node.now
    node.until_state("b", SUSPECT)
    # The first window, and twice as much again since nobody answers: rather it is us.
    assert node.now - begun > 2.99 * LAN.probe_interval
    assert first < 1.0
    assert node.core.health.level > 0


def test_a_late_nack_ends_the_second_look() -> None:
    node = Node("bc")
    node.silence = node.deaf_helpers = {"b"}
    node.deaf_helpers = {"c"}
    node.run(9, lambda: bool(node.asks) and node.asks[-1].target == "b")
    node.run(LAN.probe_interval)
    assert node.core.state("b") is ALIVE
    node.core.answered(node.asks[-1].seq, "c", Outcome.SILENT, node.now)
    node.run(0.0)
    assert node.core.state("b") is SUSPECT


def test_who_refuted_a_suspicion_gets_more_time_with_the_next_probes() -> None:
    node = Node("bc")
    core = node.core

    def window() -> float:
        """Of the look that a suspicion brings, which b then refutes."""
        incarnation = node.claimed("b").incarnation
        core.receive([Rumour("b", incarnation, SUSPECT, "c")], node.now)
        probe = next(a for a in core.actions() if isinstance(a, Probe))
        core.acked(probe.seq, incarnation + 1, node.now)
        return probe.timeout / (LAN.probe_interval * REPORT)

    assert [window() for _ in range(6)] == pytest.approx([1, 2, 3, 4, 4, 4])
    node.now += 2 * LAN.lenience_decay
    assert window() == pytest.approx(2)


def test_every_member_is_probed_once_a_round() -> None:
    node = Node("bcdefgh")
    node.run(LAN.probe_interval * 1.1 * 7 * 10)
    rounds = [target for _, target in node.probes]
    for first in range(0, 63, 7):
        assert sorted(rounds[first : first + 7]) == list("bcdefgh")


def test_a_member_that_is_heard_is_not_accused_though_probes_fail() -> None:
    node = Node()
    node.silence = {"b"}
    for _ in range(100):
        node.core.heard("b", 1, node.now)
        node.run(0.05)
    assert node.core.state("b") is ALIVE


def test_our_timer_waits_while_the_suspect_is_heard() -> None:
    node = Node()
    node.silence = {"b"}
    node.receive(Rumour("b", 1, SUSPECT, "c"), Rumour("b", 1, SUSPECT, "x"))
    for _ in range(100):
        node.core.heard("b", 1, node.now)
        node.run(0.05)
    assert node.core.state("b") is SUSPECT  # only a higher incarnation refutes for the others
    # Then it is looked at, and found silent.
    node.until_state("b", DEAD, within=2 * LAN.probe_interval + 0.01)


def test_a_higher_incarnation_refutes() -> None:
    node = Node()
    node.silence = {"b"}
    node.until_state("b", SUSPECT)
    node.receive(Rumour("b", 2, ALIVE, "b"))
    assert node.core.state("b") is ALIVE
    assert Rumour("b", 2, ALIVE, "b") in node.core.piggyback("c")


def test_who_hears_of_a_suspicion_looks_at_once() -> None:
    node = Node()
    node.incarnations["b"] = 2  # it refutes in the answer
    node.receive(Rumour("b", 1, SUSPECT, "c"))
    assert node.probes == [(node.now, "b")]
    assert node.core.state("b") is ALIVE


def test_in_a_large_cluster_only_some_look_at_once() -> None:
    looked = 0
    for seed in range(400):
        core = Membership("a", 1, LAN, random.Random(seed), 0.0)
        for index in range(100):
            core.add(f"n{index}", 0.0)
        core.receive([Rumour("n1", 0, SUSPECT, "n2")], 0.0)
        looked += len(core.actions())
    assert 10 < looked < 50  # 2 K of 99 each: 24 in the mean


# -- local health --


def test_missing_nacks_make_us_slower() -> None:
    node = Node("bcde")
    node.silence, node.deaf_helpers = {"b"}, {"c", "d", "e"}
    node.until_state("b", SUSPECT)
    assert node.core.health.level > 0
    node = Node("bcde")
    node.silence = {"b"}
    node.until_state("b", SUSPECT)
    assert node.core.health.level == 0


def test_answers_make_us_well_again() -> None:
    node = Node()
    node.core.health.worse(4)
    node.run(20)
    assert node.core.health.level == 0


def test_an_unwell_node_holds_its_suspicions_longer() -> None:
    node = Node("b")
    node.silence = {"b"}
    node.core.health.worse(4)
    node.until_state("b", SUSPECT)
    assert node.until_state("b", DEAD) == pytest.approx(LAN.suspicion_min * 2, abs=0.05)


def test_a_clock_that_jumped_is_our_own_silence() -> None:
    node = Node()
    node.silence = {"b"}
    node.until_state("b", SUSPECT)
    node.silence = set()
    node.now += 30.0  # suspended; b's answer waits in a buffer
    node.core.handle_timer(node.now)
    assert node.core.state("b") is SUSPECT
    node.receive(Rumour("b", 2, ALIVE, "b"))
    node.run(5)
    assert node.core.state("b") is ALIVE
    assert DEAD not in {t.after for t in node.seen}


# -- ourselves --


@pytest.mark.parametrize("state", [SUSPECT, REFUSED, DEAD, LEFT])
def test_what_is_said_of_us_is_refuted_at_once(state: State) -> None:
    node = Node()
    node.core.receive([Rumour("a", 7, state, "b")], node.now)
    assert node.core.incarnation == 8
    assert node.core.next_timer() <= node.now
    assert node.core.gossip(node.now, ["b", "c"]) == (["c", "b"], [Rumour("a", 8, ALIVE, "a")])


def test_old_accusations_of_us_are_answered_without_a_new_incarnation() -> None:
    node = Node()
    node.receive(Rumour("a", 4, DEAD, "b"))
    assert node.core.incarnation == 5
    assert node.core.piggyback("b") == [Rumour("a", 5, ALIVE, "a")]


def test_an_incarnation_that_we_do_not_remember_is_surpassed() -> None:
    node = Node()
    node.receive(Rumour("a", 9, ALIVE, "a"))
    assert node.core.incarnation == 10


def test_leaving_is_told_and_nobody_is_probed_any_more() -> None:
    node = Node()
    node.core.leave(node.now)
    assert node.core.gossip(node.now, ["b"]) == (["b"], [Rumour("a", 5, LEFT, "a")])
    node.probes.clear()
    node.run(10)
    assert node.probes == []
    for _ in range(20):  # however often it was told: a ping that is answered is the proof
        assert node.core.piggyback("b")[0] == Rumour("a", 5, LEFT, "a")
    assert "a" not in node.core.live()


def test_who_has_left_is_left_alone() -> None:
    node = Node()
    node.receive(Rumour("b", 1, LEFT, "b"))
    node.probes.clear()
    node.run(30)
    assert {target for _, target in node.probes} == {"c"}
    assert node.core.state("b") is LEFT


@pytest.mark.parametrize("state", [SUSPECT, REFUSED, DEAD, LEFT])
def test_who_comes_back_with_a_higher_incarnation_is_alive_at_once(state: State) -> None:
    for heard in (True, False):
        node = Node()
        node.silence = {"b"}
        node.receive(Rumour("b", 1, SUSPECT, "c"), Rumour("b", 1, state, "c"))
        node.run(3)
        node.silence = set()
        node.incarnations["b"] = 2
        if heard:
            node.core.heard("b", 2, node.now)
        else:
            node.core.receive([Rumour("b", 2, ALIVE, "b")], node.now)
        assert node.core.state("b") is ALIVE


# -- a dead agent is not a dead host --


def test_a_refused_probe_makes_it_refused_without_suspicion() -> None:
    node = Node()
    node.refuse = {"b"}
    node.until_state("b", REFUSED)
    assert [(t.before, t.after) for t in node.seen] == [(ALIVE, REFUSED)]
    assert Rumour("b", 1, REFUSED, "a") in node.core.piggyback("c")
    assert node.core.live() == ["a", "c"]


def test_a_helper_that_is_refused_counts_as_well() -> None:
    node = Node("bcde")
    node.silence = {"b"}
    node.outcome = lambda target: Outcome.REFUSED  # type: ignore[method-assign]
    node.until_state("b", REFUSED)


def test_a_refused_node_is_probed_on_and_dead_after_the_grace_time() -> None:
    node = Node(tuning=replace(LAN, agent_grace=20.0))
    node.refuse = {"b"}
    node.until_state("b", REFUSED)
    node.probes.clear()
    assert node.until_state("b", DEAD) == pytest.approx(20.0)
    assert sum(target == "b" for _, target in node.probes) > 20
    assert node.seen[-1].reason == "its agent did not come back within 20 s"


def test_a_refused_node_that_falls_silent_is_dead_like_any_other() -> None:
    node = Node("b")
    node.refuse = {"b"}
    node.until_state("b", REFUSED)
    node.run(5)
    node.refuse, node.silence = set(), {"b"}
    took = node.until_state("b", DEAD)
    assert LAN.suspicion_min < took < LAN.suspicion_min + 3 * LAN.probe_interval
    assert node.seen[-1].reason.startswith("silent for 0.8 s; suspected by 1 node")


def test_a_refusal_ends_the_suspicion_underneath() -> None:
    node = Node("bc", tuning=replace(LAN, suspicion_max_factor=9.0))
    node.refuse = {"b"}
    node.until_state("b", REFUSED)
    for _ in range(15):  # silent for a while, again and again, and then a refusal
        node.refuse, node.silence = set(), {"b"}
        node.run(1.5)
        node.refuse, node.silence = {"b"}, set()
        node.run(1.5)
    assert node.core.state("b") is REFUSED


def test_others_accusations_do_not_bury_a_refused_node() -> None:
    node = Node("bcde")
    node.refuse = {"b"}
    node.until_state("b", REFUSED)
    for _ in range(10):
        node.receive(*(Rumour("b", 1, SUSPECT, by) for by in "cde"))
        node.run(2.0)
    assert node.core.state("b") is REFUSED


def test_others_accusations_confirm_ours_of_a_refused_node() -> None:
    def took(confirmed: bool) -> float:
        node = Node("bcde")
        node.refuse = {"b"}
        node.until_state("b", REFUSED)
        node.refuse, node.silence = set(), {"b"}
        if confirmed:
            node.receive(*(Rumour("b", 1, SUSPECT, by) for by in "cde"))
        return node.until_state("b", DEAD)

    assert took(confirmed=True) < took(confirmed=False) - LAN.suspicion_min


def test_a_restarted_agent_is_alive_at_once() -> None:
    node = Node()
    node.refuse = {"b"}
    node.until_state("b", REFUSED)
    node.refuse, node.incarnations["b"] = set(), 2
    assert node.until_state("b", ALIVE) < 3 * LAN.probe_interval


# -- the dead, and those that others call dead --


def test_the_dead_are_probed_and_told_what_is_said_of_them() -> None:
    node = Node("bcd")
    node.silence = {"b"}
    node.until_state("b", DEAD)
    assert node.core.piggyback("b")[0] == Rumour("b", 1, DEAD, "a")
    node.silence, node.incarnations["b"] = set(), 2
    assert node.until_state("b", ALIVE) <= LAN.probe_interval * 1.1


def test_all_the_dead_are_probed_in_turn_and_seldom() -> None:
    node = Node([chr(97 + i) for i in range(1, 25)])  # type: ignore[arg-type]
    node.silence = {"b", "c", "d"}
    for each in "bcd":
        node.until_state(each, DEAD)
    node.probes.clear()
    node.run(60.0)
    dead = [target for _, target in node.probes if target in "bcd"]
    assert dead.count("b") == pytest.approx(len(dead) / 3, abs=1)
    assert len(dead) == pytest.approx(60 / LAN.probe_interval / LAN.dead_turns(22), rel=0.1)


def test_a_dead_that_others_claim_of_a_live_member_is_held_and_told() -> None:
    node = Node()
    node.silence = {"b"}
    node.probes.clear()
    node.receive(Rumour("b", 1, DEAD, "c"))
    assert node.core.state("b") is SUSPECT
    assert node.claimed("b").state is DEAD  # the claim itself is merged
    assert node.probes == [(node.now, "b")]
    assert node.core.piggyback("b")[0] == Rumour("b", 1, DEAD, "c")
    assert node.until_state("b", DEAD) == pytest.approx(LAN.suspicion_min)


def test_a_held_dead_is_refuted_like_a_suspicion() -> None:
    node = Node()
    node.incarnations["b"] = 2  # it answers the ping that tells it
    node.receive(Rumour("b", 1, DEAD, "c"))
    assert node.core.state("b") is ALIVE
    assert DEAD not in {t.after for t in node.seen}


def test_a_dead_that_others_claim_of_a_silent_suspect_holds_at_once() -> None:
    node = Node()
    node.silence = {"b"}
    node.until_state("b", SUSPECT)
    node.receive(Rumour("b", 1, DEAD, "c"))
    assert node.core.state("b") is DEAD


def test_who_speaks_and_is_called_dead_is_told_by_a_ping() -> None:
    node = Node()
    node.silence = {"b"}
    node.until_state("b", DEAD)
    node.silence, node.incarnations["b"] = set(), 2
    node.core.heard("b", 1, node.now)
    node.settle()
    assert node.core.state("b") is ALIVE


def test_who_comes_back_with_an_old_incarnation_is_told_the_newer() -> None:
    node = Node()
    node.receive(Rumour("b", 6, ALIVE, "b"))
    node.core.heard("b", 1, node.now)
    assert Rumour("b", 6, ALIVE, "") in node.core.piggyback("b")
    node.core.heard("b", 7, node.now)
    assert node.claimed("b") == Rumour("b", 7, ALIVE, "")


# -- news --


def test_news_is_sent_a_bounded_number_of_times() -> None:
    node = Node()
    node.silence = {"b"}
    node.receive(Rumour("b", 1, SUSPECT, "c"))
    sent = sum(Rumour("b", 1, SUSPECT, "c") in node.core.piggyback("c") for _ in range(50))
    assert sent == LAN.transmissions(3) == 3


def test_the_newest_goes_first_and_what_is_old_is_dropped() -> None:
    node = Node("bcdef")
    node.core.receive([Rumour("b", 3, ALIVE), Rumour("c", 4, ALIVE)], node.now)
    assert node.core.piggyback("f", limit=1) == [Rumour("c", 4, ALIVE)]
    assert node.core.piggyback("f", limit=1) == [Rumour("b", 3, ALIVE)]
    node.core.receive([Rumour("c", 5, ALIVE)], node.now)
    everything = [r for _ in range(20) for r in node.core.piggyback("f", limit=1)]
    assert everything[0] == Rumour("c", 5, ALIVE)
    assert Rumour("c", 4, ALIVE) not in everything


def test_gossip_is_at_once_when_idle_and_paced_after() -> None:
    node = Node("bcdefghijk")
    streams = list("bcdefghijk")
    node.core.receive([Rumour("b", 2, ALIVE)], node.now)
    first, news = node.core.gossip(node.now, streams)
    assert len(first) == LAN.gossip_fanout
    assert news == [Rumour("b", 2, ALIVE)]
    assert node.core.gossip(node.now, streams) == ([], [])
    node.now += LAN.gossip_interval
    assert node.core.next_timer() <= node.now
    second, _ = node.core.gossip(node.now, streams)
    assert len(set(first) | set(second)) == 2 * LAN.gossip_fanout


def test_without_streams_news_waits_and_nothing_spins() -> None:
    node = Node()
    node.core.receive([Rumour("b", 2, ALIVE)], node.now)
    assert node.core.gossip(node.now, []) == ([], [])
    assert node.core.next_timer() > node.now
    assert Rumour("b", 2, ALIVE) in node.core.piggyback("c")


def test_confirmations_of_different_accusers_are_told_up_to_k() -> None:
    node = Node("bcdefgh")
    node.silence = {"b"}
    node.receive(*(Rumour("b", 1, SUSPECT, by) for by in "cdefgh"))
    told = {r.by for _ in range(20) for r in node.core.piggyback("h") if r.node == "b"}
    assert told == set("cdef")  # the accuser and K = 3


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_presets_fit_together(preset: Tuning) -> None:
    assert preset.probe_timeout < preset.probe_interval
    assert preset.suspicion_min > 2 * preset.probe_interval
    assert preset.window(1000) < preset.minimum(1000)


@pytest.mark.parametrize("unwell", [0, 8])
def test_an_agent_that_hangs_is_refused_and_not_dead_however_unwell_we_are(unwell: int) -> None:
    node = Node()
    node.hang.add("b")
    node.core.health.worse(unwell)
    node.run(30.0, lambda: node.core.state("b") is REFUSED)
    assert [t.after for t in node.seen if t.node == "b"] == [SUSPECT, REFUSED]
    node.run(20.0)
    assert node.core.state("b") is REFUSED, "each connection that its host takes renews it"
    node.hang.clear()
    node.silence.add("b")
    node.run(30.0, lambda: node.core.state("b") is DEAD)
    assert node.core.state("b") is DEAD


# -- what a hostile member claims --


def test_nobody_can_claim_an_incarnation_that_leaves_a_node_no_room_above() -> None:
    node = Node("bc")
    for top in (1 << 61, (1 << 62) - 1, 1 + AHEAD_MAX + 1):
        node.receive(Rumour("b", top, DEAD, "c"), Rumour("a", top + 4, SUSPECT, "c"))
    assert node.core.state("b") is ALIVE and node.core.incarnation == 5
    # What may be true is heeded, and refuted.
    node.receive(Rumour("a", 5 + AHEAD_MAX, SUSPECT, "c"))
    assert node.core.incarnation == 5 + AHEAD_MAX + 1
    # A node's own word counts wherever it is.
    node.core.heard("b", 1 << 61, node.now)
    assert (1 << 61) in {rumour.incarnation for rumour in node.core.table()}
