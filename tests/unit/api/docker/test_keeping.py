"""Addresses that containers had: who is given them again, and who is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent.api.docker import keeping
from agent.api.docker.keeping import ENGINE, Keeper, first_of, mount_points
from agent.model import Endpoint
from agent.notation import parse_address
from tests.unit.api.docker.conftest import Caller

A, B = "a" * 64, "b" * 64
OLD = parse_address("10.5.0.9")


def about(id: str, root: str = "") -> dict[str, Any]:
    """What inspect says, of an engine with overlay2 or, without a root, of a newer one."""
    return {"Id": id, "GraphDriver": {"Data": {"MergedDir": root}} if root else None}


def endpoint(address: bytes, network: str = "n") -> Endpoint:
    return Endpoint("e" * 16, network, "c", b"\2\0\0\0\0\1", (address,))


def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *points: str) -> None:
    """Have the engine's mounts be these."""
    directory = tmp_path / str(os.getpid())
    directory.mkdir(exist_ok=True)
    lines = [f"{n} 1 0:5 / {point} rw - overlay overlay rw" for n, point in enumerate(points)]
    (directory / "mountinfo").write_text("\n".join(lines))
    monkeypatch.setattr(keeping, "PROC", tmp_path)
    ENGINE.set(os.getpid())


def free(_: bytes) -> bool:
    return False


async def test_who_is_mounted_and_does_not_run_has_its_address_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path)
    keeper.note(about(A, "/a/merged"), endpoint(OLD))
    mounted(monkeypatch, tmp_path, "/", "/other")
    assert await keeper.wanted("n", 4, free) == b""  # stopped: another one asks
    mounted(monkeypatch, tmp_path, "/", "/a/merged")
    assert await keeper.wanted("n", 4, free) == OLD
    assert await keeper.wanted("n", 6, free) == b""
    assert await keeper.wanted("m", 4, free) == b""
    assert await keeper.wanted("n", 4, lambda address: address == OLD) == b""
    keeper.started(A)  # and taken out of the network: another one asks
    assert await keeper.wanted("n", 4, free) == b""
    keeper.all_ended()
    assert await keeper.wanted("n", 4, free) == OLD
    keeper.forget(A)
    assert await keeper.wanted("n", 4, free) == b""


async def test_of_several_the_first_that_was_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, other = Keeper(tmp_path), parse_address("10.5.0.8")
    keeper.note(about(A), endpoint(OLD))
    keeper.note(about(B), endpoint(other))
    mounted(monkeypatch, tmp_path, "/", f"/run/rootfs/{B}", f"/run/rootfs/{A}")
    assert await keeper.wanted("n", 4, free) == other
    assert await keeper.wanted("n", 4, lambda address: address == other) == OLD


async def test_it_outlives_the_agent_and_only_what_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path)
    for id in (A, B):
        keeper.note(about(id), endpoint(OLD))
    keeper.only([A])
    await keeper.close()
    again = Keeper(tmp_path)
    mounted(monkeypatch, tmp_path, f"/{B}/x")
    assert await again.wanted("n", 4, free) == b""
    mounted(monkeypatch, tmp_path, f"/{A}/x")
    assert await again.wanted("n", 4, free) == OLD
    (tmp_path / keeping.FILE).write_text("no such thing")
    assert await Keeper(tmp_path).wanted("n", 4, free) == b""


def test_lines_that_are_none() -> None:
    assert mount_points("\n1 2\n1 2 0:3 / /x rw\n") == ["/x"]
    assert first_of(["/x"], {}) == b""


async def test_an_engine_that_asks_for_it_gets_it(
    engine: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [{"AddressSpace": "vxmesh", "Pool": "10.5.0.0/24", "Gateway": "10.5.0.1/24"}]
    assert await engine.call("NetworkDriver.CreateNetwork", NetworkID="c", IPv4Data=data) == {}
    [network] = engine.node.catalogue.all()
    engine.keeper.note(about(A), endpoint(OLD, network.id))
    mounted(monkeypatch, tmp_path, f"/{A}/x")  # this process is at the other end
    asked = {"PoolID": "new,10.5.0.0/24,"}
    assert (await engine.call("IpamDriver.RequestAddress", **asked))["Address"] == "10.5.0.9/24"
    assert (await engine.call("IpamDriver.RequestAddress", **asked))["Address"] != "10.5.0.9/24"


async def test_aux_addresses_are_nobodys(engine: Caller) -> None:
    aux = {"router": "10.5.0.2/29", "other": "10.5.0.3/29"}
    pool = {"AddressSpace": "vxmesh", "Pool": "10.5.0.0/29", "Gateway": "10.5.0.1/29"}
    data = [pool | {"AuxAddresses": aux}]
    assert await engine.call("NetworkDriver.CreateNetwork", NetworkID="c", IPv4Data=data) == {}
    [network] = engine.node.catalogue.all()
    assert dict(network.options) == {"aux.router": "10.5.0.2", "aux.other": "10.5.0.3"}
    asked = {"PoolID": "new,10.5.0.0/29,"}
    given = [(await engine.call("IpamDriver.RequestAddress", **asked)) for _ in range(4)]
    assert [g.get("Address") for g in given] == ["10.5.0.4/29", "10.5.0.5/29", "10.5.0.6/29", None]
    wanted = await engine.call("IpamDriver.RequestAddress", Address="10.5.0.2", **asked)
    assert "kept free" in wanted["Err"]
    data = [pool | {"AuxAddresses": {"far": "10.6.0.2/29"}}]
    told = await engine.call("NetworkDriver.CreateNetwork", NetworkID="d", IPv4Data=data)
    assert "is in none of the subnets" in told["Err"]
