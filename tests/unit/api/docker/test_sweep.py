"""Endpoints that an engine, which was killed, left over go; those that it has stay."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.api.docker import mirror
from agent.api.docker.engine import Refused
from agent.api.docker.keeping import Keeper
from agent.api.docker.mirror import Mirror
from tests.unit.api.docker.conftest import Caller

NET, HAS, LEFT = "c" * 64, "1" * 64, "2" * 64


class Lists:
    """An engine with one network, which has one of the endpoints."""

    def __init__(self, status: int = 200) -> None:
        self.status = status  # of what it answers about the network
        self.asked = 0

    async def networks(self) -> list[dict[str, Any]]:
        return [{"Id": NET, "Name": "web", "Driver": "vxmesh"},
                {"Id": "b" * 64, "Name": "bridge", "Driver": "bridge"}]  # fmt: skip

    async def network(self, id: str) -> dict[str, Any]:
        assert id == NET
        self.asked += 1
        if self.status != 200:
            raise Refused("the engine", self.status, "says no")
        return {"Containers": {"x": {"EndpointID": HAS}}}


@pytest.mark.parametrize(
    ("status", "is_bound", "left"),
    [
        (200, True, {HAS}),
        (200, False, {HAS}),  # what was bound is lost
        (404, True, set()),
    ],
)
async def test_what_the_engine_does_not_list_goes(
    engine: Caller,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int,
    is_bound: bool,
    left: set[str],
) -> None:
    monkeypatch.setattr(mirror, "SURELY", 0.0)
    await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET)
    for id in (HAS, LEFT):
        await engine.call("NetworkDriver.CreateEndpoint", NetworkID=NET, EndpointID=id)
    if not is_bound:
        await engine.bindings.drop(NET)
    fake: Any = Lists(status)
    await Mirror(engine.operations, engine.bindings, fake, Keeper(tmp_path), bool, bool)._sweep()
    (members,) = engine.node.members.values()
    assert {e.labels["docker.endpoint"] for e in members.local.values()} == left


@pytest.mark.parametrize("status", [500, 403])
async def test_what_the_engine_refuses_to_tell_is_asked_again(
    engine: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    monkeypatch.setattr(mirror, "SURELY", 0.0)
    await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET)
    for id in (HAS, LEFT):
        await engine.call("NetworkDriver.CreateEndpoint", NetworkID=NET, EndpointID=id)
    fake: Any = Lists(status)
    looking = Mirror(engine.operations, engine.bindings, fake, Keeper(tmp_path), bool, bool)
    looking._is_there = True
    sweeping = asyncio.create_task(looking._sweep())
    while fake.asked < 3:
        await asyncio.sleep(0)
    (members,) = engine.node.members.values()
    assert len(members.local) == 2 and not sweeping.done()
    fake.status = 200
    await sweeping
    assert [e.labels["docker.endpoint"] for e in members.local.values()] == [HAS]
