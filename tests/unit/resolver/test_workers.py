"""Several processes of the name server: what is fed is in force in all, and one may end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import dns.message
import pytest_asyncio

from agent.model import Endpoint, Network
from agent.notation import parse_address
from agent.resolver.client import ResolverClient
from agent.resolver.feed import Batch, ServiceRow, State, View
from agent.syscalls import start_time
from tests.ports import free_port

NET = "d" * 16
ASKED = 60  # from as many ports: none of three workers goes without, but once in 10^10


def endpoint(address: str) -> Endpoint:
    return Endpoint("1" * 16, NET, "one", bytes(6), (parse_address(address),))


def state() -> State:
    network = Network(
        NET, "demo", "overlay", ("10.1.0.0/16",), (), "", 1, 0, False, False, {}, {},
        created=0.0, creator="",
    )  # fmt: skip
    view = View(parse_address("127.0.0.1"), (NET,))
    web = ServiceRow(NET, "s" * 16, "web", (parse_address("10.1.0.100"),))
    return State([network], [endpoint("10.1.0.2")], [view], [web])


@pytest_asyncio.fixture
async def fed(tmp_path: Path) -> AsyncIterator[tuple[ResolverClient, int]]:
    port = free_port()
    client = ResolverClient(tmp_path, None, state, (f"127.0.0.1:{port}",), workers=3)
    await client.connect_or_spawn()
    try:
        yield client, port
    finally:
        await client.stop()


def workers_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def addresses(port: int, name: str = "one") -> set[str]:
    """What those who ask from many ports are told."""

    def ask() -> set[str]:
        found = set()
        for _ in range(ASKED):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(15)
                sock.connect(("127.0.0.1", port))
                sock.send(dns.message.make_query(name, "A").to_wire())
                found.add(str(dns.message.from_wire(sock.recv(4096)).answer[0][0]))
        return found

    return await asyncio.to_thread(ask)


async def test_all_answer_and_a_change_is_in_force_in_all(fed: tuple[ResolverClient, int]) -> None:
    client, port = fed
    assert await addresses(port) == {"10.1.0.2"}
    assert await addresses(port, "web.demo") == {"10.1.0.100"}
    for number in range(3, 13):
        batch = Batch()
        batch.put(endpoint(f"10.1.0.{number}"))
        client.send(batch)
        await client.flush()
        assert await addresses(port) == {f"10.1.0.{number}"}
    counters = (await client.stats()).counters
    assert counters["workers"] == 3
    assert counters["udp"] == counters["answer"] == 12 * ASKED


async def test_one_that_ends_leaves_its_questions_to_the_first(
    fed: tuple[ResolverClient, int],
) -> None:
    client, port = fed
    for pid in workers_of(client.pid):
        os.kill(pid, signal.SIGKILL)
        assert await addresses(port) == {"10.1.0.2"}
    assert (await client.stats()).counters["workers"] == 1
    batch = Batch()
    batch.put(endpoint("10.1.0.9"))
    client.send(batch)
    await client.flush()
    assert await addresses(port) == {"10.1.0.9"}


async def test_all_end_with_the_first(fed: tuple[ResolverClient, int]) -> None:
    client, port = fed
    first, others = client.pid, workers_of(client.pid)
    assert len(others) == 2
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(60):
        while any(start_time(pid) for pid in others) or client.pid in (0, first):
            await asyncio.sleep(0.02)
    assert await addresses(port) == {"10.1.0.2"}
