"""The change of a CA, as a state machine: any order of nodes, any keeper going on with it."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster.identity import authority as ca
from agent.cluster.identity import keepers, rotation, statements
from agent.cluster.identity.rotation import INTRODUCING, RENEWING, STEADY, Member
from agent.errors import Invalid
from agent.model import ONLY, Trust, check_sound, encode

CLUSTER = "c" * 16
OLD, NEW, ROGUE = (ca.make_authority(CLUSTER, 1_800_000_000.0) for _ in range(3))
BEGIN = Trust(0, 0, CLUSTER, (OLD.certificate,), (), "n1")


def begun() -> Trust:
    return rotation.introduce(BEGIN, NEW.certificate, "n1", 7)


def member(node: str, trust: Trust, /, **changed: object) -> Member:
    return Member(node, False, trust.epoch, trust.authorities[0])._replace(**changed)  # type: ignore[arg-type]


def test_the_new_ca_issues_only_when_all_that_live_trust_it() -> None:
    first = begun()
    assert (first.epoch, first.phase) == (1, INTRODUCING)
    assert first.authorities == (OLD.certificate, NEW.certificate), "the old one issues"
    late = member("n2", first, trust=0)
    members = [member("n1", first), late, member("n3", first, away=True, trust=0)]
    assert rotation.advance(first, members, 8) is None
    assert rotation.waiting(first, members) == ["n2"]
    members[1] = member("n2", first)
    second = rotation.advance(first, members, 8)
    assert second and second.phase == RENEWING
    assert second.authorities == (NEW.certificate, OLD.certificate)
    assert second.left_behind == ("n3",)


def test_keepers_have_its_key_before_it_issues() -> None:
    first = begun()
    members = [member("n1", first), member("n2", first, keeper=True, holds_next=False)]
    assert rotation.waiting(first, members) == ["n2"]
    members[1] = members[1]._replace(holds_next=True)
    assert rotation.advance(first, members, 8)


def test_the_old_ca_goes_only_when_all_that_live_have_certificates_of_the_new_one() -> None:
    first = begun()
    second = rotation.advance(first, [member("n1", first)], 8)
    assert second
    members = [member("n1", second), member("n2", second, issuer=OLD.certificate)]
    assert rotation.advance(second, members, 9) is None
    members[1] = member("n2", second)
    third = rotation.advance(second, members, 9)
    assert third and third.phase == STEADY
    assert third.authorities == (NEW.certificate,)
    assert third.retired == (OLD.certificate,)
    assert rotation.advance(third, members, 10) is None


def test_who_went_away_is_named_and_who_came_back_in_time_is_not() -> None:
    first = begun()
    away = [member(n, first, away=True, trust=0) for n in ("n2", "n3")]
    second = rotation.advance(first, [member("n1", first), *away], 8)
    assert second and second.left_behind == ("n2", "n3")
    members = [member("n1", second), member("n2", second), away[1], member("n4", second, away=True)]
    third = rotation.advance(second, members, 9)
    assert third and third.left_behind == ("n3",)
    forgotten = rotation.advance(second, [member("n1", second)], 9)
    assert forgotten and forgotten.left_behind == (), "removed nodes are nobody's concern"


@given(st.integers(2, 12), st.randoms(use_true_random=False))
def test_no_live_node_ever_trusts_less_than_another_shows(count: int, rng: random.Random) -> None:
    """Nodes hear and renew in any order, some go away for good. Whatever is believed and shown by
    those that live, at any moment, each believes each."""
    trusts = {f"n{i}": BEGIN for i in range(count)}
    shown = dict.fromkeys(trusts, OLD.certificate)
    away: set[str] = set()
    newest = begun()
    for _ in range(count * 40):
        id = rng.choice(sorted(trusts))
        if id in away:
            continue
        if rng.random() < 0.03 and len(away) < count - 1:
            away.add(id)
            continue
        if rng.random() < 0.5:
            trusts[id] = newest
        elif trusts[id].authorities[0] != shown[id]:
            shown[id] = trusts[id].authorities[0]
        members = [Member(n, n in away, trusts[n].epoch, shown[n]) for n in trusts]
        newest = rotation.advance(newest, members, newest.stamp + 1) or newest
        here = set(trusts) - away
        assert all(shown[a] in trusts[b].authorities for a in here for b in here)


def test_a_statement_is_believed_by_who_trusts_one_of_its_signers() -> None:
    first = statements.sign_trust(begun(), [OLD, NEW])
    assert statements.newest_trust([first], BEGIN) == first
    steady = statements.sign_trust(
        msgspec.structs.replace(first, epoch=3, authorities=(NEW.certificate,)), [NEW]
    )
    assert statements.newest_trust([steady], BEGIN) is None, "nothing known signed it"
    assert statements.newest_trust([steady, first], first) == steady
    assert statements.newest_trust([first], first) is None


def test_no_member_makes_others_trust_a_ca_of_its_own() -> None:
    rogue = rotation.introduce(BEGIN, ROGUE.certificate, "n9", 99)
    signed = statements.sign_trust(rogue, [ROGUE])
    stolen = msgspec.structs.replace(
        rogue, signatures=statements.sign_trust(begun(), [OLD]).signatures
    )
    elsewhere = statements.sign_trust(msgspec.structs.replace(begun(), cluster="d" * 16), [OLD])
    assert statements.newest_trust([signed, stolen, elsewhere], BEGIN) is None
    for bad in (signed, stolen, elsewhere):
        with pytest.raises(Invalid):
            statements.read_trust(encode(bad), CLUSTER, BEGIN.authorities)
    good = statements.sign_trust(begun(), [OLD])
    assert statements.newest_trust([signed, good], BEGIN) == good
    assert statements.read_trust(encode(good), CLUSTER, BEGIN.authorities) == good


@given(st.binary(max_size=300))
def test_no_bytes_pass_for_a_statement(data: bytes) -> None:
    with pytest.raises(Invalid):
        statements.read_trust(data, CLUSTER, BEGIN.authorities)


def test_every_statement_of_a_change_is_one_that_peers_take() -> None:
    first = statements.sign_trust(begun(), [OLD, NEW])
    second = rotation.advance(first, [member("n1", first)], 8)
    assert second
    third = rotation.advance(second, [member("n1", second)], 9)
    assert third
    for trust in (first, second, third):
        check_sound(statements.sign_trust(trust, [OLD, NEW]), ONLY)


def test_the_key_goes_to_the_oldest_member_that_lives_and_only_one_hands_it() -> None:
    assert keepers.choose_heir("n1", ["n1"], {"n3": 7.0, "n2": 8.0}) == "n3"
    assert keepers.choose_heir("n1", ["n1"], {"n3": 7.0, "n2": 7.0}) == "n2", "came at once"
    assert keepers.choose_heir("n2", ["n1", "n2"], {"n3": 7.0}) is None, "n1 does it"
    assert keepers.choose_heir("n1", ["n1", "n2", "n3"], {"n4": 7.0}) is None
    assert keepers.choose_heir("n4", ["n1"], {"n2": 7.0}) is None, "it has none to give"
    assert keepers.choose_heir("n1", ["n1"], {}) is None


def test_only_who_comes_after_enough_others_drops_it() -> None:
    four = ["n4", "n2", "n1", "n3"]
    assert [n for n in four if keepers.is_surplus(n, four)] == ["n4"]
    assert not keepers.is_surplus("n3", ["n1", "n2", "n3"])
    assert not keepers.is_surplus("n9", four)
