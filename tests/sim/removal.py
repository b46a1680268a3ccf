"""Real nodes that donate, die for good and are removed by several at once, on lossy wires.

Some are removed by force though they live, and go on as before, for those who have not heard.

The oracle sees all nodes: no address is owned by two that live, and none is handed out twice,
but for those of nodes that live and are removed.
Messages are lost, late (but not longer than a dead node's can be on its way) and out of order;
nodes restart with what they had on disk; those of a forgetful world with nothing but their own
records and what nodes and networks there are, so that their own word has to be enough.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

from agent.core.removal import FROZEN_FOR, Answer, Ask, Attempt, Verdict
from agent.core.replica import Delta, Record
from agent.errors import VxmeshError
from agent.model import Node
from agent.node import NeedSpace, NodeState
from agent.notation import format_address
from agent.requests import parse_endpoint, parse_network
from agent.views import NETWORK, NODE, Change

MAP = (NODE, NETWORK)  # the kinds of records that even forgetful nodes keep
LATE_MOST = FROZEN_FOR - 1.0  # s; see core/removal.py
TICK = 0.3  # s between steps, on average


class Peer:
    """A node and what of it is on disk."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.id = f"{index + 1:016x}"
        self.is_up = True
        self.attempt: tuple[int, Attempt] | None = None
        self.held: dict[str, dict[str, int]] = {}  # on disk
        self.disk: dict[str, tuple[list[Record], int]] = {}
        self.boot()

    def boot(self) -> None:
        address = f"10.99.0.{int(self.id, 16)}"
        me = Node(self.id, f"n{int(self.id, 16)}", address, 7946, address, 4789, "", 0.0, 1500)
        rng = random.Random(self.world.rng.random())
        self.state = NodeState(me, lambda: self.world.now, rng)
        self.state.is_linked = self.world.lives
        self.state.listeners.append(self._changed)
        self.state.on_expelled = lambda error: self.world.end(self)

    def _changed(self, change: Change) -> None:
        """As agent/listeners.py: what others wrote gets to the disk with what it bears upon."""
        replica = self.state.replica
        replica.publish(replica.written())
        if change.own or change.nodes:
            self.disk = {
                origin: (replica.records(origin), replica.version(origin))
                for origin in replica.origins()
            }

    def restart(self) -> None:
        disk = self.disk
        self.attempt = None
        self.boot()
        mine, version = disk.pop(self.id)
        self.state.restore(mine, [], version, 0)
        self.state.removing.held = {node: dict(by) for node, by in self.held.items()}
        for origin, (kept, version) in disk.items():
            if self.world.forgetful:
                self.state.restore_peer(origin, [r for r in kept if r.key[:2] in MAP], 0, 0)
            else:
                self.state.restore_peer(origin, kept, version, 0)
        self.state.describe(self.state.nodes[self.id])

    def delta(self, origin: str, known: int, most: int = 10**6) -> Delta:
        records = self.state.since(origin, known)
        upto = self.state.version(origin)
        if len(records) > most:
            records = records[:most]
            upto = records[-1].version
        return Delta(origin, known, max(known, upto), records)

    def try_to_inherit(self) -> bool:
        assert self.attempt
        attempt, machine = self.attempt[1], self.state.removing
        if not machine.is_ready(attempt, self.world.now):
            return False
        self.state.inherit(attempt.ask.lost)
        machine.finish(attempt)
        self.attempt = None
        return True


class World:
    """The nodes, what is on its way between them, and the oracle."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.forgetful = seed % 3 == 0
        self.loss = self.rng.choice([0.0, 0.1, 0.4])
        self.flying: list[tuple[float, str, Callable[[], object]]] = []  # until, to, delivery
        self.attempts = itertools.count()
        self.cut_off = 0  # nodes that lived when they were removed
        self.heirs: dict[str, list[str]] = {}  # lost node -> who inherited it
        self.peers = [Peer(self, i) for i in range(self.rng.randint(3, 6))]
        self.by_id = {p.id: p for p in self.peers}
        for peer in self.peers:
            peer.state.describe(peer.state.nodes[peer.id])
        self.peers[0].state.create_network(parse_network("a", subnets=["10.1.0.0/27"]))
        self.settle()

    def lives(self, id: str) -> bool:
        return self.by_id[id].is_up

    def up(self) -> list[Peer]:
        return [p for p in self.peers if p.is_up]

    def members(self) -> list[Peer]:
        """Those that live and that nobody who belongs to them has removed."""
        found = self.up()
        for peer in self.up():
            if peer in found:
                found = [p for p in found if p is peer or not peer.state.is_removed(p.id)]
        return found

    def run(self, steps: int) -> World:
        actions = [
            (self.create, 10), (self.free, 4), (self.tell, 14), (self.deliver, 16),
            (self.restart, 1), (self.die, 1), (self.remove, 4), (self.network, 1), (self.drop, 1),
            (self.cut, 3), (self.enquire, 4),
        ]  # fmt: skip
        kinds, weights = zip(*actions, strict=True)
        for _ in range(steps):
            self.now += self.rng.uniform(0, 2 * TICK)
            self.rng.choices(kinds, weights)[0](self.rng.choice(self.up()))
            for peer in self.up():
                self.press_on(peer)
            self.check()
        return self

    # -- what happens --

    def post(self, to: str, delivery: Callable[[], object]) -> None:
        if self.rng.random() >= self.loss:
            self.flying.append((self.now + LATE_MOST, to, delivery))

    def deliver(self, peer: Peer) -> None:
        self.flying = [m for m in self.flying if m[0] > self.now and self.lives(m[1])]
        self.rng.shuffle(self.flying)
        for message in self.flying[: self.rng.randint(1, 6)]:
            self.flying.remove(message)
            message[2]()

    def tell(self, peer: Peer) -> None:
        """All or a part of what `peer` has, of anybody, goes to another."""
        other = self.rng.choice(self.peers)
        for origin in peer.state.replica.origins():
            known = other.state.version(origin)
            if origin == other.id or peer.state.version(origin) <= known:
                continue
            delta = peer.delta(origin, known, self.rng.choice([1, 2, 10**6]))
            self.post(other.id, lambda delta=delta: other.state.merge(delta))  # type: ignore[misc]

    def create(self, peer: Peer) -> None:
        """An endpoint; if addresses are others', one of them is asked, and the answer may fail."""
        known = sorted(n.id for n in peer.state.catalogue.all())
        if not known:
            return
        network = self.rng.choice(known)
        spec = parse_endpoint(f"e{self.rng.randint(0, 10**9)}")
        try:
            peer.state.create_endpoint(network, spec)
        except NeedSpace as need:
            for owner, ranges in need.owners.items():
                donor = self.by_id.get(owner)
                if donor is None or not donor.is_up or self.rng.random() < self.loss:
                    continue
                if not donor.state.donate(network, peer.id, 4, ranges):
                    delta = donor.delta(owner, peer.state.version(owner))
                    if self.rng.random() < 0.5:
                        peer.state.merge(delta)
                    else:
                        self.post(peer.id, lambda delta=delta: peer.state.merge(delta))  # type: ignore[misc]
                    if self.rng.random() < 0.2:  # nobody else may ever hear of it
                        self.end(donor)
                    return
        except VxmeshError:
            return

    def free(self, peer: Peer) -> None:
        local = sorted(id for m in peer.state.members.values() for id in m.local)
        if local:
            peer.state.remove_endpoints([self.rng.choice(local)])

    def network(self, peer: Peer) -> None:
        third = self.rng.randint(2, self.rng.choice([6, 250]))  # few: made by several at once
        spec = parse_network(f"n{third}", subnets=[f"10.1.{third}.0/28"])
        try:
            peer.state.create_network(spec)
        except VxmeshError:
            return

    def drop(self, peer: Peer) -> None:
        known = sorted(n.id for n in peer.state.catalogue.all() if n.name != "a")
        if known:
            try:
                peer.state.remove_network(self.rng.choice(known))
            except VxmeshError:
                return

    def restart(self, peer: Peer) -> None:
        self.flying = [m for m in self.flying if m[1] != peer.id]
        peer.restart()

    def die(self, peer: Peer) -> None:
        if len(self.up()) > 2:
            self.end(peer)

    def end(self, peer: Peer) -> None:
        if len(self.up()) > 1:
            peer.is_up = False

    # -- removals, as cluster/ and agent/departures.py do them --

    def remove(self, peer: Peer) -> None:
        lost = sorted(
            p.id for p in self.peers
            if not p.is_up and p.id in peer.state.nodes and not peer.state.is_removed(p.id)
        )  # fmt: skip
        if not lost or peer.attempt:
            return
        named = set(lost if self.rng.random() < 0.8 else self.rng.sample(lost, 1))
        attempt = peer.state.removing.begin(named, self.now)
        peer.attempt = (next(self.attempts), attempt)

    def cut(self, peer: Peer) -> None:
        """Somebody who lives is to be cut off; the dead may have to be named as well."""
        others = [p.id for p in self.members() if p is not peer and p.id in peer.state.nodes]
        if peer.attempt or peer not in self.members() or len(others) < 2:
            return
        dead = {p.id for p in self.peers if not p.is_up and p.id in peer.state.nodes}
        named = dead | {self.rng.choice(others)}
        force = peer.state.hybrid.next(self.now)
        attempt = peer.state.removing.begin(named, self.now, force)
        peer.attempt = (next(self.attempts), attempt)

    def enquire(self, peer: Peer) -> None:
        """As cluster/consent.py: `settle`; what is answered may be late, or lost."""
        for ask in peer.state.removing.open_ends():
            self.post(ask.remover, lambda ask=ask: self.enquired(peer, ask))  # type: ignore[misc]

    def enquired(self, asker: Peer, ask: Ask) -> None:
        if not self.by_id[ask.remover].state.removing.pursues(ask):
            self.post(asker.id, lambda: asker.state.removing.release(ask))

    def press_on(self, peer: Peer) -> None:
        if not peer.attempt or not peer.is_up:
            return
        number, attempt = peer.attempt
        if attempt.failed or self.now >= attempt.deadline:
            peer.state.removing.finish(attempt)
            peer.attempt = None
            for other in self.peers:
                self.post(other.id, lambda o=other: o.state.removing.release(attempt.ask))  # type: ignore[misc]
            return
        lost = {id for id in attempt.ask.lost if not peer.state.is_removed(id)}
        if peer.try_to_inherit():
            self.cut_off += any(map(self.lives, lost))
            for id in lost:
                self.heirs.setdefault(id, []).append(peer.id)
            return
        for voter in peer.state.removing.look(attempt):
            if self.rng.random() < 0.5:
                self.post(voter, lambda v=voter: self.asked(v, peer.id, number, attempt.ask))  # type: ignore[misc]

    def asked(self, voter: str, remover: str, number: int, ask: Ask) -> None:
        state = self.by_id[voter].state
        answer = state.removing.decide(ask, self.now)
        self.by_id[voter].held = {n: dict(by) for n, by in state.removing.held.items()}
        deltas = []
        if answer.verdict is Verdict.AGREED and self.rng.random() < 0.8:
            for origin in ask.lost:
                known = self.by_id[remover].state.version(origin)
                deltas.append(self.by_id[voter].delta(origin, known))
        self.post(remover, lambda: self.answered(remover, voter, number, answer, deltas))

    def answered(
        self, remover: str, voter: str, number: int, answer: Answer, deltas: list[Delta]
    ) -> None:
        peer = self.by_id[remover]
        for delta in deltas:
            peer.state.merge(delta)
        if peer.attempt and peer.attempt[0] == number:
            peer.state.removing.take(peer.attempt[1], voter, answer)

    # -- the oracle --

    def check(self) -> None:
        owned: dict[tuple[str, int], str] = {}
        for peer in self.members():
            for network, addresses in peer.state.addresses.items():
                addresses.ring.check()
                for start, end in addresses.ring.owned(peer.id, 4):
                    for number in range(start, end + 1):
                        other = owned.setdefault((network, number), peer.id)
                        assert other == peer.id, (
                            f"seed {self.seed}: {peer.id} and {other} both own "
                            f"{format_address(number.to_bytes(4))} of {network}"
                        )
        held = Counter(
            (e.network, address)
            for peer in self.members()
            for members in peer.state.members.values()
            for e in members.local.values()
            for address in e.addresses
        )
        twice = [format_address(a) for (_, a), count in held.items() if count > 1]
        assert not twice, f"seed {self.seed}: handed out twice: {twice}"
        # One that inherited and died before anybody heard of it is lost with all of it.
        living = {p.id for p in self.members()}
        alive = {id: [h for h in heirs if h in living] for id, heirs in self.heirs.items()}
        more = {id: heirs for id, heirs in alive.items() if len(heirs) > 1}
        assert not more, f"seed {self.seed}: inherited more than once: {more}"

    def settle(self) -> None:
        """All that live hear all that live, until nothing is new."""
        self.flying.clear()
        news = True
        while news:
            news = False
            for peer, other in itertools.permutations(self.up(), 2):
                for origin in peer.state.replica.origins():
                    known = other.state.version(origin)
                    heard = origin != other.id and other.state.is_heard(origin)
                    if heard and peer.state.version(origin) > known:
                        other.state.merge(peer.delta(origin, known))
                        news = True

    def finish(self) -> None:
        """Peace: everything is heard, whoever is lost is removed, and all see the same."""
        self.loss = 0.0
        for peer in set(self.up()) - set(self.members()):
            self.end(peer)  # it was cut off
        self.now += 2 * FROZEN_FOR
        for peer in self.up():
            self.press_on(peer)
        self.settle()
        for peer in self.up():
            for _ in self.peers:  # one attempt of each remover at a time
                self.enquire(peer)
                while self.flying:
                    self.flying.pop()[2]()
        self.settle()
        self.check()
        if self.forgetful:
            return  # what only the dead knew is lost
        first = self.up()[0]
        # Some that died are only known by what they were given; they can be named by their id.
        owners = {o for a in first.state.addresses.values() for o in a.owners()}
        known = owners | set(first.state.nodes)
        lost = {p.id for p in self.peers if not p.is_up and p.id in known}
        for first in self.up():  # one of them whom no other holds off for a dead remover
            if lost <= set(first.state.removals):
                break
            first.attempt = (next(self.attempts), first.state.removing.begin(lost, self.now))
            for _ in range(200):
                self.press_on(first)
                self.deliver(first)
                self.settle_later()
                if not first.attempt:
                    break
            assert not first.attempt, f"seed {self.seed}: nobody is in the way, and yet not done"
            self.settle()
        if not any(lost <= set(peer.state.removals) for peer in self.up()):
            # Each is held off by another for a remover that is dead: a person has to decide.
            assert all(peer.state.removing.held for peer in self.up()), f"seed {self.seed}: why?"
            return
        self.check()
        views = []
        for peer in self.up():
            state = peer.state
            views.append((
                sorted(state.nodes),
                sorted((n.id, n.name, n.vni) for n in state.catalogue.all()),
                {(id, m.node) for net in state.members for id, m in state.members[net].all.items()},
                {n: a.ring.segments() for n, a in state.addresses.items()},
            ))  # fmt: skip
            alive = {p.id for p in self.up()}
            owners = {s.owner for a in state.addresses.values() for s in a.ring.segments()}
            assert owners <= alive, f"seed {self.seed}: owned by the dead"
            for network in state.catalogue.all():
                writers = state.catalogue.writers(network.id)
                assert writers <= alive, f"seed {self.seed}: a record of the dead"
            unsettled = list(state.catalogue.unsettled())
            assert not unsettled, f"seed {self.seed}: {peer.id} sees unsettled {unsettled}"
        for view in views:
            for part, (mine, theirs) in enumerate(zip(views[0], view, strict=True)):
                assert mine == theirs, f"seed {self.seed}: views differ in part {part}"

    def settle_later(self) -> None:
        """Some of the traffic that goes on beside."""
        for peer in self.up():
            self.tell(peer)
