"""Broadcast and multicast between hosts: what the options say, and where default rows lead."""

from __future__ import annotations

import random
from collections.abc import Set
from typing import Any

import msgspec
import pytest

from agent.core.members import Members
from agent.core.replica import Delta, Record
from agent.drivers import flooding, wireguard
from agent.drivers.base import DEFAULT
from agent.errors import Invalid
from agent.floodmodel import RATE_DEFAULT, RATE_MAX, flood_rate
from agent.model import Endpoint, Network, Node, Sandbox, WireguardKey, encode
from agent.node import NodeState
from agent.notation import parse_address
from agent.plan import Plan, Touched
from agent.requests import parse_endpoint, parse_network
from agent.views import Status

ME, OTHER, THIRD = "1" * 16, "2" * 16, "3" * 16
ON = {"flood": "on"}


def host(id: str) -> Node:
    address = f"10.99.0.{id[0]}"
    keys = (WireguardKey(bytes([int(id[0])]) * 32, 51851, 1),)
    return Node(id, f"n{id[0]}", address, 7946, address, 4789, "0", 0.0, 1500, wireguard=keys)


def vtep(id: str) -> bytes:
    return parse_address(f"10.99.0.{id[0]}")


class World:
    """A node with a network that floods, and two others."""

    def __init__(self, **fields: object) -> None:
        private = {host(ME).wireguard[0].public: b"p" * 32}
        self.state = NodeState(host(ME), lambda: 1.0, random.Random(1))
        self.state.describe(host(ME))
        self.plan = Plan(self.state, lambda: private)
        self.touched: list[Touched] = []
        self.state.listeners.append(lambda change: self.touched.append(self.plan.touched(change)))
        self.versions: dict[str, int] = {}
        self.net = self.make("net", **{"options": ON, **fields})
        self.told(OTHER, (f"n/{OTHER}", encode(host(OTHER))))
        self.told(THIRD, (f"n/{THIRD}", encode(host(THIRD))))

    def make(self, name: str, **fields: object) -> Network:
        subnet = f"10.{len(list(self.state.catalogue.all()))}.0.0/24"
        spec = parse_network(name, subnets=[subnet], **fields)  # type: ignore[arg-type]
        return self.state.create_network(spec)

    def told(self, origin: str, *records: tuple[str, bytes]) -> None:
        base = self.versions.get(origin, 0)
        numbered = [Record(k, base + i + 1, v) for i, (k, v) in enumerate(records)]
        self.versions[origin] = base + len(records)
        self.state.merge(Delta(origin, base, self.versions[origin], numbered))

    def remote(self, origin: str, number: int) -> bytes:
        """An endpoint on another node; its MAC."""
        mac = bytes([2, 0, 0, 0, 0, number])
        address = parse_address(self.net.subnets[0].split("/")[0])[:3] + bytes([100 + number])
        held = Endpoint(f"{number:016x}", self.net.id, f"r{number}", mac, (address,))
        self.told(origin, (f"e/{held.id}", encode(held)))
        return mac

    def gone(self, origin: str, number: int) -> None:
        self.told(origin, (f"e/{number:016x}", b""))

    def workload(self) -> str:
        made = self.state.create_endpoint(self.net.id, parse_endpoint("w"), "5" * 16)
        path = "/proc/9/ns/net"
        self.state.put_sandbox(Sandbox("5" * 16, "w", path, 9, 9, 9, 0.0, (made.id,), ("eth0",)))
        return made.id

    def is_asked(self) -> bool:
        """Whether the last change touched the default rows."""
        return DEFAULT in self.touched[-1].macs.get(self.net.vni, ())

    def defaults(self) -> Set[bytes] | None:
        rows = self.plan.rows(self.net.vni, [DEFAULT], [])
        assert rows.fdb == [] and rows.floods
        assert rows.defaults == self.plan.all_rows(self.net.vni).defaults
        assert rows.defaults is not None
        return set(rows.defaults)


def test_they_lead_to_each_other_node_with_a_member_while_one_is_here() -> None:
    world = World()
    world.remote(OTHER, 1)
    assert world.plan.all_rows(world.net.vni).defaults is None, "it is not on this node"
    local = world.workload()
    assert world.is_asked() or world.net.vni in world.touched[-1].bridges
    assert world.defaults() == {vtep(OTHER)}
    world.remote(THIRD, 2)
    assert world.is_asked() and world.defaults() == {vtep(OTHER), vtep(THIRD)}
    world.remote(THIRD, 3)
    assert not world.is_asked(), "a second one there changes nothing"
    world.gone(THIRD, 2)
    assert not world.is_asked() and world.defaults() == {vtep(OTHER), vtep(THIRD)}
    world.gone(THIRD, 3)
    assert world.is_asked() and world.defaults() == {vtep(OTHER)}
    world.state.remove_endpoints([local])
    assert world.plan.bridge(world.net.vni) is None
    assert world.plan.all_rows(world.net.vni).defaults is None


def test_they_are_worked_out_only_when_a_host_comes_or_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.workload()
    calls: list[Members] = []

    def counted(members: Members, *others: Any) -> frozenset[bytes]:
        calls.append(members)
        return before(members, *others)

    before = flooding.defaults
    monkeypatch.setattr(flooding, "defaults", counted)
    for number in range(1, 9):
        world.remote(OTHER, number)
    world.gone(OTHER, 8)
    assert len(calls) == 1
    world.remote(THIRD, 9)
    assert len(calls) == 2 and world.is_asked()
    world.gone(THIRD, 9)
    assert len(calls) == 3 and world.is_asked()


def test_a_workload_in_its_nodes_own_stack_is_no_member() -> None:
    world = World()

    def on_host(number: int, origin: str) -> None:
        mac, id = bytes([6, 0, 0, 0, 0, number]), f"{number:016x}"
        held = Endpoint(id, world.net.id, f"h{number}", mac, (vtep(origin),))
        world.told(origin, (f"e/{id}", encode(held)))

    on_host(1, OTHER)
    on_host(2, OTHER)
    own = world.state.create_host_endpoint(world.net.id, parse_endpoint("own"), "6" * 16)
    world.remote(THIRD, 3)
    rows = world.plan.all_rows(world.net.vni)
    assert not rows.defaults, "nothing here sends to all"
    local = world.workload()
    assert world.defaults() == {vtep(THIRD)}
    world.remote(OTHER, 4)
    assert world.is_asked() and world.defaults() == {vtep(OTHER), vtep(THIRD)}
    world.gone(OTHER, 4)
    assert world.is_asked() and world.defaults() == {vtep(THIRD)}
    world.gone(OTHER, 1)
    assert not world.is_asked() and world.defaults() == {vtep(THIRD)}
    world.state.drop_sandbox("5" * 16)
    assert local not in world.state.members[world.net.id].local
    assert own.id in world.state.members[world.net.id].local
    assert not world.plan.all_rows(world.net.vni).defaults


def test_a_node_that_died_is_sent_nothing_until_it_is_there_again() -> None:
    world = World()
    world.workload()
    world.remote(OTHER, 1)
    world.state.set_status(OTHER, Status("unreachable", "", 1.0, withdrawn=True))
    assert world.is_asked() and world.defaults() == set()
    world.state.set_status(OTHER, Status("alive", "", 2.0))
    assert world.is_asked() and world.defaults() == {vtep(OTHER)}


def test_what_became_of_others_while_none_was_here_is_looked_at_once_one_is() -> None:
    world = World()
    local = world.workload()
    world.remote(THIRD, 3)
    world.state.remove_endpoints([local])
    # What it has in its own stack is told apart by where it is, as it is not while withdrawn.
    world.state.set_status(OTHER, Status("unreachable", "", 1.0, withdrawn=True))
    held = Endpoint(f"{9:016x}", world.net.id, "h9", bytes([6, 0, 0, 0, 0, 9]), (vtep(OTHER),))
    world.told(OTHER, (f"e/{held.id}", encode(held)))
    world.state.set_status(OTHER, Status("alive", "", 2.0))
    world.workload()
    assert world.defaults() == {vtep(THIRD)}
    world.remote(OTHER, 1)
    assert world.is_asked() and world.defaults() == {vtep(OTHER), vtep(THIRD)}


def test_of_a_network_that_is_gone_nothing_is_kept() -> None:
    world = World()
    local = world.workload()
    world.remote(OTHER, 1)
    floods = world.plan._floods
    assert floods._hosts and floods._known
    world.state.remove_endpoints([local])
    world.gone(OTHER, 1)
    world.state.remove_network(world.net.id)
    assert not floods._hosts and not floods._known


def test_of_an_encrypted_network_they_lead_inside_wireguard() -> None:
    world = World(encrypted=True)
    world.workload()
    world.remote(OTHER, 1)
    found = wireguard.key_address(OTHER, host(OTHER).wireguard[0])
    assert world.defaults() == {found}
    bare = msgspec.structs.replace(host(OTHER), wireguard=())
    world.told(OTHER, (f"n/{OTHER}", encode(bare)))
    assert world.is_asked() and world.defaults() == set(), "nowhere else"


def test_without_the_option_none_are_wanted_and_one_that_is_there_goes() -> None:
    for options in ({}, {"flood": "off"}):
        world = World(options=options)
        world.workload()
        world.remote(OTHER, 1)
        assert not world.is_asked()
        rows = world.plan.all_rows(world.net.vni)
        assert rows.defaults is None and not rows.floods
        assert world.plan.rows(world.net.vni, [DEFAULT], []).fdb == [(DEFAULT, None)]
        (bridge,) = world.plan.bridges().values()
        assert bridge.flood_rate == 0


def test_other_rows_are_those_of_any_network() -> None:
    world = World()
    world.workload()
    mac = world.remote(OTHER, 1)
    rows = world.plan.rows(world.net.vni, [mac, DEFAULT, b"\2" * 6], [])
    assert rows.fdb == [(mac, vtep(OTHER)), (b"\2" * 6, None)]
    assert rows.defaults == frozenset({vtep(OTHER)})
    assert world.plan.rows(world.net.vni, [mac], []).defaults is None, "not asked for"
    (bridge,) = world.plan.bridges().values()
    assert bridge.flood_rate == RATE_DEFAULT


BAD = [
    ("overlay", {"flood": "yes"}, "option flood='yes': is unknown. Use on or off"),
    ("overlay", {"flood": ""}, "option flood='': is unknown"),
    ("overlay", {"flood": "on", "flood-rate": "0"}, "is no number of packets a second"),
    ("overlay", {"flood": "on", "flood-rate": str(RATE_MAX + 1)}, f"Use 1 to {RATE_MAX}"),
    ("overlay", {"flood": "on", "flood-rate": "٣"}, "is no number"),
    ("overlay", {"flood": "on", "flood-rate": "9" * 5000}, "is no number"),
    ("overlay", {"flood-rate": "5"}, "Give -O flood=on as well"),
    ("overlay", {"flood": "off", "flood-rate": "5"}, "Give -O flood=on as well"),
    ("bridge", {"flood": "on"}, "driver bridge has no VXLAN to flood"),
    ("bridge", {"flood-rate": "5"}, "driver bridge has no VXLAN to flood"),
    ("macvlan", {"parent": "eth1", "flood": "on"}, "is unknown to driver macvlan"),
    ("ipvlan", {"parent": "eth1", "flood": "on"}, "is unknown to driver ipvlan"),
]


@pytest.mark.parametrize(("driver", "options", "words"), BAD)
def test_bad_options_are_refused(driver: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_network("n", driver=driver, options=options)
    assert words in str(caught.value)


def test_good_options_are_kept_as_they_are_and_a_plugins_are_its_own() -> None:
    options = {"flood": "on", "flood-rate": str(RATE_MAX)}
    assert parse_network("n", options=options).options == options
    odd = {"flood": "a little"}
    assert parse_network("n", driver="remote:weave", options=odd).options == odd


@pytest.mark.parametrize(
    ("driver", "options", "rate"),
    [
        ("overlay", {"flood": "on", "flood-rate": "7"}, 7),
        ("overlay", {"flood": "on", "flood-rate": "-1"}, RATE_DEFAULT),
        ("overlay", {"flood": "on", "flood-rate": "x" * 100}, RATE_DEFAULT),
        ("overlay", {"flood": "ON"}, 0),
        ("bridge", {"flood": "on"}, 0),
    ],
)
def test_what_another_agent_wrote_is_made_the_best_of(
    driver: str, options: dict[str, str], rate: int
) -> None:
    network = World().net
    assert flood_rate(msgspec.structs.replace(network, driver=driver, options=options)) == rate
