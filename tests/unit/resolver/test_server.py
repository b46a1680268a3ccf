"""resolver/server.py and sockets.py on loopback addresses: no root, no namespace."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import dns.asyncquery
import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
import pytest_asyncio

from agent.core.names import Names
from agent.errors import Conflict, Invalid, Unavailable
from agent.notation import parse_address
from agent.resolver.forward import Forwarder
from agent.resolver.server import CONNECTIONS_PER_SOURCE_MAX, Server
from agent.resolver.sockets import Listen, is_ours, open_sockets, parse_listen
from agent.resolver.wire import Asked, failure
from tests.ports import free_port

NET = "d" * 16
SANDBOX = "127.0.0.2"  # an address with a view; 127.0.0.1 has none


class SlowForwarder(Forwarder):
    """Answers SERVFAIL, but only when it is let go; counts who is waiting."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"), lambda _address, _port: False)
        self.go = asyncio.Event()
        self.waiting = 0

    async def answer(self, asked: Asked) -> bytes | None:
        self.waiting += 1
        await self.go.wait()
        return failure(asked, dns.rcode.NOERROR)


class Running:
    """A started server and where it is."""

    def __init__(self, server: Server, forwarder: SlowForwarder, port: int) -> None:
        self.server = server
        self.forwarder = forwarder
        self.port = port

    async def udp(
        self, text: str, type: str = "A", source: str = SANDBOX, where: str = "127.0.0.1"
    ) -> dns.message.Message:
        query = dns.message.make_query(text, type)
        return await dns.asyncquery.udp(query, where, timeout=20, port=self.port, source=source)

    async def tcp(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(SANDBOX, 0))


async def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Poll until `holds`; fail past the time."""
    for _ in range(int(seconds / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not come to hold in time")


def names() -> Names:
    made = Names()
    made.put_network(NET, "demo", ("10.1.0.0/16",))
    made.put(NET, "1" * 16, "one", ("web",), (parse_address("10.1.0.2"),))
    made.put(NET, "2" * 16, "two", ("web",), (parse_address("10.1.0.3"),))
    for number in range(100):
        made.put(NET, f"{number:016x}", f"n{number}", ("many",), (bytes((10, 1, 1, number)),))
    made.put_view(parse_address(SANDBOX), (NET,))
    return made


@pytest_asyncio.fixture
async def running() -> AsyncIterator[Running]:
    udp, tcp = open_sockets([Listen("0.0.0.0", 0)], None)
    forwarder = SlowForwarder()
    server = Server(udp, tcp, forwarder, idle_seconds=20)
    server.names = names()
    await server.start()
    try:
        yield Running(server, forwarder, udp[0].getsockname()[1])
    finally:
        await server.close()


async def test_names_by_who_asks(running: Running) -> None:
    response = await running.udp("one.demo")
    assert str(response.answer[0]) == "one.demo. 5 IN A 10.1.0.2"
    stranger = await running.udp("one.demo.vxmesh.internal", source="127.0.0.1")
    assert stranger.rcode() == dns.rcode.NXDOMAIN
    refused = await running.udp("example.com", source="127.0.0.1")
    assert refused.rcode() == dns.rcode.REFUSED
    assert running.forwarder.waiting == 0


async def test_the_answer_comes_from_the_address_that_was_asked(running: Running) -> None:
    """dnspython drops an answer that comes from elsewhere."""
    for where in ("127.0.0.1", "127.0.0.77", "127.1.2.3"):
        assert (await running.udp("one", where=where)).answer


async def test_round_robin_by_question(running: Running) -> None:
    firsts = []
    for _ in range(4):
        firsts.append(str((await running.udp("web")).answer[0][0]))
        await running.udp("web", "AAAA")  # what a C library asks along must not upset the turns
    assert firsts == ["10.1.0.2", "10.1.0.3", "10.1.0.2", "10.1.0.3"]


async def test_truncated_and_fetched_by_tcp(running: Running) -> None:
    query = dns.message.make_query("many", "A")
    response, by_tcp = await dns.asyncquery.udp_with_fallback(
        query, "127.0.0.1", timeout=20, port=running.port, source=SANDBOX
    )
    assert by_tcp
    assert len(response.answer[0]) == 100


async def test_garbage_datagrams_and_then_a_question(running: Running) -> None:
    rng = random.Random(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((SANDBOX, 0))
        for _ in range(500):
            sock.sendto(rng.randbytes(rng.randrange(600)), ("127.0.0.1", running.port))
        sock.sendto(b"", ("127.0.0.1", running.port))
        sock.sendto(bytes(60_000), ("127.0.0.1", running.port))
    assert (await running.udp("one")).answer
    assert running.server.counters["malformed"] > 0
    assert running.server.counters["errors"] == 0


async def test_a_fault_of_ours_is_servfail_and_not_the_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> bytes:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("agent.resolver.server.build", broken)
        assert (await running.udp("one")).rcode() == dns.rcode.SERVFAIL
    assert (await running.udp("one")).answer
    assert running.server.counters["errors"] == 1


def framed(text: str, id: int) -> bytes:
    return dns.message.make_query(text, "A", id=id).to_wire(prepend_length=True)


async def read_framed(reader: asyncio.StreamReader) -> dns.message.Message:
    async with asyncio.timeout(15):
        size = int.from_bytes(await reader.readexactly(2), "big")
        return dns.message.from_wire(await reader.readexactly(size))


async def test_tcp_answers_overtake_what_waits_for_an_upstream(running: Running) -> None:
    reader, writer = await running.tcp()
    writer.write(framed("example.com", 1) + framed("one", 2) + framed("two", 3))
    assert [(await read_framed(reader)).id for _ in range(2)] == [2, 3]
    running.forwarder.go.set()
    assert (await read_framed(reader)).id == 1
    writer.close()


async def test_tcp_answers_one_who_has_said_all(running: Running) -> None:
    """A half-closed connection still gets what was asked on it."""
    reader, writer = await running.tcp()
    writer.write(framed("example.com", 1) + framed("one", 2))
    writer.write_eof()
    assert (await read_framed(reader)).id == 2
    running.forwarder.go.set()
    assert (await read_framed(reader)).id == 1
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\x20half", framed("one", 1)])
async def test_tcp_idle_is_closed(running: Running, sent: bytes) -> None:
    running.server._idle_seconds = 0.2
    reader, writer = await running.tcp()
    writer.write(sent)
    async with asyncio.timeout(15):
        try:
            await reader.read()
        except ConnectionResetError:
            pass
    writer.close()


async def test_tcp_one_who_does_not_read_is_let_go(running: Running) -> None:
    running.server._idle_seconds = 0.5
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # full sooner
    sock.bind((SANDBOX, 0))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", running.port))
    question = framed("many", 1) * 64
    async with asyncio.timeout(20):
        with pytest.raises(ConnectionError):
            while True:
                await loop.sock_sendall(sock, question)
    sock.close()
    assert (await running.udp("one")).answer


async def test_tcp_garbage_ends_or_is_answered(running: Running) -> None:
    rng = random.Random(7)
    for size in (0, 5, 12, 100, 5000, 65535):
        reader, writer = await running.tcp()
        writer.write(size.to_bytes(2, "big") + rng.randbytes(size))
        writer.write_eof()
        async with asyncio.timeout(15):
            try:
                await reader.read()
            except ConnectionResetError:
                pass
        writer.close()
    assert (await running.udp("one")).answer
    assert running.server.counters["errors"] == 0


async def test_one_asker_has_a_bounded_number_of_connections(running: Running) -> None:
    held = [await running.tcp() for _ in range(CONNECTIONS_PER_SOURCE_MAX)]
    for reader, writer in held:
        writer.write(framed("one", 1))
        assert (await read_framed(reader)).answer
    reader, writer = await running.tcp()
    async with asyncio.timeout(10):  # sooner than who says nothing
        assert await reader.read() == b""
    other, other_writer = await asyncio.open_connection(
        "127.0.0.1", running.port, local_addr=("127.0.0.3", 0)
    )
    other_writer.write(framed("one", 1))
    assert (await read_framed(other)).rcode() == dns.rcode.NXDOMAIN
    for each in (writer, other_writer, *(writer for _, writer in held)):
        each.close()


async def test_a_flood_of_foreign_names_is_bounded_and_ours_go_on(running: Running) -> None:
    query = dns.message.make_query("example.com", "A")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((SANDBOX, 0))
        sock.setblocking(False)
        for _ in range(100):
            sock.sendto(query.to_wire(), ("127.0.0.1", running.port))
        assert (await running.udp("one")).answer
        assert running.forwarder.waiting == 64
        reply = dns.message.from_wire(await asyncio.get_running_loop().sock_recv(sock, 512))
        assert reply.rcode() == dns.rcode.SERVFAIL
    running.forwarder.go.set()
    assert (await running.udp("example.com")).rcode() == dns.rcode.NOERROR


async def test_a_connection_that_ends_gives_its_places_back(running: Running) -> None:
    for _ in range(10):
        _reader, writer = await running.tcp()
        writer.write(b"".join(framed("example.com", id) for id in range(16)) + framed("one", 99))
        await until(lambda: running.forwarder.waiting == 16)
        running.forwarder.waiting = 0
        writer.transport.abort()
        running.forwarder.go.set()
        await until(lambda: not running.server._connections and not running.forwarder._in_flight)
        running.forwarder.go.clear()


async def test_questions_before_the_first_state_are_kept() -> None:
    udp, tcp = open_sockets([Listen("127.0.0.1", 0)], None)
    server = Server(udp, tcp, SlowForwarder())
    query = dns.message.make_query("one", "A")
    port = udp[0].getsockname()[1]
    asking = asyncio.create_task(
        dns.asyncquery.udp(query, "127.0.0.1", timeout=20, port=port, source=SANDBOX)
    )
    await until(lambda: _readable(udp[0]))
    assert not asking.done()
    server.names = names()
    await server.start()
    await server.start()
    assert (await asking).answer
    await server.close()


async def test_one_that_gives_way_leaves_no_question_without_an_answer() -> None:
    """Those that the kernel had dealt to it were lost when it closed its socket."""
    servers, port = [], free_port()
    for _ in range(2):
        udp, tcp = open_sockets([Listen("127.0.0.1", port)], None, shared=True)
        servers.append(Server(udp, tcp, SlowForwarder()))
        servers[-1].names = names()
        await servers[-1].start()
    old, new = servers
    wire = dns.message.make_query("one", "A").to_wire()
    asking = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(120)]
    for number, sock in enumerate(asking):
        if number == 60:
            assert _readable(old._udp[0]), "of so many some are dealt to it"
            old._finish(old._datagrams)
        sock.setblocking(False)
        sock.bind((SANDBOX, 0))
        sock.sendto(wire, ("127.0.0.1", port))
    assert not _readable(old._udp[0]), "all that comes later is the other's"
    await old.close()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(30):
        for sock in asking:
            assert dns.message.from_wire(await loop.sock_recv(sock, 512)).answer
            sock.close()
    await new.close()


async def test_one_that_gives_way_is_not_kept_by_who_floods_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    udp, tcp = open_sockets([Listen("127.0.0.1", free_port())], None, shared=True)
    server = Server(udp, tcp, SlowForwarder())
    server.names = names()
    await server.start()
    reads = 0

    def flooded(_datagrams: object, _key: bytes) -> None:
        nonlocal reads
        reads += 1
        assert reads < 10_000, "it reads for ever"
        server._counters["udp"] += 64

    monkeypatch.setattr(server, "_read", flooded)
    await server.close()
    assert reads


def _readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def test_ipv6(running: Running) -> None:
    udp, tcp = open_sockets([Listen("::", 0)], None)
    server = Server(udp, tcp, running.forwarder)
    server.names = names()
    server.names.put_view(parse_address("::1"), (NET,))
    await server.start()
    query = dns.message.make_query("one", "A")
    port = udp[0].getsockname()[1]
    assert (await dns.asyncquery.udp(query, "::1", timeout=20, port=port)).answer
    assert (await dns.asyncquery.tcp(query, "::1", timeout=20, port=port)).answer
    await server.close()


def test_listening_addresses() -> None:
    assert parse_listen("0.0.0.0:53") == Listen("0.0.0.0", 53)
    assert parse_listen("[::]:5353") == Listen("::", 5353)
    for text in ("", "53", "0.0.0.0", "0.0.0.0:", "0.0.0.0:70000", "host:53", "1.2.3:53"):
        with pytest.raises(Invalid):
            parse_listen(text)


def test_a_taken_port_leaves_nothing_open() -> None:
    udp, tcp = open_sockets([Listen("127.0.0.1", 0)], None)
    port = udp[0].getsockname()[1]
    with pytest.raises(Conflict, match="the port is taken"):
        open_sockets([Listen("127.0.0.2", port), Listen("127.0.0.1", port)], None)
    again = open_sockets([Listen("127.0.0.2", port)], None)
    for sock in (*udp, *tcp, *again[0], *again[1]):
        sock.close()


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(Unavailable):
        open_sockets([Listen("192.0.2.1", 53)], None)


def test_what_is_ourselves() -> None:
    everywhere = [Listen("0.0.0.0", 5353)]
    assert is_ours("127.0.0.53", 5353, everywhere, None)
    assert not is_ours("127.0.0.53", 53, everywhere, None)
    assert not is_ours("192.0.2.1", 5353, everywhere, None)
    assert not is_ours("::1", 5353, everywhere, None)
    assert is_ours("::1", 5353, [Listen("::", 5353)], None)
    assert is_ours("127.0.0.1", 5353, [Listen("127.0.0.1", 5353)], None)
    assert not is_ours("127.0.0.2", 5353, [Listen("127.0.0.1", 5353)], None)


async def test_a_packet_of_many_questions_counts_as_one(running: Running) -> None:
    """UDP_SEGMENT: what a limit of packets in the kernel lets through is one question."""
    query = dns.message.make_query("one", "A", id=7)
    wire = query.to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind((SANDBOX, 0))
        sock.connect(("127.0.0.1", running.port))
        sock.setsockopt(17, 103, len(wire))  # SOL_UDP, UDP_SEGMENT
        sock.send(wire * 50)
        loop = asyncio.get_running_loop()
        first = dns.message.from_wire(await loop.sock_recv(sock, 4096))
        assert first.id == 7 and first.answer
        await running.udp("one")  # what came before it has been dealt with
        assert running.server.counters["udp"] == 2
        with pytest.raises(BlockingIOError):
            sock.recv(4096)
