"""Renewal and a change of the CA, seen from the nodes: over real TLS on loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.cluster.identity import authority as ca
from agent.cluster.identity import keepers, plight
from agent.cluster.identity.files import Held
from agent.cluster.link import Link
from agent.errors import Conflict, InUse, Unavailable, VxmeshError
from tests.unit.cluster.identity.party import WITHIN, Guest, party, until


def same(found: Held | None, held: Held) -> bool:
    """Keys cannot be compared as they are."""
    return found is not None and found.credentials() == held.credentials()


def streams(guests: list[Guest]) -> dict[tuple[str, str], Link]:
    return {(g.id, peer): link for g in guests for peer, link in g.peers.links.items()}


async def linked(guests: list[Guest]) -> None:
    count = len(guests) * (len(guests) - 1)
    await until(lambda: len(streams(guests)) == count, "all have streams to all")
    await asyncio.sleep(1.2)  # s; of two streams between a pair one has gone by then


async def test_certificates_are_renewed_and_no_stream_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    async with party(tmp_path, 3, life=6.0) as guests:
        await linked(guests)
        before = streams(guests)
        first = {g.id: g.identity.held for g in guests}
        for g in guests:
            await until(lambda g=g: len(g.told("certificate.renewed")) >= 3, "three renewals")  # type: ignore[misc]
        assert streams(guests) == before, "the very same streams"
        for g in guests:
            now, then = g.identity.held, first[g.id]
            assert now.key.public_key() != then.key.public_key(), "a new key each time"
            assert now.record_key == then.record_key
            assert same(g.files.load(), now)
            assert g.identity.keyring.current == now.credentials()
            await until(
                lambda g=g: all(  # type: ignore[misc]
                    o.state.nodes[g.id].certificate == g.identity.held.certificate for o in guests
                ),
                "the others know it",
            )


async def test_a_renewal_that_fails_is_told_with_what_is_left_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    async with party(tmp_path, 2, life=8.0) as (first, second):
        await until(lambda: second.state.nodes[first.id].keeper, "it knows who can")
        await first.stop()
        await until(lambda: len(second.told("certificate.renewal_failed")) >= 2, "two tries")
        notice = second.told("certificate.renewal_failed")[0]
        assert 0 < float(notice.fields["left"]) <= 4 and "h1" in notice.fields["error"]
        await until(lambda: second.told("certificate.expired"), "its end")
        assert "--token" in second.told("certificate.expired")[0].message
        await asyncio.sleep(1.5)
        assert len(second.told("certificate.expired")) == 1


async def test_the_ca_is_changed_and_no_stream_ends(tmp_path: Path) -> None:
    async with party(tmp_path, 4) as guests:
        await linked(guests)
        first = guests[0]
        old_token, old_ca = await first.token(), first.identity.held.trust.authorities[0]
        await until(lambda: len(first.identity.live_keepers()) == 3, "three keep the key")
        keeping = {g.id for g in guests if g.identity.held.issuing}
        before = streams(guests)
        await first.admin.rotate_authority(False)
        for g in guests:
            await until(lambda g=g: g.identity.held.trust.epoch == 3, "it is done")  # type: ignore[misc]
        assert streams(guests) == before, "the very same streams"
        for g in guests:
            held = g.identity.held
            assert held.trust.authorities[0] != old_ca and len(held.trust.authorities) == 1
            assert held.trust.retired == (old_ca,)
            assert ca.issuer_of(held.certificate, held.trust.authorities)
            assert same(g.files.load(), held)
            assert (held.issuing is not None) == (g.id in keeping)
            assert len(held.keys) == (g.id in keeping), "the old key is dropped"
        shown = await first.admin.cluster()
        assert shown.rotation.phase == "done" and not shown.rotation.left_behind
        assert [a.state for a in shown.authorities] == ["issuing", "retired"]
        # The token is another one, and who comes with the old one is told what happened.
        with pytest.raises(VxmeshError, match="rotate-ca"):
            await Guest(tmp_path, "late").enrol([first.target], old_token)
        newcomer = Guest(tmp_path, "new")
        await newcomer.enrol([guests[3].target], await first.token())
        assert newcomer.held.trust == first.identity.held.trust


async def test_who_was_away_is_named_told_and_comes_back_by_a_new_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plight, "ALONE_FOR", 0.1)
    async with party(tmp_path, 3) as (first, second, third):
        await until(lambda: len(first.identity.live_keepers()) == 3, "all keep the key")
        await third.stop()
        for g in (first, second):
            g.lose(third)
        with pytest.raises(InUse) as caught:
            await first.admin.rotate_authority(False)
        assert "h3" in caught.value.why and "--force" in caught.value.fix
        await first.admin.rotate_authority(True)
        await until(lambda: second.identity.held.trust.epoch == 3, "it is done")
        assert list((await first.admin.cluster()).rotation.left_behind) == ["h3"]
        assert any("h3" in n.fields["left_behind"] for n in second.told("ca.rotation"))
        # It comes back with what it knew.
        back = Guest(tmp_path, "h3")
        back.id, back.port = third.id, third.port
        try:
            await back.run([])
            back.state.nodes[first.id] = first.state.nodes[first.id]
            await until(lambda: back.told("ca.left_behind"), "it says what happened")
            assert "vxmesh cluster token" in back.told("ca.left_behind")[0].message
            await back.stop()
            await back.enrol([first.target], await first.token())
            assert (back.held.node, back.held.record_key) == (third.id, third.held.record_key)
            assert back.held.trust == first.identity.held.trust
        finally:
            await back.stop()


async def test_another_keeper_goes_on_where_the_first_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with party(tmp_path, 3) as guests:
        await until(lambda: len(guests[0].identity.live_keepers()) == 3, "all keep the key")
        first, *others = guests
        slow = asyncio.Event()  # a node that does not renew: the change waits for it

        async def wait() -> None:
            if not slow.is_set():
                others[1].identity._retry_at = others[1].identity.now() + 0.2

        monkeypatch.setattr(others[1].identity, "_renew", wait)
        await first.admin.rotate_authority(False)
        await until(lambda: all(g.identity.held.trust.epoch == 2 for g in guests), "renewing")
        async with asyncio.timeout(WITHIN):  # until h3 alone is late
            while list((await others[0].admin.cluster()).rotation.waiting) != ["h3"]:
                await asyncio.sleep(0.02)
        await first.stop()
        for g in others:
            g.lose(first)
        monkeypatch.undo()
        others[1].identity._wake.set()
        await until(lambda: all(g.identity.held.trust.epoch == 3 for g in others), "done")


async def test_it_is_resumed_after_a_restart_and_not_begun_twice(tmp_path: Path) -> None:
    async with party(tmp_path, 2) as (first, second):
        await until(lambda: len(first.identity.live_keepers()) == 2, "both keep the key")
        task = second.identity._task
        assert task is not None
        task.cancel()  # it hears of nothing
        await first.admin.rotate_authority(False)
        epoch = first.identity.held.trust.epoch
        await first.admin.rotate_authority(False)
        assert first.identity.held.trust.epoch == epoch == 1, "it is the same one"
        assert list((await first.admin.cluster()).rotation.waiting) == ["h2"]
        await until(lambda: second.state.trusts, "it could hear of it")
        await second.identity._adopt()
        with pytest.raises(Conflict, match="by h1"):
            await second.admin.rotate_authority(False)
        held = first.files.load()
        assert held and held.trust.phase == 1 and len(held.keys) == 2, "all that it takes is here"
        await second.identity.start()
        await until(lambda: first.identity.held.trust.epoch == 3, "done")


async def test_only_keepers_change_the_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    async with party(tmp_path, 2) as (first, second):
        with pytest.raises(Unavailable, match="h1"):
            await second.admin.rotate_authority(False)
        for guest in (first, second):
            assert (await guest.admin.cluster()).keepers == ["h1"]
