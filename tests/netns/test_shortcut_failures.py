"""Shortcuts past the bridge where something fails, or somebody interferes: the bridge goes on."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.datapath import bpf, filterpacking, shortcutprograms
from agent.datapath import shortcuts as module
from agent.datapath.shortcuts import Shortcuts
from tests.netns.datapath_hosts import (
    Fabric,
    Sandbox,
    opened,
    paired,
    ports_of,
    restart,
    until,
)
from tests.netns.shortcut_ways import COUNTING, past, shortcuts, talk
from tests.netns.world import VXMESH, World, said, until_said


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


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
