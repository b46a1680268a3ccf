"""Who gets in, and what the others are told; over real TLS on loopback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.cluster.identity import authority as ca
from agent.cluster.identity import custody, keepers, requests
from agent.cluster.identity.desk import Refused
from agent.cluster.identity.tokens import Token
from agent.errors import Conflict, Invalid, Unavailable, VxmeshError
from agent.model import Removal
from agent.rpc import peer_pb2 as pb
from tests.unit.cluster.identity.party import Guest, party, until


async def test_who_has_the_token_is_in(tmp_path: Path) -> None:
    async with party(tmp_path, 2) as (first, second):
        assert second.held.cluster == first.held.cluster
        assert ca.issuer_of(second.held.certificate, first.held.trust.authorities)
        await until(lambda: first.id in second.peers.links, "they talk")
        assert second.state.nodes[first.id].certificate == first.held.certificate
        assert [n.fields["name"] for n in first.told("join.accepted")] == ["h2"]


async def refused(guest: Guest, seeds: list[str], token: Token | None) -> VxmeshError:
    with pytest.raises(VxmeshError) as caught:
        await guest.enrol(seeds, token)
    assert not guest.files.exists(), "nothing was issued"
    return caught.value


async def test_wrong_void_and_foreign_tokens_are_told_apart(tmp_path: Path) -> None:
    async with party(tmp_path, 1) as (first,), party(tmp_path / "other", 1) as (other,):
        old = await first.token()
        wrong = await refused(
            Guest(tmp_path, "w"), [first.target], Token(old.fingerprint, "a" * 26)
        )
        assert "wrong" in str(wrong) and "vxmesh cluster token" in wrong.fix
        new = await first.token(rotate=True)
        assert new != old and new == await first.token()
        void = await refused(Guest(tmp_path, "v"), [first.target], old)
        assert "is void" in void.why and "--rotate" in void.why and "token" in void.fix
        foreign = await refused(Guest(tmp_path, "f"), [first.target], await other.token())
        assert "of another cluster" in foreign.why and "nothing was sent" in foreign.why
        assert new.fingerprint in foreign.why
        reasons = [n.fields["reason"] for n in first.told("join.refused")]
        assert reasons == ["wrong", "void"], "of the foreign one nothing came"
        assert {n.fields["address"] for n in first.told("join.refused")} == {"127.0.0.1"}
        await Guest(tmp_path, "g").enrol([first.target], new)


async def test_with_a_foreign_token_nothing_is_asked_but_whom_it_talks_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with party(tmp_path, 1) as (first,), party(tmp_path / "other", 1) as (other,):
        asked: list[object] = []
        monkeypatch.setattr(first.identity.desk, "join", asked.append)
        await refused(Guest(tmp_path, "f"), [first.target], await other.token())
        assert asked == []


async def test_a_node_id_is_not_given_to_somebody_else(tmp_path: Path) -> None:
    async with party(tmp_path, 2) as (first, second):
        thief = Guest(tmp_path, "thief")
        thief.id = second.id
        taken = await refused(thief, [first.target], await first.token())
        assert "another record key" in taken.why and "--reset-state" in taken.fix
        assert first.told("join.refused")[-1].fields["reason"] == "taken"


async def test_who_lost_the_answer_gets_another_one_and_nobody_else_does(tmp_path: Path) -> None:
    async with party(tmp_path, 1) as (first,):
        guest, token = Guest(tmp_path, "g"), await first.token()
        await guest.enrol([first.target], token)
        (guest.files.directory / "node.pem").unlink()  # as if it had never been written
        await guest.enrol([first.target], token)
        thief = Guest(tmp_path, "thief")
        thief.id = guest.id
        assert "another record key" in (await refused(thief, [first.target], token)).why


async def test_a_removed_node_does_not_come_back_by_a_token(tmp_path: Path) -> None:
    async with party(tmp_path, 2) as (first, second):
        await second.stop()
        first.state.removals[second.id] = Removal(second.id, "h2", first.id, 1, 0.0, "h1")
        first.state.nodes.pop(second.id)
        (second.files.directory / "node.pem").unlink()
        gone = await refused(second, [first.target], await first.token())
        assert "was removed from the cluster by h1" in gone.why and "--reset-state" in gone.fix


async def test_an_ended_certificate_is_replaced_by_a_token_and_the_node_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    async with party(tmp_path, 2, life=1.0) as (first, second):
        await second.stop()
        record_key, id = second.held.record_key, second.held.node
        await until(lambda: ca.ends(second.held.certificate) < time.time(), "it has ended")
        second.life = 3600.0
        with pytest.raises(VxmeshError) as caught:
            await second.enrol([first.target], None)
        assert "ended at" in caught.value.why and "stays the node it was" in caught.value.fix
        await second.enrol([first.target], await first.token())
        assert (second.held.node, second.held.record_key) == (id, record_key)
        assert ca.ends(second.held.certificate) > time.time() - 1


async def test_a_keeper_gives_itself_another_one(tmp_path: Path) -> None:
    guest = Guest(tmp_path, "alone", life=1.0)
    await guest.enrol([], None)
    before = guest.held
    await until(lambda: ca.ends(before.certificate) < time.time(), "it has ended")
    await guest.enrol([], None)
    assert guest.held.cluster == before.cluster
    assert ca.ends(guest.held.certificate) > ca.ends(before.certificate)


async def test_a_token_that_was_used_does_no_harm_and_one_of_another_cluster_is_refused(
    tmp_path: Path,
) -> None:
    async with party(tmp_path, 2) as (first, second), party(tmp_path / "o", 1) as (other,):
        used = await first.token()
        await first.token(rotate=True)
        await second.enrol([first.target], used)  # as its unit file says at each start
        with pytest.raises(Conflict, match=other.held.cluster):
            await second.enrol([other.target], await other.token())
        found = second.files.load()
        assert found and found.credentials() == second.held.credentials()


async def test_nodes_that_cannot_issue_pass_a_request_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    async with party(tmp_path, 2) as (first, second):
        assert second.identity.held.issuing is None
        await until(lambda: second.state.nodes[first.id].keeper, "it knows who can")
        token = await first.token()
        await Guest(tmp_path, "g").enrol([second.target], token)
        wrong = Token(token.fingerprint, "a" * 26)
        assert "wrong" in str(await refused(Guest(tmp_path, "w"), [second.target], wrong))
        assert [n.fields["reason"] for n in second.told("join.refused")] == ["wrong"]
        assert not first.told("join.refused"), "told once, by the one that was asked"
        with pytest.raises(Unavailable, match="h1"):
            await second.admin.join_token(False)
        await first.stop()
        none = await refused(Guest(tmp_path, "n"), [second.target], token)
        assert isinstance(none, Unavailable) and "keeps the CA's key answers (h1)" in none.why


async def test_where_nobody_answers_it_is_said_who_did_not(tmp_path: Path) -> None:
    async with party(tmp_path, 1) as (first,):
        token = await first.token()
    silent = await refused(Guest(tmp_path, "s"), [first.target], token)
    assert isinstance(silent, Unavailable) and first.target in silent.why


async def test_renewal_is_for_who_holds_a_valid_certificate_and_its_record_key(
    tmp_path: Path,
) -> None:
    async with party(tmp_path, 1) as (first,), party(tmp_path / "o", 1) as (other,):
        desk, held = first.identity.desk, first.held
        asked = requests.make(first.id, held.record_key)
        good = pb.RenewRequest(
            certificate=held.certificate, request=asked.request, proof=asked.proof
        )
        issued = desk.renew(good)
        assert ca.belongs(asked.key, issued.certificate)

        def reason(**changed: bytes) -> str:
            request = pb.RenewRequest()
            request.CopyFrom(good)
            for name, value in changed.items():
                setattr(request, name, value)
            with pytest.raises(Refused) as caught:
                desk.renew(request)
            return caught.value.reason

        assert reason(certificate=other.held.certificate) == "foreign"
        remembered = ca.issuer_of.cache_info().currsize
        assert reason(certificate=b"") == "foreign"
        assert reason(certificate=bytes(60_000)) == "foreign"
        # A stranger asks once a second, and 4,096 such would be 250 MB.
        assert ca.issuer_of.cache_info().currsize == remembered
        assert reason(proof=b"") == "malformed"
        stolen = requests.make(first.id, other.held.record_key)
        assert reason(request=stolen.request, proof=stolen.proof) == "malformed"
        short = ca.issue(
            held.keys[0],
            held.cluster,
            first.id,
            requests.public_half(held.record_key),
            asked.key.public_key(),
            time.time() - 100,
            10.0,
        )
        assert reason(certificate=short) == "expired"


async def test_the_key_is_taken_only_of_a_ca_that_is_trusted(tmp_path: Path) -> None:
    async with party(tmp_path, 1) as (first,), party(tmp_path / "o", 1) as (other,):
        for bad in (custody._der(other.held.keys[0].key), b"", b"x" * 5000):
            with pytest.raises(Invalid):
                await first.identity.take_key(bad)
        assert first.identity.held.keys == first.held.keys


async def test_three_keep_the_key_and_another_one_when_one_is_gone(tmp_path: Path) -> None:
    async with party(tmp_path, 4) as guests:

        def keeping() -> list[str]:
            return [g.id for g in guests if g.identity.held.issuing]

        await until(lambda: len(keeping()) == 3, "three keep it")
        assert guests[0].id in keeping()
        for guest in guests:
            if guest.id in keeping():
                held = guest.files.load()
                assert held and held.issuing, "on disk too"
        await until(
            lambda: all(
                sorted(n.id for n in g.state.nodes.values() if n.keeper) == sorted(keeping())
                for g in guests
            ),
            "all know who",
        )
        # One of them is gone: the fourth takes its place.
        gone = next(g for g in guests[1:] if g.id in keeping())
        await gone.stop()
        for guest in guests:
            if guest is not gone:
                guest.lose(gone)
        await until(lambda: len(keeping()) == 4, "the fourth keeps it")


async def test_a_thousand_refusals_do_not_flush_the_history_and_are_counted(tmp_path: Path) -> None:
    async with party(tmp_path, 1) as (first,):
        desk, refusal = (
            first.identity.desk,
            pb.Refusal(what="token", why="is wrong", reason="wrong"),
        )
        monday = first.identity.now()
        first.identity.now = lambda: monday
        for _ in range(1000):
            desk._tell(refusal, "192.0.2.1", "")
        assert len(first.told("join.refused")) == 30
        first.identity.now = lambda: monday + 1.0
        desk._tell(refusal, "192.0.2.1", "")
        assert sum(int(n.fields["count"]) for n in first.told("join.refused")) == 1001
