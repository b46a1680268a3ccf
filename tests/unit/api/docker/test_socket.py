"""The plugin's socket: a dead agent's is taken over, a living one's left to it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent.api.docker.server import DockerPlugin
from agent.errors import Conflict
from tests.unit.api.docker.conftest import Caller


def another(engine: Caller, path: Path) -> DockerPlugin:
    return DockerPlugin(engine.driver, engine.driver._ipam, path)


async def test_a_living_agent_keeps_its_socket(engine: Caller, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="another agent's"):
        await another(engine, tmp_path / "plugins/vxmesh.sock").start()
    assert await engine.call("NetworkDriver.DiscoverNew") == {}


async def test_a_dead_agents_socket_is_taken_over(engine: Caller, tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    plugin = another(engine, path)
    await plugin.start()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    await plugin.stop()


async def test_where_it_cannot_be_it_says_so(engine: Caller, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Conflict, match="cannot be listened on"):
        await another(engine, tmp_path / "file/vxmesh.sock").start()
