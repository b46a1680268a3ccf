"""The client of commands, with h2, before gRPC's own server, and gRPC's own client beside it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from agent import clientunix, http2
from agent.client import Client
from agent.errors import Conflict, Exhausted, NoAgent, NotFound, Unsupported, VxmeshError
from agent.rpc import control_pb2 as pb
from agent.rpc import control_pb2_grpc as pb_grpc
from agent.rpc import types_pb2 as types

T = TypeVar("T")
WITHIN = 60.0  # s
LONG = "ö%41€\n" * 1500  # several frames of header fields, with what has to be quoted in them
NAMES = {"empty": "", "long": LONG, "all": "".join(map(chr, range(1, 0x200)))}
SETTINGS = bytes.fromhex("000000040000000000")


class Told(pb_grpc.ControlServicer):
    """A Control that answers as it is asked to."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def ListNodes(self, request: Any, context: Any) -> Any:
        return pb.ListNodesReply(nodes=[types.Node(name="n1")])

    def GetNode(self, request: Any, context: Any) -> Any:
        if request.ref == "plain":
            context.abort(grpc.StatusCode.NOT_FOUND, LONG[:200])
        if request.ref in NAMES:
            fields = {"what": "node", "why": NAMES[request.ref], "fix": "Fix it"}
            detail = any_pb2.Any()
            detail.Pack(error_details_pb2.ErrorInfo(reason="ALREADY_EXISTS", metadata=fields))
            code = grpc.StatusCode.ALREADY_EXISTS
            status = status_pb2.Status(code=code.value[0], message="m", details=[detail])
            context.abort_with_status(rpc_status.to_status(status))
        return types.Node(name=request.ref * 3)

    def GetMetrics(self, request: Any, context: Any) -> Any:
        return pb.MetricsReply(text="x" * (http2.WINDOW + 1_000_000))

    def ListEndpoints(self, request: Any, context: Any) -> Iterator[Any]:
        if request.node == "fails":
            yield pb.ListEndpointsReply(endpoints=[types.Endpoint(name="first")])
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "late")
        for i in range(1500):
            yield pb.ListEndpointsReply(endpoints=[types.Endpoint(name=f"{i}", mac="m" * 20000)])

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.cancelled.set)
        number = 0
        while context.is_active():
            number += 1
            yield pb.Event(revision=number, time="t" * 1000)

    def Announce(self, requests: Iterator[Any], context: Any) -> Any:
        network = next(requests).header.network
        if network == "shut":
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "shut")
        digest, size = hashlib.sha256(), 0
        for request in requests:
            digest.update(request.lines)
            size += len(request.lines)
        assert network == digest.hexdigest()
        return pb.AnnounceReply(announced=size)


class Way:
    """One way to make calls of that Control."""

    def __init__(self, target: str, told: Told, blocks: bool) -> None:
        self.target, self.told, self.blocks = target, told, blocks

    def run(self, function: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """What comes of calls on one connection."""

        async def main() -> T:
            async with Client(self.target, blocks=self.blocks) as client:
                return await function(client)

        return clientunix.finish(main()) if self.blocks else asyncio.run(main())


@pytest.fixture(params=[True, False], ids=["ours", "grpc's"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Way]:
    """A server, and a client that blocks or does not."""
    told = Told()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_ControlServicer_to_server(told, server)  # type: ignore[no-untyped-call]
    target = f"unix://{tmp_path}/agent.sock"
    server.add_insecure_port(target)
    server.start()
    yield Way(target, told, request.param)
    server.stop(0).wait(WITHIN)


def test_calls_follow_each_other_on_one_connection(way: Way) -> None:
    async def calls(client: Client) -> list[str]:
        found = [node.name for node in await client.nodes()]
        for ref in ("a", "ä", "c"):
            found.append((await client.node(ref)).name)
            with pytest.raises(NotFound):
                await client.node("plain")
        return found

    assert way.run(calls) == ["n1", "aaa", "äää", "ccc"]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_comes_with_its_details(way: Way, name: str) -> None:
    with pytest.raises(Conflict) as raised:
        way.run(lambda client: client.node(name))
    assert (raised.value.what, raised.value.why) == ("node", NAMES[name])
    assert raised.value.fix == "Fix it"


def test_an_error_without_details_is_one_by_its_code(way: Way) -> None:
    with pytest.raises(NotFound) as raised:
        way.run(lambda client: client.node("plain"))
    assert raised.value.why == LONG[:200]


def test_what_a_server_does_not_have_is_unsupported(way: Way) -> None:
    with pytest.raises(Unsupported):
        way.run(lambda client: client.info())


def test_a_stream_larger_than_what_may_be_on_its_way_comes_whole(way: Way) -> None:
    found = way.run(lambda client: client.endpoints())
    assert [endpoint.name for endpoint in found] == [str(i) for i in range(1500)]
    assert {endpoint.mac for endpoint in found} == {"m" * 20000}


def test_so_does_an_answer(way: Way) -> None:
    assert way.run(lambda client: client.metrics()) == "x" * (http2.WINDOW + 1_000_000)


def test_an_answer_that_is_too_large_is_refused_and_the_connection_stays(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not way.blocks:
        pytest.skip("gRPC's own limit is made with the channel")
    monkeypatch.setattr(http2, "MESSAGE_MAX", 1 << 20)

    async def calls(client: Client) -> str:
        with pytest.raises(Exhausted, match="too large"):
            await client.metrics()
        return (await client.node("a")).name

    assert way.run(calls) == "aaa"


def test_a_stream_that_fails_gives_what_came_before(way: Way) -> None:
    found: list[str] = []

    async def calls(client: Client) -> None:
        async for reply in client._stream("ListEndpoints", pb.ListEndpointsRequest(node="fails")):
            found.extend(endpoint.name for endpoint in reply.endpoints)

    with pytest.raises(Conflict, match="late"):
        way.run(calls)
    assert found == ["first"]


def test_a_stream_that_is_left_is_cancelled(way: Way) -> None:
    async def calls(client: Client) -> str:
        events = client.events(follow=True)
        async for event in events:
            if event.revision == 20:
                break
        await events.aclose()  # type: ignore[attr-defined]
        return (await client.node("a")).name

    assert way.run(calls) == "aaa"
    assert way.told.cancelled.wait(WITHIN)


def test_what_is_announced_arrives_whole_whatever_its_size(way: Way) -> None:
    for size in (0, 1, 1 << 16, 5_000_001):
        data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
        pieces = [data[: size // 3], b"", data[size // 3 :]]
        network = hashlib.sha256(data).hexdigest()
        assert way.run(lambda client, n=network, p=pieces: client.announce(n, p)) == size  # type: ignore[misc]


def test_an_announcement_that_is_refused_half_way_says_why(way: Way) -> None:
    if not way.blocks:
        pytest.skip("gRPC's library says INTERNAL if it learns of that by a write that fails")

    def pieces() -> Iterable[bytes]:
        for _ in range(100):
            yield bytes(1 << 16)

    with pytest.raises(Conflict, match="shut"):
        way.run(lambda client: client.announce("shut", pieces()))


def test_a_file_that_cannot_be_read_is_no_agents_fault(way: Way) -> None:
    if not way.blocks:
        pytest.skip("gRPC tells of its own coroutine that failed")

    def pieces() -> Iterable[bytes]:
        yield b"1"
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        way.run(lambda client: client.announce("n", pieces()))


def serve(path: Path, answer: Callable[[socket.socket], None]) -> Callable[[], None]:
    """Answer one connection; gives what waits for the end of that."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(WITHIN)

    def run() -> None:
        with listener, listener.accept()[0] as sock, contextlib.suppress(OSError):
            sock.settimeout(WITHIN)
            answer(sock)

    thread = threading.Thread(target=run)
    thread.start()
    return lambda: thread.join(WITHIN)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


STRANGE = {
    "nothing": b"",
    "http/1.1": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "no settings first": frame(6, 0, 0, bytes(8)),
    "a huge frame": SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1",
    "fields that are none": SETTINGS + frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
    "half a block of fields": SETTINGS + frame(1, 0, 1, b"\x88") + frame(0, 0, 1),
    "a push": SETTINGS + frame(5, 4, 1, b"\0\0\0\2\x88"),
    "an end": SETTINGS + frame(7, 0, 0, bytes(8)),
    "a refusal": SETTINGS + frame(3, 0, 1, b"\0\0\0\7"),
    "another's answer": SETTINGS + frame(1, 5, 1, b"\0\7:status\003503"),
}


@pytest.mark.parametrize("said", STRANGE.values(), ids=list(STRANGE))
def test_who_is_no_agent_is_none(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "agent.sock"
    ended = serve(path, lambda sock: sock.sendall(said))
    with pytest.raises(NoAgent):
        Way(f"unix://{path}", Told(), True).run(lambda client: client.nodes())
    ended()


def test_after_the_last_call_that_an_agent_takes_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    said = SETTINGS + frame(1, 4, 1, b"\x88") + frame(0, 0, 1, bytes(5))
    said += frame(7, 0, 0, (1).to_bytes(4) + bytes(4))  # GOAWAY, before the first one has ended
    said += frame(1, 5, 1, b"\0\x0bgrpc-status\x010")
    ended = serve(path, lambda sock: sock.sendall(said))

    async def calls(client: Client) -> None:
        assert await client.nodes() == []
        with pytest.raises(NoAgent):
            await client.nodes()

    Way(f"unix://{path}", Told(), True).run(calls)
    ended()


ANSWER = SETTINGS + frame(1, 4, 1, b"\x88") + frame(0, 0, 1, bytes(5))
ANSWER += frame(1, 5, 1, b"\0\x0bgrpc-status\x010")
LAST = frame(7, 0, 0, (1).to_bytes(4) + bytes(4))  # GOAWAY: the first call is the last one
ENDS = {
    "between": (ANSWER, True),
    "it takes no more": (ANSWER + LAST, False),
    "during a call": (SETTINGS, True),
}


@pytest.mark.parametrize(("said", "ends"), ENDS.values(), ids=list(ENDS))
def test_after_the_end_of_its_connection_a_client_makes_another(
    tmp_path: Path, said: bytes, ends: bool
) -> None:
    path, has_ended = tmp_path / "agent.sock", threading.Event()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(WITHIN)

        def answer() -> None:
            first = stack.enter_context(listener.accept()[0])
            first.sendall(said)
            if ends:
                first.shutdown(socket.SHUT_RDWR)
            has_ended.set()
            stack.enter_context(listener.accept()[0]).sendall(ANSWER)

        async def calls(client: Client) -> None:
            with pytest.raises(NoAgent) if said == SETTINGS else contextlib.nullcontext():
                assert await client.nodes() == []
            assert has_ended.wait(WITHIN)
            assert await client.nodes() == []

        threads = stack.enter_context(futures.ThreadPoolExecutor(1))
        answered = threads.submit(answer)
        Way(f"unix://{path}", Told(), True).run(calls)
        answered.result(WITHIN)


def test_who_says_nothing_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clientunix, "OPEN_WITHIN", 0.05)
    path, told = tmp_path / "agent.sock", threading.Event()

    def silent(sock: socket.socket) -> None:
        told.wait(WITHIN)

    ended = serve(path, silent)
    with pytest.raises(NoAgent):
        Way(f"unix://{path}", Told(), True).run(lambda client: client.nodes())
    told.set()
    ended()


def test_where_many_wait_to_be_accepted_it_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, has_waited, sleep = str(tmp_path / "agent.sock"), threading.Event(), time.sleep

    def told_sleep(seconds: float) -> None:
        has_waited.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", told_sleep)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        listener.settimeout(WITHIN)
        before = stack.enter_context(socket.socket(socket.AF_UNIX))
        before.connect(path)
        calls = clientunix.UnixCalls(path)
        with futures.ThreadPoolExecutor(1) as threads:
            connecting = threads.submit(calls._connect)
            assert has_waited.wait(WITHIN)
            stack.enter_context(listener.accept()[0])
            sock = connecting.result(WITHIN)
        accepted = stack.enter_context(listener.accept()[0])
        accepted.settimeout(WITHIN)
        sock.sendall(b"here")
        assert accepted.recv(4) == b"here"
        sock.close()


def test_who_accepts_nobody_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clientunix, "OPEN_WITHIN", 0.05)
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as before:
        listener.bind(path)
        listener.listen(0)
        before.connect(path)
        calls = clientunix.UnixCalls(path)
        with pytest.raises(TimeoutError, match="accepts no connection"):
            calls._connect()
        asyncio.run(calls.close())


def test_a_stranger_path_is_none(tmp_path: Path) -> None:
    for target in (f"unix://{tmp_path}/none", f"unix:{tmp_path}/none", "unix:///" + "x" * 300):
        with pytest.raises(NoAgent):
            Way(target, Told(), True).run(lambda client: client.nodes())


def test_a_coroutine_that_waits_for_a_loop_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="event loop"):
        clientunix.finish(asyncio.sleep(1))


def test_every_code_has_its_error() -> None:
    """gRPC's numbers, from its own table."""
    for code in grpc.StatusCode:
        assert http2.CODES[code.value[0]] == code.name
    assert len(http2.CODES) == len(grpc.StatusCode)
    assert issubclass(Conflict, VxmeshError)
