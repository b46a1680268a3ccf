"""A node with Docker's plugin on a socket, and an engine that is the test."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector

from agent.api.docker.bindings import Bindings
from agent.api.docker.driver import Driver
from agent.api.docker.ipam import Ipam
from agent.api.docker.keeping import Keeper
from agent.api.docker.server import DockerPlugin
from agent.model import Node
from agent.node import NodeState
from agent.operations import Operations


class Settled:
    """A kernel that has what is asked of it."""

    async def settle(self, endpoint: str | None = None) -> None:
        pass


async def _durable() -> None:
    pass


class Caller:
    """What an engine sends, and what it is answered."""

    def __init__(
        self,
        session: ClientSession,
        operations: Operations,
        bindings: Bindings,
        driver: Driver,
        keeper: Keeper,
    ) -> None:
        self._session, self.driver, self.keeper = session, driver, keeper
        self.operations, self.node, self.bindings = operations, operations.node, bindings

    async def call(self, method: str, **body: Any) -> Any:
        """The answer's body; its status if that is not 200."""
        async with self._session.post(f"http://x/{method}", json=body) as answer:
            return await answer.json(content_type=None) if answer.status == 200 else answer.status

    async def raw(self, method: str, body: bytes) -> Any:
        async with self._session.post(f"http://x/{method}", data=body) as answer:
            return await answer.json(content_type=None)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Caller]:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    operations = Operations(node, None, Settled(), _durable)  # type: ignore[arg-type]
    bindings, keeper = Bindings(tmp_path), Keeper(tmp_path)
    ipam = Ipam(operations, keeper)
    path = tmp_path / "plugins/vxmesh.sock"
    driver = Driver(node, operations, bindings, ipam)
    plugin = DockerPlugin(driver, ipam, path)
    await plugin.start()
    async with ClientSession(connector=UnixConnector(str(path))) as session:
        yield Caller(session, operations, bindings, driver, keeper)
    await plugin.stop()
