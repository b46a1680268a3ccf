"""What goes wrong, what goes away, and what is not ours to touch."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.datapath import backlog
from agent.datapath.guardrules import GUARD_TABLE
from agent.datapath.nftables import STATELESS, Nftables
from agent.errors import Conflict, Invalid, NotFound, VxmeshError
from agent.syscalls import socket_in
from tests.netns.datapath_hosts import (
    Fabric,
    Sandbox,
    open_files,
    opened,
    paired,
    pings,
    restart,
    run,
    until,
)

pytestmark = pytest.mark.netns

Pair = tuple[Fabric, Sandbox, Sandbox]


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as made:
        yield made


@pytest.fixture
async def pair(fabric: Fabric) -> Pair:
    return await paired(fabric)


# -- what goes wrong --


async def test_each_failure_is_told_to_who_waits_and_stops_no_other(fabric: Fabric) -> None:
    a = fabric.a
    a.add_network(7)
    good, taken = Sandbox(fabric), Sandbox(fabric)
    taken.run("ip", "link", "add", "eth0", "type", "bridge")
    no_namespace = fabric.folder / "plain-file"
    no_namespace.touch()
    missing = a.add_port(7, 2, good, netns="/run/netns/vxt-not-there")
    plain = a.add_port(7, 3, good, netns=str(no_namespace))
    other = a.add_port(7, 4, good, inode=good.inode + 1)
    name = a.add_port(7, 5, taken)
    fine = a.add_port(7, 6, good)
    kernel = a.reconciler
    with pytest.raises(NotFound, match="vxt-not-there: cannot be opened"):
        await kernel.settle(missing.endpoint)
    with pytest.raises(Invalid, match="is no network namespace"):
        await kernel.settle(plain.endpoint)
    with pytest.raises(Invalid, match="is another namespace"):
        await kernel.settle(other.endpoint)
    with pytest.raises(Conflict, match=r"interface eth0 of .*exists already"):
        await kernel.settle(name.endpoint)
    await kernel.settle(fine.endpoint)
    await kernel.settle()
    assert pings((good.path, "10.7.0.1")) == [True]
    assert len(kernel.failures()) == 4
    # Nothing is left half made.
    assert {link for link in a.links() if link.startswith("vxp")} == {fine.device}
    # What is no longer wanted is no longer a failure.
    a.set_ports(7, {fine.endpoint: fine, name.endpoint: name})
    await kernel.settle()
    assert len(kernel.failures()) == 1
    # And what stood in the way may go.
    taken.run("ip", "link", "del", "eth0")
    await until(lambda: not kernel.failures(), "the port is made by itself")
    assert pings((taken.path, "10.7.0.6")) == [True]


async def test_a_vni_that_another_device_has_is_named(fabric: Fabric) -> None:
    a = fabric.a
    device = ("vxlan", "id", "7", "dstport", "4789", "local", "10.99.0.1")
    a.run("ip", "link", "add", "leftover", "type", *device)
    a.add_network(7)
    a.add_network(8)
    sandbox = Sandbox(fabric)
    blocked, fine = a.add_port(7, 2, sandbox), a.add_port(8, 2, sandbox, ifname="eth1")
    with pytest.raises(Conflict, match="VNI 7: is taken by device leftover in this host"):
        await a.reconciler.settle(blocked.endpoint)
    await a.reconciler.settle(fine.endpoint)
    assert pings((sandbox.path, "10.8.0.1")) == [True]
    # The network is given up before it ever came to be: its bridge goes as well.
    network = a.desired.networks.pop(7)
    a.reconciler.touch_bridge(7)
    await a.reconciler.settle()
    assert "vxb7" not in a.links() and not a.reconciler.failures()
    a.desired.networks[7] = network
    a.reconciler.touch_bridge(7)
    await a.reconciler.settle()
    assert a.reconciler.failures()
    a.run("ip", "link", "del", "leftover")
    await until(lambda: not a.reconciler.failures(), "the network is made by itself")
    await a.reconciler.settle(blocked.endpoint)
    assert pings((sandbox.path, "10.7.0.1")) == [True]


async def test_a_vni_taken_in_another_namespace_is_found_there(fabric: Fabric) -> None:
    a, device = fabric.a, ("vxlan", "id", "7", "dstport", "4789", "local", "10.99.0.1")
    # Those of other hosts on this machine, as other tests have, are in nobody's way here. One is
    # found before, one after, whatever the order.
    before, swarm, after = (fabric.namespace(name) for name in ("before", "swarm", "after"))
    for other in (before, after):
        run("ip", "link", "add", "not-ours", "type", *device, netns=other)
    a.run("ip", "link", "add", "vx-far", "type", *device)
    a.run("ip", "link", "set", "vx-far", "netns", swarm.name)
    a.add_network(7)
    port = a.add_port(7, 2, Sandbox(fabric))
    with pytest.raises(Conflict, match=f"device vx-far in namespace {swarm}"):
        await a.reconciler.settle(port.endpoint)


async def test_a_data_port_that_is_taken_is_named(fabric: Fabric) -> None:
    a = fabric.a
    with socket_in(a.path, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 4789))
        a.add_network(7)
        port = a.add_port(7, 2, Sandbox(fabric))
        with pytest.raises(Conflict, match="UDP port 4789: is taken on this host"):
            await a.reconciler.settle(port.endpoint)
    await until(lambda: not a.reconciler.failures(), "the network is made by itself")
    await a.reconciler.settle(port.endpoint)


async def test_without_rules_nothing_is_forwarded(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps networks apart may not be missing while something could pass between them."""
    a = fabric.a
    await a.reconciler.remove_all()
    real = Nftables._command

    def refuse(self: Nftables, text: str, flags: int = STATELESS) -> str:
        if self._table == GUARD_TABLE:
            return real(self, text, flags)
        raise VxmeshError("firewall rules", "nftables refused them")

    monkeypatch.setattr(Nftables, "_command", refuse)
    a.make()
    await a.reconciler.start()
    one, two = Sandbox(fabric), Sandbox(fabric)
    for vni, sandbox in ((7, one), (8, two)):
        a.add_network(vni)
        a.add_port(vni, 2, sandbox)
    await a.reconciler.settle()
    refused = a.reconciler.failures()
    assert refused and all(e.what == "firewall rules" for e in refused), "of each table one"
    attempts = [(one.path, "10.8.0.2"), (one.path, "fd00:8::2"), (one.path, "10.98.0.9")]
    assert pings(*attempts) == [False] * 3
    monkeypatch.setattr(Nftables, "_command", real)
    await until(lambda: not a.reconciler.failures(), "the rules are loaded by themselves")
    assert pings(*attempts) == [False, False, True]


async def test_without_its_guard_no_sandbox_is_let_in(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a kernel that has no nftables for bridges: said to who asked, and nothing attached."""
    a = fabric.a
    await a.reconciler.remove_all()
    real = Nftables._command

    def refuse(self: Nftables, text: str, flags: int = STATELESS) -> str:
        if self._table == GUARD_TABLE:
            raise VxmeshError("firewall rules", "nftables refused them (not supported)")
        return real(self, text, flags)

    monkeypatch.setattr(Nftables, "_command", refuse)
    a.make()
    await a.reconciler.start()
    sandbox = Sandbox(fabric)
    a.add_network(7)
    port = a.add_port(7, 2, sandbox)
    with pytest.raises(VxmeshError, match=r"the guard of sandboxes' ports: .*not supported"):
        await a.reconciler.settle(port.endpoint)
    assert port.device not in a.links() and "eth0" not in sandbox.run("ip", "link")
    monkeypatch.setattr(Nftables, "_command", real)
    await until(lambda: not a.reconciler.failures(), "the guard is loaded by itself")
    await until(lambda: sandbox.ping("10.7.0.1"), "it is let in")


async def test_a_failure_is_not_tried_in_a_hot_loop(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever a test before has set up for logs, even that there be none.
    delays: list[float] = []

    def warning(event: str, **fields: Any) -> None:
        if event == "datapath.failed":
            delays.append(fields["again_in"])

    monkeypatch.setattr(backlog, "log", SimpleNamespace(warning=warning))
    a = fabric.a
    a.add_network(7)
    await a.reconciler.settle()
    begin = time.monotonic()
    port = a.add_port(7, 2, Sandbox(fabric), netns="/run/netns/vxt-not-there")
    with contextlib.suppress(NotFound):
        await a.reconciler.settle(port.endpoint)
    for i in range(100):  # other work must not bring it on
        a.reconciler.touch_rows(7, [i.to_bytes(6, "big")], [])
        await a.reconciler.settle()
    await until(lambda: len(delays) >= 3, "it is tried again, and again")
    passed = time.monotonic() - begin
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0][: len(delays)]
    assert len(delays) <= 1 + sum(at < passed for at in (0.5, 1.5, 3.5, 7.5))


# -- sandboxes that go --


async def test_a_sandbox_that_goes_is_told(pair: Pair) -> None:
    fabric, near, _ = pair
    (endpoint,) = fabric.a.desired.networks[7].ports
    run("ip", "netns", "delete", near.path.name)
    await until(lambda: fabric.a.gone, "the port is reported gone")
    assert fabric.a.gone == [endpoint]
    fabric.a.set_ports(7, {})
    await fabric.a.reconciler.settle()
    assert not fabric.a.reconciler.failures()


async def test_a_sandbox_that_went_while_the_agent_was_down_is_told(
    pair: Pair,
) -> None:
    fabric, near, _ = pair
    (endpoint,) = fabric.a.desired.networks[7].ports
    await fabric.a.reconciler.stop()
    # Another one with the same name; made before the first one goes, whose inode is free then.
    other = fabric.namespace("other")
    run("ip", "netns", "delete", near.path.name)
    near.path.touch()
    run("mount", "--bind", str(other), str(near.path))
    fabric.a.make()
    await fabric.a.reconciler.start()
    assert fabric.a.gone == [endpoint]
    assert len(json.loads(near.run("ip", "-j", "link"))) == 1  # it is left alone


async def test_a_default_route_that_the_sandbox_has_stays(fabric: Fabric) -> None:
    a, sandbox = fabric.a, Sandbox(fabric)
    end = ["type", "veth", "peer", "mine1"]
    sandbox.run("ip", "link", "add", "mine0", *end)
    for command in (
        ("link", "set", "mine0", "up"),
        ("link", "set", "mine1", "up"),
        ("address", "add", "172.30.0.2/24", "dev", "mine0"),
        ("route", "add", "default", "via", "172.30.0.1"),
    ):
        sandbox.run("ip", *command)
    a.add_network(7)
    port = a.add_port(7, 2, sandbox)
    await a.reconciler.settle(port.endpoint)
    assert "default via 172.30.0.1" in sandbox.run("ip", "route")
    assert "default via 10.7.0.1" not in sandbox.run("ip", "route")
    assert pings((sandbox.path, "10.7.0.1")) == [True]


# -- what is not ours --


async def test_what_does_not_bear_our_mark_is_never_touched(
    pair: Pair,
) -> None:
    a = pair[0].a
    a.inside("ip", "link", "add", "foreign", "type", "bridge")
    a.inside("ip", "link", "add", "vxb9", "type", "bridge")  # our kind of name, not our mark
    a.run("ip", "route", "add", "10.50.0.0/16", "via", "10.99.0.2", "proto", "static")
    a.run("ip", "link", "add", "vxb9", "type", "bridge")
    a.run("nft", "add", "table", "inet", "theirs")
    a.inside("nft", "add", "table", "inet", "theirs")
    a.reconciler.touch_all()
    await a.reconciler.settle()
    await restart(a)
    assert {"foreign", "vxb9"} <= a.links().keys()
    assert "theirs" in a.inside("nft", "list", "tables")
    await a.reconciler.remove_all()
    assert "10.50.0.0/16 via 10.99.0.2" in a.run("ip", "route")
    assert "theirs" in a.run("nft", "list", "tables")
    assert "vxb9" in a.run("ip", "link")


async def test_a_device_of_others_with_our_name_is_a_conflict(fabric: Fabric) -> None:
    a = fabric.a
    a.inside("ip", "link", "add", "vxb7", "type", "bridge")
    a.inside("ip", "link", "set", "vxb7", "alias", "somebody's")
    a.add_network(7)
    port = a.add_port(7, 2, Sandbox(fabric))
    with pytest.raises(Conflict, match="device vxb7: is there and is not ours"):
        await a.reconciler.settle(port.endpoint)
    assert a.links()["vxb7"]["ifalias"] == "somebody's"


async def test_an_uplink_of_others_keeps_us_from_starting(fabric: Fabric) -> None:
    a = fabric.a
    await a.reconciler.remove_all()
    a.run("ip", "link", "add", "vxmesh0", "type", "bridge")
    before = open_files()
    with pytest.raises(Conflict, match="device vxmesh0: is there and is not ours"):
        await a.make().start()
    assert "vxmesh0" in a.run("ip", "link")
    await until(lambda: open_files() <= before, "no file is left open")


async def test_a_route_of_the_host_to_the_same_subnet_stays(fabric: Fabric) -> None:
    a = fabric.a
    a.run("ip", "route", "add", "10.7.0.0/24", "via", "10.99.0.2")
    a.add_network(7)
    port = a.add_port(7, 2, Sandbox(fabric))
    await a.reconciler.settle(port.endpoint)  # the network itself works
    assert "10.7.0.0/24 via 10.99.0.2" in a.run("ip", "route")
    (failure,) = a.reconciler.failures()
    assert "route to 10.7.0.0/24: the host has another one" in str(failure)
    a.run("ip", "route", "del", "10.7.0.0/24")
    await until(lambda: not a.reconciler.failures(), "the route is made by itself")
    assert "10.7.0.0/24 via 169.254.83.2" in a.run("ip", "route")
