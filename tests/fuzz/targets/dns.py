"""What sandboxes ask the name server, what upstreams answer it, and what it is fed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any, cast
from unittest import mock

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from agent.core.names import Names
from agent.resolver import feed, messages
from agent.resolver.forward import Forwarder
from agent.resolver.intake import Intake
from agent.resolver.messages import Asked
from agent.resolver.server import Server
from tests.fuzz import world
from tests.fuzz.engine import Target
from tests.fuzz.inputs import number
from tests.fuzz.shapes import Known, struct
from tests.fuzz.targets.unary import LOOP

ASKER = b"\n\1\0\x09"
NAMES = (
    "one.", "one.web.", "one.web.vxmesh.internal.", "ONE.wEb.", "two.", "many.", "web.",
    "vxmesh.internal.", "internal.", "example.com.", "localhost.", "9.0.1.10.in-addr.arpa.",
    "1.10.in-addr.arpa.", "arpa.", ".", "x." * 100, "a" * 63 + ".web.", "_http._tcp.one.web.",
    "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa.",
)  # fmt: skip
TYPES = ("A", "AAAA", "PTR", "SOA", "ANY", "SRV", "TXT", "MX", "NS", "AXFR", "OPT", "TYPE65280")


def make_names() -> Names:
    """What a sandbox at ASKER sees: two networks, and a name that is 3,000 endpoints'."""
    names = Names()
    names.put_network("w", "web", ("10.1.0.0/16", "fd00:1::/64"))
    names.put_network("d", "db", ("10.2.0.0/16",), True)
    names.put("w", "1", "one", ("first",), (ASKER, b"\xfd" + bytes(14) + b"\1"))
    for index in range(3000):
        names.put("w", f"m{index}", f"m{index}", ("many",), (b"\n\1" + index.to_bytes(2, "big"),))
    names.put("d", "2", "two", (), (b"\n\2\0\1",))
    names.put_view(ASKER, ("w", "d"))
    return names


class Answering(Forwarder):
    """Asks nobody: upstreams answer what they are told to."""

    def upstreams(self) -> list[Any]:
        """None."""
        return []

    async def resolve(self, asked: Asked) -> tuple[dns.message.Message | None, str]:
        """No answer."""
        return None, ""


def make_server() -> Server:
    """A name server without sockets."""
    server = Server((), (), Answering(Path("/dev/null"), lambda address, port: False))
    server.names = NAMES_KNOWN
    return server


NAMES_KNOWN = make_names()
SERVER = make_server()


def ask(data: bytes) -> None:
    """A datagram, and the same over TCP. An answer is a sound message, small enough, and no
    question makes the server fail."""
    before = SERVER.counters["errors"]
    for source in (ASKER, b"\n\1\0\x08"):
        for udp in (True, False):
            reply = SERVER._reply(data, source, udp)
            if isinstance(reply, Asked):
                SERVER._forwarder.release(source)
                messages.upstream_query(reply, 7).to_wire()
                reply = messages.failure(reply, 2)
            if reply is not None:
                assert len(reply) <= (messages.UDP_BYTES_MAX if udp else messages.TCP_BYTES_MAX)
                assert reply[:2] == data[:2] and reply[2] & 0x80
                if len(reply) > 12:
                    dns.message.from_wire(reply)
    assert SERVER.counters["errors"] == before, "the server failed at it"


def make_question(rng: random.Random) -> bytes:
    """For `ask`."""
    name = rng.choice(NAMES)
    made = dns.message.make_query(
        name, rng.choice(TYPES), use_edns=rng.choice((None, 0, 0, 1)),
        payload=rng.choice((0, 512, 1232, 65535)),
    )  # fmt: skip
    made.id = rng.getrandbits(16)
    made.flags |= rng.choice((0, 0, dns.flags.CD, dns.flags.AD, dns.flags.QR, 0x7800))
    return made.to_wire()


def converse(data: bytes) -> None:
    """The bytes of one TCP connection."""

    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        writer = Writer()
        server = make_server()
        try:
            await server._questions(reader, cast(Any, writer), ASKER)
        except (OSError, asyncio.IncompleteReadError):
            pass
        await asyncio.gather(*server._tasks, return_exceptions=True)  # what was broken off
        assert server.counters["errors"] == 0
        assert not server._forwarder._in_flight
        at = 0
        while at < len(writer.data):
            at += 2 + int.from_bytes(writer.data[at : at + 2], "big")
        assert at == len(writer.data)

    LOOP.run_until_complete(run())


class Writer:
    """As asyncio.StreamWriter, into memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.transport = self

    def set_write_buffer_limits(self, high: int) -> None:
        """As of a transport."""

    def is_closing(self) -> bool:
        """Never."""
        return False

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.data += data

    def close(self) -> None:
        """Nothing is to be closed."""

    async def drain(self) -> None:
        """All is with the kernel at once."""


def make_conversation(rng: random.Random) -> bytes:
    """For `converse`."""
    parts = []
    for _ in range(rng.randrange(1, 5)):
        wire = make_question(rng)
        size = len(wire) if rng.random() < 0.9 else number(rng, 16)
        parts.append(size.to_bytes(2, "big") + wire)
    return b"".join(parts)


QUERY = dns.message.make_query("example.com.", "A", use_edns=0)
QUERY.id = 7
_asked = messages.read(dns.message.make_query("example.com.", "A").to_wire(), udp=True)
assert isinstance(_asked, Asked)
ASKED: Asked = _asked


def hear_upstream(data: bytes) -> None:
    """What came back from an upstream, as it is passed on to who asked, over UDP and TCP."""
    found = messages.read_upstream(data, QUERY)
    if found is None:
        return
    for limit in (512, 1232, 65535):
        wire = messages.relay(ASKED._replace(limit=limit), found)
        assert len(wire) <= limit
        dns.message.from_wire(wire)
    # As intake._query shows it to people.
    for rrset in found.answer:
        for rdata in rrset:
            assert f"{dns.rdatatype.to_text(rrset.rdtype)} {rdata}"


def make_answer(rng: random.Random) -> bytes:
    """For `hear_upstream`."""
    made = dns.message.make_response(QUERY)
    made.id = 7 if rng.random() < 0.95 else 8
    made.set_rcode(dns.rcode.Rcode(rng.choice((0, 0, 0, 2, 3, 5, 15))))
    rows = (
        ("A", "192.0.2.1"), ("AAAA", "2001:db8::1"), ("CNAME", "a.example.com."), ("TXT", '"x"'),
        ("SOA", "a. b. 1 2 3 4 5"), ("MX", "1 a."), ("SRV", "1 2 3 a."), ("CAA", '0 issue "x"'),
        ("NAPTR", '1 2 "u" "x" "!^.*$!y!" .'), ("TYPE65280", r"\# 3 010203"), ("NS", "a."),
        ("DS", "1 8 2 " + "00" * 32), ("HTTPS", "1 . alpn=h2"), ("LOC", "1 N 1 E 1m"),
    )  # fmt: skip
    for section in (made.answer, made.authority, made.additional):
        for _ in range(rng.choice((0, 1, 1, 2))):
            type_, value = rng.choice(rows)
            name = rng.choice(("example.com.", "a.example.com.", "."))
            count = rng.choice((1, 1, 1, 40)) if type_ == "A" else 1
            values = [value if n == 0 else f"192.0.2.{n}" for n in range(count)]
            section.append(dns.rrset.from_text_list(name, number(rng, 31), "IN", type_, values))
    if rng.random() < 0.1:
        made.flags |= dns.flags.TC
    try:
        return made.to_wire()
    except dns.exception.TooBig:
        return b""


FED = Known({
    "seq": (0, 1, 2), "protocol": (feed.PROTOCOL, feed.PROTOCOL, 2), "setup": ("s", "s", "t"),
    "id": (1, 2), "name": ("one", "web", "two.web"), "rdtype": ("A", "PTR", "ANY"),
    "network": (world.NET, world.OTHER), "networks": ((world.NET,),), "address": (ASKER,),
    "subnets": (("10.1.0.0/24",), ()), "gateways": (("10.1.0.1",), ()), "created": (world.NOW,),
})  # fmt: skip
KINDS = (
    feed.Hello, feed.Reset, feed.Changes, feed.Changes, feed.Commit, feed.Query, feed.StatsQuery,
    feed.Stop,
)  # fmt: skip


def feed_resolver(data: bytes) -> None:
    """The bytes of a connection on the feed's socket. Whatever comes, names can be asked for."""

    async def run() -> None:
        server = make_server()
        forwarder = server._forwarder
        intake = Intake(Path("/dev/null"), "s", server, forwarder, lambda: None)
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        with mock.patch("gc.freeze"):
            await intake._converse(reader, cast(Any, Writer()))
        for task in list(intake._tasks):
            await task
        for name in ("one.", "one.web.", "9.0.1.10.in-addr.arpa."):
            # What is malformed in the feed may be an answer that fails, never a server that does.
            assert server._reply(dns.message.make_query(name, "ANY").to_wire(), ASKER, False)

    LOOP.run_until_complete(run())


def make_feed(rng: random.Random) -> bytes:
    """For `feed_resolver`."""
    frames = [bytes(feed.frame(feed.Hello(feed.PROTOCOL, "s")))] if rng.random() < 0.9 else []
    if rng.random() < 0.8:
        frames.append(bytes(feed.frame(feed.Reset())))
    for _ in range(rng.randrange(6)):
        try:
            frames.append(bytes(feed.frame(cast(Any, struct(rng.choice(KINDS), rng, FED)))))
        except (OverflowError, UnicodeEncodeError):
            continue
    return b"".join(frames)


TARGETS = [
    Target("dns.question", ask, make_question, (), weight=1.5),
    Target("dns.connection", converse, make_conversation, ()),
    Target("dns.upstream", hear_upstream, make_answer, (), weight=1.5),
    Target("dns.feed", feed_resolver, make_feed, ()),
]
