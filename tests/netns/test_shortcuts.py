"""Shortcuts past the bridge, on the real kernel: what goes there, and what must not.

That all else works beside them, every other test of this folder tells: they are on in all of them.
What fails, and what others do: test_shortcut_failures.py.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.datapath import shortcutprograms
from agent.drivers.base import Port, Rows
from agent.notation import parse_address
from tests.netns import frames
from tests.netns.datapath_hosts import (
    Desired,
    Fabric,
    Sandbox,
    opened,
    paired,
    restart,
)
from tests.netns.shortcut_ways import bridged, past, shortcuts, talk


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


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
