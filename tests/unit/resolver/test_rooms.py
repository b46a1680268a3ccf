"""Sockets inside sandboxes: who asks is known by the socket, and they go with the sandbox."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import dns.asyncquery
import dns.message
import dns.rcode
import pytest
import pytest_asyncio

from agent.resolver import rooms
from agent.resolver.feed import Place, View
from agent.resolver.forward import Forwarder
from agent.resolver.rooms import Rooms
from agent.resolver.server import Server
from agent.resolver.sockets import Listen, open_sockets
from agent.syscalls import start_time
from tests.ports import free_port
from tests.unit.resolver.test_server import NET, names, until

KEY, OTHER = b"sandbox 1", b"sandbox 2"
HERE = "127.0.0.1"


def _server() -> Server:
    made = Server([], [], Forwarder(Path("/nonexistent"), lambda _a, _p: False))
    made.names = names()
    made.names.put_view(KEY, (NET,))
    made.changed()
    return made


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    made = _server()
    await made.start()
    yield made
    for key in (KEY, OTHER):
        made.leave(key)
    await made.close()


async def _enter(server: Server, key: bytes) -> int:
    udp, tcp = open_sockets([Listen(HERE, free_port())], None, shared=True)
    await server.enter(key, udp, tcp)
    return int(udp[0].getsockname()[1])


async def _ask(port: int, name: str = "one", tcp: bool = False) -> dns.message.Message:
    query = dns.message.make_query(name, "A")
    ask = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
    return await ask(query, HERE, timeout=20, port=port)


@pytest.mark.parametrize("tcp", [False, True])
async def test_who_asks_is_known_by_the_socket(server: Server, tcp: bool) -> None:
    known, unknown = await _enter(server, KEY), await _enter(server, OTHER)
    for _ in range(3):  # made, and then ready
        assert str((await _ask(known, tcp=tcp)).answer[0][0]) == "10.1.0.2"
        assert not (await _ask(unknown, tcp=tcp)).answer
        assert (await _ask(unknown, "a.example", tcp=tcp)).rcode() == dns.rcode.REFUSED
    server.names.drop_view(KEY)
    server.changed()
    assert not (await _ask(known, tcp=tcp)).answer, "it is in that network no more"


async def test_what_is_asked_before_the_start_is_answered_then() -> None:
    made = _server()
    port = await _enter(made, KEY)
    asking = [asyncio.create_task(_ask(port, tcp=tcp)) for tcp in (False, True)]
    await asyncio.sleep(0)
    await made.start()
    for answered in await asyncio.gather(*asking):
        assert answered.answer
    made.leave(KEY)
    await made.close()


async def test_a_sandbox_may_end_and_another_come_while_the_server_starts() -> None:
    made = _server()
    ports = [await _enter(made, key) for key in (KEY, OTHER, b"sandbox 3")]
    starting = asyncio.create_task(made.start())
    await asyncio.sleep(0)  # it listens in the first, and waits
    made.leave(OTHER)
    made.names.put_view(b"sandbox 4", (NET,))
    late = asyncio.create_task(_enter(made, b"sandbox 4"))
    await asyncio.gather(starting, made.start())
    for tcp in (False, True):
        assert (await _ask(ports[0], tcp=tcp)).answer
        assert (await _ask(await late, tcp=tcp)).answer, "it came meanwhile"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(HERE, ports[1])
    for key in (KEY, b"sandbox 3", b"sandbox 4"):
        made.leave(key)
    await made.close()


async def test_connections_go_with_the_sandbox(server: Server) -> None:
    port = await _enter(server, KEY)
    reader, writer = await asyncio.open_connection(HERE, port)
    await _ask(port, tcp=True)
    server.leave(KEY)
    assert await reader.read() == b"", "it would hold the sandbox's namespace"
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(HERE, port)


# -- which there are --


class Entered:
    """A server that only notes where it listens."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    async def enter(
        self, key: bytes, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]
    ) -> None:
        assert key not in self.keys
        self.keys.add(key)

    def leave(self, key: bytes) -> None:
        self.keys.remove(key)


@pytest.fixture
def workload() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def _place(process: subprocess.Popen[bytes], **other: Any) -> Place:
    netns = "/proc/self/ns/net"
    fields = {"pid": process.pid, "start_time": start_time(process.pid), **other}
    return Place(netns, fields.pop("inode", Path(netns).stat().st_ino), **fields)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Entered:
    """Without a right to enter namespaces no sockets can be made there: there are none."""
    monkeypatch.setattr(rooms, "open_sockets", lambda *_, **__: ([], []))
    return Entered()


async def test_a_room_is_left_when_its_process_ends(
    entered: Entered, workload: subprocess.Popen[bytes]
) -> None:
    made = Rooms(cast(Server, entered))
    await made.alter([], [View(KEY, (NET,), _place(workload)), View(bytes(4), (NET,))])
    assert entered.keys == {KEY}, "an address is no room"
    workload.kill()
    await until(lambda: not entered.keys)
    await made.alter([KEY], [])  # the agent has seen it as well


async def test_a_whole_state_is_what_there_is(
    entered: Entered, workload: subprocess.Popen[bytes]
) -> None:
    made = Rooms(cast(Server, entered))
    first, second = (View(key, (NET,), _place(workload)) for key in (KEY, OTHER))
    await made.replace([first, second])
    assert entered.keys == {KEY, OTHER}
    await made.replace([second, View(bytes(4), (NET,))])
    assert entered.keys == {OTHER}
    await made.alter([], [View(OTHER, (NET, NET), _place(workload))])
    assert entered.keys == {OTHER}, "in other networks, and in the same place"
    made.close()
    assert not entered.keys


@pytest.mark.parametrize("other", [{"inode": 1}, {"start_time": 1}, {"pid": 1 << 22}])
async def test_another_one_at_its_place_is_not_entered(
    entered: Entered, workload: subprocess.Popen[bytes], other: dict[str, int]
) -> None:
    made = Rooms(cast(Server, entered))
    await made.alter([], [View(KEY, (NET,), _place(workload, **other))])
    assert not entered.keys
    await made.alter([KEY], [])


async def test_what_could_not_be_entered_is_tried_again_while_it_is_wanted(
    entered: Entered, workload: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def full(*_: object, **__: object) -> tuple[list[socket.socket], list[socket.socket]]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return [], []

    monkeypatch.setattr(rooms, "open_sockets", full)
    monkeypatch.setattr(rooms, "RETRY_FIRST", 0.001)
    made = Rooms(cast(Server, entered))
    await made.alter([], [View(KEY, (NET,), _place(workload))])
    assert not entered.keys
    await until(lambda: entered.keys == {KEY})
    await made.alter([KEY], [])
    tries = -1000
    await made.alter([], [View(OTHER, (NET,), _place(workload))])
    await made.alter([OTHER], [])
    await until(lambda: not made._tries)
    assert tries < -990 and not entered.keys


async def test_entering_does_not_hold_up_the_others(
    entered: Entered, workload: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()

    def slow(*_: object, **__: object) -> tuple[list[socket.socket], list[socket.socket]]:
        assert going_on.wait(60), "the loop waits for us"
        return [], []

    monkeypatch.setattr(rooms, "open_sockets", slow)
    made = Rooms(cast(Server, entered))
    altering = asyncio.create_task(made.alter([], [View(KEY, (NET,), _place(workload))]))
    await asyncio.sleep(0)
    made.close()  # while it is being entered
    going_on.set()
    await altering
    assert not entered.keys


def test_as_many_files_as_may_be() -> None:
    told = "import resource as r; from agent.syscalls import raise_file_limit as f; "
    told += "r.setrlimit(r.RLIMIT_NOFILE, (64, 512)); print(f(), r.getrlimit(r.RLIMIT_NOFILE))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "512 (512, 512)\n"
