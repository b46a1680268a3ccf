"""Docker's protocol over its socket: a whole life, and what is refused as {"Err": …}."""

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector

from agent.api.docker.bindings import Bindings
from agent.api.docker.driver import Driver
from agent.api.docker.ipam import Ipam
from agent.api.docker.server import DockerPlugin
from agent.model import Node
from agent.node import NodeState
from agent.operations import Operations

NET, EP = "c" * 64, "e" * 64


class Settled:
    async def settle(self, endpoint: str | None = None) -> None:
        pass


async def _durable() -> None:
    pass


class Engine:
    def __init__(self, session: ClientSession, node: NodeState) -> None:
        self._session, self.node = session, node

    async def call(self, method: str, **body: Any) -> Any:
        async with self._session.post(f"http://x/{method}", json=body) as answer:
            return await answer.json(content_type=None) if answer.status == 200 else answer.status


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    operations = Operations(node, None, Settled(), _durable)  # type: ignore[arg-type]
    ipam = Ipam(operations)
    path = tmp_path / "plugins/vxmesh.sock"
    plugin = DockerPlugin(Driver(node, operations, Bindings(tmp_path), ipam), ipam, path)
    await plugin.start()
    async with ClientSession(connector=UnixConnector(str(path))) as session:
        yield Engine(session, node)
    await plugin.stop()


async def test_a_network_and_an_endpoint_live_from_activation_to_deletion(engine: Engine) -> None:
    assert await engine.call("Plugin.Activate") == {"Implements": ["NetworkDriver", "IpamDriver"]}
    assert (await engine.call("NetworkDriver.GetCapabilities"))["Scope"] == "local"
    pool = {"Pool": "10.5.0.0/24", "Gateway": "10.5.0.1/24"}
    assert await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET, IPv4Data=[pool]) == {}
    about = {"NetworkID": NET, "EndpointID": EP}
    made = await engine.call(
        "NetworkDriver.CreateEndpoint", **about, Interface={"Address": "10.5.0.7/24"}
    )
    assert list(made["Interface"]) == ["MacAddress"]  # what was given is not given back
    joined = await engine.call("NetworkDriver.Join", **about, SandboxKey="/x")
    assert joined["Gateway"] == "10.5.0.1"
    assert joined["InterfaceName"]["DstPrefix"] == "eth"
    assert joined["DisableGatewayService"]
    assert (
        "has endpoints" in (await engine.call("NetworkDriver.DeleteNetwork", NetworkID=NET))["Err"]
    )
    assert await engine.call("NetworkDriver.Leave", **about) == {}
    assert await engine.call("NetworkDriver.DeleteEndpoint", **about) == {}
    assert await engine.call("NetworkDriver.DeleteNetwork", NetworkID=NET) == {}
    assert not engine.node.sandboxes and not list(engine.node.catalogue.all())


@pytest.mark.parametrize(
    ("method", "body", "why"),
    [
        ("CreateNetwork", {}, "malformed"),
        ("CreateNetwork", {"NetworkID": ""}, "missing"),
        ("CreateNetwork", {"NetworkID": NET, "IPv4Data": [{"Pool": "x"}]}, "malformed"),
        ("DeleteNetwork", {"NetworkID": NET}, "not known"),
        ("CreateEndpoint", {"NetworkID": NET, "EndpointID": EP}, "not known"),
        ("Join", {"NetworkID": NET, "EndpointID": EP}, "not known"),
    ],
)
async def test_what_cannot_be_done_is_said_and_changes_nothing(
    engine: Engine, method: str, body: dict[str, Any], why: str
) -> None:
    assert why in (await engine.call(f"NetworkDriver.{method}", **body))["Err"]
    assert not list(engine.node.catalogue.all()) and not engine.node.sandboxes


async def test_an_unknown_call_is_not_found(engine: Engine) -> None:
    assert await engine.call("NetworkDriver.Nonsense") == 404
