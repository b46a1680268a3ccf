"""The guard of the ports as text: whole in golden/, and what each endpoint has in its sets.

tests/netns/test_guards.py sends real frames against the same.
"""

from __future__ import annotations

from dataclasses import replace

from agent.datapath import guardrules, nft
from agent.datapath.guardrules import CHAINS, of_port, ruleset
from agent.drivers.base import Closed, Port
from tests.unit.datapath.test_nft import DATABASE, WEB, golden

PORT = Port(
    endpoint="00000000000000e1",
    device="vxp000000000000",
    mac=bytes.fromhex("02005e005301"),
    addresses=("10.1.0.5/24", "fd00:1::5/64"),
    netns="/run/netns/one",
    inode=1,
    ifname="eth0",
    gateways=("10.1.0.1",),
)
OTHER = replace(PORT, device="vxp000000000001", mac=bytes.fromhex("02005e005302"))
CLOSED = Closed(
    carriers=frozenset({4789, 4790}),
    agents=frozenset({("192.0.2.1", 7946), ("2001:db8::1", 7946), ("192.0.2.1", 9100)}),
    own=frozenset({7946, 9100}),
)


def test_guard_of_one_port() -> None:
    keys = [of_port(WEB, PORT), nft.closed_elements(CLOSED)]
    golden("guard.nft", nft.render(ruleset(keys)))


def test_guard_of_no_port() -> None:
    golden("guard-empty.nft", nft.render(ruleset([])))


def test_guard_of_a_port_in_a_network_that_floods() -> None:
    keys = [of_port(replace(WEB, flood_rate=1000), PORT), of_port(WEB, OTHER)]
    golden("guard-flood.nft", nft.render(ruleset(keys, floods=True)))


def test_without_such_a_network_no_rule_is_another() -> None:
    """What a frame passes: all but the declarations of sets, counters and their elements."""
    without, with_it = ruleset([of_port(WEB, PORT)]), ruleset([], floods=True)
    assert without.chains == guardrules.CHAINS and "flood" not in chain(
        "prerouting", without.chains
    )
    assert with_it.chains == guardrules.CHAINS + guardrules.FLOOD_CHAINS
    assert of_port(WEB, PORT)["flooding"] == frozenset()


def chain(name: str, chains: str) -> str:
    return chains.split(f"chain {name} {{")[1].split("}")[0]


def test_each_port_has_the_limit_of_its_network() -> None:
    for rate, burst in ((5, 10), (100, 10), (1000, 100), (1_000_000, 100_000)):
        (element,) = of_port(replace(WEB, flood_rate=rate), PORT)["flooding"]
        assert element == (
            f'"{PORT.device}" limit rate over {rate}/second burst {burst} packets counter'
        )


def test_host_table_with_closed_ports() -> None:
    golden("host-closed.nft", nft.render(nft.host([WEB], [], CLOSED)))


def test_every_reason_has_a_counter_and_is_used() -> None:
    names = {guardrules.COUNTER + reason for reason in guardrules.REASONS}
    assert set(ruleset([]).counters) == names
    for name in names:
        assert f'counter name "{name}"' in guardrules.CHAINS + guardrules.FLOOD_CHAINS


def test_no_rule_looks_into_an_anonymous_map() -> None:
    """Frames that are on their way while the table is replaced may find nothing in it."""
    assert " map {" not in CHAINS and " vmap {" not in CHAINS


def test_an_address_that_comes_costs_its_own_elements() -> None:
    more = of_port(WEB, replace(PORT, addresses=(*PORT.addresses, "10.1.0.6/24", "fd00:1::6/64")))
    before = of_port(WEB, PORT)
    come = {name: keys - before[name] for name, keys in more.items() if keys != before[name]}
    assert {name: len(keys) for name, keys in come.items()} == {
        "addresses4": 1,
        "addresses6": 1,
        "targets": 1,
    }


def test_a_port_without_ipv6_addresses_has_the_link_local_one_of_its_mac() -> None:
    keys = of_port(DATABASE, replace(PORT, addresses=("10.2.0.5/16",)))
    (only,) = keys["addresses6"]
    assert only.endswith(". fe80::5eff:fe00:5301")
    (target,) = keys["targets"]
    assert target.endswith(". 0xfe8000000000000000005efffe005301")


def test_numbers_are_written_as_nft_lists_them() -> None:
    (link,) = of_port(WEB, PORT)["links"]
    assert link == '"vxp000000000000" . 0x2005e005301'


def test_only_a_network_that_says_so_is_trusted() -> None:
    assert of_port(WEB, PORT)["trusted"] == frozenset()
    assert of_port(replace(WEB, spoof=True), PORT)["trusted"] == {'"vxp000000000000"'}
