"""What somebody takes away is put back, whether an event told of it or not."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from agent.datapath import namespaces
from agent.datapath.reconciler import Reconciler
from agent.datapath.repairs import Repair
from agent.notation import parse_address
from tests.netns.datapath_hosts import (
    Fabric,
    Host,
    Sandbox,
    longest_pause,
    opened,
    paired,
    pings,
    ports_of,
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


Drift = Callable[[Host], object]


def port_of(host: Host) -> str:
    return ports_of(host)[0]


def unplaced(host: Host) -> Path:
    """The path of our namespace, with nothing there."""
    namespaces.remove(host.own)
    return host.own


DRIFTS: dict[str, tuple[Drift, str]] = {
    "a row of the FDB": (
        lambda h: h.inside("bridge", "fdb", "del", "02:00:00:07:02:03", "dev", "vxl7", "self"),
        "fdb",
    ),
    "a neighbour": (
        lambda h: h.inside("ip", "neigh", "del", "10.7.0.3", "dev", "vxl7"),
        "neighbour",
    ),
    "a neighbour of IPv6": (
        lambda h: h.inside("ip", "neigh", "del", "fd00:7::3", "dev", "vxl7"),
        "neighbour",
    ),
    "the entry of a port": (
        lambda h: h.inside(
            "bridge", "fdb", "del", "02:00:00:07:01:02", "dev", port_of(h), "master"
        ),
        "port",
    ),
    "a port": (lambda h: h.inside("ip", "link", "del", port_of(h)), "port"),
    "the VXLAN device": (lambda h: h.inside("ip", "link", "del", "vxl7"), "bridge"),
    "the bridge": (lambda h: h.inside("ip", "link", "del", "vxb7"), "bridge"),
    "a port's bridge": (lambda h: h.inside("ip", "link", "set", port_of(h), "nomaster"), "link"),
    "the VXLAN device's bridge": (
        lambda h: h.inside("ip", "link", "set", "vxl7", "nomaster"),
        "link",
    ),
    "a port that is up": (lambda h: h.inside("ip", "link", "set", port_of(h), "down"), "link"),
    "a VXLAN device that is up": (lambda h: h.inside("ip", "link", "set", "vxl7", "down"), "link"),
    "a bridge that is up": (lambda h: h.inside("ip", "link", "set", "vxb7", "down"), "link"),
    "our rules": (lambda h: h.inside("nft", "flush", "ruleset"), "nft"),
    "a chain of ours": (
        lambda h: h.inside("nft", "flush", "chain", "inet", "vxmesh", "forward"),
        "nft",
    ),
    "the host's rules": (lambda h: h.run("nft", "flush", "ruleset"), "nft"),
    "the uplink": (lambda h: h.inside("ip", "link", "del", "uplink"), "link"),
    "the host's end of it": (lambda h: h.run("ip", "link", "del", "vxmesh0"), "link"),
    "an uplink that is up": (lambda h: h.run("ip", "link", "set", "vxmesh0", "down"), "link"),
    "where a row of the FDB leads": (
        lambda h: h.inside(
            *("bridge", "fdb", "replace", "02:00:00:07:02:03", "dev", "vxl7"),
            *("dst", "10.99.0.77", "self", "permanent"),
        ),
        "fdb",
    ),
    "that nothing is flooded": (
        lambda h: h.inside(
            *("bridge", "fdb", "add", "00:00:00:00:00:00", "dev", "vxl7"),
            *("dst", "10.99.0.77", "self", "permanent"),
        ),
        "fdb",
    ),
    "that nobody else is known": (
        lambda h: h.inside(
            *("bridge", "fdb", "add", "02:00:00:00:00:66", "dev", "vxl7"),
            *("dst", "10.99.0.2", "self", "permanent"),
        ),
        "fdb",
    ),
    "a neighbour's MAC": (
        lambda h: h.inside(
            *("ip", "neigh", "replace", "10.7.0.3", "lladdr", "02:00:00:00:00:66"),
            *("dev", "vxl7", "nud", "permanent"),
        ),
        "neighbour",
    ),
    "that a neighbour stays": (
        lambda h: h.inside(
            *("ip", "neigh", "replace", "10.7.0.3", "lladdr", "02:00:00:07:02:03"),
            *("dev", "vxl7", "nud", "stale"),
        ),
        "neighbour",
    ),
    "to which port an entry leads": (
        lambda h: h.inside(
            *("bridge", "fdb", "replace", "02:00:00:07:01:02", "dev", "vxl7"),
            *("master", "static"),
        ),
        "port",
    ),
    "what only the port's own entry leads to it": (
        lambda h: h.inside(
            *("bridge", "fdb", "add", "02:00:00:07:02:03", "dev", port_of(h)),
            *("master", "static"),
        ),
        "port",
    ),
    "an MTU": (lambda h: h.inside("ip", "link", "set", "vxl7", "mtu", "1400"), "link"),
    "a bridge's MTU": (lambda h: h.inside("ip", "link", "set", "vxb7", "mtu", "1300"), "link"),
    "a bridge's group": (lambda h: h.inside("ip", "link", "set", "vxb7", "group", "0"), "link"),
    "a bridge's MAC": (
        lambda h: h.inside("ip", "link", "set", "vxb7", "address", "02:00:00:00:00:67"),
        "link",
    ),
    "a port's MTU": (lambda h: h.inside("ip", "link", "set", port_of(h), "mtu", "900"), "link"),
    "a port's master": (
        lambda h: (
            h.inside("ip", "link", "add", "theirs", "type", "bridge"),
            h.inside("ip", "link", "set", port_of(h), "master", "theirs"),
        ),
        "link",
    ),
    "a device's name": (lambda h: h.inside("ip", "link", "set", "vxb7", "name", "b"), "bridge"),
    "that a port floods nothing": (
        lambda h: h.inside("bridge", "link", "set", "dev", port_of(h), "flood", "on"),
        "port",
    ),
    "that nothing is learnt": (
        lambda h: h.inside("bridge", "link", "set", "dev", "vxl7", "learning", "on"),
        "link",
    ),
    "an address of a bridge": (
        lambda h: h.inside("ip", "address", "del", "10.7.0.1/24", "dev", "vxb7"),
        "address",
    ),
    "that it has no other": (
        lambda h: h.inside("ip", "address", "add", "10.7.0.99/24", "dev", "vxb7"),
        "address",
    ),
    "an address of the uplink": (
        lambda h: h.inside("ip", "address", "flush", "dev", "uplink", "scope", "global"),
        "address",
    ),
    "an address of its other end": (
        lambda h: h.run("ip", "address", "flush", "dev", "vxmesh0"),
        "address",
    ),
    "a route of the host": (lambda h: h.run("ip", "route", "del", "10.7.0.0/24"), "route"),
    "a route of ours": (lambda h: h.inside("ip", "route", "del", "default"), "route"),
    "an element": (
        lambda h: h.inside("nft", 'delete element inet vxmesh hairpin { "vxb7" . "vxb7" }'),
        "nft",
    ),
    "that a chain drops": (
        lambda h: h.inside("nft", "chain inet vxmesh forward { policy accept; }"),
        "nft",
    ),
    "that nobody else is let in": (
        lambda h: h.run("nft", "insert rule inet vxmesh forward accept"),
        "nft",
    ),
    "forwarding": (lambda h: h.inside("sysctl", "-qw", "net.ipv4.ip_forward=0"), "sysctl"),
    "the host's forwarding": (lambda h: h.run("sysctl", "-qw", "net.ipv4.ip_forward=0"), "sysctl"),
    "our namespace's place": (lambda h: namespaces.remove(h.own), "namespace"),
    "what is mounted there": (lambda h: run("umount", "--lazy", str(h.own)), "namespace"),
    "which one is there": (
        lambda h: namespaces.ensure(unplaced(h)),
        "namespace",
    ),
}


@pytest.mark.parametrize("what", DRIFTS)
async def test_what_the_kernel_tells_of_is_put_back_at_once(pair: Pair, what: str) -> None:
    fabric, near, far = pair
    a = fabric.a
    before = a.fdb(7), a.neighbours(7)
    inode = namespaces.inode(a.own)
    told: list[Repair] = []
    a.reconciler.on_repair = told.append
    take, kind = DRIFTS[what]
    take(a)
    await until(lambda: a.reconciler.repairs[kind], f"{what} is put back")
    await a.reconciler.settle()
    assert namespaces.inode(a.own) == inode
    assert (a.fdb(7), a.neighbours(7)) == before
    good = [(near.path, "10.7.0.3"), (far.path, "fd00:7::2"), (near.path, "10.98.0.9")]
    await until(lambda: all(pings(*good, (a.path, "10.7.0.2"), wait=0.3)), "traffic passes again")
    assert not a.reconciler.failures() and not a.gone
    counted = Counter(a.reconciler.repairs)

    def all_told() -> bool:
        return sum((Counter({r.kind: r.count}) for r in told), Counter()) == counted

    await until(all_told, "all of it is told")
    # Nothing of it is left: all that is compared in the background is right.
    a.reconciler.audit()
    await a.reconciler.settle()
    assert a.reconciler.repairs == counted


@pytest.mark.parametrize(
    ("take", "kind"),
    [
        (lambda h: h.inside("sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=0"), "sysctl"),
        (lambda h: h.inside("sysctl", "-qw", "net.ipv4.conf.vxb7.forwarding=0"), "sysctl"),
        (lambda h: h.inside("sysctl", "-qw", "net.ipv6.conf.vxb7.disable_ipv6=1"), "sysctl"),
        (lambda h: h.run("sysctl", "-qw", "net.ipv4.conf.vxmesh0.route_localnet=0"), "sysctl"),
        (
            lambda h: h.inside("ip", "route", "replace", "default", "dev", "uplink"),
            "route",
        ),
    ],
)
async def test_what_no_event_tells_of_is_found_in_the_background(
    pair: Pair, take: Drift, kind: str
) -> None:
    fabric, near, _ = pair
    a = fabric.a
    rows = a.fdb(7), a.neighbours(7)
    await restart(a, audit_interval=0.05)
    take(a)
    await until(lambda: a.reconciler.repairs[kind], f"a repair of kind {kind}")
    await a.reconciler.settle()
    assert (a.fdb(7), a.neighbours(7)) == rows
    attempts = [(near.path, "10.7.0.3"), (a.path, "10.7.0.2"), (near.path, "10.7.0.1")]
    await until(lambda: all(pings(*attempts, (near.path, "fd00:7::3"))), "traffic passes again")
    assert not a.reconciler.failures()


async def test_every_network_gets_its_turn_in_the_background(fabric: Fabric) -> None:
    a = fabric.a
    await a.reconciler.stop()
    kernel = a.make(audit_interval=0.5)
    for vni in range(7, 17):
        a.add_network(vni)
    await kernel.start()
    # Of this no event tells, and nothing but the compare of that very network finds it.
    for vni in range(7, 17):
        a.inside("sysctl", "-qw", f"net.ipv4.conf.vxb{vni}.send_redirects=1")
    await until(lambda: kernel.repairs["sysctl"] == 10, "all ten are put back")


async def test_our_own_changes_are_no_drift(fabric: Fabric) -> None:
    """However they come and go, and whatever of them is heard late."""
    a = fabric.a
    await a.reconciler.stop()
    kernel = a.make(audit_interval=0.02)
    await kernel.start()
    sandbox = Sandbox(fabric)
    old: list[bytes] = []
    for turn in range(12):
        a.add_network(7, mtu=1430 - turn)
        a.add_port(7, 2, sandbox)
        macs = {bytes([2, 80, turn, 0, 0, i]): parse_address("10.99.0.2") for i in range(60)}
        a.desired.fdb[7] = macs
        a.desired.neighbours[7] = {mac[2:]: mac for mac in macs}
        kernel.touch_rows(7, [*old, *macs], [mac[2:] for mac in [*old, *macs]])
        old = list(macs)
        await asyncio.sleep(0.005 * (turn % 3))
        moved = {mac: parse_address("10.99.0.3") for mac in list(macs)[::2]}
        a.desired.fdb[7] = moved
        a.desired.neighbours[7] = {mac[2:]: mac for mac in moved}
        kernel.touch_rows(7, macs, [mac[2:] for mac in macs])
        if turn % 2:
            await asyncio.sleep(0.01)
            a.set_ports(7, {})
        if turn % 4 == 3:
            del a.desired.networks[7]
            kernel.touch_bridge(7)
        else:
            await kernel.settle()
            assert set(a.fdb(7)) == {mac.hex(":") for mac in moved}
    await kernel.settle()
    await asyncio.sleep(0.1)
    assert not kernel.repairs and not kernel.failures()


class Overrunning(Reconciler):
    """Counts the overruns."""

    overruns = 0

    def _overrun(self) -> None:
        self.overruns += 1
        super()._overrun()


async def test_lost_events_lead_to_a_full_compare(fabric: Fabric) -> None:
    a = fabric.a
    await a.reconciler.stop()
    a.reconciler = kernel = Overrunning(
        a.desired, a.folder, host_netns=str(a.path), monitor_buffer=1 << 14
    )
    a.desired.fdb[7] = {
        b"\x02\x50\x00\x00" + i.to_bytes(2, "big"): parse_address("10.99.0.2") for i in range(3000)
    }
    a.add_network(7)
    await kernel.start()
    rows = a.fdb(7)
    assert len(rows) == 3000
    # The loop does not run meanwhile, so nobody reads the events.
    batch = "".join(f"fdb del {mac} dev vxl7 self\n" for mac in rows)
    run("bridge", "-batch", "-", netns=a.own, text=batch)
    assert a.fdb(7) == {}
    await until(lambda: kernel.repairs["fdb"] == 3000, "all rows are put back")
    assert a.fdb(7) == rows
    assert kernel.overruns


async def test_our_own_bulk_deletions_are_not_heard(fabric: Fabric) -> None:
    """They would overrun the monitor, or at least keep the loop busy for nothing."""
    a = fabric.a
    await a.reconciler.stop()
    # Room for what the kernel tells of a network's devices, which come at once, and for no more
    # than some hundred rows.
    a.reconciler = kernel = Overrunning(
        a.desired, a.folder, host_netns=str(a.path), monitor_buffer=1 << 17
    )
    a.add_network(7)
    await kernel.start()
    for _ in range(2):
        macs = {b"\x02\x50" + i.to_bytes(4, "big"): parse_address("10.99.0.2") for i in range(3000)}
        a.desired.fdb[7] = macs
        a.desired.neighbours[7] = {mac[2:]: mac for mac in macs}
        kernel.touch_rows(7, macs, a.desired.neighbours[7])
        await kernel.settle()
        assert len(a.fdb(7)) == 3000
        a.desired.fdb[7], a.desired.neighbours[7] = {}, {}
        kernel.touch_rows(7, macs, [mac[2:] for mac in macs])
        await kernel.settle()
        assert a.fdb(7) == {} and a.neighbours(7) == {}
        # Nor those of a network that goes with all its rows.
        a.desired.fdb[7] = macs
        kernel.touch_rows(7, macs, [])
        await kernel.settle()
        network = a.desired.networks.pop(7)
        kernel.touch_bridge(7)
        await kernel.settle()
        a.desired.networks[7] = network
        a.desired.fdb[7] = {}
        kernel.touch_bridge(7)
        await kernel.settle()
    await asyncio.sleep(0.1)
    assert kernel.overruns == 0 and not kernel.repairs


async def test_ten_thousand_rows_deleted_come_back_and_are_counted(
    fabric: Fabric, capsys: pytest.CaptureFixture[str]
) -> None:
    a, n = fabric.a, 10_000
    a.add_network(7)
    macs = {b"\x02\x50" + i.to_bytes(4, "big"): parse_address("10.99.0.2") for i in range(n)}
    a.desired.fdb[7] = macs
    a.desired.neighbours[7] = {b"\x0a\x07" + mac[4:]: mac for mac in macs}
    kernel = a.reconciler
    kernel.touch_rows(7, macs, a.desired.neighbours[7])
    await kernel.settle()
    rows = a.fdb(7), a.neighbours(7)
    assert [len(each) for each in rows] == [n, n]
    lag = asyncio.create_task(longest_pause())
    took = {}

    def all_back(kind: str) -> bool:
        return kernel.repairs[kind] >= n

    for kind, *command in (("fdb", "bridge"), ("neighbour", "ip")):
        lines = (
            [f"fdb del {mac} dev vxl7 self\n" for mac in rows[0]]
            if kind == "fdb"
            else [f"neigh del {address} dev vxl7\n" for address in rows[1]]
        )
        deleting = await asyncio.create_subprocess_exec(
            *("nsenter", f"--net={a.own}", *command, "-batch", "-"), stdin=asyncio.subprocess.PIPE
        )
        await deleting.communicate("".join(lines).encode())
        begin = time.perf_counter()
        await until(partial(all_back, kind), f"all of {kind} are put back")
        took[kind] = time.perf_counter() - begin
    lag.cancel()
    (pause,) = await asyncio.gather(lag)
    assert (a.fdb(7), a.neighbours(7)) == rows
    assert kernel.repairs == {"fdb": n, "neighbour": n}
    with capsys.disabled():
        print(
            f"\n{n} rows deleted one by one: all there {took['fdb'] * 1000:.0f} ms (FDB) and "
            f"{took['neighbour'] * 1000:.0f} ms (neighbours) after the last was; "
            f"the loop's longest pause {pause * 1000:.0f} ms"
        )
