"""Shortcuts past the bridge, on the real kernel: what goes there, and what must not.

Which way TCP went is told by a rule of the test's own at the bridge, which counts what passes.
That all else works beside them, every other test of this folder tells: they are on in all of them.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from agent.datapath import bpf, filterpacking, shortcutprograms
from agent.datapath import shortcuts as module
from agent.datapath.shortcuts import Shortcuts
from agent.drivers.base import Port, Rows
from agent.notation import parse_address
from agent.syscalls import in_netns
from tests.netns import frames
from tests.netns.datapath_hosts import (
    DEADLINE,
    Desired,
    Fabric,
    Host,
    Sandbox,
    opened,
    paired,
    ports_of,
    restart,
    run,
    until,
)
from tests.netns.world import VXMESH, World, said, until_said

COUNTING = """
table bridge watch {
	counter outwards { }
	counter inwards { }
	chain forward {
		type filter hook forward priority 0; policy accept;
		meta l4proto tcp iifname "vxp*" counter name outwards
		meta l4proto tcp iifname "vxl*" counter name inwards
	}
}
"""


class Bridged(NamedTuple):
    """Frames of TCP that went over the bridge."""

    outwards: int
    inwards: int


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


def shortcuts(host: Host) -> Shortcuts:
    applier = host.reconciler._applier
    assert applier and applier.shortcuts.is_on, "this kernel has what it takes"
    return applier.shortcuts


def bridged(host: Host) -> Bridged:
    """Since the first call."""
    if "watch" not in host.inside("nft", "list", "tables"):
        run("nft", "-f", "-", netns=host.own, text=COUNTING)
    listed = host.inside("nft", "list", "table", "bridge", "watch")
    return Bridged(*map(int, re.findall(r"packets (\d+)", listed)))


async def talk(near: Sandbox, far: Sandbox, address: str, size: int = 1 << 20) -> None:
    """`size` bytes from one sandbox to another, at `address`, and back. OSError if they cannot."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def listen() -> socket.socket:
        return socket.create_server((address, 0), family=family)

    def connect() -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)

    async def answer() -> None:
        connection, _ = await loop.sock_accept(listening)
        with connection:
            left = size
            while left:
                data = await loop.sock_recv(connection, 1 << 16)
                assert data, "the client has ended"
                left -= len(data)
                await loop.sock_sendall(connection, data)

    async def ask(client: socket.socket) -> None:
        await loop.sock_connect(client, (address, port))
        await asyncio.gather(loop.sock_sendall(client, bytes(size)), take(client))

    async def take(client: socket.socket) -> None:
        left = size
        while left:
            data = await loop.sock_recv(client, 1 << 16)
            assert data, "the server has ended"
            left -= len(data)

    loop = asyncio.get_running_loop()
    with in_netns(far.path, listen) as listening, in_netns(near.path, connect) as client:
        port = listening.getsockname()[1]
        listening.setblocking(False)
        client.setblocking(False)
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(answer(), ask(client))


@pytest.mark.parametrize("address", ["10.7.0.3", "fd00:7::3"])
async def test_tcp_between_hosts_goes_past_the_bridge(fabric: Fabric, address: str) -> None:
    _, near, far = await paired(fabric)
    before = [bridged(host) for host in fabric.hosts]
    await talk(near, far, address)
    assert [bridged(host) for host in fabric.hosts] == before


async def test_it_goes_by_the_bridge_without_an_agent_and_when_it_is_told_to(
    fabric: Fabric,
) -> None:
    _, near, far = await paired(fabric)
    a, b = fabric.hosts
    await b.reconciler.stop()
    before = bridged(b)
    await talk(near, far, "10.7.0.3")
    assert all(now > then for now, then in zip(bridged(b), before, strict=True))
    await b.make(has_shortcuts=False).start()
    before = bridged(b)
    await talk(near, far, "10.7.0.3")
    assert all(now > then for now, then in zip(bridged(b), before, strict=True))
    await restart(b)
    await fabric.settle()
    both = bridged(a), bridged(b)
    await talk(near, far, "10.7.0.3")
    assert (bridged(a), bridged(b)) == both


async def past(fabric: Fabric, near: Sandbox, far: Sandbox, address: str) -> list[bool]:
    """Whether what a, where `near` is, and b send and take goes past their bridges."""
    before = [count for host in fabric.hosts for count in bridged(host)]
    await talk(near, far, address)
    after = [count for host in fabric.hosts for count in bridged(host)]
    return [now == then for then, now in zip(before, after, strict=True)]


async def test_who_comes_is_known_to_be_here_before_anybody_can_send_to_it(
    fabric: Fabric,
) -> None:
    """A frame for it would be lost at the VXLAN device."""
    _, near, _ = await paired(fabric)
    applier = fabric.a.reconciler._applier
    assert applier
    stations, attach = shortcuts(fabric.a)._maps["stations"], applier.networks.attach
    known: list[bool] = []

    async def look(vni: int, port: Port, *arguments: Any) -> None:
        known.append(any(port.mac in key for key in stations.read()))
        await attach(vni, port, *arguments)

    applier.networks.attach = look  # type: ignore[method-assign, assignment]
    late = Sandbox(fabric)
    port = fabric.a.add_port(7, 9, late)
    await fabric.a.reconciler.settle(port.endpoint)
    assert known == [True]
    await talk(near, late, "10.7.0.9")
    await talk(late, near, "fd00:7::2")


async def test_a_mac_that_goes_to_another_host_and_back(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    assert await past(fabric, near, far, "10.7.0.3") == [True] * 4
    a, b = fabric.hosts
    port = next(iter(b.desired.networks[7].ports.values()))
    here = Sandbox(fabric)
    b.set_ports(7, {})
    del a.desired.fdb[7][port.mac]
    a.reconciler.touch_rows(7, [port.mac], [])
    moved = replace(port, netns=str(here.path), inode=here.inode)
    a.set_ports(7, {**a.desired.networks[7].ports, port.endpoint: moved})
    await fabric.settle()
    await talk(near, here, "10.7.0.3")
    ports = a.desired.networks[7].ports
    a.set_ports(7, {e: each for e, each in ports.items() if e != port.endpoint})
    a.desired.fdb[7][port.mac] = parse_address(b.vtep)
    a.reconciler.touch_rows(7, [port.mac], [])
    b.set_ports(7, {port.endpoint: port})
    await fabric.settle()
    assert await past(fabric, near, far, "10.7.0.3") == [True] * 4


async def test_ports_that_go_to_another_vxlan_device(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    for host in fabric.hosts:
        bridge = host.desired.networks.pop(7)
        host.desired.networks[8] = replace(bridge, vni=8, device="vxb8", vxlan="vxl8")
        host.desired.fdb[8] = host.desired.fdb.pop(7)
        host.desired.neighbours[8] = host.desired.neighbours.pop(7)
        host.reconciler.touch_bridge(7)
        host.reconciler.touch_bridge(8)
    await fabric.settle()
    assert await past(fabric, near, far, "10.7.0.3") == [True] * 4
    for host in fabric.hosts:
        kept = {
            shortcutprograms.STATION.unpack(k)[0] for k in shortcuts(host)._maps["stations"].read()
        }
        assert kept == {host.links()["vxl8"]["ifindex"]}


async def test_where_a_network_floods_the_bridge_leads_outwards(fabric: Fabric) -> None:
    """Unicast for whom nobody knows would go to all hosts."""

    class Flooding(Desired):
        def rows(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> Rows:
            return replace(super().rows(vni, macs, addresses), floods=True)

        def all_rows(self, vni: int) -> Rows:
            return replace(super().all_rows(vni), floods=True)

    near, far = Sandbox(fabric), Sandbox(fabric)
    for host, number, sandbox in ((fabric.a, 2, near), (fabric.b, 3, far)):
        host.desired.__class__ = Flooding
        host.add_network(7, flood_rate=100)
        host.add_port(7, number, sandbox)
    await fabric.settle()
    assert await past(fabric, near, far, "10.7.0.3") == [False, True] * 2


async def test_what_others_change_is_put_back_and_counted(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    b = fabric.b
    await restart(b, audit_interval=3600)
    await fabric.settle()
    port, maps = ports_of(b)[0], shortcuts(b)._maps
    for device in (port, "vxl7"):
        b.inside("tc", "filter", "del", "dev", device, "ingress")
    astray = next(iter(maps["sources"].read()))
    maps["sources"].delete([astray])
    maps["stations"].update({bytes(maps["stations"].spec.key): bytes(4)})
    assert await past(fabric, near, far, "10.7.0.3") == [True, True, False, False]
    b.reconciler.audit()
    await fabric.settle()
    assert b.reconciler.repairs["bpf"] == 4
    assert await past(fabric, near, far, "10.7.0.3") == [True] * 4
    assert bytes(maps["stations"].spec.key) not in maps["stations"].read()
    maps["programs"].drop(shortcutprograms.SLOT.pack(shortcutprograms.INWARDS))
    assert await past(fabric, near, far, "10.7.0.3") == [True, True, True, False]
    b.reconciler.audit()
    await fabric.settle()
    assert await past(fabric, near, far, "10.7.0.3") == [True] * 4


async def test_a_device_that_was_made_without_a_place_for_programs_gets_none(
    fabric: Fabric,
) -> None:
    """While it is made, what the device is to send is lost."""
    a = fabric.a
    await a.reconciler.stop()
    await a.make(has_shortcuts=False).start()
    _, near, far = await paired(fabric)
    await restart(a)
    await fabric.settle()
    port = ports_of(a)[0]
    for device in (port, "vxl7"):
        assert "clsact" not in a.inside("tc", "qdisc", "show", "dev", device)
    assert await past(fabric, near, far, "10.7.0.3") == [False, False, True, True]
    a.reconciler.audit()
    await fabric.settle()
    assert not a.reconciler.repairs
    late = Sandbox(fabric)
    a.add_port(7, 9, late)
    await fabric.settle()
    assert await past(fabric, late, far, "10.7.0.3") == [True, False, True, True]


async def test_a_port_that_goes_is_no_repair(fabric: Fabric) -> None:
    await paired(fabric)
    a = fabric.a
    a.set_ports(7, {})
    a.reconciler.audit()
    await fabric.settle()
    assert not a.reconciler.repairs


async def test_a_thread_that_cannot_be_had_ends_no_agent(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, far = await paired(fabric)
    a, attach = fabric.a, Shortcuts._attach
    refused: list[object] = []

    def refuse(shortcuts: Shortcuts, wanted: dict[int, int]) -> None:
        if not refused:
            refused.append(wanted)
            raise RuntimeError("can't start new thread")
        attach(shortcuts, wanted)

    monkeypatch.setattr(Shortcuts, "_attach", refuse)
    late = Sandbox(fabric)
    a.add_port(7, 9, late)
    await fabric.settle()  # by the next attempt
    assert refused
    assert await past(fabric, late, far, "10.7.0.3") == [True] * 4


async def test_a_port_made_anew_is_reached_from_the_moment_it_is_there(fabric: Fabric) -> None:
    """Of frames to a device that has gone the bridge would have got some there."""
    await paired(fabric)
    a = fabric.a
    applier = a.reconciler._applier
    assert applier
    stations, attach = shortcuts(a)._maps["stations"], applier.networks.attach
    led: list[int] = []

    def leads_to(mac: bytes) -> int:
        (to,) = [value for key, value in stations.read().items() if mac in key]
        return int(shortcutprograms.PORT.unpack(to)[0])

    async def look(vni: int, port: Port, *arguments: Any) -> None:
        led.append(leads_to(port.mac))
        await attach(vni, port, *arguments)

    applier.networks.attach = look  # type: ignore[method-assign, assignment]
    ((endpoint, port),) = a.desired.networks[7].ports.items()
    anew = Sandbox(fabric)
    a.set_ports(7, {endpoint: replace(port, netns=str(anew.path), inode=anew.inode)})
    await fabric.settle()
    assert led == [0], "by the bridge meanwhile"
    assert leads_to(port.mac) == applier.networks.held[7].ports[endpoint][1]


async def test_an_address_that_is_taken_away_is_sent_from_no_more(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    a, b = fabric.hosts
    ((endpoint, port),) = a.desired.networks[7].ports.items()
    ((_, other),) = b.desired.networks[7].ports.items()

    def syn(source: str) -> bytes:
        packet = frames.ipv4(source, "10.7.0.3", frames.TCP, frames.tcp_syn(999, 4000))
        return frames.ethernet(other.mac, port.mac, frames.IPV4, packet)

    old, new = syn("10.7.0.2"), syn("10.7.0.9")
    with frames.listening(far.path) as (ear,):
        frames.send(near.path, "eth0", old)
        assert ear.hears(old)
        a.set_ports(7, {endpoint: replace(port, addresses=("10.7.0.9/24",), gateways=())})
        await fabric.settle()
        old = syn("10.7.0.2")
        frames.send(near.path, "eth0", old, new)
        assert ear.hears(new) and not ear.has(old)


async def test_what_has_no_room_goes_by_the_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = listen_to(monkeypatch)
    small = {
        **shortcutprograms.MAPS,
        "sources": replace(shortcutprograms.MAPS["sources"], entries=1),
    }
    monkeypatch.setattr(module, "MAPS", small)
    async with opened(tmp_path) as fabric:
        _, near, far = await paired(fabric)
        await talk(near, far, "10.7.0.3")
        assert told == ["shortcuts.full"] * 2
        assert not any(shortcuts(host)._maps["stations"].read() for host in fabric.hosts)
        for host in fabric.hosts:  # of two addresses one is left
            ports = host.desired.networks[7].ports
            host.set_ports(
                7,
                {
                    e: replace(p, addresses=p.addresses[:1], gateways=p.gateways[:1])
                    for e, p in ports.items()
                },
            )
        await fabric.settle()
        assert await past(fabric, near, far, "10.7.0.3") == [True] * 4


@pytest.mark.parametrize("where", ["load", "attach"])
async def test_a_kernel_that_refuses_it_is_told_of_once_and_the_bridge_does(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = listen_to(monkeypatch)

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EPERM, "program: Operation not permitted")

    def unknown(*arguments: Any) -> bytes:
        return new_program(*arguments).replace(b"bpf\0", b"bpx\0")

    new_program = filterpacking.new_program
    if where == "load":
        monkeypatch.setattr(bpf, "load", refuse)
    else:
        monkeypatch.setattr(filterpacking, "new_program", unknown)
    async with opened(tmp_path, at_sockets=False) as fabric:
        _, near, far = await paired(fabric)
        await talk(near, far, "10.7.0.3")
        fabric.a.reconciler.audit()
        await fabric.settle()
        assert not fabric.a.reconciler.failures()
        assert not fabric.a.reconciler.repairs["bpf"]
    assert told == ["shortcuts.off"] * 2


def listen_to(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told of shortcuts from here on."""
    told: list[str] = []
    log = SimpleNamespace(warning=lambda event, **_: told.append(event))
    monkeypatch.setattr(module, "log", log)
    return told


SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(100))
    connection.close()
"""
# For each line: a connection, a question on it, and the answer.
CLIENT = """
import socket, sys
for line in sys.stdin:
    with socket.create_connection((sys.argv[1], 7000), timeout=20) as sock:
        sock.sendall(line.encode())
        print(sock.recv(100).decode().strip(), flush=True)
"""


def test_an_agent_that_is_killed_leads_nothing_any_more(world: World) -> None:
    net = world.network()
    near, far = world.workload("h1", net), world.workload("h2", net)
    address = world.address("h2", far)
    pipe = subprocess.PIPE

    def started(host: str, sandbox: str, *words: str) -> subprocess.Popen[str]:
        command = [VXMESH, "exec", sandbox, "--", sys.executable, "-c", *words]
        return world.host(host).popen(command, text=True, stdin=pipe, stdout=pipe)

    def past() -> bool:
        """Whether a connection that works goes past the bridge of h1."""
        before = counted()
        assert client.stdin
        client.stdin.write("hello\n")
        client.stdin.flush()
        assert said(client.stdout) == "hello\n"
        return counted() == before

    def counted() -> str:
        return world.in_own("h1", "nft", "list", "counters", "table", "bridge", "watch")

    server, client = started("h2", far, SERVER), started("h1", near, CLIENT, address)
    try:
        until_said(server.stdout, "ready")
        world.later(lambda: world.in_own("h1", "nft", "delete", "table", "bridge", "watch"))
        world.in_own("h1", "nft", COUNTING.replace("meta l4proto tcp", "tcp dport 7000"))
        world.wait(past, "past the bridge")
        world.bed.kill("h1")
        try:
            world.wait(lambda: not past(), "by the bridge")
        finally:
            world.bed.start("h1")
        world.wait(past, "past the bridge again")
    finally:
        for process in (server, client):
            process.kill()
            process.wait()


async def test_a_look_at_maps_and_programs_that_fails_is_told_and_tried_again(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing was to be attached in the same pass."""
    a = fabric.a
    looked: list[bool] = []

    async def audit(shortcuts: Shortcuts) -> int:
        looked.append(True)
        raise OSError(errno.ENOMEM, "map stations: Cannot allocate memory")

    monkeypatch.setattr(Shortcuts, "audit", audit)
    await paired(fabric)
    a.reconciler.audit()
    await a.reconciler.settle()
    assert looked
    assert any("shortcuts" in str(error) for error in a.reconciler.failures())


async def test_attempts_that_go_on_failing_come_later_each_time(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the look at the maps between them finds nothing wrong."""
    await paired(fabric)
    a = fabric.a
    failures, failed = a.reconciler._failures, a.reconciler._failures.failed
    times: list[int] = []

    def refuse(shortcuts: Shortcuts, wanted: dict[int, int]) -> None:
        raise RuntimeError("can't start new thread")

    def note(key: Any, error: Exception) -> None:
        failed(key, error)
        times.append(failures._failures[key].times)

    monkeypatch.setattr(Shortcuts, "_attach", refuse)
    monkeypatch.setattr(failures, "failed", note)
    a.add_port(7, 9, Sandbox(fabric))
    await until(lambda: len(times) >= 3, "three attempts")
    assert times[:3] == [1, 2, 3]


async def test_what_the_guard_forbids_already_goes_no_more_though_the_bridge_cannot_be_made_so(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, near, far = await paired(fabric)
    a, b = fabric.hosts
    applier = a.reconciler._applier
    assert applier
    ((endpoint, port),) = a.desired.networks[7].ports.items()
    ((_, other),) = b.desired.networks[7].ports.items()

    def syn(source: str) -> bytes:
        packet = frames.ipv4(source, "10.7.0.3", frames.TCP, frames.tcp_syn(999, 4000))
        return frames.ethernet(other.mac, port.mac, frames.IPV4, packet)

    async def ensure(*arguments: Any) -> bool:
        raise OSError(errno.EBUSY, "device vxb7: busy")

    monkeypatch.setattr(applier.networks, "ensure", ensure)
    changed = replace(port, addresses=("10.7.0.9/24",), gateways=())
    a.desired.networks[7] = replace(a.desired.networks[7], mtu=1400, ports={endpoint: changed})
    a.reconciler.touch_bridge(7)
    await a.reconciler.settle()
    assert a.reconciler.failures()
    with frames.listening(far.path) as (ear,):
        old, new = syn("10.7.0.2"), syn("10.7.0.9")
        frames.send(near.path, "eth0", old, new)
        assert ear.hears(new) and not ear.has(old)


async def test_a_port_that_goes_as_another_comes_leaves_nothing_in_the_maps(
    fabric: Fabric,
) -> None:
    await paired(fabric)
    a = fabric.a
    gone = a.add_port(7, 9, Sandbox(fabric))
    await fabric.settle()
    ports = a.desired.networks[7].ports
    a.set_ports(7, {e: each for e, each in ports.items() if e != gone.endpoint})
    a.add_port(7, 10, Sandbox(fabric))
    await fabric.settle()
    a.reconciler.audit()
    await fabric.settle()
    for elements in ("stations", "sources"):
        assert not [k for k in shortcuts(a)._maps[elements].read() if gone.mac in k], elements
    here = {link["ifindex"] for link in a.links().values()}
    assert shortcuts(a)._wanted_at().keys() <= here
