"""The rules that balance: whole in golden/, and what a change of one frontend costs.

tests/netns/test_balancing.py has the same in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock
from zlib import crc32

import pytest

from agent.datapath import affinityrules, balancerules, nft, replies
from agent.datapath import balancer as balancer_module
from agent.datapath.balancer import Balancer, Publication, Way
from agent.datapath.balancerules import Placed
from agent.datapath.nft import Ruleset
from agent.drivers.balancing import Backend, Frontend, FrontendKey, assign
from agent.errors import VxmeshError
from agent.notation import parse_address
from tests.unit.datapath.test_nft import FORWARDS, WEB, golden

ONE = Backend(parse_address("10.1.0.2"), 8080, 1, "1" * 16)
TWO = Backend(parse_address("10.1.0.3"), 8080, 1, "2" * 16)
HOST = Backend(parse_address("10.99.0.2"), 8080, 1, "2" * 16, outside=True)
SIX = Backend(parse_address("fd00:1::2"), 8080, 1, "1" * 16)
HTTP = Frontend("a", "n", 4097, "tcp", parse_address("10.1.0.100"), 80, (ONE, TWO))
HTTP6 = replace(
    HTTP, address=parse_address("fd00:1::100"), backends=(SIX,), version=6, affinity=60.0
)
DNS = Frontend("b", "n", 4097, "udp", b"", 53, (ONE,), published=((b"", 53),), prefer_local=True)
EMPTY = Frontend("c", "n", 4097, "tcp", parse_address("10.1.0.101"), 80, (), refuse=False)
MIXED = replace(DNS, service="d", backends=(ONE, HOST), published=((b"", 54),))


class Table:
    """Nftables that keeps what it is told."""

    def __init__(self) -> None:
        self.loads: list[Ruleset] = []
        self.changes: list[tuple[Any, Any]] = []
        self.chains: list[str] = []
        self.removals: list[bool] = []

    async def remove(self) -> None:
        self.removals.append(True)

    async def load(self, ruleset: Ruleset) -> None:
        self.loads.append(ruleset)

    async def alter(self, come: object, gone: object, chains: str) -> None:
        self.changes.append((come, gone))
        self.chains += [chains] if chains else []


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def balancer(tmp_path: Path, table: Table) -> Balancer:
    balancer = Balancer(tmp_path)
    balancer.table = cast("Any", table)
    return balancer


def by_id(*frontends: Frontend) -> dict[FrontendKey, Frontend]:
    return {one.id: one for one in frontends}


NOBODY: frozenset[str] = frozenset()


def test_the_table_without_services() -> None:
    golden("balance-empty.nft", nft.render(balancerules.ruleset([])))


def test_the_table_with_services() -> None:
    placed = [
        Placed(one, assign(one.backends, one.affinity > 0)[:4], doors, frozenset({"1" * 16}))
        for one, doors in ((HTTP, ()), (HTTP6, ()), (DNS, (53,)), (MIXED, (54,)), (EMPTY, ()))
    ]
    rules = balancerules.ruleset(map(balancerules.claims, placed), {60_000})
    golden("balance.nft", nft.render(rules))


def test_the_table_made_anew_where_it_is_there_already() -> None:
    """What is kept stays, and nothing of anybody else's."""
    rules = balancerules.ruleset([balancerules.claims(Placed(HTTP, (ONE.key, TWO.key)))])
    rules = replace(rules, chains=rules.chains.split("\tchain spread_3 ")[0])  # is enough to see
    chains = {"balance", "stray", "spread_1", "stranger", "sticky_256_60000"}
    golden("balance-renew.nft", nft.renew(rules, chains, {*rules.sets, "strange"}))


def test_the_hosts_table_with_a_door() -> None:
    doors = balancerules.doors({Publication(4, b"", "udp", 53): 53})
    golden("host-doors.nft", nft.render(nft.host([WEB], FORWARDS, doors=doors)))


def test_the_table_of_a_sandbox() -> None:
    golden("replies.nft", replies.render("eth0", "vxmesh_replies_2"))


async def test_one_backend_that_changes_costs_its_own_elements(
    balancer: Balancer, table: Table
) -> None:
    await balancer.load(by_id(HTTP, HTTP6, DNS, EMPTY), NOBODY)
    moved = replace(TWO, port=8081)
    await balancer.alter(by_id(replace(HTTP, backends=(ONE, moved))), NOBODY)
    come, gone = table.changes.pop()
    assert gone == {
        "slots4": {"10.1.0.100 . tcp . 80 . 1": "10.1.0.3 . 8080"},
        "backends4": {"10.1.0.3 . tcp . 8080": ""},
    }
    assert come == {
        "slots4": {"10.1.0.100 . tcp . 80 . 1": "10.1.0.3 . 8081"},
        "backends4": {"10.1.0.3 . tcp . 8081": ""},
    }
    await balancer.alter(by_id(replace(HTTP, backends=(ONE, moved))), NOBODY)
    assert not table.changes and len(table.loads) == 1


async def test_with_affinity_a_backend_that_moves_costs_one_element_of_what_leads_to_it(
    balancer: Balancer, table: Table
) -> None:
    sticky = replace(HTTP, affinity=60.0)
    await balancer.load(by_id(sticky), NOBODY)
    assert len(table.loads[-1].sets["sticky4"].elements) == 256
    moved = replace(TWO, port=8081)
    await balancer.alter(by_id(replace(sticky, backends=(ONE, moved))), NOBODY)
    come, gone = table.changes.pop()
    member = f"10.1.0.100 . tcp . 80 . 0x{crc32(TWO.key.encode()):08x}"
    assert gone == {
        "members4": {member: "10.1.0.3 . 8080"},
        "backends4": {"10.1.0.3 . tcp . 8080": ""},
    }
    assert come["members4"] == {member: "10.1.0.3 . 8081"}


async def test_with_affinity_who_takes_no_connections_is_no_member_even_of_known_clients(
    balancer: Balancer, table: Table
) -> None:
    sticky = replace(HTTP, affinity=60.0)
    await balancer.load(by_id(sticky), NOBODY)
    for change in ({"draining": True}, {"weight": 0}):
        await balancer.alter(by_id(replace(sticky, backends=(ONE, replace(TWO, **change)))), NOBODY)
        _, gone = table.changes.pop()
        assert list(gone["members4"].values()) == ["10.1.0.3 . 8080"]
        assert "backends4" not in gone  # those connections that there are go on
        await balancer.alter(by_id(sticky), NOBODY)
        come, _ = table.changes.pop()
        assert list(come["members4"].values()) == ["10.1.0.3 . 8080"]


async def test_a_time_out_of_affinity_has_its_chains_once(balancer: Balancer, table: Table) -> None:
    await balancer.load(by_id(HTTP6), NOBODY)
    assert "chain sticky_256_60000 {" in table.loads[-1].chains
    same = replace(HTTP, affinity=60.0)
    await balancer.alter(by_id(same), NOBODY)
    assert not table.chains
    for _ in range(2):
        await balancer.alter(by_id(replace(same, affinity=1.6)), NOBODY)
        come, _ = table.changes.pop()
        assert come["services4"] == {"10.1.0.100 . tcp . 80": "goto sticky_256_2000"}
        await balancer.alter(by_id(same), NOBODY)
    (chains,) = table.chains
    assert "chain sticky_4096_2000 {" in chains and " timeout 2s : meta mark }" in chains


async def test_time_outs_that_nobody_has_any_more_lose_their_chains(
    balancer: Balancer, table: Table
) -> None:
    await balancer.load(by_id(HTTP), NOBODY)
    for seconds in range(1, 100):
        await balancer.alter(by_id(replace(HTTP, affinity=float(seconds))), NOBODY)
    assert 1 < len(table.loads) < 20
    for ruleset in table.loads:
        assert ruleset.chains.count("chain sticky_256_") <= 1
    assert "chain sticky_256_1000 {" not in table.loads[-1].chains


async def test_with_too_many_time_outs_the_hash_alone_chooses(
    balancer: Balancer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Mock()  # whatever level another test has set for the real one
    monkeypatch.setattr("agent.datapath.balancer.log", log)
    many = [
        replace(HTTP, service=f"{n:04}", address=bytes([10, 1, 1, n]), affinity=float(n + 1))
        for n in range(affinityrules.SPANS_MAX + 2)
    ]
    await balancer.load(by_id(*many), NOBODY)
    assert [call.args for call in log.warning.call_args_list] == [("affinity.timeouts",)]
    services = list(table.loads[-1].sets["services4"].elements.values())
    assert services.count(f"goto sticky_256_{affinityrules.STATELESS}") == 2
    chains = table.loads[-1].chains
    assert chains.count("chain sticky_256_") == affinityrules.SPANS_MAX + 1
    hashed = chains.split(f"chain sticky_256_{affinityrules.STATELESS} {{")[1].split("}")[0]
    assert "@sticky4" in hashed and "@clients" not in hashed
    # One with a time-out that is there has it; and there is room again when one goes.
    await balancer.alter(
        {many[0].id: None, many[-1].id: replace(many[-1], prefer_local=True)}, NOBODY
    )
    come, _ = table.changes.pop()
    assert f"goto sticky_256_{1000 * len(many)}" in come["services4"].values()


async def test_a_backend_of_two_services_stays_until_both_are_gone(
    balancer: Balancer, table: Table
) -> None:
    other = replace(HTTP, service="z", address=parse_address("10.1.0.102"))
    await balancer.load(by_id(HTTP, other), NOBODY)
    outcome = await balancer.alter({HTTP.id: None}, NOBODY)
    assert "backends4" not in table.changes.pop()[1]
    entry = HTTP.address
    assert outcome.gone == {
        Way("tcp", entry, 80, ONE.address, 8080),
        Way("tcp", entry, 80, TWO.address, 8080),
    }
    assert outcome.vips == {4097: [HTTP.address]} and not outcome.networks
    outcome = await balancer.alter({other.id: None}, NOBODY)
    assert len(table.changes.pop()[1]["backends4"]) == 2
    assert outcome.networks == {4097}


async def test_who_drains_keeps_its_connections_and_who_is_left_out_does_not(
    balancer: Balancer,
) -> None:
    await balancer.load(by_id(HTTP), NOBODY)
    drains = replace(HTTP, backends=(ONE, replace(TWO, draining=True)))
    assert not (await balancer.alter(by_id(drains), NOBODY)).gone
    outcome = await balancer.alter(by_id(replace(HTTP, backends=(ONE,))), NOBODY)
    assert outcome.gone == {Way("tcp", HTTP.address, 80, TWO.address, 8080)}


async def test_a_port_that_two_addresses_share_gets_a_door_of_another_number(
    balancer: Balancer,
) -> None:
    def at(service: str, *addresses: str) -> Frontend:
        published = tuple((parse_address(a), 443) for a in addresses)
        return replace(DNS, service=service, published=published)

    await balancer.load(by_id(at("a", "192.0.2.1"), at("b", "192.0.2.2")), NOBODY)
    assert balancer.published() == {
        ("doors4_at", "192.0.2.1 . udp . 443"): "169.254.83.2 . 443",
        ("doors4_at", "192.0.2.2 . udp . 443"): "169.254.83.2 . 65535",
    }
    # What there is keeps its door, whoever comes and goes.
    outcome = await balancer.alter({at("a").id: None}, NOBODY)
    assert balancer.published() == {("doors4_at", "192.0.2.2 . udp . 443"): "169.254.83.2 . 65535"}
    assert outcome.published
    assert outcome.opened == {Publication(4, parse_address("192.0.2.1"), "udp", 443)}


async def test_of_two_services_at_one_published_port_the_first_holds_it(
    balancer: Balancer, table: Table
) -> None:
    rival = replace(DNS, service="z", backends=(TWO,))
    await balancer.load(by_id(DNS, rival), NOBODY)
    slots = table.loads[-1].sets["slots4"].elements
    assert slots == {"169.254.83.2 . udp . 53 . 0": "10.1.0.2 . 8080"}
    await balancer.alter({DNS.id: None}, NOBODY)
    come, _ = table.changes.pop()
    assert come["slots4"] == {"169.254.83.2 . udp . 53 . 0": "10.1.0.3 . 8080"}


async def test_a_backend_that_comes_to_this_host_is_preferred_there_from_then_on(
    balancer: Balancer, table: Table
) -> None:
    preferring = replace(HTTP, prefer_local=True)
    await balancer.load(by_id(preferring), NOBODY)
    await balancer.alter({}, frozenset({TWO.key}))
    come, gone = table.changes.pop()
    assert come["slots4"] == {"10.1.0.100 . tcp . 80 . 0": "10.1.0.3 . 8080"}
    assert come["selves4"] == {"10.1.0.3 . 10.1.0.3": ""}
    assert set(gone["slots4"]) == {"10.1.0.100 . tcp . 80 . 0", "10.1.0.100 . tcp . 80 . 1"}


async def test_after_a_failure_the_whole_table_is_loaded(balancer: Balancer, table: Table) -> None:
    await balancer.load(by_id(HTTP, DNS), NOBODY)

    async def fails(come: Mapping[str, object], gone: Mapping[str, object], _: str) -> None:
        raise OSError("refused")

    alter, table.alter = table.alter, fails  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="refused"):
        await balancer.alter({HTTP.id: None}, NOBODY)
    table.alter = alter  # type: ignore[method-assign]
    await balancer.alter({}, NOBODY)
    assert len(table.loads) == 2 and not table.loads[-1].sets["vips4"].elements


async def test_without_a_service_there_is_no_table(balancer: Balancer, table: Table) -> None:
    await balancer.load({}, NOBODY)
    await balancer.alter({}, NOBODY)
    await balancer.retire()
    assert (table.loads, table.changes, len(table.removals)) == (
        [],
        [],
        1,
    )  # an agent before had one
    await balancer.alter(by_id(HTTP), NOBODY)
    # Its chains, and then piece by piece what is in it.
    assert len(table.loads) == 1 and not table.loads[-1].sets["vips4"].elements
    assert any(come.get("vips4") for come, _ in table.changes)
    await balancer.retire()
    assert len(table.removals) == 1


async def test_with_the_last_service_the_table_goes_once_nothing_leads_there(
    balancer: Balancer, table: Table
) -> None:
    await balancer.load(by_id(HTTP), NOBODY)
    await balancer.alter({HTTP.id: None}, NOBODY)
    assert table.changes and not table.removals  # who still comes is refused
    await balancer.retire()
    assert len(table.removals) == 1
    await balancer.alter(by_id(DNS), NOBODY)
    assert len(table.loads) == 2  # with its chains
    # So it is when all is looked at anew, too.
    await balancer.load({}, NOBODY)
    assert len(table.removals) == 1
    await balancer.retire()
    assert len(table.removals) == 2


async def test_what_a_change_asks_for_outlives_that_it_fails(
    balancer: Balancer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    await balancer.load(by_id(HTTP), NOBODY)

    async def fail(*arguments: object) -> None:
        raise VxmeshError("nft", "does not answer", "")

    with monkeypatch.context() as broken:
        broken.setattr(table, "alter", fail)
        with pytest.raises(VxmeshError):
            await balancer.alter(by_id(DNS, replace(HTTP, backends=(ONE,))), NOBODY)
    outcome = await balancer.load(by_id(DNS, replace(HTTP, backends=(ONE,))), NOBODY)
    assert outcome.published
    assert outcome.opened == {Publication(4, b"", "udp", 53)}
    assert outcome.gone == {Way("tcp", HTTP.address, 80, TWO.address, TWO.port)}
    assert not (await balancer.alter({}, NOBODY)).gone


async def test_a_way_that_came_back_after_a_failure_is_not_ended(
    balancer: Balancer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    await balancer.load(by_id(HTTP), NOBODY)

    async def fail(*arguments: object) -> None:
        raise VxmeshError("nft", "does not answer", "")

    with monkeypatch.context() as broken:
        broken.setattr(table, "alter", fail)
        with pytest.raises(VxmeshError):
            await balancer.alter(by_id(replace(HTTP, backends=(ONE,))), NOBODY)
    assert not (await balancer.load(by_id(HTTP), NOBODY)).gone


def many(count: int) -> dict[FrontendKey, Frontend]:
    """Services of one backend, which is another one's for each."""
    services = [
        replace(
            HTTP,
            service=f"s{number:03}",
            address=bytes((10, 1, 1, number)),
            backends=(replace(ONE, address=bytes((10, 1, 2, number))),),
        )
        for number in range(count)
    ]
    return by_id(*services)


def elements(changes: list[tuple[Any, Any]]) -> dict[str, set[str]]:
    """What came by all of these, by set or map; none may come twice."""
    found: dict[str, set[str]] = {}
    for come, gone in changes:
        assert not gone
        for name, pairs in come.items():
            held = found.setdefault(name, set())
            assert not held & pairs.keys()
            held |= pairs.keys()
    return found


async def test_many_services_come_in_several_transactions_and_each_in_one(
    balancer: Balancer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancer_module, "TOGETHER", 50)
    await balancer.load(by_id(HTTP), NOBODY)
    await balancer.alter(many(100), NOBODY)
    several = table.changes[:]
    assert len(several) > 5
    for come, _ in several:
        vips = {key.split(" . ")[0] for key in come["services4"]}
        assert vips == come["vips4"].keys()
        assert vips == {key.split(" . ")[0] for key in come["slots4"]}
    # All of it, as in one.
    table.changes.clear()
    monkeypatch.undo()
    await balancer.load(by_id(HTTP), NOBODY)
    await balancer.alter(many(100), NOBODY)
    assert len(table.changes) == 1
    assert elements(several) == elements(table.changes)


async def test_several_transactions_end_where_one_load_does(
    balancer: Balancer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the maps hold in the end is what one load of the same has."""
    monkeypatch.setattr(balancer_module, "TOGETHER", 1)
    services = many(20)
    first = min(services)
    await balancer.load(services, NOBODY)
    after = {
        key: replace(one, backends=(replace(one.backends[0], port=9000 + number),))
        for number, (key, one) in enumerate(services.items())
    }
    await balancer.alter({**after, first: None}, NOBODY)
    held = {name: dict(one.elements) for name, one in table.loads[-1].sets.items()}
    for come, gone in table.changes:
        for name, pairs in gone.items():
            for key in pairs:
                del held[name][key]
        for name, pairs in come.items():
            assert not held[name].keys() & pairs.keys()
            held[name].update(pairs)
    await balancer.load({key: one for key, one in after.items() if key != first}, NOBODY)
    assert held == {name: dict(one.elements) for name, one in table.loads[-1].sets.items()}


async def test_when_one_transaction_of_several_fails_the_next_change_brings_all(
    balancer: Balancer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancer_module, "TOGETHER", 50)
    await balancer.load(by_id(HTTP), NOBODY)
    second = Mock(side_effect=[None, VxmeshError("firewall rules", "refused"), *[None] * 50])

    async def alter(come: object, gone: object, chains: str) -> None:
        second()

    monkeypatch.setattr(table, "alter", alter)
    with pytest.raises(VxmeshError):
        await balancer.alter(many(100), NOBODY)
    assert second.call_count > 2  # nobody goes on while some are still under way
    before = len(table.loads)
    await balancer.alter({}, NOBODY)
    assert len(table.loads) == before + 1
    assert len(table.loads[-1].sets["vips4"].elements) == 1 + 100
