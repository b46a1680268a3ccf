"""A plugin of both kinds on a unix socket that does what it is told to do wrong, and a node that
asks it: what there is of the plugin's at any moment can be looked at."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.model import Node, Sandbox
from agent.node import NodeState
from agent.operations import Operations
from agent.remote.client import Plugins
from agent.remote.driver import RemoteDriver
from agent.remote.ipam import RemoteIpam
from agent.remote.ledger import Ledger
from agent.remote.undoing import OwnStep, Undoer
from agent.serviceops import ServiceOperations
from tests.unit.test_operations import Alone, SlowKernel

ME = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
BOX = "b" * 16
# s that a call may take here; the second where the plugin does not answer one.
WITHIN, HANGS_WITHIN = 20.0, 1.0
POOLS = {False: "10.7.0.0/24", True: "fd07::/64"}
MAC = "com.docker.network.endpoint.macaddress"

Body = dict[str, Any]
Wrong = Callable[["Odd", str, Body], Awaitable[web.Response]]


class Odd:
    """The plugin `odd`. What it has is in `pools`, `addresses`, `networks`, `endpoints`,
    `joined`; what it does wrong in `wrong`, by method."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "odd.sock"
        self.implements = ["NetworkDriver", "IpamDriver"]
        self.needs: Body = {}
        self.wrong: dict[str, Wrong] = {}
        self.asked: list[tuple[str, Body]] = []
        self.forget()
        self._runner: web.AppRunner | None = None

    def forget(self) -> None:
        """It starts anew and has kept nothing."""
        self.pools: dict[str, str] = {}
        self.addresses: set[str] = set()
        self.networks: set[str] = set()
        self.endpoints: set[str] = set()
        self.joined: set[str] = set()

    def left(self) -> list[object]:
        """All that it has."""
        return [*self.pools, *self.addresses, *self.networks, *self.endpoints, *self.joined]

    def methods(self, kind: str = "") -> list[str]:
        """What it was asked, in order."""
        return [method for method, _ in self.asked if method.startswith(kind)]

    def last(self, method: str) -> Body:
        return [body for name, body in self.asked if name == method][-1]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/{method}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
        self._runner = None
        self.path.unlink(missing_ok=True)

    async def _serve(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        body = json.loads(await request.read() or b"{}")
        self.asked.append((method, body))
        if method in self.wrong:
            try:
                return await self.wrong[method](self, method, body)
            except Broken:
                assert request.transport
                request.transport.abort()
                return web.Response()
        return web.json_response(self.do(method, body))

    def do(self, method: str, body: Body) -> Body:
        """What a plugin that works does, and answers."""
        match method:
            case "Plugin.Activate":
                return {"Implements": self.implements}
            case "NetworkDriver.GetCapabilities":
                return {"Scope": "local"}
            case "IpamDriver.GetCapabilities":
                return self.needs
            case "IpamDriver.GetDefaultAddressSpaces":
                return {"LocalDefaultAddressSpace": "here", "GlobalDefaultAddressSpace": "all"}
            case "IpamDriver.RequestPool":
                subnet = body["Pool"] or POOLS[body["V6"]]
                self.pools[f"pool-{subnet}"] = subnet
                return {"PoolID": f"pool-{subnet}", "Pool": subnet, "Data": {}}
            case "IpamDriver.ReleasePool":
                del self.pools[body["PoolID"]]
            case "IpamDriver.RequestAddress":
                net = ipaddress.ip_network(self.pools[body["PoolID"]])
                free = (str(a) for a in net.hosts() if str(a) not in self.addresses)
                address = body["Address"] or next(free)
                if address in self.addresses:
                    return {"Error": "taken"}
                self.addresses.add(address)
                return {"Address": f"{address}/{net.prefixlen}"}
            case "IpamDriver.ReleaseAddress":
                if body["Address"] not in self.addresses:
                    return {"Error": "not given out"}
                self.addresses.remove(body["Address"])
            case "NetworkDriver.CreateNetwork":
                self.networks.add(body["NetworkID"])
            case "NetworkDriver.DeleteNetwork":
                self.networks.remove(body["NetworkID"])
            case "NetworkDriver.CreateEndpoint":
                self.endpoints.add(body["EndpointID"])
            case "NetworkDriver.DeleteEndpoint":
                self.endpoints.remove(body["EndpointID"])
            case "NetworkDriver.Join":
                self.joined.add(body["EndpointID"])
                return {"InterfaceName": {"SrcName": "v1", "DstPrefix": "odd"}}
            case "NetworkDriver.Leave":
                self.joined.remove(body["EndpointID"])
        return {}


# -- ways to do wrong --


def says(answer: object, status: int = 200) -> Wrong:
    """It does nothing and answers this: an object, or text that is none."""

    async def wrong(odd: Odd, method: str, body: Body) -> web.Response:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return web.Response(text=text, status=status)

    return wrong


def does_and_says(**fields: object) -> Wrong:
    """It does what it is asked, and answers some fields otherwise."""

    async def wrong(odd: Odd, method: str, body: Body) -> web.Response:
        return web.json_response({**odd.do(method, body), **fields})

    return wrong


async def hangs(odd: Odd, method: str, body: Body) -> web.Response:
    """It does what it is asked, and answers when nobody waits any more."""
    answer = odd.do(method, body)
    await asyncio.sleep(2 * HANGS_WITHIN)
    return web.json_response(answer)


async def slowly(odd: Odd, method: str, body: Body) -> web.Response:
    """It does what it is asked, and takes its time."""
    await asyncio.sleep(0.3)
    return web.json_response(odd.do(method, body))


async def dies(odd: Odd, method: str, body: Body) -> web.Response:
    """It breaks off before it has done anything."""
    raise Broken


async def does_and_dies(odd: Odd, method: str, body: Body) -> web.Response:
    """It breaks off once it has done what it was asked."""
    odd.do(method, body)
    raise Broken


class Broken(Exception):
    """No answer, and the connection is closed."""


class Interfaces:
    """What datapath/ offers, without a kernel: `inside` are the interfaces in sandboxes."""

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.shown: dict[str, str] = {}

    async def move_in(self, sandbox: Sandbox, source: str, name: str, *rest: Any) -> bytes:
        self.inside.add(name)
        return b"\2\0\0\0\0\7"

    async def lead_out(self, sandbox: Sandbox, name: str, gateways: tuple[str, ...]) -> None:
        """There are no routes."""

    async def move_out(self, netns: str, inode: int, name: str, source: str) -> None:
        self.inside.remove(name)

    async def show(self, path: str, netns: str) -> None:
        self.shown[path] = netns

    async def hide(self, path: str) -> None:
        del self.shown[path]


class Calls(Plugins):
    """To plugins, as long as they take on a busy machine; shorter where one is told to hang."""

    def __init__(self, directory: Path, odd: Odd) -> None:
        self._odd = odd
        super().__init__((str(directory),))

    @property
    def within(self) -> float:
        return HANGS_WITHIN if hangs in self._odd.wrong.values() else WITHIN

    @within.setter
    def within(self, seconds: float) -> None:
        pass


class Rig:
    """A node with a sandbox `box`, and the plugin `odd` beside it."""

    def __init__(self, directory: Path, odd: Odd) -> None:
        self.directory, self.odd = directory, odd
        self.node = NodeState(ME, lambda: 1000.0, random.Random(1))
        self.node.describe(ME)
        self.node.put_sandbox(Sandbox(BOX, "box", "/proc/1/ns/net", 1, 1, 1, 0.0))
        self.interfaces = Interfaces()
        self.begin()

    def begin(self) -> None:
        """An agent's life begins, with the records as they are."""
        plugins = Calls(self.directory, self.odd)
        ours: dict[str, OwnStep] = {
            "move_out": self.interfaces.move_out,
            "hide": self.interfaces.hide,
        }
        ledger = Ledger(self.directory / "plugins.json")
        self.undoer = Undoer(self.node, plugins, ledger, ours, 0.05)
        kernel = SlowKernel()
        kernel.settled.set()
        self.operations = Operations(self.node, Alone(), kernel, _durable)
        self.operations.remote = RemoteDriver(
            self.node, Alone(), plugins, self.undoer, self.interfaces
        )
        self.ipam = RemoteIpam(self.node, plugins, self.undoer, retry_every=0.05)
        self.operations.ipam = self.ipam
        self.services = ServiceOperations(self.node, Alone(), Nobody(), self.operations.done)
        self.services.ipam = self.ipam
        self.undoer.start()

    async def end(self) -> None:
        """That life ends, as if it were killed: nothing is undone."""
        await self.ipam.stop()
        await self.undoer.stop()

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait for something that the plugin or the agent does by itself."""
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.01)

    async def nothing_left(self) -> None:
        """Wait until the plugin, the sandbox and what is written down are as in the beginning."""
        await self.until(lambda: not self.odd.left())
        await self.until(lambda: not self.undoer.ledger.steps)
        assert not self.interfaces.inside
        assert not self.interfaces.shown
        assert not self.node.sandboxes[BOX].endpoints
        assert not any(members.all for members in self.node.members.values())


class Nobody:
    """No other nodes to ask for ports."""

    def live_nodes(self) -> list[str]:
        return []

    async def check_ports(self, node: str, ports: object) -> list[Any]:
        raise AssertionError("nobody to ask")


@asynccontextmanager
async def rig(directory: Path) -> AsyncIterator[Rig]:
    """Both, for the length of a test."""
    odd = Odd(directory)
    await odd.start()
    made = Rig(directory, odd)
    try:
        yield made
    finally:
        await made.end()
        await odd.stop()


async def _durable() -> None:
    pass
