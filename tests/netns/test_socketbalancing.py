"""Balancing at connect(2), on the real kernel: what goes past the rules, and what must not.

That a connection was led so, and not by the rules, is told by the tracking of the host, which
knows of those only. What both ways have in common: test_balancing.py, test_tallies.py.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.datapath import bpf, socketbalancer, socketmaps
from agent.datapath.socketbalancer import SocketBalancer
from agent.drivers.marks import LED, LED_MASK
from agent.notation import parse_address
from tests.netns.balancing_hosts import (
    Client,
    Server,
    ask,
    backend,
    frontend,
    network,
    refused,
    serve,
    tracked,
)
from tests.netns.datapath_hosts import Fabric, Host, Sandbox, opened, restart
from tests.netns.test_services import served
from tests.netns.world import VXMESH, World, said

VIP = "10.7.0.100"
LINK_DETACH = 34  # of bpf(2), linux/bpf.h


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


def sockets(host: Host) -> SocketBalancer:
    """What the agent of a host has in the kernel."""
    applier = host.reconciler._applier
    assert applier and applier.serving.sockets.is_on, "this kernel has what it takes"
    return applier.serving.sockets


async def led(fabric: Fabric, box: Sandbox, address: str, port: int = 80) -> bool:
    """Whether a connection from a sandbox of host a goes past the rules; it is made in any case."""
    before = tracked(fabric.a.own)
    await ask(box.path, address, port)
    return tracked(fabric.a.own) == before


async def test_a_client_sees_the_vip_and_its_backend_the_client(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    over4, over6 = backend(fabric.b, 3), backend(fabric.b, 3, version=6)
    serve(fabric.hosts, frontend(over4), frontend(over6, name="six", vip="fd00:7::100"))
    await fabric.settle()
    async with Server(far.path, "far", address="::"):
        for version, address, seen in (
            (4, VIP, "::ffff:10.7.0.2"),
            (6, "fd00:7::100", "fd00:7::2"),
            (6, f"::ffff:{VIP}", "::ffff:10.7.0.2"),
        ):
            client = await Client(near.path, version=version).connect(address, 80)
            assert client.sock.getpeername()[:2] == (address, 80)
            assert await client.ask() == ("far", seen)
            mark = client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
            assert mark & LED_MASK == LED
            client.close()
        assert tracked(fabric.a.own) == 0, "no rule has seen them"
    counts = sum((await fabric.a.reconciler.connections()).values())
    assert counts == 3


async def test_what_it_does_not_take_goes_by_the_rules(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    one = backend(fabric.b, 3)
    serve(
        fabric.hosts,
        frontend(one),
        frontend(one, name="sticky", vip="10.7.0.101", affinity=60),
        frontend(one, name="udp", vip="10.7.0.102", protocol="udp"),
        frontend(name="empty", vip="10.7.0.103"),
    )
    await fabric.settle()
    async with Server(far.path, "far"):
        assert await led(fabric, near, VIP)
        assert not await led(fabric, near, "10.7.0.101")
        assert await ask(near.path, "10.7.0.102", 80, "udp") == ("far", "10.7.0.2")
        assert await refused(near.path, "10.7.0.103", 80)
        assert await refused(near.path, VIP, 81)
        for option, value in ((socket.SO_MARK, 7), (socket.SO_BINDTODEVICE, b"eth0")):
            client, before = Client(near.path), tracked(fabric.a.own)
            client.sock.setsockopt(socket.SOL_SOCKET, option, value)
            assert await (await client.connect(VIP, 80)).ask() == ("far", "10.7.0.2")
            assert tracked(fabric.a.own) == before + 1
            client.close()


async def test_a_socket_that_connects_elsewhere_is_not_taken_for_one_that_was_led(
    fabric: Fabric,
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3, port=8089)))
    await fabric.settle()
    async with Server(far.path, "far"):
        client = Client(near.path)
        client.sock.setblocking(True)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(client.sock.connect, (VIP, 80))
        assert client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
        await asyncio.to_thread(client.sock.connect, ("10.7.0.3", 8080))
        client.sock.setblocking(False)
        assert client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0
        assert client.sock.getpeername() == ("10.7.0.3", 8080)
        await restart(fabric.a)
        assert await client.ask() == ("far", "10.7.0.2")
        client.close()


async def test_a_backend_that_reaches_itself_is_answered(fabric: Fabric) -> None:
    (box,) = await network(fabric, fabric.a)
    serve(fabric.hosts, frontend(backend(fabric.a, 2)))
    await fabric.settle()
    async with Server(box.path, "box"):
        client = await Client(box.path).connect(VIP, 80)
        assert await client.ask() == ("box", "10.7.0.2")
        await restart(fabric.a)  # the accepting end has the mark of the other one, and lives
        assert await client.ask() == ("box", "10.7.0.2")
        client.close()


async def test_a_sandbox_is_led_in_each_of_its_networks_and_in_no_other(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    await network(fabric, vni=8)
    serve(
        fabric.hosts,
        frontend(backend(fabric.b, 3)),
        frontend(backend(fabric.b, 4, vni=8), name="db", vip="10.8.0.100", vni=8),
        frontend(replace(backend(fabric.b, 3), address=parse_address("10.9.0.3")), name="astray",
                 vip="10.7.0.101"),
    )  # fmt: skip
    other = Sandbox(fabric)  # comes when the services are there
    fabric.b.add_port(8, 4, other)
    await fabric.settle()
    cookies = set(sockets(fabric.a)._contents.wanted["sandboxes"])
    fabric.a.add_port(8, 5, near, ifname="eth1", gateways=())
    await fabric.settle()
    async with Server(far.path, "far"), Server(other.path, "other"):
        assert await led(fabric, near, VIP)
        assert await led(fabric, near, "10.8.0.100")
        client = await Client(other.path).connect("10.8.0.100", 80)
        assert await client.ask() == ("other", "10.8.0.4")
        client.close()
        with pytest.raises((TimeoutError, OSError)):
            await ask(other.path, VIP, 80, timeout=10)
    there = sockets(fabric.a)._contents.wanted
    assert len(set(there["sandboxes"]) - cookies) == 1, "in the second network"
    assert socketmaps.entry(parse_address("10.7.0.101"), 80) not in there["frontends"]
    fabric.a.set_ports(8, {})
    await fabric.settle()
    assert set(sockets(fabric.a)._contents.wanted["sandboxes"]) == cookies


async def test_a_connection_that_is_being_made_to_a_backend_that_goes_is_ended(
    fabric: Fabric,
) -> None:
    (near,) = await network(fabric, fabric.a)
    serve(fabric.hosts, frontend(backend(fabric.b, 9)))  # nobody is there
    await fabric.settle()
    connecting = asyncio.create_task(Client(near.path).connect(VIP, 80))
    await asyncio.sleep(0)
    serve(fabric.hosts, frontend())
    await fabric.settle()
    with pytest.raises(ConnectionAbortedError):
        await connecting


async def test_what_others_change_is_put_back_and_counted(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3)))
    await fabric.settle()
    mine = sockets(fabric.a)
    async with Server(far.path, "far"):
        for link in mine._links.values():
            bpf._bpf("link", LINK_DETACH, struct.pack("=I", link))  # as others may do
        assert not await led(fabric, near, VIP)
        slots, frontends = mine._maps["slots"], mine._maps["frontends"]
        (key,) = slots.read()
        slots.update({key: bytes(24)})  # leads nowhere
        slots.update({bytes(8): bytes(24)})  # a foreign one
        frontends.delete(frontends.read())
        fabric.a.reconciler.audit()
        await fabric.settle()
        assert fabric.a.reconciler.repairs["bpf"] == 4 + 3
        assert await led(fabric, near, VIP)
        fabric.a.reconciler.audit()
        await fabric.settle()
        assert fabric.a.reconciler.repairs["bpf"] == 7, "what is right is not repaired"


async def test_without_an_agent_the_rules_go_on(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3)))
    await fabric.settle()
    async with Server(far.path, "far"):
        client = await Client(near.path).connect(VIP, 80)
        await client.ask()
        await fabric.a.reconciler.stop()
        assert await client.ask() == ("far", "10.7.0.2")
        assert not await led(fabric, near, VIP)
        await fabric.a.make().start()
        assert await client.ask() == ("far", "10.7.0.2")
        assert await led(fabric, near, VIP)
        client.close()


async def test_a_kernel_that_refuses_it_is_told_of_once_and_the_rules_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EPERM, "link: Operation not permitted")

    told: list[str] = []
    log = SimpleNamespace(warning=lambda event, **_: told.append(event))
    monkeypatch.setattr(socketbalancer, "log", log)
    monkeypatch.setattr(bpf, "attach", refuse)
    async with opened(tmp_path) as fabric:
        near, far = await network(fabric, fabric.a, fabric.b)
        serve(fabric.hosts, frontend(backend(fabric.b, 3)))
        await fabric.settle()
        async with Server(far.path, "far"):
            assert await ask(near.path, VIP, 80) == ("far", "10.7.0.2")
            assert tracked(fabric.a.own) == 1
        fabric.a.reconciler.audit()
        await fabric.settle()
        assert not fabric.a.reconciler.failures()
        assert not fabric.a.reconciler.repairs["bpf"]
    assert told == ["balancing.sockets_off"] * len(fabric.hosts)


# For each line: a new connection ("new"), one that is kept ("keep"), a question on that ("ask").
# Says the mark of the socket, and who answered or what went wrong.
CLIENT = """
import socket, sys
def connect():
    return socket.create_connection((sys.argv[1], 80), timeout=20)
def ask(sock):
    sock.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    answer = b""
    while b"\\r\\n\\r\\n" not in answer or len(answer.split(b"\\r\\n\\r\\n")[1]) < 3:
        more = sock.recv(4096)
        if not more:
            raise EOFError
        answer += more
    return answer.split(b"\\r\\n\\r\\n")[1].split()[0].decode()
for line in sys.stdin:
    try:
        sock = kept if line == "ask\\n" else connect()
        if line == "keep\\n":
            kept = sock
        print(sock.getsockopt(socket.SOL_SOCKET, 36), ask(sock), flush=True)
    except Exception as error:
        print(0, type(error).__name__, flush=True)
"""


def test_an_agent_that_is_killed_leaves_nothing_of_it_and_looks_after_it_when_it_is_back(
    world: World,
) -> None:
    net = world.network("--subnet", "10.76.0.0/24")
    box = world.workload("h1", net)
    served(world, "h2", net, "goes")
    served(world, "h3", net, "stays")
    port = ("--network", net, "--port", "80:8000")
    world.vx("h1", "service", "create", "web", *port, "--wait=10")
    world.vx("h1", "service", "backend", "add", "web", "goes", "--wait=10")
    vip = world.read("h1", "service", "inspect", "web")["vips"][0]
    pipe = subprocess.PIPE
    command = [VXMESH, "exec", box, "--", sys.executable, "-c", CLIENT, vip]
    client = world.host("h1").popen(command, text=True, stdin=pipe, stdout=pipe)

    def say(what: str) -> tuple[bool, str]:
        """Whether it was led, and who answered."""
        assert client.stdin
        client.stdin.write(f"{what}\n")
        client.stdin.flush()
        mark, who = said(client.stdout).split()
        return int(mark) & LED_MASK == LED, who

    try:
        world.wait(lambda: say("keep") == (True, "goes"), "led")
        world.bed.kill("h1")
        world.wait(lambda: say("new") == (False, "goes"), "by the rules")
        world.wait(lambda: say("ask") == (True, "goes"), "it lives")
        world.vx("h2", "service", "backend", "add", "web", "stays")
        world.vx("h2", "service", "backend", "rm", "web", "goes")
        world.bed.start("h1")
        world.wait(lambda: say("ask")[1] == "ConnectionAbortedError", "its connection is ended")
        world.wait(lambda: say("new") == (True, "stays"), "led to another one")
    finally:
        assert client.stdin
        client.stdin.close()
        client.wait(60)
