"""What somebody takes away is put back, whether an event told of it or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agent.datapath.reconciler import Reconciler
from agent.model import parse_address
from tests.netns.datapath_hosts import (
    Fabric,
    Host,
    Sandbox,
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
}


@pytest.mark.parametrize("what", DRIFTS)
async def test_what_somebody_takes_away_is_put_back(pair: Pair, what: str) -> None:
    fabric, near, far = pair
    a = fabric.a
    rows = a.fdb(7), a.neighbours(7)
    take, kind = DRIFTS[what]
    take(a)
    await until(lambda: a.reconciler.repairs[kind], f"{what} is put back")
    await a.reconciler.settle()
    assert (a.fdb(7), a.neighbours(7)) == rows
    good = [(near.path, "10.7.0.3"), (far.path, "fd00:7::2"), (near.path, "10.98.0.9")]
    await until(lambda: all(pings(*good, (a.path, "10.7.0.2"), wait=0.3)), "traffic passes again")
    assert not a.reconciler.failures() and not a.gone


@pytest.mark.parametrize(
    ("take", "kind"),
    [
        (
            lambda h: h.inside(
                *("bridge", "fdb", "replace", "02:00:00:07:02:03", "dev", "vxl7"),
                *("dst", "10.99.0.77", "self", "permanent"),
            ),
            "fdb",
        ),
        (
            lambda h: h.inside(
                *("bridge", "fdb", "add", "00:00:00:00:00:00", "dev", "vxl7"),
                *("dst", "10.99.0.77", "self", "permanent"),
            ),
            "fdb",
        ),
        (
            lambda h: h.inside(
                *("ip", "neigh", "replace", "10.7.0.3", "lladdr", "02:00:00:00:00:66"),
                *("dev", "vxl7", "nud", "permanent"),
            ),
            "neighbour",
        ),
        (lambda h: h.run("ip", "route", "del", "10.7.0.0/24"), "route"),
        (lambda h: h.inside("ip", "link", "set", "vxl7", "mtu", "1400"), "link"),
        (lambda h: h.inside("ip", "address", "del", "10.7.0.1/24", "dev", "vxb7"), "link"),
        (lambda h: h.inside("ip", "address", "add", "10.7.0.99/24", "dev", "vxb7"), "link"),
        (lambda h: h.inside("bridge", "link", "set", "dev", port_of(h), "flood", "on"), "port"),
        (lambda h: h.inside("bridge", "link", "set", "dev", "vxl7", "learning", "on"), "link"),
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
    assert pings(*attempts) == [True] * 3
    assert set(a.reconciler.repairs) == {kind}


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
    a.reconciler = kernel = Overrunning(
        a.desired, a.folder, host_netns=str(a.path), monitor_buffer=1 << 14
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
