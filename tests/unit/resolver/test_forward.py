"""resolver/forward.py against upstreams of its own on loopback addresses."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from agent.resolver.forward import (
    IN_FLIGHT_MAX,
    IN_FLIGHT_PER_SOURCE_MAX,
    Forwarder,
    parse_resolv_conf,
)
from agent.resolver.messages import read
from agent.resolver.wire import Asked
from tests.ports import free_port

Behaviour = Callable[[dns.message.Message], list[bytes]]


def good(query: dns.message.Message, address: str = "192.0.2.1") -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True)
    name = query.question[0].name
    response.answer.append(dns.rrset.from_text(name, 60, "IN", "A", address))
    return response


def failing(query: dns.message.Message, rcode: int) -> dns.message.Message:
    response = dns.message.make_response(query)
    response.set_rcode(dns.rcode.Rcode(rcode))
    return response


@dataclass
class Fake:
    """An upstream: what it was asked by UDP and TCP, from which ports, and how it behaves."""

    behaviour: Behaviour
    port: int
    udp: list[dns.message.Message] = field(default_factory=list)
    tcp: list[dns.message.Message] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        self.fake.udp.append(query)
        self.fake.ports.append(addr[1])
        for wire in self.fake.behaviour(query):
            self.transport.sendto(wire, addr)


@asynccontextmanager
async def upstream(behaviour: Behaviour, host: str, port: int = 0) -> AsyncIterator[Fake]:
    """A fake upstream on UDP and TCP of one port; TCP always answers well."""
    fake = Fake(behaviour, port or free_port())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2), "big")
        query = dns.message.from_wire(await reader.readexactly(size))
        fake.tcp.append(query)
        writer.write(good(query, "192.0.2.99").to_wire(prepend_length=True))
        writer.close()

    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(serve, host, fake.port)
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Protocol(fake), local_addr=(host, fake.port)
    )
    try:
        yield fake
    finally:
        transport.close()
        server.close()


def forwarder(
    tmp_path: Path, port: int, *hosts: str, attempt_seconds: float = 60, total_seconds: float = 60
) -> Forwarder:
    """One that waits as long as this machine may be busy, unless told otherwise."""
    path = tmp_path / "resolv.conf"
    path.write_text("".join(f"nameserver {host}\n" for host in hosts))
    limits = attempt_seconds, total_seconds
    return Forwarder(path, lambda _address, _port: False, random.Random(1), port, *limits)


def ask(text: str = "example.com") -> Asked:
    asked = read(dns.message.make_query(text, "A").to_wire(), udp=True)
    assert isinstance(asked, Asked)
    return asked


def first(message: dns.message.Message | None) -> str:
    assert message is not None
    return str(message.answer[0][0])


async def test_every_question_has_an_id_and_a_port_of_its_own(tmp_path: Path) -> None:
    async with upstream(lambda query: [good(query).to_wire()], "127.0.0.1") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1")
        for _ in range(20):
            message, text = await asking.resolve(ask())
            assert (first(message), text) == ("192.0.2.1", "127.0.0.1")
        assert len({query.id for query in fake.udp}) == 20
        assert len(set(fake.ports)) > 10


async def test_the_silent_one_costs_one_attempt_and_is_asked_last_from_then_on(
    tmp_path: Path,
) -> None:
    def say_nothing(_query: dns.message.Message) -> list[bytes]:
        asking._attempt_seconds = 60  # the other one may take its time
        return []

    async with (
        upstream(say_nothing, "127.0.0.1") as silent,
        upstream(lambda query: [good(query).to_wire()], "127.0.0.2", silent.port) as other,
    ):
        asking = forwarder(tmp_path, silent.port, "127.0.0.1", "127.0.0.2", attempt_seconds=0.1)
        for _ in range(3):
            assert (await asking.resolve(ask()))[1] == "127.0.0.2"
        assert (len(silent.udp), len(other.udp)) == (1, 3)


async def test_nobody_listens_there_so_the_next_is_asked_at_once(tmp_path: Path) -> None:
    async with upstream(lambda query: [good(query).to_wire()], "127.0.0.2") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1", "127.0.0.2")
        async with asyncio.timeout(30):
            assert (await asking.resolve(ask()))[1] == "127.0.0.2"


async def test_servfail_leads_to_the_next_and_nxdomain_is_an_answer(tmp_path: Path) -> None:
    def bad(query: dns.message.Message) -> list[bytes]:
        return [failing(query, dns.rcode.SERVFAIL).to_wire()]

    def none(query: dns.message.Message) -> list[bytes]:
        return [failing(query, dns.rcode.NXDOMAIN).to_wire()]

    async with upstream(bad, "127.0.0.1") as one, upstream(none, "127.0.0.2", one.port):
        asking = forwarder(tmp_path, one.port, "127.0.0.1", "127.0.0.2")
        message, text = await asking.resolve(ask())
        assert message is not None
        assert (message.rcode(), text) == (dns.rcode.NXDOMAIN, "127.0.0.2")


async def test_truncated_answers_are_fetched_by_tcp(tmp_path: Path) -> None:
    def cut(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.flags |= dns.flags.TC
        return [response.to_wire()]

    async with upstream(cut, "127.0.0.1") as fake:
        message, _ = await forwarder(tmp_path, fake.port, "127.0.0.1").resolve(ask())
        assert first(message) == "192.0.2.99"
        assert len(fake.tcp) == 1


async def test_forged_answers_are_passed_over(tmp_path: Path) -> None:
    def forged(query: dns.message.Message) -> list[bytes]:
        wrong = good(query, "203.0.113.1")
        wrong.id ^= 1
        other = dns.message.make_query("example.org", "A", id=query.id)
        return [
            wrong.to_wire(),
            good(other, "203.0.113.2").to_wire(),
            b"garbage",
            query.to_wire(),
            good(query).to_wire(),
        ]

    async with upstream(forged, "127.0.0.1") as fake:
        message, _ = await forwarder(tmp_path, fake.port, "127.0.0.1").resolve(ask())
        assert first(message) == "192.0.2.1"


async def test_a_flood_of_forgeries_ends_the_attempt(tmp_path: Path) -> None:
    async with upstream(lambda _query: [b"garbage"] * 200, "127.0.0.1") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1")
        async with asyncio.timeout(30):
            assert await asking.resolve(ask()) == (None, "")


async def test_an_upstream_without_edns(tmp_path: Path) -> None:
    def old(query: dns.message.Message) -> list[bytes]:
        bare = dns.message.from_wire(query.to_wire())
        if query.edns < 0:
            return [good(query).to_wire()]
        bare.use_edns(False)
        return [failing(bare, dns.rcode.FORMERR).to_wire()]

    async with upstream(old, "127.0.0.1") as fake:
        message, _ = await forwarder(tmp_path, fake.port, "127.0.0.1").resolve(ask())
        assert first(message) == "192.0.2.1"
        assert [query.edns for query in fake.udp] == [0, -1]


async def test_without_upstreams_the_answer_is_none_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(30):
        assert await forwarder(tmp_path, 53).resolve(ask()) == (None, "")
        missing = Forwarder(tmp_path / "missing", lambda _address, _port: False)
        assert await missing.resolve(ask()) == (None, "")
        assert await missing.answer(ask()) is None
        assert missing.counters["forward_no_upstream"] == 2


async def test_all_silent_ends_in_the_time_given(tmp_path: Path) -> None:
    async with upstream(lambda _query: [], "127.0.0.1") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1", total_seconds=0.2)
        async with asyncio.timeout(30):
            assert await asking.resolve(ask()) == (None, "")
        assert asking.counters["forward_failed"] == 1


async def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    asking = forwarder(tmp_path, 53, "192.0.2.1")
    assert [up.text for up in asking.upstreams()] == ["192.0.2.1"]
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.2\n")
    os.utime(path, ns=(1, 1))
    assert [up.text for up in asking.upstreams()] == ["192.0.2.2"]
    path.unlink()
    assert asking.upstreams() == []
    path.write_text("nameserver 192.0.2.3\n")
    assert [up.text for up in asking.upstreams()] == ["192.0.2.3"]


async def test_ourselves_are_never_asked(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 10.1.0.1\nnameserver 192.0.2.1\n")
    asked: list[tuple[str, int]] = []

    def is_ours(address: str, port: int) -> bool:
        asked.append((address, port))
        return address == "10.1.0.1"

    asking = Forwarder(path, is_ours)
    assert [up.text for up in asking.upstreams()] == ["192.0.2.1"]
    assert asked == [("10.1.0.1", 53), ("192.0.2.1", 53)]


async def test_bounded_by_asker_and_in_all(tmp_path: Path) -> None:
    asking = forwarder(tmp_path, 53)
    greedy = b"\x0a\x01\x00\x02"
    assert sum(asking.admit(greedy) for _ in range(200)) == IN_FLIGHT_PER_SOURCE_MAX
    others = sum(asking.admit(bytes((10, 1, 1, n % 200))) for n in range(2000))
    assert others == IN_FLIGHT_MAX - IN_FLIGHT_PER_SOURCE_MAX
    asking.release(greedy)
    assert asking.admit(b"\x0a\x02\x00\x02")
    assert not asking.admit(b"\x0a\x02\x00\x02")


def test_resolv_conf_of_the_host() -> None:
    text = """
    # nameserver 192.0.2.9
    search example.com
    nameserver   127.0.0.53
    nameserver fd00::1   # comment
    nameserver fe80::1%lo
    nameserver not-an-address
    nameserver
    nameserver 127.0.0.53
    ; nameserver 192.0.2.8
    """
    found = parse_resolv_conf(text, 53)
    assert [up.text for up in found] == ["127.0.0.53", "fd00::1", "fe80::1%lo"]
    assert found[0].family == socket.AF_INET
    assert found[0].address == ("127.0.0.53", 53)
    assert found[2].address[3:] == (socket.if_nametoindex("lo"),)
    assert len(parse_resolv_conf("\n".join(f"nameserver 10.0.0.{n}" for n in range(99)), 53)) == 8


async def test_who_asks_the_same_meanwhile_waits_for_the_same_answer(tmp_path: Path) -> None:
    asked_once = asyncio.Event()

    def late(query: dns.message.Message) -> list[bytes]:
        asked_once.set()
        asking._attempt_seconds = 60  # the next attempt's answer may take its time
        return []

    async with upstream(late, "127.0.0.1") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1", attempt_seconds=0.3)
        first_one = asyncio.create_task(asking.answer(ask()))
        await asked_once.wait()
        others = [asyncio.create_task(asking.answer(ask())) for _ in range(20)]
        await asyncio.sleep(0)
        first_one.cancel()  # the others do not depend on who asked first
        fake.behaviour = lambda query: [good(query).to_wire()]
        answers = await asyncio.gather(*others)
        assert all(answers) and len(fake.udp) == 2
        assert asking.counters["forward_joined"] == 20


async def test_a_loop_by_way_of_a_sandbox_ends(tmp_path: Path) -> None:
    """The upstream is a sandbox's resolver whose own upstream is us: it asks us what we ask it."""
    loops: list[asyncio.Task[bytes | None]] = []

    def back_to_us(query: dns.message.Message) -> list[bytes]:
        again = read(query.to_wire(), udp=True)
        assert isinstance(again, Asked)
        loops.append(asyncio.create_task(asking.answer(again)))
        return []

    async with upstream(back_to_us, "127.0.0.1") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1", attempt_seconds=0.1)
        assert await asking.answer(ask()) is None
        assert await asyncio.gather(*loops) == [None, None]
        assert len(fake.udp) == 2  # the two tries of the first question, and none of the others


async def test_answers_are_kept_until_other_upstreams_are_asked(tmp_path: Path) -> None:
    async with upstream(lambda query: [good(query).to_wire()], "127.0.0.1") as fake:
        asking = forwarder(tmp_path, fake.port, "127.0.0.1")
        assert asking.kept(ask()) is None
        answer = await asking.answer(ask())
        assert answer is not None
        kept = asking.kept(ask())
        assert kept is not None and kept[2:] == answer[2:]
        (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n# another\n")
        asking.upstreams()
        assert asking.kept(ask()) is None
