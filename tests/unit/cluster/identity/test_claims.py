"""Members that say what is not so of the CA's key; over real TLS on loopback."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.cluster.identity import authority as ca
from agent.cluster.identity import custody, desk, keepers, proof, service
from agent.cluster.identity.rotation import Member
from agent.model import Node
from agent.rpc import peer_pb2 as pb
from tests.unit.cluster.identity.party import Guest, party, until


def pretend(guest: Guest, count: int) -> list[str]:
    """Let nodes with the lowest ids say to `guest` that they keep the key; their ids."""
    ids = [f"{n:016x}" for n in range(count)]
    for id in ids:
        guest.state.nodes[id] = Node(
            id, f"liar{int(id, 16)}", "127.0.0.1", 9, "127.0.0.1", 4789, "t", 0.0, 1500,
            keeper=True, keeper_proof=proof.make(ca.make_authority("c", 0.0), "c", id),
        )  # fmt: skip
    return ids


async def test_whatever_others_claim_the_key_is_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody, "SURPLUS_FOR", 0.0)
    async with party(tmp_path, 1) as (first,):
        pretend(first, 3)
        for _ in range(3):
            await first.identity.custody.look()
        assert first.identity.held.issuing
        held = first.files.load()
        assert held and held.issuing, "on disk too"
        assert first.identity.live_keepers() == [first.id]


async def test_enough_who_show_it_make_the_last_one_drop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody, "SURPLUS_FOR", 0.0)
    async with party(tmp_path, 1) as (first,):
        held = first.identity.held
        assert held.issuing
        for id in pretend(first, 3):
            shown = proof.make(held.issuing, held.cluster, id)
            known = first.state.nodes[id]
            first.state.nodes[id] = msgspec.structs.replace(known, keeper_proof=shown)
        await first.identity.custody.look()
        assert first.identity.held.issuing is None


async def test_a_tokens_secret_goes_to_nobody_who_only_says_that_it_keeps_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    asked: list[str] = []
    ask = desk.ask_keeper

    async def note(keeper: Node, *rest: Any) -> pb.Issued:
        asked.append(keeper.id)
        return await ask(keeper, *rest)

    monkeypatch.setattr(desk, "ask_keeper", note)
    async with party(tmp_path, 2) as (first, second):
        await until(lambda: second.state.is_keeper(second.state.nodes[first.id]), "it knows who")
        pretend(second, 3)
        await Guest(tmp_path, "g").enrol([second.target], await first.token())
        assert asked == [first.id]
        shown = await second.admin.cluster()
        assert shown.keepers == ["h1"] == [c.node for c in shown.certificates if c.keeper]


async def test_the_key_goes_to_who_is_a_member_longest_whatever_id_a_newcomer_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "KEEPERS", 1)
    async with party(tmp_path, 2) as (first, second):
        first.identity.now = lambda: time.time() + 60.0  # the certificate begins as much later
        newcomer = Guest(tmp_path, "new")
        newcomer.id = "0" * 16
        try:
            await newcomer.run([first.target], await first.token())
            newcomer.state.set_status(first.id, second.state.condition(first.id))
            await until(
                lambda: first.state.condition(newcomer.id).state == "alive", "it is there as well"
            )
            monkeypatch.setattr(keepers, "KEEPERS", 2)
            first.identity._wake.set()
            await until(lambda: second.identity.held.issuing, "the second keeps it")
            assert newcomer.identity.held.issuing is None
        finally:
            await newcomer.stop()


async def test_certificates_of_all_are_not_checked_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with party(tmp_path, 1) as (first,):
        pretend(first, 5 * service.SLICE)
        checked = most = 0

        def note(certificate: bytes, authorities: tuple[bytes, ...]) -> bytes | None:
            nonlocal checked
            checked += not certificate  # the node looks at its own now and then
            return ca.find_issuer(certificate, authorities)

        monkeypatch.setattr(ca, "issuer_of", note)
        found: asyncio.Task[list[Member]] = asyncio.create_task(first.identity.members())
        before = checked
        while not found.done():
            await asyncio.sleep(0)
            most, before = max(most, checked - before), checked
        assert len(found.result()) == 5 * service.SLICE + 1 == checked + 1
        assert most <= service.SLICE
