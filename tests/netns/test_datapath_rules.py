"""The rules in the kernel: loaded by the library and by the binary, changed, mended."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from agent.datapath import nft
from agent.datapath.balancer import Balancer
from agent.datapath.balancerules import BALANCE_TABLE
from agent.datapath.guard import Guard
from agent.datapath.nftables import LIBRARY, Nftables
from agent.drivers.base import Closed, Forward
from agent.errors import VxmeshError
from agent.model import Publish
from tests.netns.datapath_hosts import run
from tests.unit.datapath.test_balancerules import DNS, HTTP, HTTP6, NOBODY, ONE, TWO, by_id
from tests.unit.datapath.test_guardrules import CLOSED, PORT
from tests.unit.datapath.test_nft import DATABASE, FORWARDS, WEB

pytestmark = pytest.mark.netns


@pytest.fixture
def netns() -> Iterator[Path]:
    """One namespace."""
    name = f"vxt-part-{os.getpid()}"
    run("ip", "netns", "add", name)
    yield Path("/run/netns") / name
    run("ip", "netns", "delete", name)


RULESETS: dict[str, Callable[[], nft.Ruleset]] = {
    "own": lambda: nft.own([WEB, DATABASE]),
    "own, empty": lambda: nft.own([]),
    "host": lambda: nft.host([WEB, DATABASE], FORWARDS),
    "host, empty": lambda: nft.host([], []),
    "host, closed": lambda: nft.host([WEB], FORWARDS, CLOSED),
}


@pytest.fixture(params=["library", "binary"])
def table(netns: Path, request: pytest.FixtureRequest) -> Iterator[Nftables]:
    """Both ways to run nftables."""
    options = {} if request.param == "library" else {"library": "libnowhere.so"}
    made = Nftables(netns, **options)
    yield made
    made.close()


def listed(netns: Path) -> str:
    return run("nft", "list", "ruleset", netns=netns)


def unordered(netns: Path) -> list[str]:
    """The same without what passes by itself."""
    return sorted(re.sub(r" expires [^\s,]+", "", listed(netns)).replace(",", "").split())


def golden_listing(netns: Path, ruleset: nft.Ruleset) -> str:
    """How the kernel shows a ruleset that the nft binary loaded whole."""
    run("nft", "-f", "-", netns=netns, text=nft.render(ruleset))
    shown = listed(netns)
    run("nft", "flush", "ruleset", netns=netns)
    return shown


@pytest.mark.parametrize(
    ("first", "then"),
    [(f, t) for f, t in product(RULESETS, RULESETS) if f.split(",")[0] == t.split(",")[0]],
)
async def test_from_any_ruleset_to_any_other(
    netns: Path, table: Nftables, first: str, then: str
) -> None:
    wanted = golden_listing(netns, RULESETS[then]())
    await table.load(RULESETS[first]())
    await table.load(RULESETS[then]())
    assert sorted(listed(netns).split()) == sorted(wanted.split())
    assert await table.check()
    await table.remove()
    assert listed(netns) == ""
    await table.remove()


async def test_a_table_that_was_there_is_replaced(netns: Path, table: Nftables) -> None:
    run("nft", "add", "table", "inet", "vxmesh", "{ chain old { drop; } ; }", netns=netns)
    await table.load(nft.own([WEB]))
    assert "chain old" not in listed(netns) and "gateways4" in listed(netns)


async def test_what_somebody_changed_is_found_and_mended(netns: Path, table: Nftables) -> None:
    await table.load(nft.own([WEB]))
    assert await table.check()  # what was loaded has been looked at
    before = listed(netns)
    for change in (
        ("flush", "ruleset"),
        ("flush", "chain", "inet", "vxmesh", "input"),
        ("add", "element", "inet", "vxmesh", "hairpin", "{ eth9 . eth9 }"),
        ("insert", "rule", "inet", "vxmesh", "input", "accept"),
    ):
        run("nft", *change, netns=netns)
        assert not await table.check(), change
        assert listed(netns) == before
        assert await table.check()


async def test_what_somebody_changed_before_it_was_looked_at_is_found(
    netns: Path, table: Nftables
) -> None:
    await table.load(nft.own([WEB]))
    run("nft", "flush", "ruleset", netns=netns)
    assert not await table.check(told=True)
    assert "gateways4" in listed(netns)
    assert await table.check()


async def test_a_change_that_is_refused_leads_to_the_whole_table(
    netns: Path, table: Nftables
) -> None:
    await table.load(nft.own([WEB, DATABASE]))
    run("nft", "flush", "set", "inet", "vxmesh", "hairpin", netns=netns)
    await table.load(nft.own([]))  # deletes an element that is not there
    assert await table.check() and "vxb" not in listed(netns)


async def test_what_nftables_refuses_is_an_error_that_says_so(netns: Path, table: Nftables) -> None:
    ruleset = nft.own([WEB])
    bad = replace(ruleset, chains=ruleset.chains.replace("policy drop", "policy perhaps"))
    with pytest.raises(VxmeshError, match="firewall rules: nftables refused them"):
        await table.load(bad)
    assert listed(netns) == ""
    await table.load(ruleset)
    assert "gateways4" in listed(netns)


async def test_a_port_that_leads_elsewhere_follows(netns: Path, table: Nftables) -> None:
    await table.load(nft.host([WEB], [Forward(Publish(80, 80), "10.1.0.5")]))
    await table.load(nft.host([WEB], [Forward(Publish(80, 80), "10.1.0.6")]))
    assert "tcp . 80 : 10.1.0.6 . 80" in listed(netns) and "10.1.0.5" not in listed(netns)


async def test_the_guard_of_ports_altered_by_elements(netns: Path) -> None:
    """By the library and as a whole: the kernel lists what was expected, and finds no drift."""
    guard = Guard(netns)
    bridge = replace(WEB, ports={PORT.endpoint: PORT})
    moved = replace(PORT, addresses=("10.1.0.77/24", "fd00:1::77/64"))
    other = replace(PORT, endpoint="00000000000000e2", device="vxp00000000e2", mac=b"\2\0\0\0\0\2")
    try:
        await guard.load([], CLOSED)
        for ports in ((PORT,), (PORT, other), (moved, other), (moved,)):
            held = replace(bridge, ports={port.endpoint: port for port in ports})
            await guard.admit(held)
            await guard.release(WEB.vni, held.ports)
            assert await guard.table.check(), ports
            assert guard.endpoints() == {port.device: port.endpoint for port in ports}
        await guard.close_off(Closed())
        await guard.admit(replace(bridge, ports={PORT.endpoint: moved}, spoof=True))
        assert await guard.table.check()
        shown = listed(netns)
        await guard.table.remove()
        await guard.load([replace(bridge, ports={PORT.endpoint: moved}, spoof=True)], Closed())
        assert sorted(listed(netns).split()) == sorted(shown.split())
    finally:
        guard.close()


async def test_the_rules_for_networks_that_flood_are_there_while_one_is(netns: Path) -> None:
    """And no longer: on the way of the others is nothing more. Each port has a limit of its own."""
    guard = Guard(netns)
    plain = replace(WEB, ports={PORT.endpoint: PORT})
    port = replace(PORT, endpoint="00000000000000e2", device="vxp00000000e2", mac=b"\2\0\0\0\0\2")
    flooding = replace(DATABASE, flood_rate=70, ports={port.endpoint: port})
    try:
        await guard.load([plain], Closed())
        without = listed(netns)
        assert "chain groups" not in without
        await guard.admit(flooding)
        assert await guard.table.check()
        shown = listed(netns)
        assert "chain groups" in shown and f'"{port.device}" limit rate over 70/second' in shown
        await guard.admit(replace(flooding, flood_rate=5))
        assert await guard.table.check()
        assert f'"{port.device}" limit rate over 5/second' in listed(netns)
        assert set(await guard.table.counted("flooding")) == {port.device}
        await guard.release(flooding.vni)
        assert await guard.table.check()
        assert sorted(listed(netns).split()) == sorted(without.split())
        await guard.load([plain, flooding], Closed())
        assert sorted(listed(netns).split()) == sorted(shown.split())
    finally:
        guard.close()


async def test_a_guard_that_was_deleted_is_whole_after_the_next_change(netns: Path) -> None:
    guard = Guard(netns)
    try:
        await guard.load([replace(WEB, ports={PORT.endpoint: PORT})], CLOSED)
        run("nft", "flush", "ruleset", netns=netns)
        other = replace(PORT, endpoint="00000000000000e2", device="vxp00000000e2")
        await guard.admit(replace(WEB, ports={PORT.endpoint: PORT, other.endpoint: other}))
        assert await guard.table.check()
        assert PORT.device in listed(netns) and other.device in listed(netns)
        assert set(await guard.table.counted("ports")) == {PORT.device, other.device}
    finally:
        guard.close()


@pytest.mark.parametrize("library", [LIBRARY, "libnowhere.so"])
async def test_the_clients_that_the_kernel_knows_outlive_whatever_else_is_mended(
    netns: Path, library: str
) -> None:
    sticky = replace(HTTP, affinity=60.0)
    client = "10.9.0.1 . 10.1.0.100 . tcp . 80"
    table = BALANCE_TABLE.split()
    balancer, again = Balancer(netns, library), Balancer(netns, library)
    try:
        await balancer.load(by_id(sticky, HTTP6, DNS), NOBODY)
        element = f"{{ {client} timeout 30d : 0x1 }}"
        run("nft", "add", "element", *table, "clients4", element, netns=netns)
        before = unordered(netns)
        assert await balancer.table.check()
        for change in (
            ("flush", "chain", *table, "balance"),
            ("insert", "rule", *table, "balance", "accept"),
            ("add", "chain", *table, "stranger"),
            ("add", "map", *table, "strange", "{ type mark : mark; }"),
            ("flush", "map", *table, "members4"),
            ("add", "element", *table, "vips4", "{ 10.9.9.9 }"),
        ):
            run("nft", *change, netns=netns)
            assert not await balancer.table.check(), change
            assert unordered(netns) == before
            assert await balancer.table.check()
        for affinity in (60.0, 7.0, 0.0, 7.0):  # what is altered is what is then looked for
            for backends in ((ONE, replace(TWO, draining=True)), (ONE, replace(TWO, port=9)), ()):
                altered = replace(sticky, affinity=affinity, backends=backends)
                await balancer.alter(by_id(altered), NOBODY)
                assert await balancer.table.check(), altered
        await again.load(by_id(sticky, HTTP6, DNS), NOBODY)
        assert client in listed(netns) and "sticky_256_7000" not in listed(netns)
        run("nft", "flush", "ruleset", netns=netns)
        assert not await again.table.check()
        assert client not in listed(netns) and await again.table.check()
    finally:
        balancer.close()
        again.close()
