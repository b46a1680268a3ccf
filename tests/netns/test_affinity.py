"""Client affinity with a time-out: who stays with its backend, for how long, and who may not."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.datapath.affinityrules import CLIENTS_MOST
from agent.datapath.tablemonitor import TableMonitor
from agent.drivers.balancing import Backend, Frontend
from agent.notation import parse_address
from tests.netns.balancing_hosts import (
    Client,
    Server,
    ask,
    backend,
    frontend,
    network,
    serve,
)
from tests.netns.datapath_hosts import Fabric, Host, Sandbox, opened, restart, run, until

PUBLISHED = ((b"", 8000),)
ENTRANCE = {4: "10.98.0.1", 6: "fd98::1"}
VIP = {4: "10.7.0.100", 6: "fd00:7::100"}
CLIENTS = {4: [f"10.98.0.{n}" for n in range(20, 44)], 6: [f"fd98::{n:x}" for n in range(20, 44)]}
TABLE = ("inet", "vxmesh_balance")
NAMES = ("one", "two", "three")
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
HEAVY = 100  # a weight by which the hash would have next to every client move

EACH = pytest.mark.parametrize(
    ("protocol", "version"), [("tcp", 4), ("udp", 4), ("tcp", 6), ("udp", 6)]
)
VERSIONS = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        for version, bits in ((4, 24), (6, 64)):
            device = "side" if version == 4 else "side6"
            lines = (f"address add {a}/{bits} dev {device} nodad" for a in CLIENTS[version])
            run("ip", "-b", "-", netns=fabric.outsider, text="\n".join(lines))
        yield fabric


async def boxes(fabric: Fabric) -> list[Sandbox]:
    """Three sandboxes, .2 and .4 on host a, .3 on b."""
    return await network(fabric, fabric.a, fabric.b, fabric.a)


def members(fabric: Fabric, count: int, version: int = 4, **changes: Any) -> list[Backend]:
    """The first of these sandboxes as backends; `changes` are those of the last one."""
    found = []
    for number, host in enumerate([fabric.a, fabric.b, fabric.a][:count], 2):
        one = backend(host, number)
        address = f"fd00:7::{number}" if version == 6 else f"10.7.0.{number}"
        found.append(replace(one, address=parse_address(address)))
    return [*found[:-1], replace(found[-1], **changes)]


def sticky(
    *backends: Backend, protocol: str = "tcp", affinity: float = 60.0, version: int = 4
) -> Frontend:
    return frontend(
        *backends, vip=VIP[version], protocol=protocol, affinity=affinity, published=PUBLISHED
    )


class Answering:
    """A server in each sandbox, for both families."""

    def __init__(self, sandboxes: list[Sandbox]) -> None:
        self.servers = [
            Server(box.path, name, address="::")
            for box, name in zip(sandboxes, NAMES, strict=False)
        ]

    async def __aenter__(self) -> Answering:
        for server in self.servers:
            await server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self.servers:
            await server.__aexit__()


async def asked_by(fabric: Fabric, source: str, protocol: str = "tcp") -> str:
    """Who answers a client outside, on a new connection to the published port."""
    version = 6 if ":" in source else 4
    client = Client(fabric.outsider, protocol, version, source)
    await client.connect(ENTRANCE[version], 8000)
    name, _ = await client.ask()
    client.close()
    return name


async def asked(fabric: Fabric, protocol: str = "tcp", version: int = 4) -> dict[str, str]:
    """Who answers each of the clients outside."""
    return {source: await asked_by(fabric, source, protocol) for source in CLIENTS[version]}


def listed(host: Host, version: int = 4) -> str:
    return host.inside("nft", "list", "map", *TABLE, f"clients{version}")


def known(host: Host, version: int = 4) -> int:
    """How many clients the kernel knows."""
    return listed(host, version).count(" timeout ")


def seconds(said: str) -> float:
    """How long a time of nft's is, in s: "1m" and "59s996ms" as well as "20s"."""
    parts = re.findall(r"(\d+)(ms|[dhms])", said)
    assert parts and "".join(map("".join, parts)) == said, said
    return sum(int(number) * UNITS[unit] for number, unit in parts)


def left(host: Host, source: str) -> float:
    """How long a client is still known, in s; 0 if it is not."""
    found = re.search(rf"{source} [^,{{}}]*? expires (\w+)", listed(host))
    return seconds(found[1]) if found else 0.0


def age(host: Host, source: str, span: int) -> None:
    """Have a client be known for so long only, as when time has passed."""
    known = re.search(rf"{source} [^,{{}}]*? expires \S+ : \S+", listed(host))
    assert known
    key, _, value = known[0].partition(" timeout ")
    aged = re.sub(r"expires \S+", f"expires {span}s", f"{key} timeout {value}")
    name = f"{' '.join(TABLE)} clients4"
    text = f"delete element {name} {{ {key} }}\nadd element {name} {{ {aged} }}\n"
    run("nft", "-f", "-", netns=host.own, text=text)


def forget(host: Host, version: int = 4) -> None:
    host.inside("nft", "flush", "map", *TABLE, f"clients{version}")


@EACH
async def test_clients_stay_when_a_backend_comes_and_are_assigned_afresh_after_the_time_out(
    fabric: Fabric, protocol: str, version: int
) -> None:
    answering = Answering(await boxes(fabric))

    def made(count: int, affinity: float) -> Frontend:
        backends = members(fabric, count, version)
        return sticky(*backends, protocol=protocol, affinity=affinity, version=version)

    serve(fabric.hosts, made(2, 60.0))
    await fabric.settle()
    async with answering:
        before = await asked(fabric, protocol, version)
        assert set(before.values()) == {"one", "two"}
        assert known(fabric.a, version) == len(before)
        serve(fabric.hosts, made(3, 60.0))
        await fabric.settle()
        assert await asked(fabric, protocol, version) == before
        serve(fabric.hosts, made(3, 0.5))  # who comes from now on is known for that long
        await fabric.settle()
        assert await asked_by(fabric, CLIENTS[version][0], protocol) in NAMES
        await asked(fabric, protocol, version)
        await until(lambda: known(fabric.a, version) == 0, "the time-out passes")
        after = await asked(fabric, protocol, version)
    moved = {source for source, name in after.items() if name != before[source]}
    assert moved and {after[source] for source in moved} == {"three"}
    assert len(moved) < len(after)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("1m", 60), ("59s996ms", 59.996), ("20s", 20), ("4ms", 0.004), ("1d2h3m4s", 93784)],
)
def test_a_time_of_nft_is_read_whole(said: str, meant: float) -> None:
    assert seconds(said) == pytest.approx(meant)


async def test_the_time_out_counts_from_the_last_new_connection(fabric: Fabric) -> None:
    answering = Answering(await boxes(fabric))
    serve(fabric.hosts, sticky(*members(fabric, 2)))
    await fabric.settle()
    source = CLIENTS[4][0]
    async with answering:
        client = await Client(fabric.outsider, source=source).connect(ENTRANCE[4], 8000)
        name, _ = await client.ask()
        age(fabric.a, source, 20)
        passed = left(fabric.a, source)
        assert (await client.ask())[0] == name
        assert left(fabric.a, source) <= passed  # that was no new connection
        assert await asked_by(fabric, source) == name
        assert left(fabric.a, source) > passed
        client.close()


@VERSIONS
async def test_who_had_a_backend_that_is_gone_or_drains_is_moved_at_once_and_then_stays(
    fabric: Fabric, version: int
) -> None:
    answering = Answering(await boxes(fabric))
    one, two = members(fabric, 2, version)
    serve(fabric.hosts, sticky(one, two, version=version))
    await fabric.settle()
    async with answering:
        before = await asked(fabric, version=version)
        source = next(s for s, name in before.items() if name == "two")
        client = Client(fabric.outsider, version=version, source=source)
        await client.connect(ENTRANCE[version], 8000)
        assert (await client.ask())[0] == "two"
        for later in (replace(two, draining=True), replace(two, weight=0), None):
            serve(fabric.hosts, sticky(one, two, version=version))
            await fabric.settle()
            forget(fabric.a, version)
            assert await asked(fabric, version=version) == before
            backends = [one, later] if later else [one]
            serve(fabric.hosts, sticky(*backends, version=version))
            await fabric.settle()
            if later:
                assert (await client.ask())[0] == "two"  # what there is goes on
            after = await asked(fabric, version=version)
            assert set(after.values()) == {"one"}
            assert known(fabric.a, version) == len(before)
            # It is back: who was moved has another backend now, and stays there.
            serve(fabric.hosts, sticky(one, two, version=version))
            await fabric.settle()
            assert await asked(fabric, version=version) == after
        client.close()


@VERSIONS
async def test_a_sandbox_stays_with_its_backend_behind_a_vip(fabric: Fabric, version: int) -> None:
    sandboxes = await boxes(fabric)
    serve(fabric.hosts, sticky(*members(fabric, 1, version), version=version))
    await fabric.settle()
    from_host = ("10.99.0.2", 8000)  # of host b, from a's own processes
    async with Answering(sandboxes):
        paths = [box.path for box in sandboxes]  # the first one is its own backend, at first
        for path in paths:
            assert (await ask(path, VIP[version], 80))[0] == "one"
        if version == 4:
            assert (await ask(fabric.a.path, *from_host))[0] == "one"
        backends = members(fabric, 2, version, weight=HEAVY)
        serve(fabric.hosts, sticky(*backends, version=version))
        await fabric.settle()
        for path in paths:
            assert (await ask(path, VIP[version], 80))[0] == "one"
        if version == 4:
            assert (await ask(fabric.a.path, *from_host))[0] == "one"
        for host in fabric.hosts:
            forget(host, version)
        for path in paths:
            assert (await ask(path, VIP[version], 80))[0] == "two"
        if version == 4:
            assert (await ask(fabric.a.path, *from_host))[0] == "two"


async def test_clients_are_known_after_a_restart_also_one_to_which_the_service_changed(
    fabric: Fabric,
) -> None:
    answering = Answering(await boxes(fabric))
    serve(fabric.hosts, sticky(*members(fabric, 2)))
    await fabric.settle()
    async with answering:
        before = await asked(fabric)
        await restart(fabric.a)
        await fabric.settle()
        assert known(fabric.a) == len(before)
        await fabric.a.reconciler.stop()
        run("nft", "add", "chain", *TABLE, "stranger", netns=fabric.a.own)
        run("nft", "add", "rule", *TABLE, "balance", "drop", netns=fabric.a.own)
        one = sticky(*members(fabric, 3, weight=HEAVY), affinity=90.0)
        fabric.a.desired.services = {one.id: one}
        await fabric.a.make().start()
        await fabric.settle()
        assert await asked(fabric) == before
        table = fabric.a.inside("nft", "list", "table", *TABLE)
        assert "stranger" not in table and "sticky_256_60000" not in table
        forget(fabric.a)
        assert set((await asked(fabric)).values()) == {"three"}


async def test_a_table_of_another_shape_gives_way_to_ours(fabric: Fabric) -> None:
    """As after an upgrade: what cannot be kept is made anew."""
    answering = Answering(await boxes(fabric))
    serve(fabric.hosts, sticky(*members(fabric, 1)))
    await fabric.settle()
    await fabric.a.reconciler.stop()
    other = "map clients4 { type ipv4_addr : mark; }\nmap clients6 { type ipv6_addr : mark; }"
    text = f"delete table inet {TABLE[1]}\ntable inet {TABLE[1]} {{\n{other}\n}}\n"
    run("nft", "-f", "-", netns=fabric.a.own, text=text)
    await fabric.a.make().start()
    await fabric.settle()
    async with answering:
        assert set((await asked(fabric)).values()) == {"one"}
        assert known(fabric.a) == len(CLIENTS[4])


async def test_a_new_client_is_no_drift_and_is_not_even_told(fabric: Fabric) -> None:
    answering = Answering(await boxes(fabric))
    serve(fabric.hosts, sticky(*members(fabric, 2)))
    await fabric.settle()
    heard: list[bytes] = []

    class Ear(TableMonitor):
        def _handle(self, received: list[bytes]) -> None:
            heard.extend(received)

    ear = Ear(fabric.a.own, lambda: None)
    try:
        async with answering:
            await asked(fabric)
            assert known(fabric.a) == len(CLIENTS[4]) and not heard
            for count in (3, 2):
                serve(fabric.hosts, sticky(*members(fabric, count)))
                await fabric.settle()
            fabric.a.reconciler.audit()
            await fabric.settle()
            assert not fabric.a.reconciler.repairs["nft"]
            run("nft", "flush", "chain", *TABLE, "sticky_256_60000", netns=fabric.a.own)
            await until(lambda: fabric.a.reconciler.repairs["nft"] == 1, "it is put back")
            await fabric.settle()
            assert heard and known(fabric.a) == len(CLIENTS[4])
    finally:
        ear.close()


@VERSIONS
async def test_when_there_is_no_room_for_a_client_it_goes_where_its_address_says(
    fabric: Fabric, version: int
) -> None:
    answering = Answering(await boxes(fabric))
    serve(fabric.hosts, sticky(*members(fabric, 2, version), version=version))
    await fabric.settle()
    async with answering:
        first, *others = CLIENTS[version]
        remembered = await asked_by(fabric, first)
        room = CLIENTS_MOST - 1
        keys = (
            (f"{socket.inet_ntoa((i + 1).to_bytes(4))} . 1.1.1.1 . tcp . 1" for i in range(room))
            if version == 4
            else (f"0x{i + 1:x} . 0x0" for i in range(room))
        )
        elements = ", ".join(f"{key} timeout 1h : 0x1" for key in keys)
        name = f"clients{version}"
        text = f"add element {' '.join(TABLE)} {name} {{ {elements} }}\n"
        run("nft", "-f", "-", netns=fabric.a.own, text=text)
        before = await asked(fabric, version=version)
        assert set(before.values()) == {"one", "two"} and before[first] == remembered
        assert await asked(fabric, version=version) == before
        assert known(fabric.a, version) == CLIENTS_MOST
        backends = members(fabric, 3, version, weight=HEAVY)
        serve(fabric.hosts, sticky(*backends, version=version))
        await fabric.settle()
        after = await asked(fabric, version=version)
        assert after.pop(first) == remembered  # who is known stays
        assert set(after.values()) == {"three"} and set(after) == set(others)
