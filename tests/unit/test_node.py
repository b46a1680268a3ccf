"""The node's synchronous methods: what each refuses, and that a refusal changes nothing."""

from __future__ import annotations

import random

import msgspec
import pytest

from agent.core import members
from agent.core.members import Members
from agent.core.replica import Delta, Record
from agent.errors import Conflict, Exhausted, InUse, Invalid, NotFound
from agent.model import Endpoint, Network, Node, Sandbox, encode
from agent.node import NeedSpace, NodeState
from agent.notation import format_address
from agent.requests import NetworkSpec, parse_endpoint, parse_network
from agent.views import Change
from tests.fuzz import world

UNKNOWN = "who asks is not known here yet; try again shortly"


def make(name: str, *routes: str) -> NodeState:
    id = name.encode().hex().ljust(16, "0")
    me = Node(id, name, "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500, routes)
    state = NodeState(me, lambda: 1000.0, random.Random(name))
    state.describe(me)
    state.replica.publish(state.replica.written())
    return state


def send(source: NodeState, target: NodeState) -> None:
    """All that `source` has written so far reaches `target`."""
    source.replica.publish(source.replica.written())
    known = target.version(source.me)
    records = source.since(source.me, known)
    assert target.merge(Delta(source.me, known, source.version(source.me), records))


@pytest.fixture
def node() -> NodeState:
    return make("n1", "10.99.0.0/24")


@pytest.fixture
def web(node: NodeState) -> Network:
    return node.create_network(parse_network("web", subnets=["10.1.0.0/29"]))


def endpoint(node: NodeState, network: Network, name: str, **fields: object) -> Endpoint:
    return node.create_endpoint(network.id, parse_endpoint(name, **fields))  # type: ignore[arg-type]


def test_an_address_that_is_held_is_nobodys_until_its_endpoint(
    node: NodeState, web: Network
) -> None:
    space = node.addresses[web.id].space
    held = node.hold_address(web.id, 4)
    text = format_address(held)
    with pytest.raises(Conflict, match="being given"):
        node.hold_address(web.id, 4, held)
    with pytest.raises(Conflict, match="being given"):
        endpoint(node, web, "a", addresses=[text])
    with pytest.raises(Conflict, match="being given"):
        spec = parse_endpoint("a", addresses=[text], mac="02:00:00:00:00:01")
        node.reserve(web.id, [spec])
    assert endpoint(node, web, "b").addresses != (held,)
    spec = msgspec.structs.replace(parse_endpoint("a", addresses=[text]), held=True)
    made = node.create_endpoint(web.id, spec)
    assert made.addresses == (held,) and space.used(held)
    node.let_go(web.id, held)  # it is the endpoint's by now
    assert space.used(held)
    node.remove_endpoints([made.id])
    assert not space.used(held)
    for wanted in (b"", held):
        address = node.hold_address(web.id, 4, wanted)
        assert space.used(address)
        node.let_all_go()
        assert not space.used(address)
    node.remove_endpoints([m.id for m in node.members[web.id].local.values()])
    node.hold_address(web.id, 4)
    node.remove_network(web.id)
    node.let_all_go()


def test_an_endpoint_gets_another_name(node: NodeState, web: Network) -> None:
    one, two = endpoint(node, web, "one"), endpoint(node, web, "two")
    other = make("n2")
    send(node, other)
    fresh = node.rename_endpoint(one.id, "new", ["x", "my_x"], {"a": "b"})
    assert (fresh.name, fresh.aliases, fresh.labels) == ("new", ("x", "my_x"), {"a": "b"})
    assert fresh.addresses == one.addresses
    send(node, other)
    assert [m.endpoint for m in other.members[web.id].with_name("new")] == [fresh]
    assert not other.members[web.id].with_name("one")
    with pytest.raises(Conflict, match="two: exists"):
        node.rename_endpoint(one.id, "two", [], {})
    with pytest.raises(NotFound):
        other.rename_endpoint(two.id, "new2", [], {})


def test_a_network_gets_another_name(node: NodeState, web: Network) -> None:
    node.create_network(NetworkSpec("other"))
    other = make("n2")
    send(node, other)
    held = endpoint(node, web, "one")
    assert node.amend_network(web.id, "new", {"a": "b"}).name == "new"
    send(node, other)
    assert other.find_network("new").labels == {"a": "b"}
    assert node.members[web.id].local == {held.id: held}
    with pytest.raises(Conflict, match="exists"):
        node.amend_network(web.id, "other", {})


def test_a_subnet_for_a_network_to_come(node: NodeState, web: Network) -> None:
    first = node.choose_subnet(4)
    assert first.endswith("/20")
    seen = {first}
    for _ in range(20):
        subnet = node.choose_subnet(4, seen)
        assert subnet not in seen
        seen.add(subnet)
    assert node.choose_subnet(6).startswith("fd")


def test_a_network_gets_what_was_not_given(node: NodeState) -> None:
    network = node.create_network(NetworkSpec("a", ipv6=True))
    assert network.subnets[0].startswith("10.") and network.subnets[0].endswith("/20")
    assert network.subnets[1].startswith("fd") and network.subnets[1].endswith("/64")
    assert network.gateways[0].endswith(".1")
    assert 4096 <= network.vni < 1 << 24


@pytest.mark.parametrize(
    ("subnet", "words"),
    [
        ("10.1.0.0/24", "overlaps 10.1.0.0/29, network web"),
        ("10.99.0.0/16", "overlaps 10.99.0.0/24, a route of host n1"),
        ("10.0.0.0/8", "overlaps"),
    ],
)
def test_overlaps_are_named(node: NodeState, web: Network, subnet: str, words: str) -> None:
    with pytest.raises(Conflict) as caught:
        node.create_network(parse_network("b", subnets=[subnet]))
    assert words in str(caught.value)
    assert [n.name for n in node.catalogue.all()] == ["web"]


def test_routes_of_other_hosts_count(node: NodeState) -> None:
    send(make("n2", "10.7.0.0/16"), node)
    with pytest.raises(Conflict, match="a route of host n2"):
        node.create_network(parse_network("b", subnets=["10.7.1.0/24"]))


def test_names_and_vnis_are_taken_once(node: NodeState, web: Network) -> None:
    with pytest.raises(Conflict, match="network web: exists"):
        node.create_network(NetworkSpec("web"))
    with pytest.raises(Conflict, match="is network web's"):
        node.create_network(NetworkSpec("b", vni=web.vni))


def test_networks_are_found_by_name_id_and_prefix(node: NodeState, web: Network) -> None:
    for ref in ("web", web.id, web.id[:5]):
        assert node.find_network(ref) == web
    with pytest.raises(NotFound, match="See 'vxmesh network ls'"):
        node.find_network("nope")
    with pytest.raises(NotFound):
        node.find_network("")


def test_addresses_run_out_with_a_clear_error(node: NodeState, web: Network) -> None:
    got = [format_address(endpoint(node, web, f"e{i}").addresses[0]) for i in range(5)]
    assert sorted(got) == [f"10.1.0.{i}" for i in range(2, 7)]
    before = node.replica.written()
    with pytest.raises(Exhausted, match="5 of 5 are used"):
        endpoint(node, web, "one-more")
    assert node.replica.written() == before
    node.remove_endpoints([node.find_endpoint("e3")[1].endpoint.id])
    assert endpoint(node, web, "again").addresses


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"name": "a"}, Conflict, "endpoint a: exists in network web on n1"),
        ({"name": "b", "mac": "02:00:00:00:00:01"}, Conflict, "is taken by a on n1"),
        ({"name": "b", "addresses": ["10.1.0.5"]}, Conflict, "is taken by a on n1"),
        ({"name": "b", "addresses": ["10.1.0.1"]}, Conflict, "gateway"),
        ({"name": "b", "addresses": ["10.1.0.7"]}, Conflict, "first or last"),
        ({"name": "b", "addresses": ["10.2.0.5"]}, Invalid, "Use one of 10.1.0.0/29"),
    ],
)
def test_what_is_taken_is_named_and_nothing_changes(
    node: NodeState, web: Network, fields: dict[str, object], error: type[Exception], words: str
) -> None:
    endpoint(node, web, "a", mac="02:00:00:00:00:01", addresses=["10.1.0.5"])
    before = node.replica.written()
    changes: list[Change] = []
    node.listeners.append(changes.append)
    with pytest.raises(error) as caught:
        node.create_endpoint(web.id, parse_endpoint(**fields))  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert node.replica.written() == before
    assert not changes
    assert len(node.members[web.id].all) == 1


def test_a_reservation_that_fails_leaves_nothing(node: NodeState, web: Network) -> None:
    endpoint(node, web, "a", addresses=["10.1.0.5"])
    specs = [
        parse_endpoint("x", mac="02:00:00:00:00:09", addresses=["10.1.0.3"]),
        parse_endpoint("y", mac="02:00:00:00:00:0a", addresses=["10.1.0.5"]),
    ]
    with pytest.raises(Conflict):
        node.reserve(web.id, specs)
    assert {m.endpoint.name for m in node.members[web.id].all.values()} == {"a"}
    assert not node.addresses[web.id].space.used(specs[0].addresses[0])
    kept = node.reserve(web.id, specs[:1])
    node.commit(kept)
    assert node.find_endpoint("x")[1].endpoint == kept[0]


def test_the_mac_comes_back_with_the_address(node: NodeState, web: Network) -> None:
    first = endpoint(node, web, "a", addresses=["10.1.0.4"])
    node.remove_endpoints([first.id])
    assert endpoint(node, web, "b", addresses=["10.1.0.4"]).mac == first.mac


def test_a_network_with_endpoints_stays_and_says_who(node: NodeState, web: Network) -> None:
    held = endpoint(node, web, "a")
    with pytest.raises(InUse, match="has endpoints: a on n1"):
        node.remove_network(web.id)
    node.remove_endpoints([held.id])
    node.remove_network(web.id)
    assert not list(node.catalogue.all())
    assert not node.replica.items(node.me)[1:], "only the node's own record is left"


def test_another_nodes_address_must_be_donated(node: NodeState, web: Network) -> None:
    other = make("n2")
    send(other, node)
    send(node, other)
    with pytest.raises(NeedSpace) as caught:
        endpoint(other, web, "b")
    assert list(caught.value.owners) == [node.me]
    assert node.donate(web.id, other.me, 4, []) == ""
    send(node, other)
    assert endpoint(other, web, "b").addresses
    send(other, node)
    assert node.find_endpoint("b")[1].node == other.me
    with pytest.raises(InUse, match="lives on n2"):
        node.remove_endpoints([node.find_endpoint("b")[1].endpoint.id])


def test_a_static_address_of_another_is_asked_for_by_itself(node: NodeState, web: Network) -> None:
    other = make("n2")
    send(other, node)
    send(node, other)
    address = bytes([10, 1, 0, 6])
    with pytest.raises(NeedSpace) as caught:
        endpoint(other, web, "b", addresses=["10.1.0.6"])
    assert caught.value.owners == {node.me: [(address, address)]}
    endpoint(node, web, "a", addresses=["10.1.0.5"])
    assert node.donate(web.id, other.me, 4, [(address, address)]) == ""
    five = bytes([10, 1, 0, 5])
    assert "is taken by a" in node.donate(web.id, other.me, 4, [(five, five)])
    assert "does not own" in node.donate(web.id, other.me, 4, [(address, address)])
    assert "not known" in node.donate("nope", other.me, 4, [])


def test_networks_of_one_name_are_both_kept(node: NodeState) -> None:
    other = make("n2")
    mine = node.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
    theirs = other.create_network(parse_network("web", subnets=["10.2.0.0/24"]))
    send(node, other)
    send(other, node)
    names = {node.catalogue.name(n.id) for n in (mine, theirs)}
    assert names == {other.catalogue.name(n.id) for n in (mine, theirs)}
    assert len(names) == 2 and "web" in names


def test_another_node_can_remove_a_network(node: NodeState, web: Network) -> None:
    other = make("n2")
    send(node, other)
    other.remove_network(web.id)
    send(other, node)
    assert node.catalogue.get(web.id) is None
    with pytest.raises(NotFound):
        node.find_network("web")


def test_restoring_gives_back_everything(node: NodeState, web: Network) -> None:
    held = endpoint(node, web, "a")
    sandbox = Sandbox("5" * 16, "box", "/x", 1, 0, 0, 0.0, (held.id,), ("eth0",))
    node.put_sandbox(sandbox)
    node.replica.publish(node.replica.written())
    fresh = NodeState(node.nodes[node.me], lambda: 0.0, random.Random(1))
    fresh.restore(node.since(node.me, 0), [sandbox], node.replica.written(), 0)
    assert fresh.find_endpoint("a")[1].endpoint == held
    assert fresh.find_sandbox("box") == sandbox
    assert fresh.addresses[web.id].space.used(held.addresses[0])
    assert fresh.replica.written() == node.replica.written()


def test_dropping_a_sandbox_takes_its_endpoints(node: NodeState, web: Network) -> None:
    held = endpoint(node, web, "a")
    node.put_sandbox(Sandbox("5" * 16, "box", "/x", 1, 0, 0, 0.0, (held.id,), ("eth0",)))
    with pytest.raises(Conflict, match="sandbox box: exists"):
        node.put_sandbox(Sandbox("6" * 16, "box", "/y", 2, 0, 0, 0.0))
    node.drop_sandbox("5" * 16)
    assert not node.members[web.id].all
    node.drop_sandbox("5" * 16)


def test_an_endpoint_may_come_before_its_network(node: NodeState, web: Network) -> None:
    endpoint(node, web, "a")
    node.replica.publish(node.replica.written())
    records = [r for r in node.since(node.me, 0) if r.key[0] == "e"]
    rest = [r for r in node.since(node.me, 0) if r.key[0] != "e"]
    other = make("n2")
    # Such an order comes about when the network was renamed (written again) later.
    later = [r._replace(version=r.version + 10) for r in rest]
    upto = later[-1].version
    assert other.merge(Delta(node.me, 0, records[-1].version, records))
    assert other.merge(Delta(node.me, records[-1].version, upto, later))
    assert other.addresses[web.id].space.used(bytes([10, 1, 0, 2]))


def test_a_network_that_goes_and_comes_back_keeps_its_donations(
    node: NodeState, web: Network
) -> None:
    other = make("n2")
    send(other, node)
    send(node, other)
    assert node.donate(web.id, other.me, 4, []) == ""
    owned = node.addresses[web.id].ring.owned(node.me, 4)
    send(node, other)
    other.remove_network(web.id)
    send(other, node)
    assert node.catalogue.get(web.id) is None
    # The removal is withdrawn: the network is back as its creator wrote it.
    with_key = other.replica.delete(f"w/{web.id}")
    assert with_key.version
    send(other, node)
    assert node.catalogue.get(web.id) == web
    assert node.addresses[web.id].ring.owned(node.me, 4) == owned


def test_one_request_may_name_an_address_twice(node: NodeState, web: Network) -> None:
    other = make("n2")
    send(other, node)
    six = bytes([10, 1, 0, 6])
    assert node.donate(web.id, other.me, 4, [(six, six), (six, six)]) == ""
    assert node.addresses[web.id].ring.owner(six) == other.me
    for stranger in (node.me, "", "2" * 16):
        assert node.donate(web.id, stranger, 4, []) == UNKNOWN


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("e/" + "a" * 16, b"\xc1 no msgpack"),
        ("e/" + "a" * 16, encode(Endpoint("b" * 16, "w", "n", b"\2" * 6, ()))),
        ("e/" + "a" * 16, encode(Endpoint("a" * 16, "w", "n", b"\2" * 5, ()))),
        ("e/" + "a" * 16, encode(Endpoint("a" * 16, "w", "n", b"\2" * 6, (b"12345",)))),
        ("n/" + "2" * 16, encode(Node("2" * 16, "x", "h", 1, "not an address", 1, "", 0.0, 1))),
        ("w/" + "a" * 16, b"\x90"),
        ("r/" + "a" * 16, b"\x93\1\2\3"),
        ("z/of-a-newer-agent", b"whatever"),
    ],
)
def test_a_record_that_cannot_be_used_is_passed_over(
    node: NodeState, web: Network, key: str, value: bytes
) -> None:
    good = Endpoint("d" * 16, web.id, "good", b"\2\0\0\0\0\1", (bytes([10, 1, 0, 4]),))
    records = [Record(key, 1, value), Record(f"e/{good.id}", 2, encode(good))]
    assert node.merge(Delta("2" * 16, 0, 2, records))
    assert node.find_endpoint("good")[1].endpoint == good
    assert "a" * 16 not in node.members.get("w", Members(node.me)).all
    back = NodeState(node.nodes[node.me], lambda: 0.0, random.Random(1))
    back.restore_peer("2" * 16, records, 2, 0)
    assert len(back.replica.items("2" * 16)) == 2


def test_a_network_removed_elsewhere_takes_the_endpoints_made_meanwhile(
    node: NodeState, web: Network
) -> None:
    other = make("n2")
    send(node, other)
    assert node.donate(web.id, other.me, 4, []) == UNKNOWN
    send(other, node)
    assert node.donate(web.id, other.me, 4, []) == ""
    send(node, other)
    ghost = endpoint(other, web, "ghost")
    node.remove_network(web.id)
    send(node, other)
    assert not other.replica.get(other.me, f"e/{ghost.id}")
    send(other, node)
    for state in (node, other):
        with pytest.raises(NotFound):
            state.find_endpoint(ghost.id)
        assert web.id not in state.members or not state.members[web.id].all


def test_of_two_networks_with_one_vni_the_younger_gets_another(node: NodeState) -> None:
    other = make("n2")
    mine = node.create_network(parse_network("a", subnets=["10.1.0.0/24"], vni=500))
    theirs = other.create_network(parse_network("b", subnets=["10.2.0.0/24"], vni=500))
    endpoint(node, mine, "x")
    endpoint(other, theirs, "y")
    send(node, other)
    send(other, node)
    send(node, other)
    send(other, node)
    written = other.catalogue.written(theirs.id)
    assert written and written.vni != 500, "its creator has made that last"
    for state, vni in ((node, 500), (other, written.vni)):
        assert state.catalogue.get(mine.id) == mine
        assert state.catalogue.get(theirs.id) == written
        assert [n.vni for n in state.local_networks()] == [vni]


def test_of_workloads_in_its_own_stack_a_node_makes_no_more_than_others_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(members, "CLAIMANTS_MAX", 3)
    mine = world.make()
    made = [
        mine.create_host_endpoint(world.NET, parse_endpoint(f"own{number}"), "")
        for number in range(3)
    ]
    with pytest.raises(Exhausted, match="own stack"):
        mine.create_host_endpoint(world.NET, parse_endpoint("own3"), "")
    mine.remove_endpoints([made[0].id])
    assert mine.create_host_endpoint(world.NET, parse_endpoint("own3"), "")
