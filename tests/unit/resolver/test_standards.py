"""The name server as strangers find it: dnspython as the client, on loopback, case by case.

RFC 1035 (messages), 2308 (negative answers), 6891 (EDNS), 7766 (TCP); 2181, 2782, 3225, 8482, 9619
where they say more. What is no question is sent as bytes.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
import pytest_asyncio

from agent.core.names import ZONE, Names
from agent.core.nametables import ServiceBackend, ServicePort
from agent.notation import parse_address
from agent.resolver.forward import Forwarder
from agent.resolver.server import Server
from agent.resolver.sockets import Listen, open_sockets

NET, BACK = "d" * 16, "b" * 16
SANDBOX, WHERE = "127.0.0.2", "127.0.0.1"


class Upstream(asyncio.DatagramProtocol):
    """The host's resolver: what it was asked; knows example.com, and nothing else."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.DatagramTransport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        self.asked.append(question.name.to_text().lower())
        response = dns.message.make_response(query, recursion_available=True)
        if question.name == dns.name.from_text("example.com") and question.rdtype == 1:
            response.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", "203.0.113.9"))
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
            soa = "ns.test. root.test. 1 2 3 4 30"
            response.authority.append(dns.rrset.from_text("test.", 60, "IN", "SOA", soa))
        self.transport.sendto(response.to_wire(), addr)


class Served:
    """A name server and its upstream, and how to ask it."""

    def __init__(self, server: Server, upstream: Upstream, port: int) -> None:
        self.server = server
        self.upstream = upstream
        self.port = port

    async def ask(self, query: dns.message.Message, tcp: bool = False) -> dns.message.Message:
        exchange = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
        return await exchange(query, WHERE, timeout=20, port=self.port, source=SANDBOX)

    async def raw(self, wire: bytes) -> bytes | None:
        """What comes back for a datagram; None if a question after it is answered first."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.bind((SANDBOX, 0))
            sock.connect((WHERE, self.port))
            sock.send(wire)
            sock.send(query("one", id=0xFFFF).to_wire())
            first = await asyncio.wait_for(loop.sock_recv(sock, 65535), 15)
            return None if first[:2] == b"\xff\xff" else first


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    loop = asyncio.get_running_loop()
    transport, upstream = await loop.create_datagram_endpoint(Upstream, local_addr=(WHERE, 0))
    port = transport.get_extra_info("sockname")[1]
    conf = tmp_path / "resolv.conf"
    conf.write_text(f"nameserver {WHERE}\n")
    udp, tcp = open_sockets([Listen("0.0.0.0", 0)], None)
    forwarder = Forwarder(conf, lambda _address, _port: False, random.Random(1), port, 60, 60)
    server = Server(udp, tcp, forwarder)
    names = Names()
    names.put_network(NET, "demo", ("10.1.0.0/16", "fd00::/64"))
    names.put_network(BACK, "back", ("10.2.0.0/16",))
    names.put(BACK, "9" * 16, "secret", (), (parse_address("10.2.0.9"),))
    names.put(NET, "1" * 16, "one", (), (parse_address("10.1.0.2"), parse_address("fd00::2")))
    for n in range(200):
        names.put(NET, f"{n:016x}", f"n{n}", ("many",), (bytes((10, 1, 1, n)),))
    ports = (ServicePort("tcp", 80, 8080),)
    held = tuple(ServiceBackend(f"{n:016x}") for n in range(3))
    names.put_service(NET, "s1", "web", (parse_address("10.1.0.100"),), held, ports)
    names.put_service(NET, "s2", "each", (), held, ports)
    names.put_view(parse_address(SANDBOX), (NET,))
    server.names = names
    await server.start()
    try:
        yield Served(server, upstream, udp[0].getsockname()[1])
    finally:
        await server.close()
        transport.close()


def query(name: str, type: str = "A", **options: Any) -> dns.message.Message:
    return dns.message.make_query(name, type, **options)


NOERROR, NXDOMAIN, REFUSED = dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.REFUSED


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
@pytest.mark.parametrize(
    ("name", "type", "rcode", "answers"),
    [
        ("one", "A", NOERROR, ["10.1.0.2"]),
        ("ONE.demo", "A", NOERROR, ["10.1.0.2"]),
        (f"one.demo.{ZONE}", "AAAA", NOERROR, ["fd00::2"]),
        ("one", "ANY", NOERROR, ["10.1.0.2", "fd00::2"]),
        ("one", "MX", NOERROR, []),
        ("n1", "AAAA", NOERROR, []),
        ("none", "A", NXDOMAIN, []),
        (f"none.demo.{ZONE}", "TXT", NXDOMAIN, []),
        (f"secret.back.{ZONE}", "A", NXDOMAIN, []),
        ("2.0.1.10.in-addr.arpa", "PTR", NOERROR, [f"one.demo.{ZONE}."]),
        ("100.0.1.10.in-addr.arpa", "PTR", NOERROR, [f"web.demo.{ZONE}."]),
        ("99.9.1.10.in-addr.arpa", "PTR", NXDOMAIN, []),
        ("web", "A", NOERROR, ["10.1.0.100"]),
        ("tasks.web", "A", NOERROR, ["10.1.1.0", "10.1.1.1", "10.1.1.2"]),
        ("_80._tcp.web", "SRV", NOERROR, [f"0 1 80 web.demo.{ZONE}."]),
        ("_81._tcp.web", "SRV", NXDOMAIN, []),
        ("example.com", "A", NOERROR, ["203.0.113.9"]),
        ("other.example.com", "A", NXDOMAIN, []),
    ],
)
async def test_answers(
    served: Served, name: str, type: str, rcode: int, answers: list[str], tcp: bool
) -> None:
    """RFC 1035, section 4.1.1; RFC 2308, section 3: the same the first time and from then on."""
    ours = "example" not in name
    for _ in range(3):
        response = await served.ask(query(name, type), tcp)
        assert response.rcode() == rcode
        assert sorted(str(data) for rrset in response.answer for data in rrset) == answers
        assert bool(response.flags & dns.flags.AA) == ours
        assert response.flags & dns.flags.RA and not response.flags & dns.flags.TC
        if not answers:
            assert [rrset.rdtype for rrset in response.authority] == [dns.rdatatype.SOA]
            soa = response.authority[0]
            if ours:
                assert soa.ttl == soa[0].minimum == 5
                assert dns.name.from_text(name).is_subdomain(soa.name)
    assert served.server.counters["errors"] == 0
    if ours:
        assert served.upstream.asked == []


@pytest.mark.parametrize("flags", [0, dns.flags.RD, dns.flags.RD | dns.flags.CD, dns.flags.AD])
async def test_what_is_echoed(served: Served, flags: int) -> None:
    """RFC 1035, section 4.1.1: id, question and RD come back, in the case that was written."""
    for _ in range(2):
        asked = query("OnE.dEmO", id=4711)
        asked.flags = dns.flags.Flag(flags)
        response = await served.ask(asked)
        assert response.id == 4711
        assert response.question[0].name.to_text() == "OnE.dEmO."
        assert response.answer[0].name.to_text() == "OnE.dEmO."
        assert (response.flags & dns.flags.RD) == (flags & dns.flags.RD)


@pytest.mark.parametrize(
    ("payload", "size"),
    [(None, 512), (0, 512), (511, 512), (512, 512), (513, 513), (1232, 1232), (4096, 1232),
     (65535, 1232)],
)  # fmt: skip
async def test_sizes_by_udp(served: Served, payload: int | None, size: int) -> None:
    """RFC 6891, section 6.2.3 to 6.2.5; RFC 2181, section 9: TC, and all that has room."""
    options: dict[str, Any] = {} if payload is None else {"use_edns": 0, "payload": payload}
    for _ in range(2):
        response = await served.ask(query("many.demo", **options))
        wire = response.to_wire()
        assert size - 16 <= len(wire) <= size
        assert response.flags & dns.flags.TC
        assert (response.edns == 0) == (payload is not None)
        if payload is not None:
            assert response.payload == 1232
    whole = await served.ask(query("many.demo", **options), tcp=True)
    assert len(whole.answer[0]) == 200 and not whole.flags & dns.flags.TC


async def test_do_comes_back(served: Served) -> None:
    """RFC 3225, section 3."""
    for _ in range(2):
        assert (await served.ask(query("one", want_dnssec=True))).ednsflags & dns.flags.DO
        assert not (await served.ask(query("one", use_edns=0))).ednsflags & dns.flags.DO


async def test_another_version_of_edns(served: Served) -> None:
    """RFC 6891, section 6.1.3."""
    response = await served.ask(query("one", use_edns=1))
    assert response.rcode() == dns.rcode.BADVERS and response.edns == 0 and not response.answer


@pytest.mark.parametrize("number", [3, 8, 10, 12, 65001])
async def test_options_of_edns_are_passed_over(served: Served, number: int) -> None:
    """RFC 6891, section 6.1.2: unknown ones are ignored, none is made up."""
    data = b"\0\1\x18\0\x0a\0\0" if number == 8 else b"\0\1\0\0\0\0\0\0"  # RFC 7871
    option = dns.edns.GenericOption(dns.edns.OptionType(number), data)
    asked = query("one", use_edns=0, options=[option])
    wire = await served.raw(asked.to_wire())
    assert wire is not None
    response = dns.message.from_wire(wire)
    assert response.answer and response.options == ()


async def test_two_edns_records_are_malformed(served: Served) -> None:
    """RFC 6891, section 6.1.1: MUST be FORMERR."""
    wire = bytearray(query("one", use_edns=0).to_wire())
    opt = wire[-11:]
    wire[11] = 2
    got = await served.raw(bytes(wire + opt))
    assert got is not None and got[3] & 0xF == dns.rcode.FORMERR


@pytest.mark.parametrize("rdclass", ["CH", "HS", "ANY", "NONE"])
async def test_other_classes_are_refused(served: Served, rdclass: str) -> None:
    asked = dns.message.make_query("version.bind", "TXT", rdclass)
    response = await served.ask(asked)
    assert response.rcode() == REFUSED and not response.answer


@pytest.mark.parametrize("type", ["AXFR", "IXFR", "TSIG", "OPT", "TYPE250", "MAILB"])
async def test_meta_types_are_refused(served: Served, type: str) -> None:
    wire = query("one").to_wire()[:-4] + struct.pack("!HH", dns.rdatatype.from_text(type), 1)
    got = await served.raw(wire)
    assert got is not None and got[3] & 0xF in (REFUSED, dns.rcode.FORMERR)


@pytest.mark.parametrize("opcode", [1, 2, 4, 5, 6, 15])
async def test_other_opcodes_are_not_implemented(served: Served, opcode: int) -> None:
    wire = bytearray(query("one", id=7).to_wire())
    wire[2] = opcode << 3
    got = await served.raw(bytes(wire))
    assert got is not None and got[:2] == b"\0\7" and got[3] & 0xF == dns.rcode.NOTIMP
    assert got[2] & 0x78 == opcode << 3


HEADER = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0)
ONE = b"\3one\0\0\1\0\1"


@pytest.mark.parametrize(
    "wire",
    [
        HEADER,  # a question that is not there
        HEADER + b"\3one",  # ends in a name
        HEADER + b"\3one\0\0\1",  # ends in a class
        HEADER + b"\3one\0\0\1\0\1\0",  # more than there should be
        HEADER + b"\xc0\x0c\0\1\0\1",  # a pointer to itself (section 4.1.4)
        HEADER + b"\xc0\xff\0\1\0\1",  # a pointer past the end
        HEADER + b"\1a\xc0\x0c\0\1\0\1",  # a circle
        HEADER + b"\x40a\0\0\1\0\1",  # a label of a type that is none
        HEADER + b"\x80a\0\0\1\0\1",
        HEADER + b"\x3f" + b"a" * 63 + b"\0\0\1",
        HEADER + (b"\x3f" + b"a" * 63) * 4 + ONE,  # a name of more than 255 bytes
        HEADER + b"\1a" * 128 + ONE,
        struct.pack("!HHHHHH", 7, 0x0100, 0, 0, 0, 0),  # no question (RFC 9619)
        struct.pack("!HHHHHH", 7, 0x0100, 2, 0, 0, 0) + ONE + ONE,  # two
        struct.pack("!HHHHHH", 7, 0x0100, 1, 1, 0, 0) + ONE,  # an answer that is not there
        struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 1) + ONE + b"\0\0\x29\x04\xd0",  # half an OPT
        struct.pack("!HHHHHH", 7, 0x0100, 65535, 65535, 65535, 65535) + ONE,
        HEADER + ONE + bytes(5000),
    ],
)
async def test_what_is_malformed_is_said_to_be(served: Served, wire: bytes) -> None:
    """RFC 1035, section 4.1.1: FORMERR, with the id; never silence, never the end of the server."""
    got = await served.raw(wire)
    assert got is not None and got[:2] == b"\0\7" and got[3] & 0xF == dns.rcode.FORMERR
    assert (await served.ask(query("one"))).answer
    assert served.server.counters["errors"] == 0


@pytest.mark.parametrize("wire", [b"", b"\0", bytes(11), b"\0\7\x81\x80" + bytes(8)])
async def test_what_is_no_question_at_all_gets_no_answer(served: Served, wire: bytes) -> None:
    """A response would make two servers talk for ever."""
    assert await served.raw(wire) is None


async def test_a_label_may_have_any_bytes(served: Served) -> None:
    """RFC 2181, section 11."""
    for label in (b"\0", b"a.b", b"\xff\xfe", b" ", b"*", b"x" * 63):
        asked = dns.message.make_query(dns.name.Name([label, b""]), "A")
        assert (await served.ask(asked)).rcode() == NXDOMAIN
    assert served.upstream.asked == []


async def test_pipelined_by_tcp(served: Served) -> None:
    """RFC 7766, section 6.2.1.1: all that is written at once is answered; ids tell which."""
    reader, writer = await asyncio.open_connection(WHERE, served.port, local_addr=(SANDBOX, 0))
    sent = [query(f"n{n}", id=n + 1).to_wire(prepend_length=True) for n in range(100)]
    writer.write(b"".join(sent))
    seen = {}
    async with asyncio.timeout(30):
        for _ in sent:
            size = int.from_bytes(await reader.readexactly(2), "big")
            response = dns.message.from_wire(await reader.readexactly(size))
            seen[response.id] = str(response.answer[0][0])
    assert seen == {n + 1: f"10.1.1.{n}" for n in range(100)}
    writer.close()


async def test_a_byte_at_a_time_by_tcp(served: Served) -> None:
    """RFC 7766, section 8: the length may come in a segment of its own, or in two."""
    reader, writer = await asyncio.open_connection(WHERE, served.port, local_addr=(SANDBOX, 0))
    for byte in query("one").to_wire(prepend_length=True):
        writer.write(bytes((byte,)))
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(30):
        size = int.from_bytes(await reader.readexactly(2), "big")
        assert dns.message.from_wire(await reader.readexactly(size)).answer
    writer.close()


async def test_srv_has_the_addresses_of_its_targets(served: Served) -> None:
    """RFC 2782: additional data, that the client need not ask again."""
    response = await served.ask(query("_80._tcp.each", "SRV"))
    targets = {data.target for data in response.answer[0]}
    assert {rrset.name for rrset in response.additional} == targets and len(targets) == 3
    for target in targets:
        assert (await served.ask(query(target.to_text()))).answer


async def test_rotated_from_question_to_question(served: Served) -> None:
    firsts = [str((await served.ask(query("each"))).answer[0][0]) for _ in range(9)]
    assert firsts == ["10.1.1.0", "10.1.1.1", "10.1.1.2"] * 3


async def test_a_foreign_answer_is_kept_as_long_as_it_may_be(served: Served) -> None:
    for number in range(3):
        response = await served.ask(query("eXample.com", use_edns=0 if number else False))
        assert 0 < response.answer[0].ttl <= 60
        assert response.question[0].name.to_text() == "eXample.com."
        assert (response.edns == 0) == bool(number)
    assert served.upstream.asked == ["example.com."]
    for _ in range(3):  # RFC 2308, section 5: by the SOA's minimum
        assert (await served.ask(query("no.example.com"))).rcode() == NXDOMAIN
    assert served.upstream.asked == ["example.com.", "no.example.com."]


async def test_nothing_of_ours_is_seen_at_an_upstream(served: Served) -> None:
    """Whatever is asked for below our zone, of our names and addresses, in any type."""
    served.server.names.drop_service(NET, "s1")
    served.server.changed()
    names = ["one", "nothing", "one.demo", "nothing.demo", "a.b.demo", ZONE, f"x.{ZONE}"]
    names += [f"{left}.demo.{ZONE}" for left in ("one", "no", "tasks.each", "_80._tcp.each")]
    names += [f"secret.back.{ZONE}", f"a.b.c.d.{ZONE}", "tasks.web", "tasks.each", "_80._tcp.web"]
    names += [
        "_80._tcp.nothing",
        "tasks.web.demo",
        "1.0.1.10.in-addr.arpa",
        "1.0.2.10.in-addr.arpa",
    ]
    names += ["10.in-addr.arpa.demo", "internal", "localhost", "x.localhost", f"ONE.{ZONE.upper()}"]
    for name in names:
        for type in ("A", "AAAA", "SRV", "PTR", "TXT", "SOA", "NS", "DS", "HTTPS", "ANY"):
            for tcp in (False, True):
                response = await served.ask(query(name, type), tcp)
                assert response.rcode() in (NOERROR, NXDOMAIN), (name, type)
    assert served.upstream.asked == []
    await served.ask(query("example.com"))
    assert served.upstream.asked == ["example.com."]
