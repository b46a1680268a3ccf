"""The datapath's parts on the real kernel: namespaces, rows in bulk, events, underlay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.datapath import linkpacking, namespaces, nft, rtnetlink, sandbox
from agent.datapath.bulk import Bulk
from agent.datapath.maker import Maker
from agent.datapath.monitor import Events, Monitor
from agent.datapath.mountwatch import MountWatch
from agent.datapath.netlink import Netlink
from agent.datapath.networks import Networks
from agent.datapath.nftables import Nftables
from agent.datapath.packing import Row
from agent.datapath.tablemonitor import TableMonitor
from agent.datapath.underlay import describe
from agent.drivers.base import DEFAULT, Bridge, Port, Rows
from agent.errors import Conflict
from agent.model import HANDED_OUT
from agent.notation import format_mac
from agent.testbed.namespaces import mount_points
from tests.netns.datapath_hosts import Sandbox, longest_pause, opened, run, until

pytestmark = pytest.mark.netns


@pytest.fixture
def netns() -> Iterator[Path]:
    """One namespace."""
    name = f"vxt-part-{os.getpid()}"
    run("ip", "netns", "add", name)
    yield Path("/run/netns") / name
    run("ip", "netns", "delete", name)


# -- interfaces --


async def test_an_interface_that_somebody_else_has_moved_gets_another_mtu(netns: Path) -> None:
    run("ip", "link", "add", "vxptest", "type", "veth", "peer", "name", "eth0", netns=netns)

    def shown(name: str) -> tuple[int, int]:
        """Index and MTU."""
        [link] = json.loads(run("ip", "-j", "link", "show", name, netns=netns))
        return link["ifindex"], link["mtu"]

    ours, inode = shown("vxptest")[0], namespaces.inode(netns)
    waits = Port(
        "e" * 16, "vxptest", bytes([2, 0, 0, 0, 0, 1]), (), HANDED_OUT, inode, "vxpx", (),
    )  # fmt: skip
    assert await sandbox.resize(waits, 1350, ours) == 0  # nobody knows where it is
    moved = replace(waits, moved=(str(netns), inode, "eth0"))
    assert await sandbox.resize(replace(moved, moved=(str(netns), 1, "eth0")), 1350, ours) == 0
    assert await sandbox.resize(moved, 1350, ours + 77) == 0  # another's, with that name
    assert shown("eth0")[1] == 1500
    assert await sandbox.resize(moved, 1350, ours) == 1
    assert shown("eth0")[1] == 1350
    assert await sandbox.resize(moved, 1350, ours) == 0


@pytest.fixture
def made(netns: Path) -> Iterator[Callable[[bool], Networks]]:
    """Networks of one namespace; without a maker of whole ones if that is not asked for."""
    with contextlib.ExitStack() as stack:
        fd = os.open(netns, os.O_RDONLY)
        stack.callback(os.close, fd)
        link = stack.enter_context(contextlib.closing(Netlink(netns)))
        bulk = stack.enter_context(contextlib.closing(Bulk(netns)))
        maker = stack.enter_context(contextlib.closing(Maker(netns, netns)))
        deaf: Any = SimpleNamespace(muting=lambda *_: contextlib.nullcontext())
        nobody: Any = SimpleNamespace(network=_refuse, port=maker.port, place=maker.place)
        yield lambda whole: Networks(link, link, fd, maker if whole else nobody, bulk, deaf)


async def _refuse(*_: object) -> tuple[int, int]:
    raise FileExistsError


@pytest.mark.parametrize("gateways", [("10.9.0.1/24",), ("10.9.0.1/24", "fd09::1/64"), ()])
@pytest.mark.parametrize("vtep", ["127.0.0.1", ""])
@pytest.mark.parametrize("rate", [0, 1000])
async def test_a_network_made_at_once_is_as_one_made_step_by_step(
    netns: Path, made: Callable[[bool], Networks], gateways: tuple[str, ...], vtep: str, rate: int
) -> None:
    mac = bytes([2, 0, 0, 0, 0, 9])
    bridge = Bridge("n" * 16, 9, "vxb9", "vxl9", 1430, mac, gateways, (), False, vtep, 4799)
    bridge = replace(bridge, flood_rate=rate)
    run("ip", "link", "set", "lo", "up", netns=netns)
    seen = []
    for whole in (True, False):
        networks = made(whole)
        assert await networks.ensure(bridge)
        assert networks.fixed["bridge"] == 2
        seen.append(_devices(netns))
        await networks.remove(9)
    assert seen[0] == seen[1]
    assert {name for name, _ in seen[0]} == {"vxb9", "vxl9"}
    port = dict(seen[0])["vxl9"]["linkinfo"]["info_slave_data"]
    assert port["flood"] == (rate == 0), "unicast that nobody has goes to no host"
    assert dict(seen[0])["vxb9"]["addresses"] == sorted(g.partition("/")[0] for g in gateways)


@pytest.mark.parametrize("half", ["bridge", "vxlan"])
async def test_a_network_made_by_half_is_finished_and_its_rows_are_due(
    netns: Path,
    made: Callable[[bool], Networks],
    half: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the devices that were read before, none was there."""
    mac = bytes([2, 0, 0, 0, 0, 9])
    bridge = Bridge("n" * 16, 9, "vxb9", "vxl9", 1430, mac, (), (), False, "127.0.0.1", 4799)
    run("ip", "link", "set", "lo", "up", netns=netns)
    networks = made(True)
    assert await networks.ensure(bridge, {})
    whole = _devices(netns)
    await networks.remove(9)
    refused = linkpacking.mark("nowhere", "")
    name = {"bridge": "new_vxlan", "vxlan": "mark_port"}[half]
    monkeypatch.setattr(linkpacking, name, lambda *_, **__: refused)
    assert await networks.ensure(bridge, {})
    assert _devices(netns) == whole
    await networks.remove(9)


def _devices(netns: Path) -> list[tuple[str, dict[str, Any]]]:
    """All but the loopback, as `ip` tells of them; without what differs each time."""
    found = []
    for link in json.loads(run("ip", "-d", "-j", "addr", "show", netns=netns)):
        for changing in ("ifindex", "operstate", "flags"):
            flags = link.pop(changing)
        link["up"] = "UP" in flags
        info = link.get("linkinfo", {}).get("info_data", {})
        port = link.get("linkinfo", {}).get("info_slave_data", {})
        for timer in [key for key in (*info, *port) if key.endswith("timer") or "_id" in key]:
            info.pop(timer, None)
            port.pop(timer, None)
        if link["ifname"] == "vxl9":
            del link["address"]  # by chance
        # What IPv6 gives a device by itself comes when it likes.
        addresses = [a["local"] for a in link.pop("addr_info")]
        link["addresses"] = sorted(a for a in addresses if not a.startswith("fe80:"))
        if link["ifname"] != "lo":
            found.append((link["ifname"], link))
    return found


async def test_a_port_whose_name_is_taken_changes_nothing(netns: Path) -> None:
    for name in ("vxb9", "vxp9", "eth0"):
        run("ip", "link", "add", name, "type", "bridge", netns=netns)
    [bridge] = json.loads(run("ip", "-j", "link", "show", "vxb9", netns=netns))

    def shown() -> set[tuple[str, str, str]]:
        links = json.loads(run("ip", "-j", "link", "show", netns=netns))
        return {(a["ifname"], a.get("ifalias", ""), str("UP" in a["flags"])) for a in links}

    before = shown()
    with contextlib.closing(Maker(netns, netns)) as maker, netns.open("rb") as there:
        for device, ifname in (("vxp9", "eth7"), ("vxp8", "eth0")):
            port = Port("e9", device, bytes([2, 0, 0, 0, 0, 9]), (), str(netns), 1, ifname, ())
            with pytest.raises(FileExistsError):
                await maker.port(port, "vxmesh:ep:e9", 1430, bridge["ifindex"], there.fileno())
    assert shown() == before


# -- namespaces --


def test_a_namespace_is_made_once_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "netns"
    assert namespaces.inode(path) == 0
    assert namespaces.ensure(path)
    try:
        inode = namespaces.inode(path)
        assert inode and namespaces.is_network_namespace(path)
        assert inode != namespaces.inode("/proc/self/ns/net")
        assert not namespaces.ensure(path)
        assert namespaces.inode(path) == inode
    finally:
        namespaces.remove(path)
    assert not path.exists() and namespaces.inode(path) == 0
    namespaces.remove(path)  # again is no error


def test_a_file_that_a_reboot_left_becomes_a_namespace(tmp_path: Path) -> None:
    path = tmp_path / "netns"
    path.touch()
    assert namespaces.ensure(path)
    namespaces.remove(path)


def test_a_directory_in_its_place_is_a_conflict(tmp_path: Path) -> None:
    path = tmp_path / "netns"
    path.mkdir()
    with pytest.raises(Conflict, match="cannot be made"):
        namespaces.ensure(path)
    assert path.is_dir()


def test_the_agents_own_thread_stays_where_it_was(tmp_path: Path) -> None:
    before = namespaces.inode("/proc/thread-self/ns/net")
    path = tmp_path / "netns"
    namespaces.ensure(path)
    try:
        namespaces.set_sysctls(path, namespaces.OWN)
        assert namespaces.inode("/proc/thread-self/ns/net") == before
        for name, value in namespaces.OWN.items():
            assert namespaces.get_sysctl(path, name) == value, name
        for name in namespaces.FORWARDING:
            assert namespaces.get_sysctl(path, name) == "0", name
        assert namespaces.get_sysctl(path, "ipv4/nonsense") == ""
    finally:
        namespaces.remove(path)


@pytest.mark.parametrize("propagation", ["shared", "private"])
def test_copies_in_other_mount_namespaces_do_not_keep_it_alive(
    tmp_path: Path, propagation: str
) -> None:
    """As a workload's mount namespace has them, made while ours was there."""
    run("mount", "-t", "tmpfs", "vxt", str(tmp_path))
    path = tmp_path / "netns"
    try:
        run("mount", f"--make-{propagation}", str(tmp_path))
        namespaces.ensure(path)
        inode = namespaces.inode(path)
        copy = subprocess.Popen(["unshare", "--mount", "--propagation", "unchanged", "sleep", "90"])
        try:
            mounted = Path(f"/proc/{copy.pid}/mountinfo")
            deadline = time.monotonic() + 30
            while Path(f"/proc/{copy.pid}/ns/mnt").samefile("/proc/self/ns/mnt"):
                assert time.monotonic() < deadline, "it never had a mount namespace of its own"
            assert f"net:[{inode}]" in mounted.read_text()
            namespaces.remove(path)
            assert f"net:[{inode}]" not in mounted.read_text()
        finally:
            copy.kill()
            copy.wait()
    finally:
        namespaces.remove(path)
        run("umount", str(tmp_path))


# -- rows in bulk --


def vxlan(netns: Path) -> int:
    """A VXLAN device in the namespace; its index."""
    device = ("vxlan", "id", "7", "dstport", "4789", "local", "10.99.0.1", "nolearning", "proxy")
    run("ip", "link", "add", "vxl7", "type", *device, netns=netns)
    run("ip", "link", "set", "vxl7", "up", netns=netns)
    return int(run("ip", "-o", "link", "show", "vxl7", netns=netns).split(":")[0])


def many(n: int) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """MAC -> VTEP and address -> MAC of n endpoints; a tenth of both with IPv6."""
    fdb, neighbours = {}, {}
    for i in range(n):
        mac = b"\x02\x50" + i.to_bytes(4, "big")
        fdb[mac] = (
            b"\xfd" + bytes(14) + bytes([i % 50]) if i % 10 == 0 else bytes([10, 99, 0, i % 50])
        )
        address = (10 << 24 | i).to_bytes(4, "big")
        neighbours[b"\xfd" + bytes(11) + address if i % 10 == 0 else address] = mac
    return fdb, neighbours


async def test_rows_are_written_read_compared_and_deleted(netns: Path) -> None:
    index = vxlan(netns)
    bulk = Bulk(netns)
    fdb, neighbours = many(2500)
    # A device of IPv4 takes no VTEP of IPv6: the families do not mix.
    fdb = {mac: vtep for mac, vtep in fdb.items() if len(vtep) == 4}
    rows = Rows(list(fdb.items()), list(neighbours.items()))
    try:
        await bulk.write(index, rows)
        assert await bulk.dump_fdb(index) == fdb
        assert await bulk.dump_neighbours(index) == neighbours
        shown = run("ip", "neigh", "show", "dev", "vxl7", netns=netns)
        assert "fd00::a00:a lladdr 02:50:00:00:00:0a PERMANENT" in shown
        assert await bulk.reconcile(index, rows) == (set(), set())
        # One missing, one wrong, one too many, of each.
        (mac, vtep), (other, _), *_ = fdb.items()
        (address, _), (wrong, _), *_ = neighbours.items()
        extra = b"\x02\x66" + bytes(4)
        await bulk.write(
            index,
            Rows(
                [(mac, None), (other, b"\x0a\x63\x00\xc8"), (extra, vtep)],
                [(address, None), (wrong, extra), (b"\x0b\x00\x00\x01", extra)],
            ),
        )
        written = {mac, other, extra}, {address, wrong, b"\x0b\x00\x00\x01"}
        assert await bulk.reconcile(index, rows) == written
        assert await bulk.dump_fdb(index) == fdb
        assert await bulk.dump_neighbours(index) == neighbours
        # Restoring puts back only what is not there.
        await bulk.write(index, Rows([(mac, None)], [(address, None)]))
        assert await bulk.restore(index, rows) == (1, 1)
        # Deleting what is gone is fine.
        nothing = Rows([(k, None) for k in fdb], [(k, None) for k in neighbours])
        await bulk.write(index, nothing)
        await bulk.write(index, nothing)
        assert await bulk.dump_fdb(index) == await bulk.dump_neighbours(index) == {}
    finally:
        bulk.close()


async def test_the_rows_of_a_network_that_floods(
    netns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Default rows, several for one key, and for each other row an entry of the bridge."""
    index = vxlan(netns)
    run("ip", "link", "add", "vxb7", "type", "bridge", netns=netns)
    run("ip", "link", "set", "vxl7", "master", "vxb7", netns=netns)
    bulk = Bulk(netns)
    one, two, three = (bytes([10, 99, 0, n]) for n in (1, 2, 3))
    fdb = {b"\2\x50" + i.to_bytes(4, "big"): one for i in range(1500)}
    (mac, _), (other, _), *_ = fdb.items()

    def of(*vteps: bytes, **rows: list[Row]) -> Rows:
        return Rows(rows.get("fdb", []), [], floods=True, defaults=frozenset(vteps))

    def defaults() -> list[str]:
        lines = run("bridge", "fdb", "show", "dev", "vxl7", netns=netns).splitlines()
        return sorted(line.split("dst ")[1] for line in lines if line.startswith("00:00:00:00:00"))

    def shown(*numbers: int) -> list[str]:
        return [f"10.99.0.{n} self permanent" for n in numbers]

    whole = of(one, two, fdb=list(fdb.items()))
    dump, dumps = bulk._dump, list[int]()

    def counted(family: int, ifindex: int) -> Any:
        dumps.append(ifindex)
        return dump(family, ifindex)

    heard = list[tuple[bytes, bool]]()

    def hear(events: Events) -> None:
        for device, seen in events.defaults.items():
            bulk.note_defaults(device, seen)
            heard.extend(seen)

    monkeypatch.setattr(bulk, "_dump", counted)
    monitor = Monitor(netns, hear, lambda: None)
    try:
        await bulk.write(index, whole)
        assert defaults() == shown(1, 2) and await bulk.static_macs(index) == fdb.keys()
        assert await bulk.reconcile(index, whole) == (set(), set())
        # One more, one less, without a look at all rows; and just what is asked for.
        dumps.clear()
        await bulk.write(index, of(two, three))
        await until(lambda: {(one, False), (three, True)} <= set(heard), "our own events")
        await bulk.write(index, of(two))
        await until(lambda: (three, False) in heard, "our own event")
        await bulk.write(index, of(two, three))
        assert defaults() == shown(2, 3) and not dumps
        run("bridge", "fdb", "del", format_mac(DEFAULT), "dev", "vxl7", "dst", "10.99.0.2",
            netns=netns)  # fmt: skip
        await until(lambda: (two, False) in heard, "what another did")
        await bulk.write(index, of(two, three))
        assert defaults() == shown(2, 3) and dumps == [index]
        await bulk.write(index, of(one), keep=True)
        assert defaults() == shown(1, 2, 3)
        await bulk.write(index, Rows([], [], floods=True))
        assert defaults() == shown(1, 2, 3)
        assert await bulk.restore(index, of(one, two)) == (0, 0), "only puts back"
        assert await bulk.reconcile(index, whole, keep=True) == (set(), set())
        assert await bulk.reconcile(index, whole) == ({DEFAULT}, set())
        assert defaults() == shown(1, 2)
        assert await bulk.correct(index, of(two)) == (1, 0)
        assert await bulk.restore(index, of(one, two)) == (1, 0)
        # To a VTEP of ours, but not as ours do: the kernel has two for it.
        astray = ("dst", "10.99.0.2", "port", "999", "self", "permanent")
        run("bridge", "fdb", "append", format_mac(DEFAULT), "dev", "vxl7", *astray, netns=netns)
        assert len(defaults()) == 3
        await until(lambda: (b"", True) in heard, "one that is none of ours")
        assert await bulk.reconcile(index, whole) == ({DEFAULT}, set())
        assert defaults() == shown(1, 2)
        # Entries of the bridge that are missing, too many, and that go with their rows.
        await bulk.drop_static(index, mac)
        await bulk.add_static(index, b"\2\x66" + bytes(4))
        assert await bulk.reconcile(index, whole) == ({mac, b"\2\x66" + bytes(4)}, set())
        await bulk.drop_static(index, other)
        row = Rows([(mac, one), (other, one)], [], floods=True)
        assert await bulk.restore(index, row) == (1, 0)
        assert await bulk.static_macs(index) == fdb.keys()
        nothing = of(fdb=[(each, None) for each in fdb])
        await bulk.write(index, nothing)
        await bulk.write(index, nothing)
        assert defaults() == [] and await bulk.static_macs(index) == set()
        assert await bulk.dump_fdb(index) == {}
    finally:
        monitor.close()
        bulk.close()


async def test_learned_neighbours_are_not_ours(netns: Path) -> None:
    index = vxlan(netns)
    lladdr = ("lladdr", "02:00:00:00:00:01", "dev", "vxl7")
    run("ip", "neigh", "add", "10.0.0.1", *lladdr, "nud", "reachable", netns=netns)
    run("ip", "neigh", "add", "10.0.0.2", *lladdr, "nud", "permanent", netns=netns)
    bulk = Bulk(netns)
    try:
        assert set(await bulk.dump_neighbours(index)) == {b"\x0a\x00\x00\x02"}
    finally:
        bulk.close()


async def test_a_refused_row_is_named_and_stops_no_other(netns: Path) -> None:
    index = vxlan(netns)
    bulk = Bulk(netns)
    good: list[Row] = [
        (b"\x02\x50" + i.to_bytes(4, "big"), b"\x0a\x63\x00\x02") for i in range(2000)
    ]
    multicast = (b"\x02\xee\x00\x00\x00\x01", b"\xe0\x00\x00\x01" * 4)  # of the wrong family
    try:
        for at in (0, 500, len(good)):
            with pytest.raises(OSError, match="02:ee:00:00:00:01"):
                await bulk.write(index, Rows([*good[:at], multicast, *good[at:]], []))
            assert await bulk.dump_fdb(index) == dict(good)
            await bulk.write(index, Rows([(mac, None) for mac, _ in good], []))
        with pytest.raises(OSError, match="No such device"):
            await bulk.write(99999, Rows(good, []))
        await bulk.write(index, Rows(good, []))  # and it goes on
        assert await bulk.dump_fdb(index) == dict(good)
    finally:
        bulk.close()


async def test_bulk_leaves_the_loop_free_and_says_how_long_it_took(
    netns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = vxlan(netns)
    bulk = Bulk(netns)
    said = []
    try:
        for n in (10_000, 100_000):
            fdb, neighbours = many(n)
            rows = Rows([(m, b"\x0a\x63\x00\x02") for m in fdb], list(neighbours.items()))
            lag = asyncio.create_task(longest_pause())
            await asyncio.sleep(0.01)
            begin = time.perf_counter()
            await bulk.write(index, rows)
            written = time.perf_counter() - begin
            lag.cancel()
            begin = time.perf_counter()
            assert await bulk.reconcile(index, rows) == (set(), set())
            compared = time.perf_counter() - begin
            begin = time.perf_counter()
            nothing = Rows([(k, None) for k in fdb], [(k, None) for k in neighbours])
            await bulk.write(index, nothing)
            deleted = time.perf_counter() - begin
            (pause,) = await asyncio.gather(lag)
            said.append(
                f"{n} + {n} rows: written {written:.3f} s, compared {compared:.3f} s, "
                f"deleted {deleted:.3f} s; the loop's longest pause {pause * 1000:.1f} ms"
            )
    finally:
        bulk.close()
    with capsys.disabled():
        print("", *said, sep="\n")


# -- events --


async def test_losses_are_heard_but_not_of_muted_devices(netns: Path) -> None:
    index = vxlan(netns)
    seen: list[Events] = []
    monitor = Monitor(netns, seen.append, lambda: None)
    bulk = Bulk(netns)
    monitor.ignore(bulk.port)
    mac, address = b"\x02\x00\x00\x00\x00\x01", b"\x0a\x00\x00\x01"
    six = b"\xfd" + bytes(14) + b"\x01"
    here = Rows([(mac, b"\x0a\x63\x00\x02")], [(address, mac), (six, mac)])
    gone = Rows([(mac, None)], [(address, None), (six, None)])
    try:
        await bulk.write(index, here)
        with monitor.muting(index), monitor.muting(index + 1):
            await bulk.write(index, gone)
            await bulk.write(index, here)
        run("ip", "link", "set", "lo", "up", netns=netns)
        await until(lambda: any(link.name == "lo" for e in seen for link in e.links), "lo is up")
        assert not any(e.macs or e.addresses or e.lost or e.new_addresses for e in seen)
        again = [row for e in seen for row in e.new_macs.get(index, [])]
        assert again == 2 * [(mac, b"\x0a\x63\x00\x02")]
        seen.clear()
        with monitor.muting(index, False):
            await bulk.write(index, Rows([(mac, b"\x0a\x63\x00\x03")], []))
        run("ip", "link", "set", "lo", "down", netns=netns)
        await until(lambda: any(link.name == "lo" for e in seen for link in e.links), "lo is down")
        assert not any(e.new_macs for e in seen)
        seen.clear()
        await bulk.write(index, gone)
        await until(lambda: sum(len(e.addresses.get(index, [])) for e in seen) == 2, "rows gone")
        assert [m for e in seen for m in e.macs.get(index, [])] == [mac]
        assert [a for e in seen for a in e.addresses.get(index, [])] == [address, six]
        run("ip", "link", "set", "vxl7", "down", netns=netns)
        await until(
            lambda: any(link.index == index and not link.up for e in seen for link in e.links),
            "the device is down",
        )
        run("ip", "link", "del", "vxl7", netns=netns)
        await until(lambda: any(index in e.lost for e in seen), "the device is gone")
    finally:
        bulk.close()
        monitor.close()


async def test_what_others_write_is_heard_and_by_whom_it_was_not_learnt(netns: Path) -> None:
    index = vxlan(netns)
    seen: list[Events] = []
    monitor = Monitor(netns, seen.append, lambda: None)
    mac, vtep = "02:00:00:00:00:01", "10.99.0.2"
    try:
        run("bridge", "fdb", "add", mac, "dev", "vxl7", "dst", vtep, "self", netns=netns)
        neighbour = ("ip", "neigh", "replace", "10.0.0.1", "lladdr", mac, "dev", "vxl7", "nud")
        run(*neighbour, "permanent", netns=netns)
        run(*neighbour, "stale", netns=netns)
        run("ip", "address", "add", "10.5.0.1/24", "dev", "vxl7", netns=netns)
        run("ip", "address", "del", "10.5.0.1/24", "dev", "vxl7", netns=netns)
        run("sysctl", "-qw", "net.ipv4.ip_forward=1", netns=netns)
        await until(lambda: any(e.forwarding for e in seen), "the last of it")
        assert [r for e in seen for r in e.new_macs.get(index, [])] == [
            (bytes.fromhex(mac.replace(":", "")), socket.inet_aton(vtep))
        ]
        address, held = socket.inet_aton("10.0.0.1"), bytes.fromhex(mac.replace(":", ""))
        assert [r for e in seen for r in e.new_addresses.get(index, [])] == [
            (address, held),
            (address, b""),
        ]
        told = [i for e in seen for i in e.interfaces if ":" not in i[1]]
        assert told == [(index, "10.5.0.1/24", True), (index, "10.5.0.1/24", False)]
    finally:
        monitor.close()


async def test_routes_of_ours_are_heard_and_no_others(netns: Path) -> None:
    seen: list[Events] = []
    monitor = Monitor(netns, seen.append, lambda: None, host=True)
    run("ip", "link", "set", "lo", "up", netns=netns)
    try:
        for protocol in ("static", "120"):
            assert not any(e.routes for e in seen)
            run("ip", "route", "add", "10.9.0.0/24", "dev", "lo", "proto", protocol, netns=netns)
            run("ip", "route", "del", "10.9.0.0/24", netns=netns)
        await until(lambda: any(e.routes for e in seen), "ours is gone")
        assert len(seen) == 1
    finally:
        monitor.close()


async def test_of_other_tables_nothing_is_heard_nor_of_what_is_our_own_doing(netns: Path) -> None:
    heard: list[bool] = []
    monitor = TableMonitor(netns, lambda: heard.append(True))
    ours = Nftables(netns)
    try:
        run("nft", "add", "table", "inet", "theirs", netns=netns)
        run("nft", "delete", "table", "inet", "theirs", netns=netns)
        await ours.load(nft.own([]))
        await asyncio.sleep(0.05)
        assert not heard
        for command in (
            "add rule inet vxmesh forward accept",
            'add element inet vxmesh hairpin { "x" . "x" }',
            'delete element inet vxmesh hairpin { "x" . "x" }',
            "chain inet vxmesh forward { policy accept; }",
            "flush ruleset",
        ):
            heard.clear()
            run("nft", command, netns=netns)
            await until(lambda: heard, command)
    finally:
        ours.close()
        monitor.close()


async def test_a_mount_anywhere_is_told(tmp_path: Path) -> None:
    told: list[bool] = []
    before = mount_points()
    watch = MountWatch(lambda: told.append(True))
    path = tmp_path / "netns"
    try:
        await asyncio.sleep(0.01)
        # Other tests, beside this one, mount things as well.
        assert not told or mount_points() != before
        namespaces.ensure(path)
        await until(lambda: told, "it is mounted")
        told.clear()
        namespaces.remove(path)
        await until(lambda: told, "it is unmounted")
    finally:
        watch.close()
        namespaces.remove(path)


# -- the host --


async def test_the_underlay_is_described(tmp_path: Path) -> None:
    async with opened(tmp_path) as fabric:
        a = fabric.a
        a.run("ip", "link", "set", "wire", "mtu", "1400")
        for route in (
            ("10.60.0.0/16", "via", "10.99.0.2"),
            ("default", "via", "10.98.0.9"),
            ("10.61.0.0/16", "via", "10.98.0.9", "table", "100"),
            ("blackhole", "10.62.0.0/16"),
        ):
            a.run("ip", "route", "add", *route)
        a.run("ip", "-6", "route", "add", "fd60::/48", "via", "fd98::9")
        hops = ("nexthop", "via", "10.98.0.9", "nexthop", "via", "10.99.0.2")
        a.run("ip", "route", "add", "10.63.0.0/16", *hops)
        a.add_network(7)
        await a.reconciler.settle()
        assert "10.7.0.0/24" in a.run("ip", "route")
        seen = await describe(a.vtep, str(a.path))
        assert seen.mtu == 1400
        assert seen.routes == (
            "10.60.0.0/16",
            "10.63.0.0/16",
            "10.98.0.0/24",
            "10.99.0.0/24",
            "fd60::/48",
            "fd98::/64",
        )
        # An address that no device has: then what the default route leads through.
        a.run("ip", "link", "set", "side", "mtu", "1300")
        assert (await describe("203.0.113.1", str(a.path))).mtu == 1300
        a.run("ip", "route", "change", "10.60.0.0/16", "via", "10.99.0.2", "mtu", "1280")
        assert (await describe(a.vtep, str(a.path))).mtu == 1280
        empty = fabric.namespace("empty")
        assert await describe("203.0.113.1", str(empty)) == type(seen)(1500, ())


async def test_a_socket_is_closed_when_its_first_request_is_answered(netns: Path) -> None:
    loop, netlink = rtnetlink._thread_loop(), Netlink(netns)
    wrong: list[dict[str, Any]] = []

    async def both() -> list[Any]:
        """The first request, and right behind it, in the same turn of the loop, the end."""
        loop.set_exception_handler(lambda _, context: wrong.append(context))
        try:
            found = await asyncio.gather(netlink.links(), netlink._close())
            await asyncio.sleep(0)
        finally:
            loop.set_exception_handler(None)
        return list(found)

    asked = asyncio.run_coroutine_threadsafe(both(), loop)
    links, _ = await asyncio.wrap_future(asked)
    assert [link.name for link in links] == ["lo"] and not wrong


async def test_links_that_are_not_there(netns: Path) -> None:
    async with Netlink(netns) as netlink:
        assert await netlink.link("vxt-none") is None
        await netlink.delete_link(99999)
        with pytest.raises(OSError, match="vxt-none"):
            await netlink.index("vxt-none")
        with pytest.raises(OSError, match="No such device"):
            await netlink.set_link(99999, state="up")
        with pytest.raises(TypeError):
            await netlink.set_link(1, totally_bogus=5)
        await netlink.delete_address(1, "10.0.0.1/32")
        await netlink.delete_route("10.0.0.0/8", "10.0.0.1", 1)
    with pytest.raises(OSError):
        Netlink("/run/netns/vxt-not-there")


async def test_what_one_change_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, never asserted: how long one row and one port take, from touching to settled."""
    async with opened(tmp_path) as fabric:
        a = fabric.a
        a.add_network(7)
        await a.reconciler.settle()
        costs: dict[str, list[float]] = {}
        pauses: dict[str, float] = {}

        async def measure(what: str, changes: Iterator[Callable[[], object]]) -> None:
            lag = asyncio.create_task(longest_pause())
            for change in changes:
                await asyncio.sleep(0.002)
                change()
                begin = time.perf_counter()
                await a.reconciler.settle()
                costs.setdefault(what, []).append(time.perf_counter() - begin)
            lag.cancel()
            pauses[what] = (await asyncio.gather(lag))[0]

        def row(i: int) -> Callable[[], object]:
            mac, address = b"\x02\x50" + i.to_bytes(4, "big"), socket.inet_aton(f"10.7.1.{i}")
            a.desired.fdb.setdefault(7, {})[mac] = b"\x0a\x63\x00\x02"
            a.desired.neighbours.setdefault(7, {})[address] = mac
            return lambda: a.reconciler.touch_rows(7, [mac], [address])

        sandboxes = [Sandbox(fabric) for _ in range(20)]

        def remove() -> None:
            held = dict(a.desired.networks[7].ports)
            held.popitem()
            a.set_ports(7, held)

        await measure("row", (row(i) for i in range(200)))
        await measure("port", (partial(a.add_port, 7, 2 + i, s) for i, s in enumerate(sandboxes)))
        await measure("port removed", (remove for _ in sandboxes))
        await measure("network", (partial(a.add_network, 20 + i) for i in range(10)))
        await measure("restart's compare", (a.reconciler.touch_all for _ in range(5)))
    with capsys.disabled():
        print()
        for what, times in costs.items():
            times.sort()
            print(
                f"one {what}: median {times[len(times) // 2] * 1000:.2f} ms, worst "
                f"{times[-1] * 1000:.2f} ms; the loop's longest pause {pauses[what] * 1000:.1f} ms"
            )


def test_a_fabric_is_gone_when_it_is_closed(tmp_path: Path) -> None:
    """The tests' own tidiness."""

    async def use() -> str:
        async with opened(tmp_path) as fabric:
            fabric.a.add_network(7)
            fabric.a.add_port(7, 2, Sandbox(fabric))
            await fabric.settle()
            return fabric.id

    id = asyncio.run(use())
    assert id not in run("ip", "netns", "list")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
