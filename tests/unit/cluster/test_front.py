"""The peer port, with real TLS clients on loopback: who is let in, who is not, and who is told.

The agent listens on 127.0.0.7; what connects without binding comes from 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from agent.cluster import front as front_module
from agent.cluster.admission import STRANGER_BURST, STRANGER_RATE
from agent.cluster.callers import Caller, caller_of
from agent.cluster.channels import Channels
from agent.cluster.dialer import OPTIONS, Denied, Dialer, Distrusted
from agent.cluster.outside import find_refusal, find_removal
from agent.cluster.refusals import Reason, Refusals
from agent.cluster.server import SYNC, PeerServer
from agent.cluster.trust import Keyring, member_name, node_name
from agent.errors import Unavailable
from agent.model import Node, Removal
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc
from agent.views import Change
from tests.directories import run_dir
from tests.identities import CLUSTER, DAY, Authority, authority
from tests.ports import free_port
from tests.unit.cluster.portclock import PortClock

HOST = "127.0.0.7"
ME, FRIEND, OTHER = "1" * 16, "2" * 16, "3" * 16
HERE = "127.0.0.1"  # from where clients come
WITHIN = 30.0  # s; a machine may be busy


def record(id: str, address: str, port: int = 1) -> Node:
    return Node(id, f"n{id[0]}", address, port, address, 4789, "", 0.0, 1500)


class Port:
    """An agent's peer port and what there is to see of it."""

    def __init__(self, keyring: Keyring | None = None, members: tuple[str, ...] = ()) -> None:
        self.node = NodeState(record(ME, HOST), time.time, random.Random(1))
        self.node.describe(record(ME, HOST))
        for index, address in enumerate(members, 4):
            self.node.nodes[str(index) * 16] = record(str(index) * 16, address)
        self.events: list[dict[str, str]] = []
        self.node.listeners.append(self._note)
        self.run_dir = run_dir()
        self.keyring = keyring or authority().keyring(ME)
        self.refusals = Refusals(self.node)
        self.enrolled: list[Caller] = []
        self.streams: list[Caller] = []
        enrol: Any = grpc.unary_unary_rpc_method_handler(self._enrol)
        self.server = PeerServer(
            self.node,
            self._echo,
            self._durable,
            Dialer(self.node, self.keyring),
            self.refusals,
            self.run_dir,
            {"Join": enrol},
        )
        self.number = 0

    def _note(self, change: Change) -> None:
        self.events += [{"kind": n.kind, **n.fields} for n in change.notices]

    async def _enrol(self, request: bytes, context: Any) -> bytes:
        self.enrolled.append(caller_of(context))
        return b"welcome"

    async def _echo(self, read: AsyncIterator[bytes], write: Any, caller: Caller) -> None:
        self.streams.append(caller)
        async for data in read:
            await write(data)

    async def _durable(self) -> None:
        pass

    @property
    def target(self) -> str:
        return f"{HOST}:{self.number}"

    def counted(self) -> dict[str, int]:
        return {reason: count for reason, count in self.refusals.counts.items() if count}

    def refused(self) -> list[dict[str, str]]:
        return [event for event in self.events if event["kind"] == "peer.refused"]

    def remove(self, id: str) -> None:
        """As if its removal had come from another node."""
        self.node.removals[id] = Removal(id, "lost", OTHER, 1, 0.0, "n3")
        for told in list(self.node.listeners):
            told(Change(nodes={id}))

    async def start(self) -> None:
        self.number = free_port()
        await self.server.start(HOST, self.number)

    async def stop(self) -> None:
        await self.server.stop()


@contextlib.asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Port]:
    port = Port(**options)
    await port.start()
    try:
        yield port
    finally:
        await port.stop()


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    async with opened() as made:
        yield made


async def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def call(
    channel: grpc.aio.Channel, path: str, data: bytes = b""
) -> bytes | grpc.aio.AioRpcError:
    """The answer to a call, whatever kind it is of, or how it failed."""
    make: Any = channel.stream_stream
    try:
        async with asyncio.timeout(30):
            return bytes(await make(path)(iter([data])).read())
    except grpc.aio.AioRpcError as error:
        return error


@contextlib.asynccontextmanager
async def dialled(port: Port, keyring: Keyring, node: str = ME) -> AsyncIterator[grpc.aio.Channel]:
    channel = keyring.channel(port.target, node, OPTIONS)
    try:
        yield channel
    finally:
        await channel.close()


def nameless() -> Keyring:
    return Keyring(authority().credentials(FRIEND, names=[member_name(CLUSTER)]))


def of_another_cluster() -> Keyring:
    """Of somebody who believes our CA all the same, and so goes on to show its own certificate."""
    theirs = Authority("d" * 16).credentials(FRIEND, authorities=(authority().pem,))
    return Keyring(dataclasses.replace(theirs, cluster=CLUSTER))


METHODS = [f"/vxmesh.v1.Peer/{m.name}" for m in pb.DESCRIPTOR.services_by_name["Peer"].methods]


async def test_a_node_of_the_cluster_is_let_in_and_known_by_its_certificate(port: Port) -> None:
    async with dialled(port, authority().keyring(FRIEND)) as channel:
        reply = await call(channel, "/vxmesh.v1.Peer/WhoIs")
        assert isinstance(reply, bytes) and pb.WhoIsReply.FromString(reply).node == ME
        assert await call(channel, SYNC, b"echo") == b"echo"
        assert await call(channel, "/vxmesh.v1.Enrol/Join", b"renew") == b"welcome"
    assert port.streams == [Caller(FRIEND, HERE)] == port.enrolled
    assert port.counted() == {} and port.refused() == []


@pytest.mark.parametrize(
    ("reason", "keyring"),
    [
        (Reason.EXPIRED, lambda: Keyring(authority().credentials(FRIEND, -100, -1))),
        (Reason.EARLY, lambda: Keyring(authority().credentials(FRIEND, 100, 200))),
        (Reason.REMOVED, lambda: authority().keyring(FRIEND)),
        (Reason.NAMELESS, nameless),
    ],
)
async def test_who_is_refused_can_call_nothing_and_is_told_why(
    port: Port, reason: Reason, keyring: Callable[[], Keyring]
) -> None:
    if reason is Reason.REMOVED:
        port.remove(FRIEND)
    async with dialled(port, keyring()) as channel:
        for method in METHODS:
            error = await call(channel, method, b"\n\x10" + FRIEND.encode())
            assert isinstance(error, grpc.aio.AioRpcError), method
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert find_refusal(error) is reason
            removal = find_removal(error, FRIEND)
            assert (removal is not None) == (reason is Reason.REMOVED)
    assert port.streams == []
    # Counted and told once: it was one connection.
    assert port.counted() == {reason.value: 1}
    (event,) = port.refused()
    assert (event["reason"], event["address"]) == (reason.value, HERE)
    assert event["node"] == ("" if reason is Reason.NAMELESS else FRIEND)


async def test_who_shows_no_certificate_can_enrol_and_nothing_else(port: Port) -> None:
    credentials = grpc.ssl_channel_credentials(authority().pem)
    name = ("grpc.ssl_target_name_override", member_name(CLUSTER))
    channel = grpc.aio.secure_channel(port.target, credentials, [*OPTIONS, name])
    assert await call(channel, "/vxmesh.v1.Enrol/Join", b"token") == b"welcome"
    assert port.enrolled == [Caller("", HERE, Reason.NO_CERTIFICATE)]
    assert port.counted() == {}
    for method in METHODS:
        error = await call(channel, method)
        assert isinstance(error, grpc.aio.AioRpcError)
        assert find_refusal(error) is Reason.NO_CERTIFICATE
    unknown = await call(channel, "/vxmesh.v1.Control/ListNodes")
    assert isinstance(unknown, grpc.aio.AioRpcError)
    assert unknown.code() is grpc.StatusCode.UNIMPLEMENTED
    await channel.close()
    assert port.streams == []
    assert port.counted() == {"no-certificate": len(METHODS)}
    assert [e["reason"] for e in port.refused()] == ["no-certificate"]  # of many, one is told


async def test_a_certificate_of_another_cluster_is_refused(port: Port) -> None:
    async with dialled(port, of_another_cluster()) as channel:
        error = await call(channel, "/vxmesh.v1.Peer/WhoIs")
        assert isinstance(error, grpc.aio.AioRpcError)
    await until(port.refused)
    assert port.counted() == {"foreign": 1}
    assert port.refused()[0]["address"] == HERE


async def test_an_agent_of_another_cluster_turns_away_itself_and_is_noted(port: Port) -> None:
    stranger = Authority("d" * 16).keyring(FRIEND)
    node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
    with pytest.raises(Distrusted, match="another cluster"):
        await Dialer(node, stranger).who_is(port.target, within=WITHIN)
    await until(port.refused)
    assert port.counted() == {"abandoned": 1}


async def test_what_does_not_speak_tls_1_3_is_refused(port: Port) -> None:
    reader, writer = await asyncio.open_connection(HOST, port.number)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    assert port.counted() == {"no-tls": 1}
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(HOST, port.number, ssl=old)
    await until(lambda: port.counted() == {"no-tls": 2})


async def test_a_knock_is_no_attempt(port: Port) -> None:
    for _ in range(40):
        _, writer = await asyncio.open_connection(HOST, port.number)
        writer.close()
        await writer.wait_closed()
    # And none of them has taken anything of what strangers may do.
    async with dialled(port, authority().keyring(FRIEND)) as channel:
        assert isinstance(await call(channel, "/vxmesh.v1.Peer/WhoIs"), bytes)
    assert port.counted() == {} and port.events == []


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["nothing", "a beginning"])
async def test_who_is_slow_is_let_go(
    port: Port, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(front_module, "FIRST_BYTE_WITHIN", 0.1)
    monkeypatch.setattr(front_module, "HANDSHAKE_WITHIN", 0.1)
    reader, writer = await asyncio.open_connection(HOST, port.number)
    writer.write(said)
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    writer.close()
    assert port.counted() == {"slow": 1}


# -- the other direction --


async def test_a_dialler_believes_only_the_node_that_it_wants(port: Port) -> None:
    node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
    heard: list[str] = []
    node.listeners.append(lambda change: heard.extend(n.kind for n in change.notices))
    dialer = Dialer(node, authority().keyring(FRIEND))
    assert await dialer.who_is(port.target, within=WITHIN) == ME
    assert await dialer.who_is(port.target, ME, WITHIN) == ME
    with pytest.raises(Distrusted, match="another one has its address"):
        await dialer.who_is(port.target, OTHER, WITHIN)
    assert heard == ["peer.distrusted"]
    assert port.streams == []


@pytest.mark.parametrize(
    ("keyring", "match"),
    [
        (lambda: Keyring(authority().credentials(ME, -100, -1)), "certificate has expired"),
        (lambda: Authority("d" * 16).keyring(ME), "of another cluster"),
    ],
)
async def test_a_dialler_tells_why_it_does_not_believe(
    keyring: Callable[[], Keyring], match: str
) -> None:
    async with opened(keyring=keyring()) as port:
        node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
        with pytest.raises(Distrusted, match=match):
            await Dialer(node, authority().keyring(FRIEND)).who_is(port.target, ME, WITHIN)


async def test_who_is_refused_hears_what_to_do(port: Port) -> None:
    node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
    told: list[str] = []
    node.listeners.append(
        lambda change: told.extend(f"{n.kind}: {n.message}" for n in change.notices)
    )
    dialer = Dialer(node, Keyring(authority().credentials(FRIEND, -100, -1)))
    for _ in range(3):
        with pytest.raises(Denied, match="refuses this node: its certificate has expired") as error:
            await dialer.who_is(port.target, ME, WITHIN)
    assert "vxmesh cluster token" in error.value.fix
    assert len(told) == 1 and told[0].startswith("identity.refused: "), told
    assert "certificate has expired" in told[0] and "vxmesh cluster token" in told[0]


# -- floods --


async def test_a_flood_of_strangers_does_not_keep_members_waiting() -> None:
    async with opened(members=(HERE,)) as port:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        stopped, began = asyncio.Event(), time.monotonic()
        tried = shaken = 0

        async def flood(address: str) -> None:
            nonlocal tried, shaken
            while not stopped.is_set() and tried < 5000:
                tried += 1
                with contextlib.suppress(OSError):
                    async with asyncio.timeout(1):
                        _, writer = await asyncio.open_connection(
                            HOST, port.number, ssl=tls, local_addr=(address, 0)
                        )
                    shaken += 1
                    writer.close()

        floods = [asyncio.create_task(flood(f"127.0.9.{n % 4 + 1}")) for n in range(32)]
        node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
        dialer = Dialer(node, authority().keyring(FRIEND))
        await until(lambda: port.refusals.counts["rate"] > 50)
        for _ in range(20):
            assert await dialer.who_is(port.target, ME, WITHIN) == ME
        stopped.set()
        await asyncio.gather(*floods)
        # Each of the four got its allowance at most, and what is told of it all is little.
        each = STRANGER_BURST + STRANGER_RATE * (time.monotonic() - began)
        assert shaken <= 4 * each
        assert len(port.refused()) <= 30


async def test_strangers_that_say_nothing_do_not_keep_out_one_that_speaks(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "FIRST_BYTE_WITHIN", 600.0)  # or some go for being slow
    silent = []
    for number in range(100):
        address = (f"127.0.9.{number // 6 + 1}", 0)
        silent.append(await asyncio.open_connection(HOST, port.number, local_addr=address))
    node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
    assert await Dialer(node, authority().keyring(FRIEND)).who_is(port.target, ME, WITHIN) == ME
    assert port.refusals.counts["busy"] >= 100 - 64
    for _, writer in silent:
        writer.close()


async def test_one_address_cannot_hold_many_places_outside(port: Port) -> None:
    late = Keyring(authority().credentials(FRIEND, -100, -1))
    channels = [late.channel(port.target, ME, OPTIONS) for _ in range(5)]
    answers = [await call(channel, "/vxmesh.v1.Peer/WhoIs") for channel in channels]
    denied = [isinstance(a, grpc.aio.AioRpcError) and bool(find_refusal(a)) for a in answers]
    assert denied == [True] * 4 + [False]
    assert port.counted() == {"expired": 5, "busy": 1}
    for channel in channels:
        await channel.close()


async def test_attempts_to_enrol_are_limited_by_address(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Keyring(authority().credentials(FRIEND, -100, -1))
    async with dialled(port, late) as channel:
        answers = [await call(channel, "/vxmesh.v1.Enrol/Join", b"guess") for _ in range(60)]
    assert 30 <= len(port.enrolled) < 60
    assert answers.count(b"welcome") == len(port.enrolled)
    last = answers[-1]
    assert isinstance(last, grpc.aio.AioRpcError)
    assert last.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert port.refusals.counts["rate"] == 60 - len(port.enrolled)


async def test_a_stranger_that_sends_very_much_is_cut_off(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "OUTSIDE_BYTES", 10_000)
    late = Keyring(authority().credentials(FRIEND, -100, -1))
    async with dialled(port, late) as channel:
        error = await call(channel, "/vxmesh.v1.Enrol/Join", bytes(50_000))
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert port.enrolled == []


# -- who speaks for whom --

CLAIMS = [
    ("Ping", pb.PingRequest(node=OTHER)),
    ("PingFor", pb.PingForRequest(node=OTHER, target=ME, seconds=0.1)),
    ("RequestSpace", pb.SpaceRequest(network="n", requester=OTHER, family=4)),
]


@pytest.mark.parametrize(("method", "request_"), CLAIMS, ids=[m for m, _ in CLAIMS])
async def test_who_speaks_for_another_node_is_refused(
    port: Port, method: str, request_: Any
) -> None:
    async with dialled(port, authority().keyring(FRIEND)) as channel:
        stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await getattr(stub, method)(request_, timeout=30)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert find_refusal(error.value) is Reason.IMPOSTOR
    assert port.counted() == {"impostor": 1}
    assert [(e["reason"], e["node"]) for e in port.refused()] == [("impostor", FRIEND)]


# -- what changes while connections stand --


async def echoes(stream: Any, data: bytes) -> bool:
    """Whether a stream still carries."""
    try:
        await stream.write(data)
        return bool(await stream.read() == data)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return False


async def ends(stream: Any) -> bool:
    """That a stream comes to its end, within 30 s."""
    try:
        async with asyncio.timeout(30):
            return await stream.read() is grpc.aio.EOF
    except grpc.aio.AioRpcError:
        return True


async def test_a_removed_nodes_connections_are_closed_and_new_ones_are_told(port: Port) -> None:
    friend = authority().keyring(FRIEND)
    async with dialled(port, friend) as channel:
        stream: Any = channel.stream_stream(SYNC)()
        assert await echoes(stream, b"before")
        port.remove(FRIEND)
        assert await ends(stream)
        assert not await echoes(stream, b"after")
    async with dialled(port, friend) as channel:
        error = await call(channel, "/vxmesh.v1.Peer/WhoIs")
        assert isinstance(error, grpc.aio.AioRpcError) and find_removal(error, FRIEND)
    assert port.counted() == {"removed": 1}


async def test_only_a_member_is_believed_that_this_node_was_removed(port: Port) -> None:
    """Not who was removed and answers at a seed's address, or as a neighbour on the LAN."""
    port.remove(FRIEND)
    node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
    dialer = Dialer(node, authority().keyring(FRIEND))
    with pytest.raises(Denied, match="was removed by n3"):
        await dialer.who_is(port.target, within=WITHIN)
    assert node.expelled is None
    node.nodes[ME] = record(ME, HOST)
    with pytest.raises(Denied, match="was removed by n3"):
        await dialer.who_is(port.target, ME, WITHIN)
    assert node.expelled is not None


async def test_a_stream_goes_on_when_its_node_has_shown_a_newer_certificate(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, keyring = PortClock(monkeypatch), authority().keyring(FRIEND)
    async with dialled(port, keyring) as channel:
        stream: Any = channel.stream_stream(SYNC)()
        assert await echoes(stream, b"before")
        keyring.replace(authority().credentials(FRIEND, ends=3 * DAY))
        node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
        assert await Dialer(node, keyring).who_is(port.target, ME, WITHIN) == ME
        await clock.advance(2 * DAY)
        assert await echoes(stream, b"after")
    assert port.counted() == {}


async def test_a_stream_ends_with_the_last_certificate_of_its_node() -> None:
    # Certificates end with a whole second, so the first lives for two to three; on a very busy
    # machine that may be over before there is a stream.
    for life in (3.0, 10.0, 25.0):
        keyring = Keyring(authority().credentials(FRIEND, ends=life))
        async with opened() as port, dialled(port, keyring) as channel:
            stream: Any = channel.stream_stream(SYNC)()
            if await echoes(stream, b"before"):
                assert await ends(stream)
                assert port.counted() == {"expired": 1}
                return
    raise AssertionError("no certificate was long enough")


async def test_when_a_ca_is_void_so_is_who_has_shown_only_its_certificates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(front_module, "VOID_AFTER", 0.3)
    old, new = Authority(), Authority()
    both = (new.pem, old.pem)
    mine = new.credentials(ME, authorities=both)
    async with opened(keyring=Keyring(mine)) as port:
        late = Keyring(old.credentials(FRIEND, authorities=both))
        timely = Keyring(old.credentials(OTHER, authorities=both))
        async with dialled(port, late) as one, dialled(port, timely) as two:
            lost: Any = one.stream_stream(SYNC)()
            kept: Any = two.stream_stream(SYNC)()
            assert await echoes(lost, b"before") and await echoes(kept, b"before")
            timely.replace(new.credentials(OTHER, authorities=both))
            node = NodeState(record(OTHER, HERE), time.time, random.Random(2))
            await Dialer(node, timely).who_is(port.target, ME, WITHIN)
            port.keyring.replace(dataclasses.replace(mine, authorities=(new.pem,)))
            assert await ends(lost)
            assert await echoes(kept, b"after")
            assert port.counted() == {"foreign": 1}
            with pytest.raises(Unavailable):
                await Dialer(node, late).who_is(port.target, ME, WITHIN)


async def test_a_ping_channel_is_made_anew_when_the_certificate_is_new_or_it_is_old(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NodeState(record(FRIEND, HERE), time.time, random.Random(2))
    keyring = authority().keyring(FRIEND)
    channels = Channels(Dialer(node, keyring))
    there = record(ME, HOST, port.number)

    async def ask() -> Any:
        await channels.stub(there).WhoIs(pb.WhoIsRequest(), timeout=30)
        return channels._channels[ME].channel

    first = await ask()
    assert await ask() is first
    keyring.replace(authority().credentials(FRIEND))
    second = await ask()
    assert second is not first
    monkeypatch.setattr(Dialer, "check_interval", 0.0)
    assert await ask() is not second
    await channels.close()


def test_the_name_of_the_node_is_in_its_certificate_alone() -> None:
    assert node_name(CLUSTER, ME) != node_name(CLUSTER, FRIEND) != member_name(CLUSTER)
