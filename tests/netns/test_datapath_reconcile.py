"""What the reconciler makes so, and that nobody notices when it does so again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import Unavailable
from agent.notation import format_mac, parse_address
from agent.syscalls import socket_in
from tests.netns.datapath_hosts import (
    Fabric,
    Sandbox,
    open_files,
    opened,
    paired,
    pings,
    ports_of,
    restart,
    run,
    until,
)
from tests.netns.echoes import pinging_from

pytestmark = pytest.mark.netns

Pair = tuple[Fabric, Sandbox, Sandbox]


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as made:
        yield made


@pytest.fixture
async def pair(fabric: Fabric) -> Pair:
    return await paired(fabric)


@contextlib.contextmanager
def netlink_events(*places: Path) -> Iterator[Callable[[], list[str]]]:
    """The events of any kind since the last call in all those namespaces, each as its type
    (linux/rtnetlink.h, linux/netfilter/nf_tables.h) and the beginning of what it tells."""
    socks = []
    for path in places:
        for protocol, groups in ((socket.NETLINK_ROUTE, range(1, 33)), (12, [7])):
            sock = socket_in(path, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
            sock.bind((0, 0))
            for group in groups:
                sock.setsockopt(270, 1, group)
            sock.setblocking(False)
            socks.append(sock)

    def seen() -> list[str]:
        events = []
        for sock in socks:
            with contextlib.suppress(BlockingIOError):
                while True:
                    event = sock.recv(1 << 16)
                    kind = int.from_bytes(event[4:6], sys.byteorder)
                    events.append(f"{kind}: {event[16:80].hex()}")
        return events

    try:
        yield seen
    finally:
        for sock in socks:
            sock.close()


async def quiet(seen: Callable[[], list[str]]) -> None:
    """Until nothing has happened for longer than the kernel may wait before it tells that a device
    has a carrier: a second, where nothing hurries it (net/core/link_watch.c)."""
    deadline = time.monotonic() + 60
    while True:
        seen()
        await asyncio.sleep(1.2)
        if not (late := seen()):
            return
        assert time.monotonic() < deadline, late


async def test_applying_twice_changes_nothing(pair: Pair) -> None:
    fabric, near, _ = pair
    a = fabric.a
    with netlink_events(a.path, a.own, near.path) as seen:
        await quiet(seen)
        a.reconciler.touch_all()
        a.reconciler.touch_forwards()
        a.reconciler.touch_bridge(7)
        rows = a.desired.all_rows(7)
        a.reconciler.touch_rows(7, dict(rows.fdb), dict(rows.neighbours))
        await a.reconciler.settle()
        await asyncio.sleep(0.2)
        assert seen() == []
        a.run("ip", "link", "set", "side", "mtu", "1499")
        assert seen(), "it would have been seen"


async def test_a_restart_changes_no_device_address_route_or_row(
    pair: Pair,
) -> None:
    fabric, near, _ = pair

    def state() -> list[str]:
        shown = [["ip", "address"], ["ip", "route"], ["ip", "-6", "route"], ["bridge", "fdb"]]
        text = [run(*c, netns=p) for c in shown for p in (fabric.a.own, fabric.a.path, near.path)]
        return [*text, str(fabric.a.neighbours(7))]

    with netlink_events(fabric.a.path, fabric.a.own, near.path) as seen:
        await quiet(seen)
    before = state()
    await restart(fabric.a)
    assert state() == before
    assert not fabric.a.reconciler.repairs


async def test_traffic_does_not_notice_a_restart(pair: Pair) -> None:
    fabric, near, _ = pair
    addresses = ("10.7.0.3", "10.98.0.9", "fd00:7::3")
    with contextlib.ExitStack() as stack:
        flows = [
            stack.enter_context(await asyncio.to_thread(pinging_from, near.path, address))
            for address in addresses
        ]
        for host in 4 * fabric.hosts:
            await restart(host)
        lost = [await asyncio.to_thread(flow.end) for flow in flows]
    assert lost == [[], [], []]


async def test_what_was_wanted_no_longer_goes_at_a_restart(
    pair: Pair,
) -> None:
    fabric, near, _ = pair
    a = fabric.a
    a.add_network(8)
    a.add_port(8, 2, near, ifname="eth1", gateways=())
    await a.reconciler.settle()
    await a.reconciler.stop()
    del a.desired.networks[8]
    a.desired.fdb[7].clear()
    a.make()
    await a.reconciler.start()
    assert set(a.links()) == {"lo", "uplink", "vxb7", "vxl7", *ports_of(a)}
    assert a.fdb(7) == {}
    assert "10.8.0.0/24" not in a.run("ip", "route")
    assert "10.8.0" not in a.run("nft", "list", "ruleset") + a.inside("nft", "list", "ruleset")
    assert "eth1" not in near.run("ip", "link")


async def test_rows_that_others_may_still_tell_of_are_kept(
    pair: Pair,
) -> None:
    a = pair[0].a
    rows = a.fdb(7), a.neighbours(7)
    a.desired.fdb[7], a.desired.neighbours[7] = {}, {}
    a.desired.all_known = False
    await restart(a)
    assert (a.fdb(7), a.neighbours(7)) == rows
    a.desired.all_known = True
    a.reconciler.touch_all()
    await a.reconciler.settle()
    assert (a.fdb(7), a.neighbours(7)) == ({}, {})


# -- what is asked for --


async def test_rows_follow_what_is_desired(pair: Pair) -> None:
    a = pair[0].a
    mac, other = b"\x02\x00\x00\x00\x00\x01", b"\x02\x00\x00\x00\x00\x02"
    before = a.fdb(7), a.neighbours(7)
    a.desired.fdb[7] |= {mac: parse_address("10.99.0.2"), other: parse_address("10.99.0.2")}
    a.desired.neighbours[7] |= {
        parse_address("10.7.0.50"): mac,
        parse_address("fd00:7::50"): mac,
        parse_address("10.7.0.51"): other,
    }
    a.reconciler.touch_rows(7, [mac, other], map(parse_address, ("10.7.0.50", "fd00:7::50")))
    a.reconciler.touch_rows(7, [], [parse_address("10.7.0.51")])
    await a.reconciler.settle()
    assert a.fdb(7) == before[0] | {format_mac(m): "10.99.0.2" for m in (mac, other)}
    assert a.neighbours(7) == before[1] | {
        "10.7.0.50": format_mac(mac),
        "fd00:7::50": format_mac(mac),
        "10.7.0.51": format_mac(other),
    }
    # Moved to another host, and to another MAC; then gone.
    a.desired.fdb[7][mac] = parse_address("10.99.0.3")
    a.desired.neighbours[7][parse_address("10.7.0.50")] = other
    del a.desired.fdb[7][other], a.desired.neighbours[7][parse_address("fd00:7::50")]
    keys = [parse_address("10.7.0.50"), parse_address("fd00:7::50")]
    a.reconciler.touch_rows(7, [mac, other], keys)
    await a.reconciler.settle()
    assert a.fdb(7) == before[0] | {format_mac(mac): "10.99.0.3"}
    expected = {"10.7.0.50": format_mac(other), "10.7.0.51": format_mac(other)}
    assert a.neighbours(7) == before[1] | expected
    assert not a.reconciler.repairs


async def test_a_port_changes_and_goes(pair: Pair) -> None:
    fabric, near, _ = pair
    a = fabric.a
    ((endpoint, port),) = a.desired.networks[7].ports.items()
    moved = replace(port, addresses=("10.7.0.9/24",), gateways=())
    a.set_ports(7, {endpoint: moved})
    await a.reconciler.settle(endpoint)
    (device,) = json.loads(near.run("ip", "-j", "address", "show", "eth0"))
    held = {i["local"] for i in device["addr_info"] if i["scope"] == "global"}
    assert held == {"10.7.0.9"}
    assert "default" not in near.run("ip", "route") + near.run("ip", "-6", "route")
    renamed = replace(port, ifname="net0", mac=b"\x02\x00\x00\x00\x00\x99")
    a.set_ports(7, {endpoint: renamed})
    await a.reconciler.settle(endpoint)
    assert "02:00:00:00:00:99" in near.run("ip", "link", "show", "net0")
    assert "eth0" not in near.run("ip", "link")
    assert pings((near.path, "10.7.0.1")) == [True]
    a.set_ports(7, {})
    await a.reconciler.settle()
    assert json.loads(near.run("ip", "-j", "link"))[0]["ifname"] == "lo"
    assert len(json.loads(near.run("ip", "-j", "link"))) == 1
    assert not a.reconciler.repairs


async def test_a_network_goes_with_all_that_is_its(pair: Pair) -> None:
    a = pair[0].a
    del a.desired.networks[7]
    a.reconciler.touch_bridge(7)
    await a.reconciler.settle()
    assert set(a.links()) == {"lo", "uplink"}
    assert "10.7.0" not in a.run("ip", "route") + a.run("nft", "list", "ruleset")


async def test_another_network_with_the_same_vni_begins_anew(
    pair: Pair,
) -> None:
    a = pair[0].a
    a.desired.networks[7] = replace(a.desired.networks[7], network="ff" * 8, ports={})
    a.desired.fdb[7], a.desired.neighbours[7] = {}, {}
    a.reconciler.touch_bridge(7)
    await a.reconciler.settle()
    links = a.links()
    assert links["vxb7"]["ifalias"] == links["vxl7"]["ifalias"] == f"vxmesh:net:{'ff' * 8}"
    assert not any(name.startswith("vxp") for name in links)
    assert a.fdb(7) == {}


async def test_another_vtep_makes_the_vxlan_device_anew_with_its_rows(
    pair: Pair,
) -> None:
    fabric, near, _ = pair
    fabric.a.run("ip", "address", "add", "10.99.0.11/24", "dev", "wire")
    for host, vtep in ((fabric.a, "10.99.0.11"), (fabric.b, "10.99.0.2")):
        host.desired.networks[7] = replace(host.desired.networks[7], vtep=vtep)
    macs = fabric.b.desired.fdb[7]
    macs.update(dict.fromkeys(macs, parse_address("10.99.0.11")))
    fabric.a.reconciler.touch_bridge(7)
    fabric.b.reconciler.touch_rows(7, macs, [])
    await fabric.settle()
    assert fabric.a.links()["vxl7"]["linkinfo"]["info_data"]["local"] == "10.99.0.11"
    assert pings((near.path, "10.7.0.3")) == [True]


async def test_what_the_driver_asks_for_is_what_the_kernel_has(
    pair: Pair,
) -> None:
    """pyroute2 drops what it does not know without a word."""
    a = pair[0].a
    links = a.links()
    bridge, vxlan, port = links["vxb7"], links["vxl7"], links[ports_of(a)[0]]
    assert bridge["address"] == format_mac(a.desired.networks[7].router_mac)
    data = bridge["linkinfo"]["info_data"]
    assert (data["stp_state"], data["mcast_snooping"], data["forward_delay"]) == (0, 0, 0)
    data = vxlan["linkinfo"]["info_data"]
    assert (data["id"], data["local"], data["port"]) == (7, "10.99.0.1", 4789)
    assert (data["learning"], data["proxy"]) == (False, True)
    assert not data.keys() & {"group", "remote", "link"}
    for link, flood in ((vxlan, True), (port, False)):
        slave = link["linkinfo"]["info_slave_data"]
        assert (slave["learning"], slave["flood"]) == (False, flood)
        assert (slave["mcast_flood"], slave["bcast_flood"]) == (True, True)
        assert link["master"] == "vxb7" and "UP" in link["flags"] and link["mtu"] == 1430
    assert bridge["ifalias"] == vxlan["ifalias"] == "vxmesh:net:0000000000000007"
    (endpoint,) = a.desired.networks[7].ports
    assert port["ifalias"] == f"vxmesh:ep:{endpoint}"
    assert "169.254.83.2 dev vxmesh0 proto 120 src 169.254.83.1" in a.run("ip", "route")
    # The UDP socket is the host's.
    assert ":4789" in a.run("ss", "-Hlun") and ":4789" not in a.inside("ss", "-Hlun")


async def test_a_mark_comes_back_when_it_is_applied(fabric: Fabric) -> None:
    a = fabric.a
    a.desired.version = 42
    a.add_network(7)
    assert 42 not in a.applied
    await a.reconciler.settle()
    assert a.applied[-1] == 42 and "vxb7" in a.links()


# -- the end --


async def test_nothing_is_left_behind(pair: Pair) -> None:
    fabric, near, far = pair
    a = fabric.a
    ours = a.own
    (uplink,) = json.loads(a.run("ip", "-j", "link", "show", "vxmesh0"))
    own = f"nsid {uplink['link_netnsid']}"
    assert own in a.run("ip", "netns", "list-id")
    await a.reconciler.remove_all()
    assert not ours.exists()
    assert "vxmesh" not in a.run("ip", "link") + a.run("nft", "list", "ruleset")
    assert "proto 120" not in a.run("ip", "route") + a.run("ip", "-6", "route")
    assert len(json.loads(near.run("ip", "-j", "link"))) == 1
    await until(lambda: ":4789" not in a.run("ss", "-Hlun"), "the UDP socket is closed")
    # By the id that the host's namespace has for it: inodes are handed out again at once.
    await until(lambda: own not in a.run("ip", "netns", "list-id"), "nobody holds our namespace")
    assert pings((far.path, "10.7.0.1")) == [True]  # the other host is as it was
    await a.reconciler.remove_all()  # once more is no error
    # And it begins again from nothing.
    a.make()
    await a.reconciler.start()
    await a.reconciler.settle()
    await until(lambda: pings((near.path, "10.7.0.3"))[0], "traffic passes again")


async def test_who_waits_is_told_when_the_agent_stops(fabric: Fabric) -> None:
    a = fabric.a
    a.add_network(7)
    waiting = asyncio.create_task(a.reconciler.settle())
    await asyncio.sleep(0)
    await a.reconciler.stop()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await a.reconciler.settle()


async def test_no_file_is_left_open(fabric: Fabric) -> None:
    a, sandbox = fabric.a, Sandbox(fabric)
    a.add_network(7)
    await a.reconciler.settle()
    before = open_files()  # or one more, if a thread just reads a file
    for _ in range(10):
        port = a.add_port(7, 2, sandbox)
        await a.reconciler.settle(port.endpoint)
        a.set_ports(7, {})
        await a.reconciler.settle()
        a.add_port(7, 3, sandbox, netns="/run/netns/vxt-not-there")
        await a.reconciler.settle()
        a.set_ports(7, {})
        await a.reconciler.settle()
    await until(lambda: open_files() <= before, "ten rounds would have left ten")
    for _ in range(3):
        await restart(a)
    await until(lambda: open_files() <= before, "nor do restarts leave any")
