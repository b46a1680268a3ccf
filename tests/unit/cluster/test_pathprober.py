"""Datagrams that measure paths: whose they are, who is answered, and with how much."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.cluster import pathprober
from agent.cluster.pathkeys import PairKeys
from agent.cluster.pathprober import PathProber
from agent.cluster.pathwire import ANSWER, HEADERS, PROBE, build, is_proven, parse
from agent.cluster.trust import Keyring
from agent.core.pathmtu import Measure, State
from agent.core.paths import Found, Send
from agent.model import Node
from agent.node import NodeState
from agent.views import Change
from tests.identities import Authority, authority
from tests.ports import free_port

ONE, TWO = "1" * 16, "2" * 16
HOSTS = {ONE: "127.0.0.21", TWO: "127.0.0.22"}
STRANGER = "127.0.0.23"
KEY = bytes(range(32))


def der(keyring: Keyring) -> bytes:
    loaded = x509.load_pem_x509_certificate(keyring.current.certificate)
    return loaded.public_bytes(Encoding.DER)


class Pair:
    """Two nodes that know each other, on loopback."""

    def __init__(self) -> None:
        self.port = free_port()
        self.keyrings = {id: authority().keyring(id) for id in HOSTS}
        records = {
            id: Node(id, f"n{id[0]}", host, self.port, host, 4789, "", 0.0, 1500)
            for id, host in HOSTS.items()
        }
        records = {
            id: msgspec.structs.replace(record, certificate=der(self.keyrings[id]))
            for id, record in records.items()
        }
        self.nodes = {id: NodeState(records[id], time.time, random.Random(1)) for id in HOSTS}
        for node in self.nodes.values():
            node.nodes.update(records)
        self.found: list[Found] = []
        self.probers = {
            id: PathProber(self.nodes[id], self.keyrings[id], 3600.0, {}, self.found.extend)
            for id in HOSTS
        }

    def key(self, id: str) -> bytes:
        """That of node `id` with the other one."""
        other = TWO if id == ONE else ONE
        nodes = self.nodes[id].nodes
        found = PairKeys(self.keyrings[id], lambda node: nodes[node].certificate).key(other)
        assert found is not None
        return found


@asynccontextmanager
async def started(*ids: str) -> AsyncIterator[Pair]:
    pair = Pair()
    for id in ids:
        await pair.probers[id].start()
    try:
        yield pair
    finally:
        for id in ids:
            await pair.probers[id].stop()


@asynccontextmanager
async def mouth(host: str, port: int = 0) -> AsyncIterator[socket.socket]:
    """A socket that says what the test wants."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind((host, port))
        yield sock


async def heard(sock: socket.socket, seconds: float) -> bytes:
    """What comes within that time; nothing: empty."""
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.get_running_loop().sock_recv(sock, 65535)
    except TimeoutError:
        return b""


async def until(holds: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_both_come_to_the_same_key_and_nobody_else() -> None:
    pair = Pair()
    assert pair.key(ONE) == pair.key(TWO)
    third = authority().keyring("3" * 16)
    certificates = {id: der(keyring) for id, keyring in pair.keyrings.items()}
    theirs = {PairKeys(third, certificates.__getitem__).key(id) for id in HOSTS}
    assert None not in theirs and pair.key(ONE) not in theirs and len(theirs) == 2


async def test_it_wakes_for_nothing_that_is_as_it_was() -> None:
    async with started(ONE) as pair:
        prober, node = pair.probers[ONE], pair.nodes[ONE]
        prober._wake.clear()
        node.nodes[TWO] = msgspec.structs.replace(node.nodes[TWO], version="other")
        prober._changed(Change(nodes={ONE, TWO}))
        assert not prober._wake.is_set()
        node.nodes[TWO] = msgspec.structs.replace(node.nodes[TWO], mtu=1400)
        prober._changed(Change(nodes={TWO}))
        assert prober._wake.is_set()
        prober._wake.clear()
        del node.nodes[TWO]
        prober._changed(Change(nodes={TWO}))
        assert prober._wake.is_set(), "who is told of paths is to know"


def test_it_waits_to_tell_only_while_there_is_something_to_tell() -> None:
    prober = Pair().probers[ONE]  # it has no paths yet
    now = time.monotonic()
    prober._is_gone = True
    assert prober._once(now) == float("inf")
    prober._is_gone = True
    assert prober._once(now) <= pathprober.TOGETHER


@pytest.mark.parametrize("kind", ["none", "garbage", "another's", "another CA's"])
def test_a_certificate_that_is_not_that_nodes_gives_no_key(kind: str) -> None:
    certificate = {
        "none": b"",
        "garbage": b"\x30\x82garbage",
        "another's": der(authority().keyring("3" * 16)),
        "another CA's": der(Authority().keyring(TWO)),
    }[kind]
    assert PairKeys(authority().keyring(ONE), lambda node: certificate).key(TWO) is None


def test_a_renewed_certificate_is_another_key() -> None:
    own, theirs = authority().keyring(ONE), authority().keyring(TWO)
    shown = {TWO: der(theirs)}
    keys = PairKeys(own, shown.__getitem__)
    first = keys.key(TWO)
    assert keys.key(TWO) == first
    shown[TWO] = der(authority().keyring(TWO))
    second = keys.key(TWO)
    own.replace(authority().credentials(ONE))
    assert len({first, second, keys.key(TWO), None}) == 4


@pytest.mark.parametrize("family", [4, 6])
def test_a_probe_has_the_size_it_says_and_an_answer_is_small(family: int) -> None:
    for size in (576, 1280, 1500, 9000, 65535):
        data = build(PROBE, 7, size, ONE, KEY, family)
        assert len(data) + HEADERS[family] == size
        found = parse(data, family)
        assert found and (found.kind, found.nonce, found.size, found.sender) == (
            PROBE,
            7,
            size,
            ONE,
        )
        assert is_proven(found, KEY) and not is_proven(found, KEY[::-1])
        assert parse(data[:-1], family) is None  # cut short on the way
        answer = build(ANSWER, 7, size, TWO, KEY, family)
        assert len(answer) < 576 - HEADERS[6]
        assert parse(answer + b"\0", family) is None


def test_bytes_of_anybody_are_taken_or_not_and_nothing_else() -> None:
    rng = random.Random(3)
    good = build(PROBE, 7, 576, ONE, KEY, 4)
    for _ in range(3000):
        data = bytearray(good[: rng.randrange(len(good) + 1)])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        found = parse(bytes(data), 4)
        if found and bytes(data[:60]) != good[:60]:
            assert not is_proven(found, KEY)


async def test_two_nodes_measure_the_path_between_them() -> None:
    async with started(ONE, TWO) as pair:
        await until(lambda: len(pair.found) == 2)
        assert {(f.node, f.after.state, f.after.mtu) for f in pair.found} == {
            (ONE, State.WHOLE, 1500),
            (TWO, State.WHOLE, 1500),
        }


async def test_a_member_is_answered_with_less_and_a_stranger_is_not() -> None:
    async with started(ONE) as pair, mouth(HOSTS[TWO], pair.port) as member:
        await heard(member, 5.0)  # what it asks itself
        key, at = pair.key(TWO), (HOSTS[ONE], pair.port)
        probe = build(PROBE, 7, 1500, TWO, key, 4)
        wrong = [
            build(PROBE, 8, 1500, TWO, KEY, 4),  # without the key
            build(PROBE, 8, 1500, ONE, key, 4),  # its own, sent back to it
            build(PROBE, 8, 1500, "3" * 16, key, 4),  # of a node that is not known
            probe.replace(TWO.encode(), ONE.encode()),
            probe[:-1],
            b"",
        ]
        async with mouth(STRANGER) as stranger:
            stranger.sendto(probe, at)  # heard on the wire, sent from elsewhere
            for data in wrong:
                member.sendto(data, at)
            member.sendto(probe, at)
            answers: list[tuple[int, int, bool]] = []
            while not any(nonce == 7 for nonce, _, _ in answers):  # the last that was sent
                data = await heard(member, 20.0)
                found = parse(data, 4)
                assert found is not None
                if found.kind == ANSWER:
                    answers.append((found.nonce, found.size, is_proven(found, key)))
                    assert len(data) < len(probe)
            assert answers == [(7, 1500, True)]
            assert await heard(stranger, 0.1) == b""
        # One that was removed is a stranger.
        del pair.nodes[ONE].nodes[TWO]
        while await heard(member, 0.05):
            pass
        member.sendto(probe, at)
        assert await heard(member, 0.3) == b""


async def test_a_member_that_floods_gets_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pathprober, "RATE", 0.001)
    monkeypatch.setattr(pathprober, "BURST", 20.0)
    async with started(ONE) as pair, mouth(HOSTS[TWO], pair.port) as member:
        key, at = pair.key(TWO), (HOSTS[ONE], pair.port)
        answered = set()
        for nonce in range(100):
            member.sendto(build(PROBE, nonce, 576, TWO, key, 4), at)
            await asyncio.sleep(0)
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            found = parse(await heard(member, 0.1), 4)
            if found and found.kind == ANSWER:
                answered.add(found.nonce)
            if len(answered) == 20:
                end = min(end, time.monotonic() + 0.5)
        assert len(answered) == 20


async def test_forged_answers_and_a_port_that_is_taken_measure_nothing() -> None:
    async with mouth(HOSTS[ONE]) as taken:
        pair = Pair()
        pair.port = taken.getsockname()[1]
        me = pair.nodes[ONE]
        me.nodes[ONE] = msgspec.structs.replace(me.nodes[ONE], port=pair.port)
        await pair.probers[ONE].start()
        assert not pair.probers[ONE].is_measuring
        assert pair.probers[ONE].measures() == {}
        await pair.probers[ONE].stop()
    async with started(ONE) as pair, mouth(HOSTS[TWO], pair.port) as member:
        asked = parse(await heard(member, 20.0), 4)
        assert asked and asked.kind == PROBE
        at = (HOSTS[ONE], pair.port)
        member.sendto(build(ANSWER, asked.nonce, asked.size, TWO, KEY, 4), at)
        member.sendto(build(ANSWER, asked.nonce, asked.size, ONE, pair.key(ONE), 4), at)
        member.sendto(build(ANSWER, asked.nonce ^ 1, asked.size, TWO, pair.key(TWO), 4), at)
        await asyncio.sleep(0.1)
        assert pair.probers[ONE].measure(TWO).state is State.UNKNOWN
        member.sendto(build(ANSWER, asked.nonce, asked.size, TWO, pair.key(TWO), 4), at)
        await until(lambda: pair.probers[ONE].measure(TWO).state is State.WHOLE)


@pytest.mark.parametrize(("together", "times"), [(3600.0, 1), (0.0, 5)])
async def test_what_is_found_soon_after_is_told_together(
    monkeypatch: pytest.MonkeyPatch, together: float, times: int
) -> None:
    monkeypatch.setattr(pathprober, "TOGETHER", together)
    pair, enough = Pair(), asyncio.Event()
    prober, told, turns = pair.probers[ONE], list[int](), itertools.count(1)

    def handle_timer(now: float) -> list[Send]:
        if next(turns) > 5:
            enough.set()
        return []

    unknown = Measure(State.UNKNOWN, 0, 1500)
    change = Found(TWO, unknown, unknown)
    monkeypatch.setattr(prober._paths, "handle_timer", handle_timer)
    monkeypatch.setattr(prober._paths, "next_timer", time.monotonic)
    monkeypatch.setattr(prober._paths, "found", lambda: [change])
    prober._told = lambda changes: told.append(len(changes))
    await prober.start()
    async with asyncio.timeout(30):
        await enough.wait()
    await prober.stop()
    assert len(told) == 1 if times == 1 else len(told) >= times


async def test_after_what_nobody_expected_it_goes_on_and_tells_what_it_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pathprober, "AFTER_FAULT", 0.01)
    monkeypatch.setattr(pathprober, "TOGETHER", 0.01)
    faults: list[str] = []
    told: list[int] = []

    def found(changes: list[Found]) -> None:
        if changes and not faults:
            faults.append("found")
            raise ValueError("nobody expected this")
        told.append(len(changes))

    pair = Pair()
    prober = pair.probers[ONE] = PathProber(pair.nodes[ONE], pair.keyrings[ONE], 3600.0, {}, found)
    real = prober._send

    def send(what: Send) -> None:
        if len(faults) == 1:
            faults.append("send")
            raise ValueError("nor this")
        real(what)

    monkeypatch.setattr(prober, "_send", send)
    for each in pair.probers.values():
        await each.start()
    try:
        await until(lambda: faults and told)
        prober.hasten()
        await until(lambda: len(faults) == 2)
        prober.hasten()
        await until(lambda: prober.measure(TWO) == Measure(State.WHOLE, 1500, 1500))
    finally:
        for each in pair.probers.values():
            await each.stop()
