"""Endpoints get the names that the engine tells of their containers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.api.docker.engine import Engine
from agent.api.docker.keeping import Keeper
from agent.api.docker.labelled import Labelled
from agent.api.docker.naming import Naming, health_of, label_from, names_of
from agent.errors import Invalid
from agent.model import WORKLOAD, Endpoint
from agent.serviceops import ServiceOperations
from tests.unit.api.docker.conftest import Caller

NET, CONTAINER = "c" * 64, "d" * 64


@pytest.mark.parametrize(
    ("name", "label"),
    [("db", "db"), ("My_Proj.db-1", "my-proj-db-1"), ("a" * 80, "a" * 63), ("x__", "x")],
)
def test_a_label_like_a_name(name: str, label: str) -> None:
    assert label_from(name) == label


def test_nothing_of_a_name_is_a_label() -> None:
    with pytest.raises(Invalid):
        label_from("__")


class Nobody:
    def live_nodes(self) -> list[str]:
        return []


def container(name: str, endpoint: str, *aliases: str, **labels: str) -> dict[str, Any]:
    attached = {"NetworkID": NET, "EndpointID": endpoint, "Aliases": list(aliases) or None}
    return {
        "Id": CONTAINER,
        "Name": f"/{name}",
        "Config": {"Hostname": "box", "Labels": labels},
        "NetworkSettings": {"Networks": {"web": attached}},
    }


def test_the_names_of_a_container() -> None:
    told = container("proj_db_1", "e", "db", "a.b", "", "DB", "_x")
    attached = told["NetworkSettings"]["Networks"]["web"]
    name, aliases = names_of(told, attached)
    assert name == "proj-db-1"
    assert aliases == ["proj_db_1", "box", "d" * 12, "db"]


async def endpoints(engine: Caller, *ids: str) -> Naming:
    data = [{"Pool": "10.5.0.0/24", "Gateway": "10.5.0.1/24"}]
    assert await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET, IPv4Data=data) == {}
    for id in ids:
        made = await engine.call("NetworkDriver.CreateEndpoint", NetworkID=NET, EndpointID=id)
        assert "Interface" in made
    return Naming(
        engine.operations, engine.bindings, Engine(Path("/nowhere")), Keeper(Path("/nowhere"))
    )


def named(engine: Caller, id: str) -> Endpoint:
    every = [e for m in engine.node.members.values() for e in m.local.values()]
    return next(e for e in every if e.labels["docker.endpoint"] == id)


async def test_names_labels_and_a_name_that_is_taken(engine: Caller) -> None:
    one, two = "1" * 64, "2" * 64
    naming = await endpoints(engine, one, two)
    await naming.take(
        container("db", one, "data", **{"app": "x", "com.docker.compose.project": "p"})
    )
    first = named(engine, one)
    assert (first.name, first.aliases) == ("db", ("box", "d" * 12, "data"))
    assert first.labels == {"docker.endpoint": one, WORKLOAD: "d" * 12, "app": "x"}
    await naming.take(container("db", two))
    second = named(engine, two)
    assert second.name == "db-" + "2" * 12 and second.aliases[0] == "db"
    revision = engine.node.revision
    await naming.take(container("db", two))
    assert engine.node.revision == revision  # what was told is no change
    await naming.take(container("other", one))
    await naming.take(container("db", two))
    assert named(engine, two).name == "db"
    assert {"db", "other"} == {
        e.name for m in engine.node.members.values() for e in m.local.values()
    }


async def test_capitals_in_a_services_name_are_lowered(
    engine: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = "1" * 64
    naming = await endpoints(engine, one)
    asks = {"vxmesh.service": "Api", "vxmesh.port": "80"}
    await naming.take(container("db", one, "api", **asks))
    assert "api" not in named(engine, one).aliases  # it is the service's
    operations = ServiceOperations(engine.node, None, Nobody(), engine.operations.done)  # type: ignore[arg-type]
    services = Labelled(engine.node, operations)
    assert await services._once() is None
    (service,) = engine.node.services.all()
    (row,) = engine.node.backends_of(service, 1000.0)
    assert row.endpoint.id == named(engine, one).id
    monkeypatch.setattr("agent.api.docker.labelled.GRACE", 0.0)
    assert await services._once() is None  # it is asked for, so it stays
    assert [s.id for s in engine.node.services.all()] == [service.id]


async def test_who_is_gone_or_not_ours_is_passed_over(engine: Caller) -> None:
    naming = await endpoints(engine)
    await naming.take(container("db", "3" * 64))
    other = container("db", "3" * 64)
    other["NetworkSettings"]["Networks"]["web"]["NetworkID"] = "f" * 64
    await naming.take(other)
    await naming.take({"Id": CONTAINER})
    assert all(not m.local for m in engine.node.members.values())


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (None, ("", "")),
        ({"Status": "none"}, ("", "")),
        ({"Status": "healthy", "Log": [{"Output": "x"}]}, ("healthy", "")),
        ({"Status": "starting"}, ("unhealthy", "starting")),
        ({"Status": "unhealthy", "Log": None}, ("unhealthy", "")),
        ({"Status": "unhealthy", "Log": [{"Output": "a"}, {"Output": " b\n" + "c" * 999}]},
         ("unhealthy", "b " + "c" * 118)),
    ],
)  # fmt: skip
def test_what_a_healthcheck_says(told: Any, found: tuple[str, str]) -> None:
    assert health_of({"State": {"Health": told}}) == found


async def test_health_is_told_of_the_endpoint(engine: Caller) -> None:
    one = "1" * 64
    naming = await endpoints(engine, one)
    for status, state in (("starting", "unhealthy"), ("healthy", "healthy"), ("none", "")):
        await naming.take(container("db", one) | {"State": {"Health": {"Status": status}}})
        (members,) = engine.node.members.values()
        (member,) = members.all.values()
        health = engine.node.health_of(member)
        assert (health.told if health else "") == state


class Told:
    """An engine that says one thing after the other; the first answer waits for `gate`."""

    def __init__(self, *states: str) -> None:
        self.states, self.asked, self.gate = list(states), 0, asyncio.Event()

    async def container(self, id: str) -> dict[str, Any]:
        status = self.states[min(self.asked, len(self.states) - 1)]
        self.asked += 1
        if self.asked == 1:
            await self.gate.wait()
        return container("db", "1" * 64) | {"State": {"Health": {"Status": status}}}


async def turns(count: int = 50) -> None:
    """Let what can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def watch_health(engine: Caller, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told of endpoints from now on."""
    told: list[str] = []
    tell = engine.node.tell_health

    def telling(endpoint: str, state: str, reason: str = "") -> None:
        told.append(state)
        tell(endpoint, state, reason)

    monkeypatch.setattr(engine.node, "tell_health", telling)
    return told


async def test_an_answer_that_comes_late_does_not_win(
    engine: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    naming = await endpoints(engine, "1" * 64)
    told = watch_health(engine, monkeypatch)
    fake = Told("healthy", "unhealthy")
    naming._engine = fake  # type: ignore[assignment]
    naming.look_at(CONTAINER)
    await turns()
    assert fake.asked == 1
    naming.look_at(CONTAINER)
    await turns()  # whoever looked beside the first would be done by now
    fake.gate.set()
    await turns()
    assert told[-1] == "unhealthy"
    assert not naming._tasks
    before = fake.asked
    naming.look_at(CONTAINER)  # it goes on afterwards
    await turns()
    assert fake.asked == before + 1


async def test_what_changed_while_an_endpoint_was_placed_is_asked_anew(
    engine: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    naming = await endpoints(engine, "1" * 64)
    told = watch_health(engine, monkeypatch)
    fake = Told("healthy", "unhealthy")
    fake.gate.set()
    naming._engine = fake  # type: ignore[assignment]
    placing, go = asyncio.Event(), asyncio.Event()

    async def place(endpoint: Endpoint, container: Any) -> None:
        placing.set()
        await go.wait()

    monkeypatch.setattr(naming, "_place", place)
    naming.look_at(CONTAINER)
    await placing.wait()
    naming.look_at(CONTAINER)
    await turns()
    go.set()
    await turns()
    assert set(told) == {"unhealthy"}
    assert not naming._tasks
