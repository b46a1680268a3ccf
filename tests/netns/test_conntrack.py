"""The table of connections on the real kernel: what is deleted is what was found."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.datapath.conntrack import Conntrack, Entry, with_table
from tests.netns.balancing_hosts import (
    Client,
    Server,
    backend,
    frontend,
    listening,
    network,
    serve,
)
from tests.netns.datapath_hosts import Fabric, opened, until

FORGOTTEN = 5.0  # s; the kernel's own time for it would be 10


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


def balanced(netns: Path) -> list[Entry]:
    """The TCP connections of a namespace that were led elsewhere."""
    found: list[Entry] = []

    def work(table: Conntrack) -> None:
        found.extend(table.find(socket.AF_INET))

    with_table(netns, work)
    return [e for e in found if e.original.target != e.reply.source]


def delete(netns: Path, entries: list[Entry]) -> list[Entry]:
    """Those that were still there."""
    deleted: list[Entry] = []
    with_table(netns, lambda table: deleted.extend(table.delete(entries, socket.AF_INET)))
    return deleted


async def test_a_new_connection_at_the_ports_of_an_old_one_is_not_deleted_in_its_place(
    fabric: Fabric,
) -> None:
    """Between the look and the deletion a client takes a port again: with many short connections
    that happens within milliseconds, and the kernel gives the new one the old one's id."""
    near, far = await network(fabric, fabric.a, fabric.b)
    one, two = backend(fabric.a, 2), backend(fabric.b, 3)
    serve(fabric.hosts, frontend(one, published=((b"", 8000),)))
    await fabric.settle()
    async with Server(near.path, "one") as server, Server(far.path, "two"):
        first = await Client(fabric.outsider).connect("10.98.0.1", 8000)
        ends = first.sock.getsockname()
        assert (await first.ask())[0] == "one"
        server.connections[0].close()  # the server first: then the client's port is free at once
        assert await first.wait() == b""
        first.close()
        stale = await asyncio.to_thread(balanced, fabric.a.own)
        assert len(stale) == 1
        drained = replace(one, draining=True)
        serve(fabric.hosts, frontend(drained, two, published=((b"", 8000),)))
        await fabric.settle()
        second = Client(fabric.outsider)
        second.sock.bind(ends)
        await second.connect("10.98.0.1", 8000)
        assert (await second.ask())[0] == "two"
        [entry] = await asyncio.to_thread(balanced, fabric.a.own)
        same_id = stale[0]._replace(raw=(stale[0].raw[0], entry.raw[1]))  # whatever memory it got
        assert await asyncio.to_thread(delete, fabric.a.own, [same_id]) == []
        assert (await second.ask())[0] == "two", "it goes on"
        assert await asyncio.to_thread(delete, fabric.a.own, [entry]) == [entry]
        second.close()


async def test_a_client_that_comes_again_by_the_port_of_a_broken_connection_gets_a_living_backend(
    fabric: Fabric,
) -> None:
    """A backend that is killed resets its connections; the port of one is soon taken again by a
    client, and must not lead there: it is unhealthy by then."""
    near, far = await network(fabric, fabric.a, fabric.b)
    one, two = backend(fabric.a, 2), backend(fabric.b, 3)
    serve(fabric.hosts, frontend(one, published=((b"", 8000),)))
    await fabric.settle()
    loop = asyncio.get_running_loop()
    async with Server(far.path, "two"):
        listener = listening(near.path, "0.0.0.0", 8080)
        listener.setblocking(False)
        first = await Client(fabric.outsider).connect("10.98.0.1", 8000)
        accepted, _ = await loop.sock_accept(listener)
        await loop.sock_sendall(first.sock, b"?\n")
        await until(lambda: select.select([accepted], [], [], 0)[0], "the question is there")
        ends = first.sock.getsockname()
        accepted.close()  # with something unread: reset, as when the process is killed
        listener.close()
        with pytest.raises(ConnectionResetError):
            await first.wait()
        first.close()
        drained = replace(one, draining=True)
        serve(fabric.hosts, frontend(drained, two, published=((b"", 8000),)))
        await fabric.settle()
        async with asyncio.timeout(FORGOTTEN):
            await until(lambda: not balanced(fabric.a.own), "the old one is forgotten")
        second = Client(fabric.outsider)
        second.sock.bind(ends)
        await second.connect("10.98.0.1", 8000)
        assert (await second.ask())[0] == "two"
        second.close()
