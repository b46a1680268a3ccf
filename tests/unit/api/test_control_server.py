"""The agent's sockets, with processes of other users and groups at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from agent.api import rights
from agent.api.front import Limits
from agent.api.server import ControlServer
from agent.client import Client
from agent.errors import Denied
from agent.rpc import control_pb2 as pb
from agent.rpc import control_pb2_grpc as pb_grpc
from agent.rpc import types_pb2 as types
from tests.needs import lacks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives sockets to groups: needs root")

CHANGE, READ, STRANGER = 64711, 64712, 64713  # gids that no machine has
WITHIN = 60.0  # s
LIMITS = Limits(root=3, others=3, each=2)

# What all callers begin with: they become who they are to be once all is imported, as that
# user may not be able to read the interpreter's files. Then argv is what follows.
BECOME = """
import grp, json, os, pwd, socket, sys
import grpc, google.rpc.error_details_pb2, google.rpc.status_pb2
from agent import syscalls
from agent.client import Client
import agent.clientgrpc
from agent.errors import VxmeshError

how = json.loads(sys.argv.pop(1))
if how["userns"]:
    syscalls.unshare(0x10000000)  # CLONE_NEWUSER
    print("unshared", flush=True)
    sys.stdin.readline()
os.setgroups(how["groups"])
os.setresgid(*[how["gid"]] * 3)
os.setresuid(*[how["uid"]] * 3)
"""

# Each further argument is a call, what comes of each is a line.
CALLS = """
import asyncio

async def announce(client):
    return await client.announce("web", [b"a", b"b"])

async def watch(client):
    return [event.action async for event in client.events()]

async def main():
    calls = {
        "info": lambda c: c.info(), "create": lambda c: c.create_network("web"),
        "announce": announce, "watch": watch,
    }
    async with Client(sys.argv[1]) as client:
        for name in sys.argv[2:]:
            try:
                await calls[name](client)
                print(name, "ok", flush=True)
            except VxmeshError as error:
                print(name, error.code, error, flush=True)

asyncio.run(main())
"""

# Connects so many times, tells of each connection whether it stands, and keeps them.
HOLD = """
held = []
for _ in range(int(sys.argv[2])):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    try:
        first = sock.recv(1)
    except ConnectionResetError:
        first = b""
    held.append(sock)
    print(bool(first), flush=True)
sys.stdin.read()
"""

HEALTH = """
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as r, reflection_pb2_grpc

channel = grpc.insecure_channel(sys.argv[1])
health = health_pb2_grpc.HealthStub(channel)
status = health.Check(health_pb2.HealthCheckRequest()).status
first = next(iter(health.Watch(health_pb2.HealthCheckRequest()))).status
stub = reflection_pb2_grpc.ServerReflectionStub(channel)
asks = iter([r.ServerReflectionRequest(list_services="")])
found = next(stub.ServerReflectionInfo(asks)).list_services_response.service
print(json.dumps([status, first, sorted(s.name for s in found)]))
"""


async def start(
    script: str,
    *arguments: str,
    uid: int = 64700,
    gid: int = STRANGER,
    groups: tuple[int, ...] = (),
    userns: bool = False,
) -> asyncio.subprocess.Process:
    """A process of that user; with `userns` uid and gid are those in a namespace of its own."""
    how = {"uid": uid, "gid": gid, "groups": groups, "userns": userns}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        BECOME + script,
        json.dumps(how),
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def finish(process: asyncio.subprocess.Process) -> str:
    """What it said, when it has ended well."""
    out, err = await asyncio.wait_for(process.communicate(b"\n"), WITHIN)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def as_user(target: str, *calls: str, **who: Any) -> dict[str, str]:
    """Have a process of that user make the calls: call -> "ok", or the code and the error."""
    said = await finish(await start(CALLS, target, *calls, **who))
    return dict(line.split(" ", 1) for line in said.splitlines())


class Told(pb_grpc.ControlServicer):
    """A Control that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lines = 0

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.Info:
        self.asked.append("GetInfo")
        return pb.Info(name="n1")

    async def CreateNetwork(self, request: pb.CreateNetworkRequest, context: Any) -> types.Network:
        self.asked.append("CreateNetwork")
        return types.Network(name=request.name)

    async def Announce(self, requests: AsyncIterator[Any], context: Any) -> pb.AnnounceReply:
        self.asked.append("Announce")
        async for request in requests:
            self.lines += len(request.lines)
        return pb.AnnounceReply(announced=2)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Event]:
        self.asked.append("Watch")
        yield pb.Event(action="synced")


class Served:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.control = Told()
        self.refused: list[tuple[str, str]] = []
        self.server = ControlServer(
            self.control,
            run_dir,
            (str(CHANGE), str(READ)),
            lambda reason, who, text: self.refused.append((reason, who)),
            LIMITS,
        )

    def target(self, name: str = "agent.sock") -> str:
        return f"unix://{self.run_dir / name}"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="vxm-", dir="/tmp"))  # pytest's own are root's alone
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def served(run_dir: Path) -> AsyncIterator[Served]:
    made = Served(run_dir)
    await made.server.start()
    yield made
    await made.server.stop()


class Log:
    """In place of a module's log, which other tests may have turned off."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is logged of changing calls."""
    log = Log()
    monkeypatch.setattr(rights, "log", log)
    return log.lines


ALL = ("info", "create", "announce", "watch")


async def test_the_sockets_belong_to_root_and_the_groups_and_nobody_else(served: Served) -> None:
    for name, gid in (("agent.sock", CHANGE), ("read.sock", READ)):
        found = (served.run_dir / name).stat()
        assert stat.S_IMODE(found.st_mode) == 0o660 and stat.S_ISSOCK(found.st_mode)
        assert (found.st_uid, found.st_gid) == (0, gid)
    assert stat.S_IMODE((served.run_dir / "inner").stat().st_mode) == 0o700
    assert sorted(p.name for p in (served.run_dir / "inner").iterdir()) == ["control.sock"]


async def test_root_and_the_members_of_the_group_may_do_everything(served: Served) -> None:
    everything = dict.fromkeys(ALL, "ok")
    assert await as_user(served.target(), *ALL, uid=0, gid=0) == everything
    assert await as_user(served.target(), *ALL, gid=CHANGE) == everything
    assert await as_user(served.target(), *ALL, groups=(7, CHANGE)) == everything
    assert served.control.lines == 6 and served.refused == []


async def test_readers_come_by_a_socket_of_their_own_and_change_nothing(served: Served) -> None:
    got = await as_user(served.target(), *ALL, groups=(READ,))
    assert got["info"] == got["watch"] == "ok"
    for call, method in (("create", "CreateNetwork"), ("announce", "Announce")):
        why = f"may look and not change: {method} is for root and the group {CHANGE}"
        assert got[call].startswith(f"PERMISSION_DENIED uid 64700: {why}"), got
    assert served.control.asked == ["GetInfo", "Watch"] and served.control.lines == 0
    assert served.refused == [("right", "uid 64700")] * 2


async def test_a_reader_by_the_wide_socket_is_told_what_is_lacking(served: Served) -> None:
    (served.run_dir / "agent.sock").chmod(0o666)
    got = await as_user(served.target(), *ALL, groups=(READ,))
    assert got["info"] == got["watch"] == "ok"
    assert got["create"].startswith("PERMISSION_DENIED uid 64700: may look and not change")
    assert f"for root and the group {CHANGE}" in got["create"]
    assert served.control.asked == ["GetInfo", "Watch"]


async def test_who_is_in_no_group_is_kept_out_by_the_kernel(served: Served) -> None:
    got = await as_user(served.target(), *ALL)
    assert {text.split()[0] for text in got.values()} == {"PERMISSION_DENIED"}
    assert f"root and the group {CHANGE} and (to look only) {READ}" in got["info"]
    assert "uid 64700" in got["info"]
    assert served.control.asked == []


async def test_who_is_in_no_group_gets_nothing_by_an_open_socket_either(served: Served) -> None:
    (served.run_dir / "agent.sock").chmod(0o666)
    got = await as_user(served.target(), *ALL)
    assert {text.split()[0] for text in got.values()} == {"PERMISSION_DENIED"}
    assert "has no right here" in got["info"] and f"the group {READ}" in got["info"]
    assert served.control.asked == []
    assert served.refused == [("right", "uid 64700")] * 4


async def test_root_changes_nothing_by_the_readers_socket(served: Served) -> None:
    got = await as_user(served.target("read.sock"), *ALL, uid=0, gid=0)
    assert got["info"] == "ok"
    assert got["create"].startswith("PERMISSION_DENIED root (uid 0): came by read.sock")
    assert served.control.asked == ["GetInfo", "Watch"]


async def test_root_of_another_user_namespace_is_not_root(served: Served) -> None:
    (served.run_dir / "agent.sock").chmod(0o666)
    process = await start(CALLS, served.target(), "info", "create", uid=0, gid=0, userns=True)
    assert process.stdout
    said = await asyncio.wait_for(process.stdout.readline(), WITHIN)
    if said != b"unshared\n":
        lacks("this kernel gives no user namespaces")
    for name, id in (("uid_map", 64700), ("gid_map", STRANGER)):
        Path(f"/proc/{process.pid}/{name}").write_text(f"0 {id} 1")  # noqa: ASYNC240
    said_of = await finish(process)
    assert said_of.count("PERMISSION_DENIED uid 64700: has no right here") == 2, said_of
    assert served.control.asked == []


async def test_a_socket_of_the_inner_server_that_no_front_made_gets_nothing(
    served: Served,
) -> None:
    async with Client(f"unix://{served.server.inner}") as client:
        with pytest.raises(Denied, match=r"did not come by"):
            await client.info()


async def test_every_change_is_in_the_log_with_who_made_it(
    served: Served, changes: list[dict[str, Any]]
) -> None:
    await as_user(served.target(), "create", "info", "announce", gid=CHANGE)
    assert {e["event"] for e in changes} == {"control.change"}
    assert [(e["method"], e["uid"], e["result"]) for e in changes] == [
        ("CreateNetwork", 64700, "ok"),
        ("Announce", 64700, "ok"),
    ]
    assert changes[0]["object"] == "web"


async def test_a_change_that_failed_is_in_the_log_too(
    served: Served, changes: list[dict[str, Any]]
) -> None:
    async def fail(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such network")

    served.control.CreateNetwork = fail  # type: ignore[method-assign,assignment]
    await served.server.stop()
    await served.server.start()
    await as_user(served.target(), "create", uid=0, gid=0)
    (change,) = changes
    assert (change["uid"], change["result"]) == (0, "no such network")


async def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return sock


def open_sockets() -> int:
    """Not all descriptors: gRPC's threads make some of their own, whenever they like."""
    found = 0
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # it is closed meanwhile
            found += str(path.readlink()).startswith("socket:")
    return found


async def is_shut(sock: socket.socket) -> bool:
    """Whether the agent has closed a connection; gRPC says something on one that stands."""
    async with asyncio.timeout(WITHIN):
        try:
            return await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        except ConnectionResetError:
            return True


async def test_nobody_takes_all_connections_and_nobody_keeps_root_out(served: Served) -> None:
    path = served.run_dir / "agent.sock"
    processes = []
    try:
        for uid, stand in ((64701, [True, True, False]), (64702, [True, False])):
            process = await start(HOLD, str(path), str(len(stand)), uid=uid, gid=CHANGE)
            processes.append(process)
            assert process.stdout
            async with asyncio.timeout(WITHIN):
                lines = [await process.stdout.readline() for _ in stand]
            assert lines == [b"%s\n" % str(x).encode() for x in stand], uid
        roots = [await connect(path) for _ in range(LIMITS.root + 1)]
        assert [await is_shut(sock) for sock in roots] == [False] * LIMITS.root + [True]
        assert [reason for reason, _ in served.refused] == ["busy"] * 3
        for sock in roots:
            sock.close()
    finally:
        for process in processes:
            process.kill()
            await process.wait()
    async with asyncio.timeout(WITHIN):  # whose places are free again when they are gone
        while (await as_user(served.target(), "info", gid=CHANGE)) != {"info": "ok"}:
            pass


async def test_a_caller_who_goes_away_leaves_no_connection(served: Served) -> None:
    before = open_sockets()
    for _ in range(5):
        sock = await connect(served.run_dir / "agent.sock")
        sock.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        sock.close()
    async with asyncio.timeout(WITHIN):
        while open_sockets() > before:
            await asyncio.sleep(0.01)


async def test_health_and_reflection_are_for_readers_too(served: Served) -> None:
    said = await finish(await start(HEALTH, served.target("read.sock"), gid=READ))
    services = ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
    assert json.loads(said) == [1, 1, [*services, "vxmesh.v1.Control"]]
