"""Nodes that go: what their heir has, what nobody takes from them again, and what callers hear."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from agent import restart, views
from agent.cluster import link
from agent.core.addresses import Range
from agent.core.removal import FROZEN_FOR, Answer, Ask, Verdict
from agent.core.replica import Delta, Record
from agent.departures import LINKED_FOR, TRY_FOR, Departures
from agent.errors import Conflict, InUse, NotFound, Timeout, Unavailable, VxmeshError
from agent.listeners import ToStore
from agent.model import Network, Node, Notice, Removal
from agent.node import NeedSpace, NodeState
from agent.node.records import Recording
from agent.operations import Operations
from agent.requests import parse_endpoint, parse_network
from agent.store import Store
from agent.views import Change, Status


def make(name: str) -> NodeState:
    id = name[1:].rjust(16, "0")
    me = Node(id, name, "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    state = NodeState(me, lambda: 1000.0, random.Random(name))
    state.listeners.append(lambda change: state.replica.publish(state.replica.written()))
    state.describe(me)
    return state


def send(source: NodeState, target: NodeState, origin: str = "") -> None:
    """All that `source` has of an origin, by itself its own, reaches `target`."""
    origin = origin or source.me
    known = target.version(origin)
    records = source.since(origin, known)
    assert target.merge(Delta(origin, known, source.version(origin), records))


def meet(*nodes: NodeState) -> None:
    for source in nodes:
        for target in nodes:
            if source is not target:
                send(source, target)


def notices(node: NodeState) -> list[Notice]:
    found: list[Notice] = []

    def take(change: Change) -> None:
        found.extend(change.notices)

    node.listeners.append(take)
    return found


def owners(node: NodeState, network: Network) -> dict[str, int]:
    usage = node.addresses[network.id].usage(4)
    return {node.node_name(id): owned for id, (owned, _) in usage.owned.items()}


@pytest.fixture
def three() -> tuple[NodeState, NodeState, NodeState]:
    nodes = make("n1"), make("n2"), make("n3")
    meet(*nodes)
    return nodes


def lost_network(three: tuple[NodeState, NodeState, NodeState]) -> Network:
    """Made by n3, which gave a part of it to n2 and has an endpoint there."""
    _, n2, n3 = three
    web = n3.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    n3.create_endpoint(web.id, parse_endpoint("on-lost"))
    meet(*three)
    assert n3.donate(web.id, n2.me, 4, []) == ""
    meet(*three)
    return web


# -- lost nodes --


def test_the_heir_has_all_that_was_the_lost_ones(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = lost_network(three)
    before = owners(n1, web)
    told, told_other = notices(n1), notices(n2)
    n1.inherit([n3.me])
    send(n1, n2)
    for node in (n1, n2):
        assert owners(node, web) == {"n1": before["n3"], "n2": before["n2"]}
        assert set(node.nodes) == {n1.me, n2.me}
        assert [n.name for n in node.catalogue.all()] == ["web"]
        assert node.members[web.id].all == {}
        assert n3.me not in node.replica.origins()
        assert node.node_name(n3.me) == "n3"
    assert {n.kind for n in told} == {"member.removed", "space.reclaimed"}
    assert [n.fields["addresses"] for n in told if n.kind == "space.reclaimed"] == ["10"]
    assert [n.message for n in told_other] == ["n3 was removed by n1"]
    taken = {n1.create_endpoint(web.id, parse_endpoint(f"e{i}")).addresses[0] for i in range(6)}
    assert len(taken) == 6


def test_nothing_of_a_removed_node_is_taken_again(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = lost_network(three)
    n1.inherit([n3.me])
    n3.create_endpoint(web.id, parse_endpoint("late"))
    for _ in range(2):
        assert n1.merge(Delta(n3.me, 0, n3.version(n3.me), n3.since(n3.me, 0)))
    assert n3.me not in n1.replica.origins() and n3.me not in n1.digest()
    assert n1.members[web.id].all == {}
    assert "removed" not in n1.donate(web.id, n2.me, 4, [])
    assert n1.donate(web.id, n3.me, 4, []) != ""


def test_a_second_time_changes_nothing(three: tuple[NodeState, NodeState, NodeState]) -> None:
    n1, _, n3 = three
    lost_network(three)
    n1.inherit([n3.me])
    before = n1.replica.written()
    n1.inherit([n3.me])
    assert n1.replica.written() == before


def test_what_was_deleted_by_the_lost_one_stays_deleted(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    n3.remove_network(web.id)
    meet(*three)
    n2.inherit([n3.me])
    send(n2, n1)
    assert not n1.catalogue.get(web.id) and not n2.catalogue.get(web.id)


def test_a_network_does_not_flicker_when_the_removal_comes_before_the_heirs_copy(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = lost_network(three)
    n2.create_endpoint(web.id, parse_endpoint("mine"))
    n1.inherit([n3.me])
    known = n2.version(n1.me)
    records = n1.since(n1.me, known)
    removal = [r for r in records if r.key.startswith("x/")]
    # As if the heir had written its copy again since: the older record comes first.
    copies = [r for r in records if not r.key.startswith("x/")]
    later = [Record(r.key, removal[0].version + i, r.value) for i, r in enumerate(copies, 1)]
    upto = removal[0].version
    assert n2.merge(Delta(n1.me, known, upto, removal))
    assert n2.catalogue.get(web.id) and n2.members[web.id].local
    assert n2.merge(Delta(n1.me, upto, upto + len(later), later))
    assert n2.catalogue.get(web.id) and n2.members[web.id].local
    assert n2.catalogue.writers(web.id) == {n1.me}


def test_removals_of_a_removed_node_are_its_heirs(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = lost_network(three)
    n2.inherit([n3.me])
    send(n2, n1)
    n1.inherit([n2.me])
    fresh = make("n4")
    send(n1, fresh)
    assert {r.by_name for r in fresh.removals.values()} == {"n1", "n2"}
    assert fresh.merge(Delta(n3.me, 0, n3.version(n3.me), n3.since(n3.me, 0)))
    assert set(fresh.nodes) == {fresh.me, n1.me}
    assert owners(fresh, web) == {"n1": 13}


def test_what_was_given_to_the_lost_one_unheard_comes_to_its_heir_in_the_end(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    assert n1.donate(web.id, n3.me, 4, []) == ""
    n2.inherit([n3.me])
    assert owners(n2, web) == {"n1": 13}
    send(n1, n2)
    assert owners(n2, web) == {"n1": 7, "n2": 6}


async def test_a_removal_outlives_a_restart_and_the_lost_one_is_off_the_disk(
    tmp_path: Path, three: tuple[NodeState, NodeState, NodeState]
) -> None:
    n1, _, n3 = three
    web = lost_network(three)
    store = Store(tmp_path)
    storing = ToStore(n1, store, lambda: None)
    storing._kept.clear()
    n1.replica.changed.update(set(n1.replica.origins()) - {n1.me})
    storing.keep_peers()
    n1.inherit([n3.me])
    await storing.durable()
    await store.close()

    store = Store(tmp_path)
    meta, records, boxes = store.load()
    again = NodeState(n1.nodes[n1.me], lambda: 1000.0, random.Random(1))
    again.restore(records, boxes, int(meta["version"]), int(meta.get("floor", 0)))
    kept = store.load_peers()
    assert n3.me not in [k.origin for k in kept]
    for known in kept:
        again.restore_peer(known.origin, known.records, known.version, known.floor)
    assert set(again.removals) == {n3.me} == again.inherited
    assert owners(again, web) == owners(n1, web)
    await store.close()


def test_who_was_removed_stops_and_says_why(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = lost_network(three)
    n1.inherit([n3.me])
    errors: list[VxmeshError] = []
    n3.on_expelled = errors.append
    send(n1, n3)  # or by a peer's refusal: `expel`
    n3.expel(n1.removals[n3.me])
    assert [str(e) for e in errors] == [str(errors[0])]
    assert "was removed from the cluster by n1" in str(errors[0])
    assert "--reset-state" in str(errors[0])
    with pytest.raises(VxmeshError, match="was removed"):
        n3.create_endpoint(web.id, parse_endpoint("x"))
    assert "removed" in n3.donate(web.id, n2.me, 4, [])


def test_two_halves_that_removed_each_other_do_not_end_each_other() -> None:
    n1, n2 = make("n1"), make("n2")
    meet(n1, n2)
    n1.inherit([n2.me])
    n2.inherit([n1.me])
    n1.expel(n2.removals[n1.me])
    assert n1.expelled is None
    n1.expel(Removal(n1.me, "n1", "9" * 16, 1, 0.0))
    assert n1.expelled is not None


# -- the calls --


class Kernel:
    async def settle(self, endpoint: str | None = None) -> None:
        return None


class Wire:
    """A cluster of NodeStates in one process; `cut` do not answer."""

    def __init__(self, *nodes: NodeState) -> None:
        self.nodes = {n.me: n for n in nodes}
        self.cut: set[str] = set()
        self.me = ""
        self.left: list[str] = []
        self.before_answer: Callable[[str], None] = lambda voter: None
        self.lagging: list[str] = []  # whose kernels lack everything

    def at(self, me: str) -> Wire:
        other = Wire(*self.nodes.values())
        other.cut, other.me, other.before_answer = self.cut, me, self.before_answer
        other.left, other.lagging = self.left, self.lagging
        return other

    def reach(self, id: str) -> NodeState:
        if id in self.cut or id not in self.nodes or self.me in self.cut:
            raise Unavailable(f"node {id}", "does not answer (UNAVAILABLE)")
        return self.nodes[id]

    async def ask(self, voter: str, ask: Ask) -> Answer:
        await asyncio.sleep(0)
        node = self.reach(voter)
        self.before_answer(voter)
        answer = node.removing.decide(ask, node.monotonic())
        for origin in answer.versions if answer.verdict is Verdict.AGREED else ():
            send(node, self.nodes[self.me], origin)
        await asyncio.sleep(0)
        return answer

    async def release(self, ask: Ask, voters: list[str]) -> None:
        for voter in voters:
            if voter not in self.cut:
                self.nodes[voter].removing.release(ask)

    async def deliver(self, peer: str) -> None:
        send(self.nodes[self.me], self.reach(peer))

    async def announce_left(self) -> None:
        """As cluster/detector.py: `leave`."""
        self.left.append(self.me)

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        return dict.fromkeys(self.lagging, "")

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        refused = self.reach(owner).donate(network.id, self.me, family, ranges)
        send(self.nodes[owner], self.nodes[self.me])
        return refused


async def _durable() -> None:
    return None


def departures(node: NodeState, wire: Wire, ended: list[str] | None = None) -> Departures:
    mine = wire.at(node.me)
    node.is_linked = lambda id: id not in wire.cut and id in wire.nodes
    calls = Operations(node, mine, Kernel(), _durable)
    ended = [] if ended is None else ended
    return Departures(node, calls, mine, mine.announce_left, lambda: ended.append(node.me))


def ticking(monkeypatch: pytest.MonkeyPatch, *nodes: NodeState) -> None:
    """Let the nodes' time pass with the loop's."""
    for node in nodes:
        node.monotonic = lambda: 1000.0 + 10 * asyncio.get_running_loop().time()


async def test_rm_needs_the_others_and_not_those_that_left(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    ticking(monkeypatch, *three)
    lost_network(three)
    wire = Wire(*three)
    wire.cut |= {n3.me, n2.me}
    rm = departures(n1, wire)
    with pytest.raises(Unavailable, match="n2 has to agree") as caught:
        await rm.remove_nodes(["n3"])
    assert "vxmesh node rm n2 n3" in caught.value.fix
    assert not n1.removals and n1.removing.attempt is None
    n1.set_status(n2.me, Status("left", "", 0.0, True))
    assert await rm.remove_nodes(["n3"]) == [n3.me]
    assert set(n1.removals) == {n3.me}


async def test_rm_of_the_living_of_oneself_and_of_nobody(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, _, n3 = three
    ticking(monkeypatch, *three)
    wire = Wire(*three)
    rm = departures(n1, wire)
    with pytest.raises(InUse, match=r"n3: is alive\. Run 'vxmesh node leave' there"):
        await rm.remove_nodes(["n3"])
    with pytest.raises(InUse, match="is this one"):
        await rm.remove_nodes(["n1"])
    with pytest.raises(NotFound):
        await rm.remove_nodes(["n9"])
    wire.cut |= {n3.me}
    n1.set_status(n3.me, Status("suspect", "", 0.0))
    with pytest.raises(InUse):
        await rm.remove_nodes([n3.me])
    n1.set_status(n3.me, Status("unreachable", "agent", 0.0))
    with pytest.raises(InUse, match="has a host that answers"):
        await rm.remove_nodes([n3.me])
    n1.set_status(n3.me, Status("unreachable", "", 0.0, True))
    first = await rm.remove_nodes(["n3"])
    assert first == await rm.remove_nodes(["n3"]) == await rm.remove_nodes([n3.me[:16]])


async def test_rm_by_force_of_one_that_lives(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    ticking(monkeypatch, *three)
    web = lost_network(three)
    before = owners(n1, web)
    wire = Wire(*three)
    rm = departures(n1, wire)
    n2.is_linked = lambda id: True
    with pytest.raises(InUse, match="is alive") as refused:
        await rm.remove_nodes(["n3"])
    assert "vxmesh node rm --force n3" in refused.value.fix
    assert "its addresses are handed out again" in refused.value.fix
    assert not n1.removals and not n2.removing.held
    with pytest.raises(InUse, match="is this one"):
        await rm.remove_nodes(["n1"], force=True)

    assert await rm.remove_nodes(["n3"], force=True) == [n3.me]
    # n2 has not heard that it is done, and takes nothing of it all the same, for ever.
    assert not n2.removals
    assert n3.donate(web.id, n2.me, 4, []) == ""
    send(n3, n2)
    monkeypatch.setattr(n2, "monotonic", lambda: 1e9)
    send(n3, n2)
    assert owners(n2, web) == before
    send(n1, n2)
    assert owners(n2, web) == {"n1": before["n3"], "n2": before["n2"]}
    assert n2.removing.open_ends() == [] and not n2.removing.held


async def test_rm_by_force_that_fails_opens_the_door_again(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    n4 = make("n4")
    meet(*three, n4)
    ticking(monkeypatch, *three, n4)
    wire = Wire(*three, n4)
    rm = departures(n1, wire)
    wire.cut |= {n4.me}
    with pytest.raises(Unavailable, match="n4 has to agree") as silent:
        await rm.remove_nodes(["n3"], force=True)
    assert "vxmesh node rm --force n3 n4" in silent.value.fix
    assert not n1.removals and n2.is_heard(n3.me) and not n2.removing.held


async def test_a_forced_consent_outlives_a_restart(
    tmp_path: Path, three: tuple[NodeState, NodeState, NodeState]
) -> None:
    n1, n2, n3 = three
    store = Store(tmp_path)
    life = restart.begin(store, "boot", lambda: n2.me)
    storing = ToStore(n2, store, lambda: None)
    n2.describe(n2.nodes[n2.me])
    answer = n2.removing.decide(Ask(n1.me, frozenset({n3.me}), True, 7), n2.monotonic())
    assert answer.verdict is Verdict.AGREED
    await storing.durable()
    await store.close()

    store = Store(tmp_path)
    life = restart.begin(store, "another boot", lambda: n2.me)
    again = NodeState(n2.nodes[n2.me], lambda: 1000.0, random.Random(1))
    restart.recall(again, store, life)
    assert not again.is_heard(n3.me) and again.is_heard(n1.me)
    await store.close()


async def test_rm_of_one_that_only_another_sees_alive(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    ticking(monkeypatch, *three)
    wire = Wire(*three)
    wire.cut |= {n3.me}
    rm = departures(n1, wire)
    n2.is_linked = lambda id: True
    with pytest.raises(InUse, match="n3: is alive"):
        await rm.remove_nodes(["n3"])
    assert not n1.removals and n2.is_heard(n3.me)
    # Or that answers itself, though nobody has a stream to it.
    n2.is_linked = lambda id: False
    wire.cut.clear()
    n1.is_linked = lambda id: False
    with pytest.raises(InUse, match="it answers"):
        await rm.remove_nodes(["n3"])


async def test_rm_waits_for_streams_that_stand_a_moment_after_the_verdict(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    ticking(monkeypatch, *three)
    wire = Wire(*three)
    wire.cut |= {n3.me}
    n1.set_status(n3.me, Status("unreachable", "", 0.0, True))
    looks = {"n1": 3, "n2": 2}  # those for which it stands

    def is_linked(name: str) -> bool:
        looks[name] -= 1
        return looks[name] > 0

    rm = departures(n1, wire)
    n1.is_linked, n2.is_linked = lambda id: is_linked("n1"), lambda id: is_linked("n2")
    assert await rm.remove_nodes(["n3"]) == [n3.me]
    assert max(looks.values()) <= 0 and n1.removals


async def test_of_two_at_once_one_does_it_and_both_succeed(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    ticking(monkeypatch, *three)
    web = lost_network(three)
    wire = Wire(*three)
    wire.cut |= {n3.me}

    async def gossip() -> None:
        while len(n1.removals) + len(n2.removals) < 2:
            await asyncio.sleep(0.01)
            meet(n1, n2)

    calls = [departures(n, wire).remove_nodes(["n3"]) for n in (n1, n2)]
    results = await asyncio.gather(*calls, gossip())
    assert results[:2] == [[n3.me], [n3.me]]
    assert n1.removals[n3.me].by == n2.removals[n3.me].by == n1.me
    assert owners(n1, web) == owners(n2, web)
    assert n1.inherited == {n3.me} and n2.inherited == set()


async def test_a_clock_that_is_set_neither_ends_a_consent_nor_keeps_it(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    lost_network(three)
    now = 50.0
    n2.monotonic = lambda: now
    answer = n2.removing.decide(Ask(n1.me, frozenset({n3.me})), n2.monotonic())
    assert answer.verdict is Verdict.AGREED
    n2.clock = lambda: 1000.0 + 3600.0  # set forward: it is bound all the same
    assert not n2.is_heard(n3.me)
    n2.clock = lambda: 1000.0 - 3600.0  # and set back: free when the time is up
    now += FROZEN_FOR
    assert n2.is_heard(n3.me)


async def test_an_attempt_ends_in_time_though_the_clock_is_set_back(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    began, wire = 1000.0, Wire(*three)
    for node in three:
        node.clock = lambda: began  # the wall's clock stands still
    n1.monotonic = lambda: 10 * asyncio.get_running_loop().time()
    wire.cut |= {n2.me, n3.me}
    with pytest.raises(Unavailable, match="n2 has to agree"):
        async with asyncio.timeout(TRY_FOR):
            await departures(n1, wire).remove_nodes(["n3"])


async def test_a_rival_that_does_not_finish_is_named(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    ticking(monkeypatch, *three)
    wire = Wire(*three)
    wire.cut |= {n3.me}
    n1.removing.begin({n3.me}, n1.monotonic())
    with pytest.raises(Conflict, match="is being removed by n1"):
        await departures(n2, wire).remove_nodes(["n3"])


async def test_leaving_is_refused_while_something_runs_here(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = lost_network(three)
    ended: list[str] = []
    wire = Wire(*three)
    leave = departures(n3, wire, ended)
    with pytest.raises(InUse, match="has workloads: on-lost"):
        await leave.leave()
    assert not ended and not wire.left and owners(n3, web)["n3"] and not n3.leaving
    done = await leave.leave(force=True)
    assert ended == [n3.me] == wire.left
    assert [(h.network, h.addresses) for h in done] == [(web.id, 10)]
    assert owners(n1, web) == owners(n2, web) == owners(n3, web)
    assert "n3" not in owners(n1, web)
    assert n1.members[web.id].all == {}
    with pytest.raises(InUse, match="is leaving"):
        n3.create_endpoint(web.id, parse_endpoint("x"))


async def test_leaving_ends_only_when_all_that_live_have_what_this_node_wrote(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, _, n3 = three
    web = n3.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    wire, ended = Wire(*three), list[str]()
    leave = departures(n3, wire, ended)
    wire.cut |= {n1.me}
    n3.is_linked = lambda id: True
    with pytest.raises(Unavailable):
        await leave.leave()
    assert not ended and not n3.leaving and not wire.left
    # What was given is the other's all the same: nothing is handed out here again unasked.
    if owners(n3, web).get("n3", 0) == 0:
        with pytest.raises(NeedSpace):
            n3.create_endpoint(web.id, parse_endpoint("x"))
    wire.cut.clear()
    await leave.leave()
    assert ended == [n3.me] and owners(n1, web).get("n3", 0) == 0


async def test_who_waits_leaves_only_when_nothing_of_it_is_in_any_kernel(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, _, n3 = three
    lost_network(three)
    wire, ended = Wire(*three), list[str]()
    n3.kernel_has(n3.versions())
    n3.listeners.append(lambda change: n3.kernel_has(n3.versions()))
    wire.lagging.append(n1.me)
    leave = departures(n3, wire, ended)
    with pytest.raises(Timeout, match=r"this node: has not left: .* in the kernel of n1"):
        await leave.leave(force=True, wait=1.0)
    assert not ended and not n3.leaving and not wire.left
    wire.lagging.clear()
    await leave.leave(wait=1.0)
    assert ended == [n3.me] == wire.left


async def test_who_is_alone_may_leave_but_not_with_addresses_that_nobody_can_take() -> None:
    n1 = make("n1")
    n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    ended: list[str] = []
    wire = Wire(n1)
    n2 = make("n2")
    send(n2, n1)
    with pytest.raises(Unavailable, match="no other node answers"):
        await departures(n1, wire, ended).leave()
    only = make("n1")
    await departures(only, Wire(only), ended).leave()
    assert ended == [only.me]


# -- how full a network is --


def test_a_full_network_says_who_uses_it_and_who_has_the_rest(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, _ = three
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    assert n1.donate(web.id, n2.me, 4, []) == ""
    meet(*three)
    n2.create_endpoint(web.id, parse_endpoint("a"))
    meet(*three)
    text = n1.describe_usage(web.id, 4, [n2.me])
    assert text == "1 of 13 are used (n2 1), 12 are free (n1 7, n2 5); n2 does not answer"


def test_an_ip_range_is_the_total() -> None:
    n1 = make("n1")
    spec = parse_network("web", subnets=["10.1.0.0/24"], ip_ranges=["10.1.0.64/29"])
    web = n1.create_network(spec)
    usage = n1.addresses[web.id].usage(4)
    assert (usage.total, usage.used, usage.free) == (8, 0, 8)
    assert usage.owned == {n1.me: (8, 0)}


def test_a_notice_when_a_network_is_nearly_full() -> None:
    n1 = make("n1")
    told = notices(n1)
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))  # 13 to choose from
    ids = [n1.create_endpoint(web.id, parse_endpoint(f"e{i}")).id for i in range(10)]
    assert not told
    ids.append(n1.create_endpoint(web.id, parse_endpoint("e10")).id)
    assert [(n.kind, n.fields["used"], n.fields["total"]) for n in told] == [
        ("space.low", "11", "13")
    ]
    n1.remove_endpoints(ids[:1])
    n1.create_endpoint(web.id, parse_endpoint("e11"))
    assert len(told) == 1
    n1.remove_endpoints(ids[1:5])
    for i in range(4):
        n1.create_endpoint(web.id, parse_endpoint(f"f{i}"))
    assert len(told) == 2


# -- lost nodes and networks that clash --


def send_removals(heir: NodeState, target: NodeState) -> None:
    """Only the removals reach `target`; the copies of networks were written again since."""
    known = target.version(heir.me)
    removals = [r for r in heir.since(heir.me, known) if r.key.startswith("x/")]
    with Recording(heir):
        for network in list(heir.catalogue._written._records):
            copy = heir.catalogue.records(network).get(heir.me)
            if copy:
                heir._put("w/" + network, copy)
    assert target.merge(Delta(heir.me, known, removals[-1].version, removals))


def test_the_heir_makes_last_what_became_of_the_lost_ones_networks(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    mine = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    n3.clock = lambda: 1001.0
    theirs = n3.create_network(parse_network("web", subnets=["10.2.0.0/28"]))
    send(n3, n1)
    send(n3, n2)
    send(n1, n2)
    shown = n2.catalogue.get(theirs.id)
    assert shown and shown.name == f"web-{theirs.id[:6]}"
    assert list(n2.catalogue.unsettled())  # its creator has not heard of it, and never will
    n2.inherit([n3.me])
    send(n2, n1)
    for node in (n1, n2):
        assert not list(node.catalogue.unsettled())
        kept = node.catalogue.get(theirs.id)
        assert kept and kept.name == shown.name and kept.stamp > theirs.stamp
        assert set(node.catalogue.records(theirs.id)) == {n2.me}
    n1.remove_network(mine.id)
    send(n1, n2)
    assert [n.name for n in n2.catalogue.all()] == [shown.name]


def test_a_copy_is_not_newer_than_what_the_living_wrote_since(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n3.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    n2.clock = lambda: 2000.0
    n2.remove_network(web.id)  # while n1 does not hear it
    n1.clock = lambda: 3000.0
    n1.inherit([n3.me])
    copied = n1.catalogue.records(web.id)[n1.me]
    assert copied.stamp == web.stamp and not copied.deleted
    meet(n1, n2)
    assert not n1.catalogue.get(web.id) and not n2.catalogue.get(web.id)


def test_a_deletion_by_the_lost_one_holds_until_the_heirs_copy_whatever_else_comes(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    n3.remove_network(web.id)
    send(n3, n1)
    send(n3, n2)
    n1.inherit([n3.me])
    send_removals(n1, n2)
    later = msgspec.structs.replace(web, stamp=web.stamp + (1 << 40))
    with Recording(n2) as change:
        n2._take_network("4" * 16, later, change)
    assert not n2.catalogue.get(web.id), "it rose from the dead"
    send(n1, n2)
    assert set(n2.catalogue.records(web.id)) == {n1.me, "4" * 16}
    assert not n2.catalogue.get(web.id) and not n1.catalogue.get(web.id)


def test_two_lost_ones_records_of_a_network_go_with_one_copy(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    n4 = make("n4")
    meet(n1, n2, n3, n4)
    web = n3.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(n1, n2, n3, n4)
    n4.clock = lambda: 1005.0
    with Recording(n4) as change:
        n4._write_network(web, change)
    meet(n1, n2, n3, n4)
    n1.inherit([n3.me, n4.me])
    send_removals(n1, n2)
    assert set(n2.removals) == {n3.me, n4.me}
    assert n2.catalogue.get(web.id)
    send(n1, n2)
    for node in (n1, n2):
        assert set(node.catalogue.records(web.id)) == {n1.me} and not node._orphans.get(web.id)


def test_a_network_whose_creator_took_it_back_does_not_stay_for_a_lost_ones_record(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    n3.clock = lambda: 1005.0
    with Recording(n3) as change:
        n3._write_network(web, change)
    meet(*three)
    n1.inherit([n3.me])
    send_removals(n1, n2)
    assert n2.catalogue.get(web.id)
    n1.remove_network(web.id)
    assert not n1.replica.get(n1.me, "w/" + web.id), "a tombstone, as only it had a record"
    send(n1, n2)
    assert not n2.catalogue.get(web.id) and not n2.catalogue.records(web.id)


def test_a_deletion_by_the_lost_one_outlives_it_though_others_wrote_later(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n1.create_network(parse_network("web", subnets=["10.1.0.0/28"]))
    meet(*three)
    n3.remove_network(web.id)
    n2.clock = lambda: 2000.0
    with Recording(n2) as change:  # has not heard of it
        n2._write_network(web, change)
    meet(*three)
    assert not n1.catalogue.get(web.id)
    n1.inherit([n3.me])
    send(n1, n2)
    for node in (n1, n2):
        assert not node.catalogue.get(web.id)
        assert node.catalogue.records(web.id)[n1.me].deleted
        assert set(node.catalogue.records(web.id)) == {n1.me, n2.me}


def test_a_closed_network_is_not_opened_by_the_removal_of_who_made_it(
    three: tuple[NodeState, NodeState, NodeState],
) -> None:
    n1, n2, n3 = three
    web = n3.create_network(parse_network("web", internal=True, encrypted=True))
    meet(*three)
    for later in (5, 1 << 40):  # of a member that is up to no good, before and after
        opened = msgspec.structs.replace(
            web, stamp=web.stamp + later, encrypted=False, internal=False
        )
        with Recording(n2) as change:
            n2._put("w/" + web.id, opened)
            n2._take_network(n2.me, opened, change)
        send(n2, n1)
        if later == 5:
            n1.inherit([n3.me])
            send_removals(n1, n2)
        for node in (n1, n2):
            found = node.catalogue.get(web.id)
            assert found and found.encrypted and found.internal
    send(n1, n2)
    for node in (n1, n2):
        found = node.catalogue.get(web.id)
        assert found and found.encrypted and found.internal and not node._orphans.get(web.id)


def test_a_node_can_be_removed_though_somebody_has_removed_very_many(
    three: tuple[NodeState, NodeState, NodeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    n1, n2, n3 = three
    monkeypatch.setattr(views, "REMOVALS_MAX", 5)
    with Recording(n2):
        for number in range(8):
            id = f"{number:016x}".replace("0", "f")
            n2._put("x/" + id, Removal(id, "nobody", n2.me, 1, 0.0))
    send(n2, n3)
    assert len(n3.removals) == 5
    n3.nodes["4" * 16] = n3.nodes[n2.me]
    with Recording(n1):
        n1._put("x/" + "4" * 16, Removal("4" * 16, "n4", n1.me, 1, 0.0))
        n1._put("x/" + "5" * 16, Removal("5" * 16, "n5", n1.me, 1, 0.0))
    send(n1, n3)
    assert "4" * 16 in n3.removals and "5" * 16 not in n3.removals


def test_streams_are_waited_for_longer_than_they_seem_to_live() -> None:
    assert link.STALE < LINKED_FOR
