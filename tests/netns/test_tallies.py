"""Connections by service and backend, on the real kernel: each is counted once, where it goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.notation import parse_address
from tests.netns.balancing_hosts import (
    Client,
    Server,
    ask,
    backend,
    frontend,
    network,
    serve,
    withdraw,
)
from tests.netns.datapath_hosts import Fabric, opened, until


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


async def test_each_connection_is_counted_once_where_it_goes(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    one, two = backend(fabric.a, 2), backend(fabric.b, 3)
    # Two services with the same backends and ports: only by which one it came tells them apart.
    web = frontend(one, two, published=((b"", 8000),))
    db = frontend(one, two, name="db", vip="10.7.0.101", published=((b"", 8001),))
    udp = frontend(two, name="dns", vip="10.7.0.102", protocol="udp")
    serve(fabric.hosts, web, db, udp)
    await fabric.settle()
    asked: dict[tuple[str, str], int] = {
        (name, b.key): 0 for name in ("web", "db") for b in (one, two)
    }
    keys = {"one": one.key, "two": two.key}
    async with Server(near.path, "one"), Server(far.path, "two"):
        for address, port, service, count in (
            ("10.98.0.1", 8000, "web", 9),
            ("10.98.0.1", 8001, "db", 5),
        ):
            for _ in range(count):
                asked[service, keys[(await ask(fabric.outsider, address, port))[0]]] += 1
        for _ in range(7):
            asked["db", keys[(await ask(near.path, "10.7.0.101", 80))[0]]] += 1
        client = await Client(near.path, "udp").connect("10.7.0.102", 80)
        for _ in range(3):  # one flow
            await client.ask()
        client.close()
        assert await fabric.a.reconciler.connections() == {**asked, ("dns", two.key): 1}
        assert set((await fabric.b.reconciler.connections()).values()) == {0}, "it balanced none"
        kept = await Client(near.path).connect("10.7.0.100", 80)
        before = await fabric.a.reconciler.connections()
        for _ in range(50):
            await kept.ask()
        assert await fabric.a.reconciler.connections() == before, "packets are not counted"
        kept.close()


async def test_what_was_counted_outlives_changes_of_others_and_of_the_table(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    one, two = backend(fabric.a, 2), backend(fabric.b, 3)
    serve(fabric.hosts, frontend(two))
    await fabric.settle()

    async def counted() -> dict[str, int]:
        return {key: n for (_, key), n in (await fabric.a.reconciler.connections()).items()}

    async with Server(near.path, "one"), Server(far.path, "two"):
        for _ in range(4):
            await ask(near.path, "10.7.0.100", 80)
        serve(fabric.hosts, frontend(one, replace(two, draining=True)))
        await fabric.settle()
        await ask(far.path, "10.7.0.100", 80)
        assert await counted() == {one.key: 0, two.key: 4}
        repairs = fabric.a.reconciler.repairs["nft"]
        fabric.a.inside("nft", "delete", "table", "inet", "vxmesh_balance")
        await until(lambda: fabric.a.reconciler.repairs["nft"] > repairs, "the table is put back")
        await ask(near.path, "10.7.0.100", 80)
        assert await counted() == {one.key: 1, two.key: 4}
        serve(fabric.hosts, frontend(one))
        await fabric.settle()
        assert await counted() == {one.key: 1}, "who is gone is told of no longer"
        withdraw(fabric.hosts, frontend(one))
        await fabric.settle()
        assert await counted() == {}


async def test_over_ipv6_too(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    two = replace(backend(fabric.b, 3), address=parse_address("fd00:7::3"))
    serve(fabric.hosts, frontend(two, vip="fd00:7::100"))
    await fabric.settle()
    async with Server(far.path, "two", address="::"):
        for _ in range(3):
            await ask(near.path, "fd00:7::100", 80)
    assert await fabric.a.reconciler.connections() == {("web", two.key): 3}
