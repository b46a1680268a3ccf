"""Consent to removals: who goes on, who gives way, and what must be known before inheriting."""

from __future__ import annotations

import pytest

from agent.core.removal import (
    ATTEMPT_WITHIN,
    FROZEN_FOR,
    HELD_MAX,
    Answer,
    Ask,
    Attempt,
    Removals,
    Verdict,
)


class Sight:
    """What a node sees, set by hand."""

    def __init__(self, me: str, *others: str) -> None:
        self.me = me
        self.known = {me, *others}
        self.removed: set[str] = set()
        self.inherited: set[str] = set()
        self.alive: set[str] = set()
        self.versions: dict[str, int] = {}

    def voters(self) -> set[str]:
        return self.known - self.removed

    def is_removed(self, node: str) -> bool:
        return node in self.removed

    def has_removed(self, node: str) -> bool:
        return node in self.inherited

    def is_alive(self, node: str) -> bool:
        return node in self.alive

    def version(self, origin: str) -> int:
        return self.versions.get(origin, 0)


def make(me: str, *others: str) -> tuple[Removals, Sight]:
    sight = Sight(me, *others)
    return Removals(sight), sight


def consent(machine: Removals, attempt: Attempt, *voters: str) -> None:
    for voter in voters:
        machine.take(attempt, voter, Answer(Verdict.AGREED))


def test_all_others_that_are_not_lost_are_asked() -> None:
    machine, _ = make("a", "b", "c", "d")
    attempt = machine.begin({"d"}, 0.0)
    assert machine.look(attempt) == ["b", "c"]
    assert not machine.is_ready(attempt, 0.0)
    consent(machine, attempt, "b")
    assert machine.look(attempt) == ["c"]
    consent(machine, attempt, "c")
    assert machine.is_ready(attempt, 0.0)
    machine.finish(attempt)
    assert not machine.is_ready(attempt, 0.0)


def test_one_that_is_alone_needs_nobody() -> None:
    machine, _ = make("a", "b")
    assert machine.is_ready(machine.begin({"b"}, 0.0), 0.0)


def test_an_attempt_ends_with_its_time() -> None:
    machine, _ = make("a", "b")
    attempt = machine.begin({"b"}, 5.0)
    assert machine.is_ready(attempt, 5.0 + ATTEMPT_WITHIN - 0.1)
    assert not machine.is_ready(attempt, 5.0 + ATTEMPT_WITHIN)


def test_whom_only_a_voter_knows_is_asked_too() -> None:
    machine, _ = make("a", "b", "d")
    attempt = machine.begin({"d"}, 0.0)
    machine.take(attempt, "b", Answer(Verdict.AGREED, voters=frozenset("abcd")))
    assert machine.look(attempt) == ["c"]
    assert not machine.is_ready(attempt, 0.0)


def test_whom_it_comes_to_know_meanwhile_is_asked_too() -> None:
    machine, sight = make("a", "b", "d")
    attempt = machine.begin({"d"}, 0.0)
    consent(machine, attempt, "b")
    sight.known.add("c")
    assert not machine.is_ready(attempt, 0.0)
    assert machine.look(attempt) == ["c"]


def test_it_catches_up_with_the_furthest_voter_and_with_each_voters_own() -> None:
    machine, sight = make("a", "b", "c", "d")
    attempt = machine.begin({"d"}, 0.0)
    machine.take(attempt, "b", Answer(Verdict.AGREED, versions={"d": 7, "b": 3, "c": 99}))
    machine.take(attempt, "c", Answer(Verdict.AGREED, versions={"d": 5, "c": 4}))
    assert machine.lacking(attempt) == ["b", "c", "d"]
    sight.versions = {"b": 3, "c": 4, "d": 6}
    assert machine.lacking(attempt) == ["d"]
    assert not machine.is_ready(attempt, 0.0)
    sight.versions["d"] = 7
    assert machine.is_ready(attempt, 0.0)


def test_a_lost_one_that_lives_after_all_is_not_inherited() -> None:
    machine, sight = make("a", "b", "d")
    attempt = machine.begin({"d"}, 0.0)
    consent(machine, attempt, "b")
    sight.alive.add("d")
    assert not machine.is_ready(attempt, 0.0)


@pytest.mark.parametrize(
    ("ask", "verdict", "about"),
    [
        (Ask("a", frozenset("d")), Verdict.AGREED, ""),
        (Ask("x", frozenset("d")), Verdict.STRANGER, ""),
        (Ask("b", frozenset("d")), Verdict.STRANGER, ""),
        (Ask("e", frozenset("d")), Verdict.STRANGER, ""),
        (Ask("a", frozenset("bd")), Verdict.ALIVE, "b"),
        (Ask("a", frozenset("cd")), Verdict.ALIVE, "c"),
    ],
)
def test_what_a_voter_says(ask: Ask, verdict: Verdict, about: str) -> None:
    machine, sight = make("b", "a", "c", "d", "e")
    sight.alive.add("c")
    sight.removed.add("e")
    answer = machine.decide(ask, 0.0)
    assert (answer.verdict, answer.about) == (verdict, about)


def test_consent_tells_how_far_the_voter_is() -> None:
    machine, sight = make("b", "a", "d")
    sight.versions = {"a": 1, "b": 2, "d": 3}
    answer = machine.decide(Ask("a", frozenset("d")), 0.0)
    assert answer.versions == {"b": 2, "d": 3}
    assert answer.voters == frozenset("abd")


def test_of_two_the_smaller_id_goes_on() -> None:
    (a, _), (b, _) = make("a", "b", "d"), make("b", "a", "d")
    ours, theirs = a.begin({"d"}, 0.0), b.begin({"d"}, 0.0)
    refusal = a.decide(theirs.ask, 0.0)
    assert (refusal.verdict, refusal.about) == (Verdict.RIVAL, "a")
    consent_of_b = b.decide(ours.ask, 0.0)
    assert consent_of_b.verdict is Verdict.AGREED
    assert theirs.failed and theirs.failed.about == "a" and not b.is_ready(theirs, 0.0)
    a.take(ours, "b", consent_of_b)
    assert a.is_ready(ours, 0.0)
    b.take(theirs, "a", Answer(Verdict.AGREED))  # late, and of another attempt
    assert not b.is_ready(theirs, 0.0)


def test_two_that_remove_different_nodes_do_not_meet() -> None:
    machine, _ = make("b", "a", "c", "d")
    own = machine.begin({"c"}, 0.0)
    assert machine.decide(Ask("a", frozenset("d")), 0.0).verdict is Verdict.AGREED
    assert own.failed is None


def test_who_was_removed_already_must_be_known_to_be_so() -> None:
    (b, b_sees), (a, a_sees) = make("b", "a", "d", "e"), make("a", "b", "d", "e")
    b_sees.removed.add("d")
    b_sees.versions = {"b": 4, "d": 9, "e": 2}
    attempt = a.begin({"d", "e"}, 0.0)
    answer = b.decide(attempt.ask, 0.0)
    assert answer.settled == frozenset("d") and answer.versions == {"b": 4, "e": 2}
    a.take(attempt, "b", answer)
    a_sees.versions = {"b": 4, "e": 2}
    assert a.lacking(attempt) == ["d"] and not a.is_ready(attempt, 0.0)
    a_sees.removed.add("d")
    assert a.is_ready(attempt, 0.0)


def test_the_lost_are_not_heard_while_one_may_inherit() -> None:
    machine, _ = make("b", "a", "d")
    ask = Ask("a", frozenset("d"))
    machine.decide(ask, 0.0)
    assert machine.remover("d", FROZEN_FOR - 1) == "a"
    assert machine.remover("c", 0.0) == ""
    assert machine.remover("d", FROZEN_FOR) == ""
    machine.decide(ask, 100.0)
    machine.release(Ask("c", frozenset("d")))
    assert machine.remover("d", 100.0) == "a"
    machine.release(ask)
    assert machine.remover("d", 100.0) == ""


def test_ones_own_attempt_hears_them_once_the_rival_gave_up() -> None:
    machine, _ = make("b", "a", "d")
    machine.decide(Ask("a", frozenset("d")), 0.0)
    attempt = machine.begin({"d"}, 1.0)
    assert machine.remover("d", 1.0) == "a"
    consent(machine, attempt, "a")
    assert machine.remover("d", 1.0) == ""


def test_a_frozen_time_outlasts_an_attempt() -> None:
    # An attempt that began before the ask was sent must be over before the voter forgets it.
    assert FROZEN_FOR > ATTEMPT_WITHIN


# -- by force --


def test_a_living_one_is_removed_by_force_only() -> None:
    voter, sight = make("b", "a", "d")
    sight.alive.add("d")
    assert voter.decide(Ask("a", frozenset("d")), 0.0).verdict is Verdict.ALIVE
    assert voter.remover("d", 0.0) == "" and not voter.held
    assert voter.decide(Ask("a", frozenset("d"), True, 7), 0.0).verdict is Verdict.AGREED
    machine, sees = make("a", "b", "d")
    sees.alive.add("d")
    for force, ready in ((0, False), (7, True)):
        attempt = machine.begin({"d"}, 0.0, force)
        assert (attempt.ask.force, attempt.ask.number) == (force > 0, force)
        consent(machine, attempt, "b")
        assert machine.is_ready(attempt, 0.0) is ready


def test_a_forced_consent_has_no_end_but_the_removers() -> None:
    machine, sight = make("b", "a", "c", "d")
    ask = Ask("a", frozenset("d"), True, 7)
    machine.decide(ask, 0.0)
    assert machine.remover("d", 1e9) == "a"
    assert machine.open_ends() == [ask]
    machine.release(Ask("a", frozenset("d"), True, 6))  # late, of an attempt before
    machine.release(Ask("c", frozenset("d"), True, 9))
    assert machine.remover("d", 1.0) == "a"
    machine.release(ask)
    assert machine.remover("d", 1.0) == "" and machine.open_ends() == []
    machine.decide(ask, 0.0)
    sight.removed.add("a")
    assert machine.remover("d", 1e9) == "" and machine.open_ends() == [] and not machine.held


def test_a_remover_knows_whether_it_pursues_an_attempt() -> None:
    machine, sight = make("a", "b", "d")
    attempt = machine.begin({"d"}, 0.0, 7)
    assert machine.pursues(attempt.ask)
    assert not machine.pursues(Ask("a", frozenset("d"), True, 6))
    machine.finish(attempt)
    assert not machine.pursues(attempt.ask)
    sight.removed.add("d")
    assert not machine.pursues(attempt.ask)  # another one did it, whom the asker may not hear
    sight.inherited.add("d")
    assert machine.pursues(attempt.ask)  # it has come to its end


def test_who_is_being_cut_off_gets_no_consent() -> None:
    voter, _ = make("b", "a", "c", "d")
    voter.decide(Ask("a", frozenset("d"), True, 7), 0.0)
    for ask in (Ask("d", frozenset("a"), True, 8), Ask("d", frozenset("c"))):
        assert voter.decide(ask, 1.0).verdict is Verdict.STRANGER
    remover, _ = make("a", "b", "d")
    remover.begin({"d"}, 0.0, 7)
    assert remover.decide(Ask("d", frozenset("b"), True, 8), 0.0).verdict is Verdict.STRANGER


def test_ones_own_attempt_does_not_open_the_door_to_one_that_is_removed_already() -> None:
    machine, _ = make("b", "a", "d")
    machine.decide(Ask("a", frozenset("d"), True, 7), 0.0)
    attempt = machine.begin({"d"}, 1.0, 8)
    machine.take(attempt, "a", Answer(Verdict.AGREED, settled=frozenset("d")))
    assert machine.remover("d", 1.0) == "a"


def test_a_voter_is_heard_again_once_all_agree_that_its_remover_is_lost() -> None:
    machine, _ = make("b", "a", "c", "d")
    machine.decide(Ask("a", frozenset("d"), True, 7), 0.0)
    attempt = machine.begin({"a"}, 100.0)
    consent(machine, attempt, "d")
    assert machine.remover("d", 100.0) == "a"
    consent(machine, attempt, "c")
    assert machine.remover("d", 100.0) == ""
    machine.finish(attempt)  # it failed for another reason
    assert machine.remover("d", 100.0) == "a"


def test_so_many_are_held_off_for_one_remover() -> None:
    machine, _ = make("b", "a", "c")
    many = [f"{i:04}" for i in range(HELD_MAX + 1)]
    assert machine.decide(Ask("a", frozenset(many[1:]), True, 1), 0.0).verdict is Verdict.AGREED
    assert machine.decide(Ask("a", frozenset(many[:1]), True, 2), 0.0).verdict is Verdict.STRANGER
    assert machine.decide(Ask("c", frozenset(many[:1]), True, 2), 0.0).verdict is Verdict.AGREED


def test_so_many_are_frozen_for_one_remover_at_a_time() -> None:
    machine, _ = make("b", "a")
    many = [f"{i:04}" for i in range(HELD_MAX + 1)]
    assert machine.decide(Ask("a", frozenset(many[1:])), 0.0).verdict is Verdict.AGREED
    assert machine.decide(Ask("a", frozenset(many[:1])), 0.0).verdict is Verdict.STRANGER
    assert machine.decide(Ask("a", frozenset(many[:1])), FROZEN_FOR).verdict is Verdict.AGREED


def test_who_gives_up_does_not_open_the_door_that_another_one_waits_behind() -> None:
    machine, _ = make("b", "a", "c", "d")
    for remover in ("a", "c"):
        assert machine.decide(Ask(remover, frozenset("d")), 0.0).verdict is Verdict.AGREED
    machine.release(Ask("c", frozenset("d")))
    assert machine.remover("d", 1.0) == "a"
    machine.release(Ask("a", frozenset("d")))
    assert machine.remover("d", 1.0) == ""
