"""The overlay driver and the plan: what the kernel should hold, for what the node knows."""

from __future__ import annotations

import random

import msgspec
import pytest

from agent.core.bounds import check_bounds
from agent.core.members import Members
from agent.core.replica import Delta, Record
from agent.core.waysout import without
from agent.drivers import overlay
from agent.drivers.balancing import Frontend
from agent.errors import Invalid
from agent.model import Endpoint, Node, Publish, Sandbox, encode
from agent.node import NodeState
from agent.notation import parse_address
from agent.plan import Plan, Touched
from agent.requests import parse_endpoint, parse_network

ME, OTHER = "1" * 16, "2" * 16


def host(id: str, address: str, mtu: int = 1500) -> Node:
    return Node(id, f"n{id[0]}", address, 7946, address, 4789, "0", 0.0, mtu)


class World:
    """A node with network `web`, and what it is told of another."""

    def __init__(self) -> None:
        self.state = NodeState(host(ME, "10.99.0.1"), lambda: 1.0, random.Random(1))
        self.state.describe(host(ME, "10.99.0.1"))
        self.web = self.state.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
        self.plan = Plan(self.state)
        self.touched: list[Touched] = []
        self.state.listeners.append(lambda change: self.touched.append(self.plan.touched(change)))
        self.version = 0

    def told(self, *records: tuple[str, bytes]) -> None:
        base = self.version
        numbered = [Record(k, base + i + 1, v) for i, (k, v) in enumerate(records)]
        self.version += len(records)
        self.state.merge(Delta(OTHER, base, self.version, numbered))

    def remote(self, id: str, mac: int, last: int) -> None:
        endpoint = Endpoint(
            id * 16, self.web.id, f"r{id}", bytes([2, 0, 0, 0, 0, mac]), (bytes([10, 1, 0, last]),)
        )
        self.told((f"e/{endpoint.id}", encode(endpoint)))

    def workload(self, name: str) -> Endpoint:
        made = self.state.create_endpoint(self.web.id, parse_endpoint(name), "5" * 16)
        self.state.put_sandbox(
            Sandbox("5" * 16, name, "/proc/9/ns/net", 9, 9, 9, 0.0, (made.id,), ("eth0",),
                    (Publish(8080, 80),), "", made.id)
        )  # fmt: skip
        return made


@pytest.fixture
def world() -> World:
    world = World()
    world.told((f"n/{OTHER}", encode(host(OTHER, "10.99.0.2", 1400))))
    return world


def test_nothing_is_wanted_of_a_network_without_a_local_endpoint(world: World) -> None:
    world.remote("a", 1, 9)
    assert world.plan.bridges() == {}
    assert world.plan.all_rows(world.web.vni).fdb == []
    rows = world.plan.rows(world.web.vni, [b"\2\0\0\0\0\1"], [])
    assert rows.fdb == [(b"\2\0\0\0\0\1", None)]


def test_a_local_endpoint_brings_the_bridge_and_all_rows(world: World) -> None:
    world.remote("a", 1, 9)
    made = world.workload("w")
    (bridge,) = world.plan.bridges().values()
    assert (bridge.device, bridge.vxlan) == (f"vxb{world.web.vni}", f"vxl{world.web.vni}")
    assert bridge.mtu == 1350, "the narrowest underlay counts"
    assert bridge.gateways == ("10.1.0.1/24",)
    port = bridge.ports[made.id]
    assert port.addresses == ("10.1.0.2/24",)
    assert port.gateways == ("10.1.0.1",)
    assert port.device == f"vxp{made.id[:12]}" and len(port.device) == 15
    rows = world.plan.all_rows(world.web.vni)
    assert rows.fdb == [(b"\2\0\0\0\0\1", bytes([10, 99, 0, 2]))]
    assert rows.neighbours == [(bytes([10, 1, 0, 9]), b"\2\0\0\0\0\1")]


def test_a_change_touches_what_it_is_and_no_more(world: World) -> None:
    world.workload("w")
    world.remote("a", 1, 9)
    touched = world.touched[-1]
    assert touched.macs == {world.web.vni: [b"\2\0\0\0\0\1"]}
    assert touched.addresses == {world.web.vni: [bytes([10, 1, 0, 9])]}
    assert not touched.bridges and not touched.everything and not touched.forwards


def test_an_endpoint_that_goes_is_touched_and_has_no_row(world: World) -> None:
    world.workload("w")
    world.remote("a", 1, 9)
    world.told(("e/" + "a" * 16, b""))
    touched = world.touched[-1]
    rows = world.plan.rows(
        world.web.vni, touched.macs[world.web.vni], touched.addresses[world.web.vni]
    )
    assert rows.fdb == [(b"\2\0\0\0\0\1", None)]
    assert rows.neighbours == [(bytes([10, 1, 0, 9]), None)]


def test_the_last_local_endpoint_takes_the_bridge_along(world: World) -> None:
    made = world.workload("w")
    world.state.drop_sandbox("5" * 16)
    assert world.web.vni in world.touched[-1].bridges
    assert world.plan.bridge(world.web.vni) is None
    assert made.id not in world.state.members[world.web.id].all


def test_a_new_vtep_touches_everything(world: World) -> None:
    world.workload("w")
    world.told((f"n/{OTHER}", encode(host(OTHER, "10.99.0.77", 1400))))
    assert world.touched[-1].everything
    world.remote("a", 1, 9)
    assert world.plan.all_rows(world.web.vni).fdb[0][1] == bytes([10, 99, 0, 77])


def test_an_internal_network_gives_no_default_route(world: World) -> None:
    network = world.state.create_network(
        parse_network("in", subnets=["10.2.0.0/24"], internal=True)
    )
    assert overlay.bridge(network, host(ME, "10.99.0.1"), [host(ME, "10.99.0.1")], {}).internal


def test_published_ports_lead_to_the_default_endpoint(world: World) -> None:
    made = world.workload("w")
    (forward,) = world.plan.forwards()
    assert (forward.publish.host_port, forward.publish.target_port) == (8080, 80)
    assert forward.address == "10.1.0.2" and made.addresses == (bytes([10, 1, 0, 2]),)


def test_each_family_leaves_by_an_interface_of_its_own(world: World) -> None:
    six = world.state.create_network(parse_network("six", subnets=["fd00:6::/64"]))
    shut = world.state.create_network(
        parse_network("shut", subnets=["10.3.0.0/24", "fd00:3::/64"], internal=True)
    )
    made = [
        world.state.create_endpoint(network.id, parse_endpoint("w"), "5" * 16)
        for network in (shut, world.web, six)
    ]
    ids = tuple(each.id for each in made)
    box = Sandbox("5" * 16, "w", "/proc/9/ns/net", 9, 9, 9, 0.0, ids, ("eth0", "eth1", "eth2"),
                  (Publish(8080, 80),))  # fmt: skip
    world.state.put_sandbox(box)

    def gateways() -> list[tuple[str, ...]]:
        ports = {k: v for b in world.plan.bridges().values() for k, v in b.ports.items()}
        return [ports[id].gateways if id in ports else () for id in ids]

    assert gateways() == [(), ("10.1.0.1",), ("fd00:6::1",)]
    ports = {k: v for b in world.plan.bridges().values() for k, v in b.ports.items()}
    assert [ports[id].handed_on for id in ids] == [(4, 6), (6,), (4,)]
    assert [f.address for f in world.plan.forwards()] == ["10.1.0.2", "fd00:6::2"]
    world.state.remove_endpoints([ids[1]])
    world.state.put_sandbox(without(world.state.sandboxes[box.id], {ids[1]}))
    assert gateways() == [(), (), ("fd00:6::1",)]
    assert [f.address for f in world.plan.forwards()] == ["fd00:6::2"]


def test_a_network_that_is_removed_elsewhere_takes_its_default_route_along(world: World) -> None:
    other = world.state.create_network(parse_network("other", subnets=["10.2.0.0/24"]))
    first = world.state.create_endpoint(other.id, parse_endpoint("w"), "5" * 16)
    second = world.state.create_endpoint(world.web.id, parse_endpoint("w"), "5" * 16)
    world.state.put_sandbox(
        Sandbox("5" * 16, "w", "/x", 9, 9, 9, 0.0, (first.id, second.id), ("eth0", "eth1"))
    )
    assert world.state.sandboxes["5" * 16].default == first.id
    gone = msgspec.structs.replace(other, deleted=True, stamp=other.stamp + 1)
    world.told((f"w/{other.id}", encode(gone)))
    assert world.state.catalogue.get(other.id) is None
    assert world.state.sandboxes["5" * 16].default == second.id


def test_the_mtu_follows_the_underlay_and_its_family(world: World) -> None:
    assert overlay.mtu(world.web, [host(ME, "10.99.0.1")]) == 1450
    assert overlay.mtu(world.web, [host(ME, "fd99::1")]) == 1430
    fixed = msgspec.structs.replace(world.web, mtu=1234)
    assert overlay.mtu(fixed, [host(ME, "10.99.0.1")]) == 1234


def test_router_macs_differ_by_host_and_network() -> None:
    macs = {overlay.router_mac(n, h) for n in ("a", "b") for h in (ME, OTHER)}
    assert len(macs) == 4
    assert all(mac[0] & 3 == 2 for mac in macs), "locally administered, not multicast"


def test_of_two_claims_to_an_address_the_local_one_counts() -> None:
    members = Members(ME)
    mac, address = b"\2\0\0\0\0\1", bytes([10, 1, 0, 5])
    far = Endpoint("a" * 16, "w", "far", mac, (address,))
    near = Endpoint("b" * 16, "w", "near", mac, (address,))
    vteps = {OTHER: bytes([10, 99, 0, 2])}
    members.put(far, OTHER)
    assert overlay.all_rows(members, vteps).fdb == [(mac, vteps[OTHER])]
    members.put(near, ME)
    assert overlay.all_rows(members, vteps).fdb == []
    members.drop(near.id)
    assert overlay.all_rows(members, vteps).fdb == [(mac, vteps[OTHER])]
    members.drop(far.id)
    assert not members.by_mac.ids(mac) and not members.by_address.ids(address)


def test_what_lives_here_touches_no_row_unless_another_claims_it(world: World) -> None:
    made = world.workload("w")
    vni = world.web.vni
    assert all(vni not in t.macs or not t.macs[vni] for t in world.touched)
    claim = Endpoint("c" * 16, world.web.id, "claim", made.mac, made.addresses)
    world.told((f"e/{claim.id}", encode(claim)))
    assert world.touched[-1].macs[vni] == [made.mac]
    assert world.plan.rows(vni, [made.mac], []).fdb == [(made.mac, None)]
    world.state.drop_sandbox("5" * 16)
    assert made.mac in world.touched[-1].macs[vni], "now the other's row may be due"


def test_what_is_closed_to_sandboxes_is_every_agents() -> None:
    one = Node("1" * 16, "n1", "10.99.0.1", 7946, "10.98.0.1", 4789, "0", 0.0, 1500, closed=(9100,))
    two = Node("2" * 16, "n2", "fd99::2", 7947, "fd99::2", 4790, "0", 0.0, 1500)
    closed = overlay.closed(one, [one, two])
    assert closed.carriers == {4789}
    assert closed.own == {7946, 9100}
    assert closed.agents == {
        ("10.99.0.1", 7946),
        ("10.98.0.1", 7946),
        ("10.99.0.1", 9100),
        ("10.98.0.1", 9100),
        ("fd99::2", 7947),
    }


def test_no_node_closes_a_port_of_all_by_saying_that_it_takes_vxlan_there(world: World) -> None:
    there = msgspec.structs.replace(host(OTHER, "10.99.0.2"), data_port=443)
    world.told((f"n/{OTHER}", encode(there)))
    assert world.plan.closed().carriers == {4789}


def test_no_node_closes_what_is_at_the_address_of_a_gateway(world: World) -> None:
    """Or at that of a workload: neither leads out of this host while the network is here."""
    liar = msgspec.structs.replace(
        host(OTHER, "10.1.0.1"), vtep="10.99.0.2", port=7946, closed=(53, 443)
    )
    world.told((f"n/{OTHER}", encode(liar)))
    assert ("10.1.0.1", 53) in world.plan.closed().agents, "the network is not here"
    made = world.workload("w")
    theirs = {("10.99.0.2", port) for port in (53, 443, 7946)}
    assert world.plan.closed().agents == {("10.99.0.1", 7946), *theirs}
    assert any(t.everything for t in world.touched[-2:]), "the rules are loaded anew"
    world.state.remove_endpoints([made.id])
    assert ("10.1.0.1", 53) in world.plan.closed().agents


def test_a_network_that_somebody_makes_of_the_underlay_opens_no_agent(world: World) -> None:
    world.told((f"n/{OTHER}", encode(host(OTHER, "10.99.0.2"))))
    world.workload("w")
    world.state.create_network(parse_network("under", subnets=["10.99.0.0/24"]))
    assert world.plan.closed().agents == {("10.99.0.1", 7946), ("10.99.0.2", 7946)}


def test_no_node_takes_the_name_servers_from_the_sandboxes_of_all() -> None:
    """By saying that it takes VXLAN where they are asked, which is closed on every host."""
    sound = Node("2" * 16, "n2", "10.99.0.2", 7946, "10.99.0.2", 4790, "0", 0.0, 1500)
    check_bounds(sound)
    for port in (52, 53):  # with 52 the port inside WireGuard would be 53
        with pytest.raises(Invalid, match=f"at port {port}"):
            check_bounds(msgspec.structs.replace(sound, data_port=port))


@pytest.mark.parametrize(("options", "spoof"), [({}, False), ({"spoof": "allow"}, True)])
def test_a_network_may_let_its_sandboxes_spoof(options: dict[str, str], spoof: bool) -> None:
    me = Node("1" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    state = NodeState(me, lambda: 1000.0, random.Random(1))
    network = state.create_network(parse_network("lab", options=options))
    assert overlay.bridge(network, me, [me], {}).spoof is spoof


def test_a_router_mac_says_whose_it_is_and_has_a_mark_in_it_on_every_machine() -> None:
    for number in range(50):
        mac = overlay.router_mac("a", str(number))
        assert mac.startswith(overlay.ROUTER_PREFIX)
        for order in ("big", "little"):
            assert int.from_bytes(mac[2:], order) & 0x80000000


def test_a_networks_services_bring_rows_for_vips_and_for_the_other_routers(world: World) -> None:
    world.workload("w")
    vni, vip = world.web.vni, bytes([10, 1, 0, 100])
    mine, theirs = (overlay.router_mac(world.web.id, id) for id in (ME, OTHER))
    assert world.plan.rows(vni, [theirs], [vip]).fdb == [(theirs, None)]
    one = Frontend("s" * 16, world.web.id, vni, "tcp", vip, 80, ())
    world.plan.balanced.take_in({one.id: one})
    assert world.plan.frontends() == {one.id: one}
    rows = world.plan.rows(vni, [theirs, mine], [vip])
    assert rows.fdb == [(theirs, bytes([10, 99, 0, 2])), (mine, None)]
    assert rows.neighbours == [(vip, mine)]
    everything = world.plan.all_rows(vni)
    assert everything.fdb == [(theirs, bytes([10, 99, 0, 2]))]
    assert everything.neighbours == [(vip, mine)]
    world.plan.balanced.take_in({one.id: None})
    assert world.plan.all_rows(vni).neighbours == world.plan.all_rows(vni).fdb == []


def test_a_vip_at_the_gateways_address_gets_no_row(world: World) -> None:
    world.workload("w")
    gateway = parse_address(world.web.gateways[0])
    one = Frontend("s" * 16, world.web.id, world.web.vni, "tcp", gateway, 80, ())
    world.plan.balanced.take_in({one.id: one})
    assert world.plan.all_rows(world.web.vni).neighbours == []
    assert world.plan.rows(world.web.vni, [], [gateway]).neighbours == [(gateway, None)]
