"""The nodes of a simulation, their streams, and what must hold at every step and at the end."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from agent.allocator import with_space
from agent.core.addresses import Range
from agent.core.plumtree import Mesh
from agent.core.seals import Unproven
from agent.core.session import Hello, Message, Session
from agent.core.topology import EVERYBODY, Topology
from agent.errors import Unavailable
from agent.model import Endpoint, Network, Node
from agent.node import NodeState
from agent.notation import format_address
from agent.views import Change
from tests.sim.keys import sealer_of
from tests.sim.network import Clock, Weather, Wire

T = TypeVar("T")
REDIAL = 0.1  # s; after a stream that was ended


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """Drive a coroutine that never really waits: the simulation's requests answer at once."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("the coroutine waited")


class SimNode:
    """A node, its sessions, and its way to ask others for addresses."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.cluster = cluster
        self.id = f"{index + 1:016x}"
        address = f"10.99.0.{index + 1}"
        node = Node(self.id, f"n{index + 1}", address, 7946, address, 4789, "sim", 0.0, 1500)
        rng = random.Random(cluster.rng.random())
        self.state = NodeState(node, lambda: cluster.clock.now, rng)
        self.state.replica.sealer = sealer_of(self.id, self.state.nodes.__contains__)
        self.state.collect_after = 1.0  # so that a run of seconds sees it happen often
        self.sessions: dict[str, Session] = {}
        self.mesh = Mesh(self.id, lambda: cluster.is_bounded, lambda: cluster.nodes)
        self.timers: dict[str, float] = {}  # peer -> when to look again
        self.state.listeners.append(self._changed)
        self.state.describe(node)

    def _changed(self, change: Change) -> None:
        if change.floor:
            self.cluster.check_collected(self.id, change.floor)
        self.state.replica.publish(self.state.replica.written())
        self.state.kernel_has(self.state.versions())
        self.cluster.clock.after(0.0, self.flush_all)

    def flush_all(self) -> None:
        for peer in list(self.sessions):
            self.flush(peer)

    def connect(self, peer: str) -> None:
        """Open our end of a new stream to `peer`, in place of one that there was."""
        hello = Hello(self.id, "boot", "sim", self.id)
        rng = random.Random(self.cluster.rng.random())
        session = Session(self.state, hello, rng, self.cluster.clock.now, self.mesh)
        session.peer = Hello(peer, "boot", "sim", peer)
        self.sessions[peer] = session
        self.mesh.up(session)
        self.flush(peer)

    def flush(self, peer: str) -> None:
        session = self.sessions.get(peer)
        if session is None:
            return
        clock = self.cluster.clock
        for message in session.to_send(clock.now):
            self.cluster.send(self.id, peer, session, message)
        due = session.next_timer()
        if due < self.timers.get(peer, float("inf")):
            self.timers[peer] = due
            clock.at(due, lambda: self._timer(peer, due))

    def _timer(self, peer: str, due: float) -> None:
        if self.timers.get(peer) == due:
            del self.timers[peer]
            self.flush(peer)

    def receive(self, peer: str, session: Session, message: Message) -> None:
        if self.sessions.get(peer) is session:
            try:
                session.receive(message, self.cluster.clock.now)
            except Unproven as error:
                self._refuse(peer, error)
                return
            self.flush(peer)
            self.flush_pending()

    def _refuse(self, peer: str, error: Unproven) -> None:
        """As cluster/link.py: the stream is over; it is dialled again."""
        assert peer in self.cluster.hostile, f"seed {self.cluster.seed}: {peer} is honest: {error}"
        self.mesh.down(self.sessions.pop(peer))
        self.cluster.clock.after(REDIAL, lambda: self.cluster.redial(self.id, peer))

    def flush_pending(self) -> None:
        """What came on one stream may have to go on by others, or be asked of its origin."""
        for origin in sorted(self.state.replica.doubted):
            self.cluster.redial(self.id, origin)
        for peer, session in list(self.sessions.items()):
            if session.pending:
                self.flush(peer)

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        """As cluster/ does it: the request, the donation and the answer can each be lost."""
        donor = self.cluster.nodes[owner]
        wire = self.cluster.wire
        if not wire.passes(self.id, owner):
            raise Unavailable(owner, "does not answer")
        known = self.state.version(owner)
        refused = donor.state.donate(network.id, self.id, family, ranges)
        if not wire.passes(owner, self.id):
            raise Unavailable(owner, "does not answer")
        if not refused:
            self.state.merge(donor.state.delta(owner, known), owner)
            self.mesh.spread(owner, None, self.cluster.clock.now)
            self.flush_pending()
        return refused

    def allocate(self, action: Callable[[], T]) -> T:
        """Run an allocating call with the owners' help."""
        return run_now(with_space(self.state, self, action))


class Cluster:
    """`count` nodes, every pair with a stream; above `everybody` those that topology.py says."""

    node_type = SimNode

    def __init__(self, seed: int, count: int, weather: Weather, everybody: int = EVERYBODY) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.wire = Wire(self.clock, self.rng, weather)
        self.nodes: dict[str, SimNode] = {}
        # Nodes that may be refused, and what becomes of what they send: sender, message.
        self.hostile: set[str] = set()
        self.tamper: Callable[[str, Message], Message | None] = lambda sender, message: message
        self.is_bounded = count > everybody
        for index in range(count):
            node = self.node_type(self, index)
            self.nodes[node.id] = node
        topology = Topology(self.nodes, everybody)
        for a in self.nodes.values():
            for b in self.nodes.values():
                if topology.opens(a.id, b.id) or topology.opens(b.id, a.id):
                    a.connect(b.id)

    def send(self, a: str, b: str, session: Session, message: Message) -> None:
        sender, receiver = self.nodes[a], self.nodes[b]
        if a in self.hostile:
            tampered = self.tamper(a, message)
            if tampered is None:
                return
            message = tampered

        def deliver() -> None:
            # A stream that was replaced takes what was on it along.
            if sender.sessions.get(b) is session and a in receiver.sessions:
                receiver.receive(a, receiver.sessions[a], message)

        self.wire.carry(a, b, deliver)

    def reconnect(self, a: str, b: str) -> None:
        if b in self.nodes[a].sessions:
            self.open(a, b)

    def redial(self, a: str, b: str) -> None:
        """A stream between two nodes that have none, or of which one has ended it."""
        if b not in self.nodes[a].sessions:
            self.open(a, b)

    def open(self, a: str, b: str) -> None:
        self.nodes[a].connect(b)
        self.nodes[b].connect(a)

    def partition(self, group: set[str], one_way: bool) -> None:
        """Cut `group` off from the rest."""
        for a in group:
            for b in set(self.nodes) - group:
                self.wire.cut.add((a, b))
                if not one_way:
                    self.wire.cut.add((b, a))

    def heal(self) -> None:
        """Mend every cut; streams over it are new ones as often as not."""
        pairs = {(min(a, b), max(a, b)) for a, b in self.wire.cut}
        self.wire.cut.clear()
        for a, b in sorted(pairs):
            if self.rng.random() < 0.5:
                self.reconnect(a, b)

    # -- what must hold --

    def living(self) -> list[tuple[str, Endpoint]]:
        """Every endpoint as its own node has it: the truth that all must come to."""
        return [
            (node.id, endpoint)
            for node in self.nodes.values()
            for members in node.state.members.values()
            for endpoint in members.local.values()
        ]

    def check_always(self) -> None:
        """At every step: no address twice, every ring whole, nobody owns what another does."""
        held = Counter((e.network, a) for _, e in self.living() for a in e.addresses)
        known = {s.id: s for node in self.nodes.values() for s in node.state.services.all()}
        held.update((s.network, vip) for s in known.values() for vip in s.vips)
        twice = [f"{format_address(a)} in {n}" for (n, a), count in held.items() if count > 1]
        assert not twice, f"seed {self.seed}: addresses handed out twice: {twice}"
        owned: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for node in self.nodes.values():
            for network, addresses in node.state.addresses.items():
                addresses.ring.check()
                for start, end in addresses.ring.owned(node.id, 4):
                    owned.setdefault((network, 4), []).append((start, end, node.id))
        for key, ranges in owned.items():
            ranges.sort()
            for (_, end, a), (start, _, b) in itertools.pairwise(ranges):
                assert start > end, f"seed {self.seed}: {a} and {b} both own {start} of {key}"

    def check_collected(self, origin: str, floor: int) -> None:
        """When tombstones go: every node has them. (Here none ever loses what it had.)"""
        for node in self.nodes.values():
            have = node.state.replica.version(origin)
            assert have >= floor, f"seed {self.seed}: {node.id} has {have} of {origin}, not {floor}"

    def check_equal(self) -> None:
        """At the end: every node has the same records and sees the same of everything."""
        seen = {}
        for node in self.nodes.values():
            state = node.state
            seen[node.id] = (
                {o: state.replica.version(o) for o in sorted(self.nodes)},
                {o: state.replica.items(o) for o in sorted(self.nodes)},
                {n.id: state.catalogue.name(n.id) for n in state.catalogue.all()},
                {(id, m.node) for net in state.members for id, m in state.members[net].all.items()},
                {n: a.ring.segments() for n, a in state.addresses.items()},
                {s.id: (s, state.backends_of(s, 0.0)) for s in state.services.all()},
            )
        first = next(iter(seen.values()))
        for id, view in seen.items():
            for part, (mine, theirs) in enumerate(zip(first, view, strict=True)):
                assert mine == theirs, f"seed {self.seed}: {id} differs in part {part}"
        truth = {(e.id, node) for node, e in self.living()}
        assert truth == first[3], f"seed {self.seed}: endpoints are not those that live"
