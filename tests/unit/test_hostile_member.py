"""What a member with a certificate can write, and what it can take from the others by that."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from agent import views
from agent.core import catalogue, members, replica
from agent.core.bounds import SEGMENTS_MAX
from agent.core.replica import JUMP, JUMPS_MAX, VERSION_MAX, Delta, Record
from agent.errors import Exhausted
from agent.model import Claims, Endpoint, Network, Removal, Segment, encode
from agent.node import NodeState
from agent.node.networks import TOLD_AT_ONCE
from agent.node.state import SURPASS_EVERY
from agent.notation import parse_address
from agent.plan import Plan
from agent.requests import parse_endpoint, parse_network
from agent.servicemodel import Check, Port, Service
from agent.views import Change
from tests.fuzz import world
from tests.fuzz.world import LOCAL, NET, OTHER, PEER, REMOTE, THIRD


@pytest.fixture
def node() -> NodeState:
    return world.make()


class Writer:
    """A member that writes what it likes, under its own origin."""

    def __init__(self, node: NodeState, origin: str) -> None:
        self.node, self.origin = node, origin

    def write(self, *rows: tuple[str, msgspec.Struct | None]) -> None:
        base = self.node.version(self.origin)
        records = [
            Record(key, base + at, encode(value) if value else b"")
            for at, (key, value) in enumerate(rows, 1)
        ]
        assert self.node.merge(Delta(self.origin, base, base + len(rows), records))


@pytest.fixture
def peer(node: NodeState) -> Writer:
    return Writer(node, PEER)


def endpoint(id: str = REMOTE, network: str = NET, number: int = 7, **fields: object) -> Endpoint:
    mac = b"\2\0^\0" + number.to_bytes(2, "big")
    made = Endpoint(id, network, f"e{number}", mac, (bytes([10, 1]) + number.to_bytes(2, "big"),))
    return msgspec.structs.replace(made, **fields)


def network(number: int, **fields: object) -> Network:
    made = Network(f"{number:016x}", f"n{number}", "overlay", (f"10.{64 + number // 256}."
                   f"{number % 256}.0/24",), (f"10.{64 + number // 256}.{number % 256}.1",), "",
                   5000 + number, 0, False, False, {}, {}, world.NOW, PEER, 5, born=5)  # fmt: skip
    return msgspec.structs.replace(made, **fields)


THIRD_ID = "e3" * 8


def service(**fields: object) -> Service:
    made = Service("51" * 8, "shop", NET, "vip", (), (Port(80, 8000, "tcp", 8080),),
                   {"app": "shop"}, (), 0.0, Check(), (), False, "refuse", 0.0, {}, world.NOW,
                   PEER, 5, born=5)  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def told(node: NodeState) -> list[str]:
    kinds: list[str] = []
    node.listeners.append(lambda change: kinds.extend(notice.kind for notice in change.notices))
    return kinds


# -- endpoints --


def test_an_endpoint_stays_with_its_node_whoever_writes_or_deletes_one_of_its_id(
    node: NodeState, peer: Writer
) -> None:
    mine = node.members[NET].all[LOCAL]
    peer.write(("e/" + LOCAL, endpoint(LOCAL)))
    peer.write(("e/" + LOCAL, endpoint(LOCAL, OTHER)))
    peer.write(("e/" + LOCAL, None))
    assert node.members[NET].all == {LOCAL: mine} and node.local_endpoint(LOCAL)
    peer.write(("e/" + REMOTE, endpoint()))
    Writer(node, THIRD).write(("e/" + REMOTE, None))
    assert node.members[NET].all[REMOTE].node == PEER
    peer.write(("e/" + REMOTE, None))
    assert REMOTE not in node.members[NET].all


def test_an_endpoint_that_moves_to_another_network_leaves_nothing_behind(
    node: NodeState, peer: Writer
) -> None:
    peer.write(("e/" + REMOTE, endpoint()))
    for number in range(50):
        peer.write(("e/" + REMOTE, endpoint(REMOTE, f"{number:016x}")))
    peer.write(("e/" + REMOTE, endpoint(REMOTE, OTHER)))
    assert {id: list(m.all) for id, m in node.members.items() if m.all} == {
        NET: [LOCAL], OTHER: [REMOTE],
    }  # fmt: skip
    assert len(node.members) <= 2


def test_so_many_endpoints_may_claim_one_name_mac_or_address(
    node: NodeState, peer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "CLAIMANTS_MAX", 3)
    for field in ("name", "mac", "addresses"):
        same = {field: getattr(endpoint(number=99), field)}
        ids = [f"{field[0]}{n:015x}" for n in range(5)]
        peer.write(*(("e/" + id, endpoint(id, NET, n, **same)) for n, id in enumerate(ids)))
        assert [id in node.members[NET].all for id in ids] == [True] * 3 + [False] * 2
        # One of them that changes keeps its place, and one that goes makes room.
        peer.write(("e/" + ids[0], endpoint(ids[0], NET, 50, **same)), ("e/" + ids[1], None))
        peer.write(("e/" + ids[4], endpoint(ids[4], NET, 51, **same)))
        assert [id in node.members[NET].all for id in ids] == [True, False, True, False, True]
        peer.write(*(("e/" + id, None) for id in ids))


def test_no_row_leads_to_who_claims_the_gateways_address(node: NodeState, peer: Writer) -> None:
    plan = Plan(node)
    gateway, usual = b"\n\1\0\1", b"\n\1\0\7"
    peer.write(("e/" + REMOTE, endpoint(addresses=(gateway, usual))))
    vni = node.catalogue.get(NET).vni  # type: ignore[union-attr]
    assert [address for address, _ in plan.all_rows(vni).neighbours] == [usual]
    rows = dict(plan.rows(vni, [], [gateway, usual]).neighbours)
    assert rows == {gateway: None, usual: endpoint().mac}


# -- services --


def follow(node: NodeState, plan: Plan) -> None:
    def look(change: Change) -> None:
        plan.touched(change)

    node.listeners.append(look)


def backends(plan: Plan) -> dict[bytes, bool]:
    return {b.address: b.outside for f in plan.frontends().values() for b in f.backends}


@pytest.mark.parametrize(
    "lie",
    [
        "127.0.0.1",  # this host's own processes
        "169.254.83.1",  # the host, as it is seen from our namespace
        "169.254.83.2",
        "169.254.169.254",  # what a cloud tells its hosts alone
        "0.0.0.0",
        "224.0.0.1",
        "10.1.0.1",  # the gateway, which is us
        "10.2.0.7",  # in another network of this host
        "10.99.0.1",  # this host
        "192.0.2.7",  # whoever it is
        "::1",
        "::ffff:127.0.0.1",
        "fe80::1",
        "fd76:786d:6573:6800::1",
        "fd00:1::1",
    ],
)
def test_a_published_port_leads_to_no_address_but_the_networks(
    node: NodeState, peer: Writer, lie: str
) -> None:
    node.create_endpoint(OTHER, parse_endpoint("two"))
    plan, address = Plan(node), parse_address(lie)
    follow(node, plan)
    peer.write(
        ("e/" + REMOTE, endpoint(addresses=(address,), labels={"app": "shop"})),
        ("e/" + THIRD_ID, endpoint(THIRD_ID, labels={"app": "shop"})),
        ("s/" + "51" * 8, service()),
    )
    usual = b"\n\1\0\7"
    assert backends(plan) == {usual: False}
    # Nor if it says that its node is there.
    bad = msgspec.structs.replace(node.nodes[PEER], vtep=lie, incarnation=2 << 20)
    peer.write(("n/" + PEER, bad))
    assert backends(plan) == (
        {usual: False, address: True} if lie == "192.0.2.7" else {usual: False}
    )


def test_a_backend_in_a_nodes_own_stack_is_at_that_nodes_address(
    node: NodeState, peer: Writer
) -> None:
    plan, vtep = Plan(node), parse_address("10.99.0.2")
    follow(node, plan)
    peer.write(
        ("e/" + REMOTE, endpoint(addresses=(vtep,), labels={"app": "shop"})),
        ("s/" + "51" * 8, service()),
    )
    assert backends(plan) == {vtep: True}
    # Another's node is not its own.
    other = Writer(node, THIRD)
    other.write(("e/" + THIRD_ID, endpoint(THIRD_ID, addresses=(vtep,), labels={"app": "shop"})))
    [one] = next(iter(plan.frontends().values())).backends
    assert one.key == REMOTE
    moved = msgspec.structs.replace(node.nodes[PEER], vtep="10.99.0.9", incarnation=2 << 20)
    peer.write(("n/" + PEER, moved))
    assert backends(plan) == {}
    peer.write(("n/" + PEER, msgspec.structs.replace(moved, vtep="10.2.0.7", incarnation=3 << 20)))
    lie = endpoint(addresses=(parse_address("10.2.0.7"),), labels={"app": "shop"})
    peer.write(("e/" + REMOTE, lie))
    assert backends(plan) == {parse_address("10.2.0.7"): True}
    # A network of this host has that address now.
    node.create_endpoint(OTHER, parse_endpoint("two"))
    assert backends(plan) == {}


# -- networks --


def test_so_many_networks_of_one_node_are_let_be(
    node: NodeState, peer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "NETWORKS_MAX", 4)
    peer.write(*((f"w/{n:016x}", network(n)) for n in range(6)))
    assert [node.catalogue.get(f"{n:016x}") is not None for n in range(6)] == [True] * 4 + [
        False
    ] * 2
    # Those that are there may change, and be deleted: that makes room.
    peer.write(("w/" + f"{0:016x}", network(0, stamp=6, mtu=1400)))
    assert node.catalogue.get(f"{0:016x}").mtu == 1400  # type: ignore[union-attr]
    peer.write(("w/" + f"{0:016x}", network(0, stamp=7, deleted=True)))
    peer.write(("w/" + f"{5:016x}", network(5)))
    assert node.catalogue.get(f"{5:016x}") and not node.catalogue.get(f"{0:016x}")
    # A node that has made as many itself is told so, as the others would not take one more.
    for name in ("c", "d"):
        node.create_network(parse_network(name))
    with pytest.raises(Exhausted):
        node.create_network(parse_network("e"))


def test_so_many_networks_may_overlap_and_so_many_conflicts_are_told_one_by_one(
    node: NodeState, peer: Writer
) -> None:
    kinds = told(node)
    same = {"subnets": ("10.1.0.0/16",), "gateways": ("10.1.0.1",), "name": "web"}
    peer.write(*((f"w/{n:016x}", network(n, **same)) for n in range(100)))
    assert len(list(node.catalogue.all())) == 2 + catalogue.OVERLAPS_MAX - 1
    assert kinds.count("network.conflict") == TOLD_AT_ONCE + 1


def test_what_was_made_encrypted_or_internal_stays_so_whoever_writes_after(
    node: NodeState, peer: Writer
) -> None:
    peer.write(("w/" + "3" * 16, network(3, id="3" * 16, encrypted=True, internal=True)))
    opened = network(3, id="3" * 16, stamp=99, mtu=1400)
    Writer(node, THIRD).write(("w/" + "3" * 16, opened))
    found = node.catalogue.get("3" * 16)
    assert found and found.mtu == 1400 and found.encrypted and found.internal


def test_many_networks_in_one_message_are_judged_once(node: NodeState, peer: Writer) -> None:
    judged = []
    settle = node.catalogue._settle

    def count() -> dict[str, Network]:
        judged.append(1)
        return settle()

    node.catalogue._settle = count  # type: ignore[method-assign]
    peer.write(*((f"w/{n:016x}", network(n, name="web")) for n in range(200)))
    # Once when they came, and once when ours, which is the youngest, had its name taken down.
    assert len(judged) <= 2
    assert sum(n.name.startswith("web-") for n in node.catalogue.all()) == 200


# -- what is left behind --


def sizes(node: NodeState) -> dict[str, int]:
    """How much the node holds, wherever that is kept."""
    state = {**vars(node), **{f"catalogue.{k}": v for k, v in vars(node.catalogue).items()}}
    return {
        k: len(v) for k, v in state.items() if isinstance(v, dict | set | list) and k != "nodes"
    }


def test_what_comes_and_goes_under_ever_new_names_leaves_nothing_behind(
    node: NodeState, peer: Writer
) -> None:
    before = sizes(node)
    for number in range(100):
        id = f"{number:016x}"
        rows: Sequence[tuple[str, msgspec.Struct]] = (
            ("w/" + id, network(number)),
            ("e/" + id, endpoint(id, id, number)),
            ("r/" + id, Claims(id, ())),
            ("r/" + "f" + id[1:], Claims("f" + id[1:], ())),
        )
        peer.write(*rows)
        peer.write(*((key, None) for key, _ in rows))
        peer.write(("w/" + "f" + id[1:], None))
    after = sizes(node)
    assert {key: size for key, size in after.items() if size > before[key]} == {}


def test_so_many_removals_are_heeded(
    node: NodeState, peer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "REMOVALS_MAX", 3)
    ids = [f"{n:016x}" for n in range(5)]
    peer.write(*(("x/" + id, Removal(id, id, PEER, 1, world.NOW)) for id in ids))
    assert set(node.removals) == set(ids[:3])


# -- origins --


@pytest.mark.parametrize(
    ("bound", "value"), [("ORIGIN_RECORDS_MAX", 20), ("ORIGIN_BYTES_MAX", 1500)]
)
def test_an_origin_that_writes_more_than_anybody_may_is_not_heard_any_more(
    node: NodeState, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(replica, bound, value)
    kinds = told(node)
    peer = Writer(node, PEER)
    for number in range(40):
        peer_version = node.version(PEER)
        if not node.is_heard(PEER):
            break
        peer.write((f"e/{number:016x}", endpoint(f"{number:016x}", NET, number)))
    assert 10 < number < 39 and kinds == ["origin.overfull"]
    held = node.version(PEER)
    assert held == peer_version
    Writer(node, PEER).write(("e/" + REMOTE, endpoint()))
    assert node.version(PEER) == held and REMOTE not in node.members[NET].all
    assert node.is_heard(THIRD)


def test_parts_of_a_whole_state_that_is_never_complete_have_an_end(
    node: NodeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "ORIGIN_RECORDS_MAX", 20)
    for number in range(30):
        record = Record(f"e/{number:016x}", number + 1, b"\x90")
        node.merge(Delta(PEER, number, number + 1, [record], reset=True))
    assert len(node.replica._incoming[PEER].records) == 20


def test_there_are_so_many_origins(node: NodeState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "ORIGINS_MAX", 5)
    for number in range(9):
        assert node.merge(Delta(f"{number:016x}", 0, 1, [Record("n/x", 1, b"\x90")]))
    assert len(node.replica.origins()) == 5


# -- our own versions --


def test_nobody_can_carry_our_versions_to_where_none_is_taken(node: NodeState) -> None:
    kinds = told(node)
    written = node.replica.written()
    for lie in (VERSION_MAX, VERSION_MAX - JUMP, written + (JUMPS_MAX + 1) * JUMP):
        for _ in range(3):
            node.seen(PEER, {node.me: (lie, 0)})
    assert node.replica.written() == written
    assert kinds == ["version.unbelievable"]  # told once of each peer


def test_what_a_disk_has_lost_is_made_up_for_but_not_at_every_message() -> None:
    node = world.make()
    now = [world.NOW]
    node.clock = lambda: now[0]
    node.seen(PEER, {node.me: (node.replica.written() + 5, 0)})
    once = node.replica.written()
    assert once > JUMP
    node.seen(PEER, {node.me: (once + 5, 0)})
    assert node.replica.written() == once
    now[0] += SURPASS_EVERY
    node.seen(PEER, {node.me: (once + 5, 0)})
    assert node.replica.written() > once + JUMP / 2


# -- addresses --


def test_nobody_can_have_our_share_cut_into_more_pieces_than_can_be_told() -> None:
    node = world.make(networks=0)
    network = node.create_network(parse_network("wide", subnets=["10.0.0.0/16"]))
    last = ""
    for first in range(0, 1 << 16, 512):
        odd = [bytes([10, 0]) + n.to_bytes(2, "big") for n in range(first + 1, first + 512, 2)]
        last = node.donate(network.id, PEER, 4, [(address, address) for address in odd])
        if last:
            break
    assert "pieces" in last
    claims = node.addresses[network.id].claims()
    assert SEGMENTS_MAX * 0.8 < len(claims.segments) <= SEGMENTS_MAX
    wide = Segment(6, bytes(16), b"\xff" * 16, "f" * 16, 1 << 60)
    assert len(encode(Claims("f" * 16, (wide,) * SEGMENTS_MAX))) < 256 << 10
