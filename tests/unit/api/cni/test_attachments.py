"""The agent's side: a node without a kernel, asked on its socket as the plugin asks."""

from __future__ import annotations

import asyncio
import json
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent import cnimodel as cni
from agent.api.cni import attachments
from agent.api.cni.attachments import Attachments
from agent.api.cni.server import CniServer
from agent.drivers.base import Seen
from agent.errors import (
    Conflict,
    Denied,
    Exhausted,
    InUse,
    Invalid,
    NotFound,
    Timeout,
    Unavailable,
    Unsupported,
    VxmeshError,
)
from agent.model import Node
from agent.node import NodeState
from agent.operations import Operations
from agent.requests import parse_network


class Kernel:
    """A kernel that has what is asked of it, but for what a test breaks."""

    def __init__(self) -> None:
        self.fails: VxmeshError | None = None
        self.seen: Seen | None = Seen(
            "02:00:00:00:00:05", 1450, True, frozenset({"10.1.0.2/24", "fe80::1/64"}),
            (("0.0.0.0/0", "10.1.0.1"),), frozenset({"0.0.0.0/0", "10.1.0.0/24"}),
        )  # fmt: skip

    async def settle(self, endpoint: str | None = None) -> None:
        if self.fails and endpoint:
            raise self.fails

    async def see(self, netns: str, inode: int, ifname: str) -> Seen | None:
        return self.seen


async def _durable() -> None:
    pass


class Caller:
    def __init__(self, node: NodeState, kernel: Kernel, path: Path) -> None:
        self.node, self.kernel, self.path = node, kernel, path

    async def raw(self, line: bytes) -> dict[str, Any]:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(line)
        found = await reader.readline()
        writer.close()
        return json.loads(found) if found else {}

    async def call(self, command: str, container: str = "blue", **more: Any) -> dict[str, Any]:
        asked = {"command": command, "config": "dbnet", "container": container, "ifname": "eth0"}
        if command in ("ADD", "STATUS"):
            asked |= {"network": "demo"}
        if command == "ADD":
            asked |= {"netns": f"/run/netns/{container}"}
        return await self.raw(json.dumps(asked | more).encode() + b"\n")

    async def code(self, command: str, **more: Any) -> int:
        return int((await self.call(command, **more))["error"]["code"])

    def endpoints(self) -> dict[str, str]:
        """Container -> name."""
        every = (e for m in self.node.members.values() for e in m.local.values())
        return {e.labels["cni.container"]: e.name for e in every}


@pytest.fixture
async def caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Caller]:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    node.create_network(parse_network("demo", subnets=["10.1.0.0/29"]))
    kernel = Kernel()
    operations = Operations(node, None, kernel, _durable)  # type: ignore[arg-type]
    inodes: dict[str, int] = {}

    def identify(path: str) -> Any:
        if path.endswith("gone"):
            raise NotFound("namespace", "does not exist")
        if path.endswith("host"):
            raise Conflict("namespace", "is the host's")
        return attachments_namespace(path, inodes.setdefault(path, len(inodes) + 1))

    monkeypatch.setattr(attachments, "identify", identify)
    monkeypatch.setattr("agent.sandboxops.identify", identify)
    monkeypatch.setattr("agent.sandboxops.is_alive", lambda sandbox: True)
    monkeypatch.setattr("agent.interfaceops.identify", identify)
    monkeypatch.setattr("agent.interfaceops.is_alive", lambda sandbox: True)
    server = CniServer(Attachments(operations, kernel.see), tmp_path / "cni.sock")
    await server.start()
    yield Caller(node, kernel, tmp_path / "cni.sock")
    await server.stop()


def attachments_namespace(path: str, inode: int) -> Any:
    from agent.workload import Namespace

    return Namespace(path, inode)


async def test_the_socket_is_for_root_alone(caller: Caller) -> None:
    assert stat.S_IMODE(caller.path.stat().st_mode) == 0o600


async def test_what_an_add_is_told(caller: Caller) -> None:
    assert await caller.call("ADD") == {
        "found": {
            "mac": "02:00:00:00:00:05",
            "mtu": 1450,
            "addresses": ["10.1.0.2/24"],
            "gateways": ["10.1.0.1"],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}],
            "dns": {
                "nameservers": ["10.1.0.1"],
                "search": ["demo.vxmesh.internal"],
                "options": ["ndots:0"],
            },
        }
    }


@pytest.mark.parametrize(
    ("code", "more"),
    [
        (cni.BAD_CONFIG, {"network": "nowhere"}),
        (cni.BAD_CONFIG, {"network": "host"}),
        (cni.BAD_CONFIG, {"addresses": ["10.9.0.1"]}),
        (cni.BAD_CONFIG, {"addresses": ["x"]}),
        (cni.BAD_CONFIG, {"mac": "x"}),
        (cni.BAD_CONFIG, {"aliases": ["a b"]}),
        (cni.BAD_CONFIG, {"ports": [{"host": 0, "target": 80}]}),
        (cni.UNKNOWN_CONTAINER, {"netns": "/run/netns/gone"}),
        (cni.BAD_ENVIRONMENT, {"netns": "/run/netns/host"}),
        (cni.FAILED, {"surplus": 1}),
    ],
)
async def test_an_add_that_is_refused_leaves_nothing(
    caller: Caller, code: int, more: dict[str, Any]
) -> None:
    assert await caller.code("ADD", **more) == code
    assert caller.endpoints() == {} and not caller.node.sandboxes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Invalid, cni.BAD_CONFIG),
        (Conflict, cni.TAKEN),
        (InUse, cni.TAKEN),
        (Exhausted, cni.EXHAUSTED),
        (NotFound, cni.TRY_AGAIN),
        (Unavailable, cni.TRY_AGAIN),
        (Timeout, cni.TRY_AGAIN),
        (Unsupported, cni.FAILED),
        (Denied, cni.FAILED),
    ],
)
async def test_each_of_our_errors_has_a_code(
    caller: Caller, error: type[VxmeshError], code: int
) -> None:
    caller.kernel.fails = error("it", "does not")
    assert await caller.code("ADD") == code
    assert caller.endpoints() == {} and not caller.node.sandboxes


async def test_an_interface_that_went_at_once_is_undone(caller: Caller) -> None:
    caller.kernel.seen = None
    assert await caller.code("ADD") == cni.TRY_AGAIN
    assert caller.endpoints() == {}


async def test_a_second_add_is_refused_also_while_the_first_is_under_way(caller: Caller) -> None:
    answers = await asyncio.gather(*(caller.call("ADD") for _ in range(3)))
    codes = sorted(a["error"]["code"] if "error" in a else 0 for a in answers)
    assert codes == [0, cni.TAKEN, cni.TAKEN]
    assert caller.endpoints() == {"blue": "blue"}


async def test_del_twice_and_of_what_never_was(caller: Caller) -> None:
    await caller.call("ADD")
    for container in ("blue", "blue", "never"):
        assert await caller.call("DEL", container) == {"found": {}}
    assert caller.endpoints() == {}


async def test_who_is_called_how(caller: Caller) -> None:
    await caller.call("ADD", "blue", names=["web-0"])
    await caller.call("ADD", "c" * 64, names=["web-0"])
    named = caller.endpoints()
    assert named["blue"] == "web-0"
    assert named["c" * 64] == "c" * 12
    await caller.call("ADD", "_", names=["no name"])  # neither is a label
    assert caller.endpoints()["_"].startswith("cni-")


async def test_gc_takes_those_of_its_configuration_that_are_not_valid(caller: Caller) -> None:
    await caller.call("ADD", "one")
    await caller.call("ADD", "two")
    await caller.call("ADD", "three", config="other")
    assert await caller.call("GC", valid=[["one", "eth0"], ["two", "eth1"]]) == {"found": {}}
    assert sorted(caller.endpoints()) == ["one", "three"]


async def test_status(caller: Caller) -> None:
    assert await caller.call("STATUS") == {"found": {}}
    assert await caller.code("STATUS", network="nowhere") == cni.NOT_AVAILABLE
    network = caller.node.find_network("demo")
    caller.node.kernel_withholds({network.id: "vxl7 is somebody else's"})
    assert await caller.code("STATUS") == cni.LIMITED
    caller.node.kernel_withholds({})
    for number in range(5):  # a /29 without its ends and the gateway
        await caller.call("ADD", f"c{number}")
    assert await caller.code("STATUS") == cni.NOT_AVAILABLE
    assert await caller.code("ADD", container="more") == cni.EXHAUSTED


async def test_check(caller: Caller) -> None:
    assert await caller.code("CHECK") == cni.UNKNOWN_CONTAINER
    await caller.call("ADD")
    whole: dict[str, Any] = {
        "mac": "02:00:00:00:00:05", "addresses": ["10.1.0.2/24"], "routes": ["0.0.0.0/0"]
    }  # fmt: skip
    assert await caller.call("CHECK", **whole) == {"found": {}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mac": "02:00:00:00:00:06"}, "its MAC is 02:00:00:00:00:05"),
        ({"addresses": ["10.1.0.3/24"]}, "no address 10.1.0.3/24"),
        ({"routes": ["192.0.2.0/24"]}, "no route to 192.0.2.0/24"),
    ]
    for change, said in wrong:
        told = (await caller.call("CHECK", **(whole | change)))["error"]
        assert told["code"] == cni.NOT_AS_IT_SHOULD_BE and said in told["details"]
    caller.kernel.seen = None
    assert await caller.code("CHECK", **whole) == cni.NOT_AS_IT_SHOULD_BE


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[\n", b"\xff\n", b'{"command":"UP"}\n'])
async def test_garbage_on_the_socket_is_refused(caller: Caller, line: bytes) -> None:
    assert (await caller.raw(line))["error"]["code"] == cni.FAILED
