"""The streams of a simulated host, kept up as agent/cluster/peers.py keeps those of a real one.

Whom a host wants streams to follows from core/topology.py and its own membership's live view, so
a rumour that kills a node moves the streams. Who dials when, which of two streams stays and when
one is given up are the agent's rules and times; a dial is a handshake that loss can spoil.
What stands opposite: links.py, and this room on another host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agent.cluster.peers import (
    CONNECT_WITHIN,
    GRACE,
    HEAD_START,
    KEEP_UNWANTED,
    PAUSE,
    SETTLE,
    TIDY_INTERVAL,
)
from agent.cluster.reach import AT_FULL_PACE, PROBE_EVERY
from agent.core.membership import Rumour
from agent.core.plumtree import Mesh
from agent.core.session import Hello
from agent.core.topology import EVERYBODY, Topology
from tests.sim.large import host as hosts
from tests.sim.large.host import Host
from tests.sim.large.links import Link
from tests.sim.large.membership import Member, size_of
from tests.sim.large.nodes import State
from tests.sim.large.world import OVERHEAD, World


class LinkedHost(Host):
    """A host whose protocols speak over the streams that its Peers keep."""

    __slots__ = ("peers",)

    peers: Peers

    def __init__(self, world: World, id: str) -> None:
        super().__init__(world, id)
        self.peers = None  # type: ignore[assignment]  # Peers puts itself here

    def send(self, peer: Host, channel: int, message: Any, size: int) -> None:
        link = self.peers.links.get(peer.id)
        if link is not None:
            link.send(channel, message, size)


class LinkedMember(Member):
    """Membership as the agent drives it: a stream that opens tells the whole table, one that
    ends has its peer probed, and whatever comes on one is a sign of life."""

    __slots__ = ("_table", "_told")

    host: LinkedHost

    def start(self) -> None:
        self._told: dict[str, int] = {}  # node -> the incarnation that it gave itself
        self._table: tuple[int, list[Rumour]] = (0, [])
        super().start()

    def stream_changed(self, peer: str) -> None:
        """A stream to `peer` has come up or gone."""
        if peer in self.host.peers.links:
            self._open(self.host.world.hosts[peer])
        else:
            self.core.hasten(peer, self.host.world.now)
        self._pump()

    def _open(self, peer: Host) -> None:
        digest = self.core.digest()
        if self._table[0] != digest:
            self._table = (digest, self.core.table())  # one for all streams, until it changes
        table = self._table[1]
        self.send(peer, (self.core.incarnation, table, True), size_of(table))

    def _sync(self, _: None, __: None) -> None:
        """The agent compares no tables from time to time."""

    def _heard(self, peer: Host, incarnation: int, rumours: list[Rumour]) -> None:
        self._told[peer.id] = incarnation
        super()._heard(peer, incarnation, rumours)

    def _timer(self, due: float, _: None) -> None:
        if due == self._wake and self.host.runs:
            for id, link in self.host.peers.links.items():
                heard = link.session.heard
                if heard > link.taken and id in self._told:
                    link.taken = heard
                    self.core.heard(id, self._told[id], heard)
        super()._timer(due, None)


class SharedTopology(Topology):
    """A topology that many hosts look at: each node's neighbours are found once."""

    def __init__(self, nodes: Iterable[str], everybody: int) -> None:
        super().__init__(nodes, everybody)
        self._found: dict[str, set[str]] = {}

    def neighbours(self, node: str) -> set[str]:
        found = self._found.get(node)
        if found is None:
            found = self._found[node] = super().neighbours(node)
        return found


class Topologies:
    """The topology of each set of nodes that somebody believes to live. It is a function of that
    set alone, so hosts that believe the same share it."""

    def __init__(self, everybody: int = EVERYBODY) -> None:
        self._everybody = everybody
        self._known: dict[frozenset[str], SharedTopology] = {}

    def of(self, nodes: Iterable[str]) -> SharedTopology:
        """The topology of these."""
        key = frozenset(nodes)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = SharedTopology(key, self._everybody)
        return found


class _Keeper:
    """The wish for a stream to a host. `link`: it is content as long as that one stands."""

    __slots__ = ("id", "link")

    def __init__(self, id: str) -> None:
        self.id = id
        self.link: Link | None = None


class Peers(hosts.Protocol):
    """All streams of one host. Its sessions speak for `state`."""

    def __init__(
        self, host: LinkedHost, state: State, member: LinkedMember, topologies: Topologies
    ) -> None:
        super().__init__(host)
        host.peers = self
        self.state = state
        self.member = member
        self.hello = Hello(host.id, "boot", "sim", host.id)
        self.links: dict[str, Link] = {}
        self.mesh = Mesh(host.id, lambda: self._topology.is_bounded, self._others)
        self._topologies = topologies
        self._live: list[str] | None = None  # the others, as long as nothing has changed
        self._everyone = topologies.of(host.world.hosts)
        self._topology = self._everyone
        self._wanted: set[str] = set()
        self._keepers: dict[str, _Keeper] = {}
        self._unwanted: dict[str, float] = {}
        self._waiting = 0  # hosts that are being tried
        self._looking = False

    def start(self) -> None:
        world = self.host.world
        self._everyone = self._topologies.of(world.hosts)
        self.state.written = lambda: world.at(world.now, self._wake)
        world.at(world.now + PROBE_EVERY[0] * world.rng.random(), self._look)
        world.at(world.now + TIDY_INTERVAL * world.rng.random(), self._tidy)

    def receive(self, peer: Host, message: Any) -> None:
        raise AssertionError("sessions have a channel of their own")

    # -- what sessions and membership say --

    def _wake(self, _: None, __: None) -> None:
        """Records were published: let sessions look."""
        for link in list(self.links.values()):
            link.flush()

    def pass_on(self) -> None:
        """What came on one stream may have to go on by others, or be asked of its origin."""
        if not self.state.replica.doubted <= self._wanted:
            self.membership_changed()
        for link in list(self.links.values()):
            if link.session.pending:
                link.flush()

    def _others(self) -> list[str]:
        if self._live is None:
            self._live = [id for id in self.member.core.live() if id != self.host.id]
        return self._live

    def membership_changed(self) -> None:
        """Look anew whom to hold streams to."""
        self._live = None
        if not self._looking:
            self._looking = True
            world = self.host.world
            settle = SETTLE if self._everyone.is_bounded else 0.0
            world.at(world.now + settle, self._look)

    # -- who is wanted --

    def _look(self, _: None, __: None) -> None:
        self._looking = False
        me = self.host.id
        self._topology = self._topologies.of([me, *self._others()])
        self._wanted = self._topology.neighbours(me) | self._everyone.neighbours(me)
        self._wanted |= self.state.replica.doubted
        for id in [id for id in self._keepers if id not in self._wanted and id not in self.links]:
            del self._keepers[id]
        for id in sorted(self._wanted - self._keepers.keys()):
            keeper = self._keepers[id] = _Keeper(id)
            self._step_after(GRACE if self._leaves_it_to(id) else 0.0, keeper)

    def _leaves_it_to(self, id: str) -> bool:
        return id < self.host.id and self._topology.opens(id, self.host.id)

    def _is_wanted(self, id: str) -> bool:
        me = self.host.id
        return id in self.state.replica.doubted or any(
            topology.opens(me, id) or topology.opens(id, me)
            for topology in (self._topology, self._everyone)
        )

    def _tidy(self, _: None, __: None) -> None:
        if not self.host.runs:
            return
        world = self.host.world
        world.at(world.now + TIDY_INTERVAL, self._tidy)
        unwanted = [id for id in self.links if not self._is_wanted(id)]
        self._unwanted = {id: self._unwanted.get(id, world.now) for id in unwanted}
        for id, since in self._unwanted.items():
            if self.links[id].dialed and world.now - since >= KEEP_UNWANTED:
                self.links[id].close()

    # -- dialling --

    def _step_after(self, seconds: float, keeper: _Keeper) -> None:
        world = self.host.world
        world.at(world.now + seconds, self._step, keeper)

    def _is_over(self, keeper: _Keeper) -> bool:
        if not self.host.runs or self._keepers.get(keeper.id) is not keeper:
            return True
        if keeper.id not in self._wanted:
            del self._keepers[keeper.id]
            return True
        return False

    def _step(self, keeper: _Keeper, _: None) -> None:
        """Be content with the stream that there is, or try for another."""
        if self._is_over(keeper):
            return
        link = self.links.get(keeper.id)
        if link is not None and not link.is_stale:
            keeper.link = link
            return
        self._waiting += 1
        self._probe(keeper, None)

    def _probe(self, keeper: _Keeper, _: None) -> None:
        """See whether its port answers: a connection, closed at once."""
        if self._is_over(keeper):
            self._waiting -= 1
            return
        world = self.host.world
        if self._connects(keeper.id):
            world.at(world.now + self._round_trip(), self._answered, keeper)
        else:
            pace = world.rng.uniform(*PROBE_EVERY) * max(1.0, self._waiting / AT_FULL_PACE)
            world.at(world.now + pace, self._probe, keeper)

    def _answered(self, keeper: _Keeper, _: None) -> None:
        self._waiting -= 1
        world = self.host.world
        pause = HEAD_START if self._leaves_it_to(keeper.id) else 0.0
        world.at(world.now + pause, self._connect, keeper)

    def _connect(self, keeper: _Keeper, _: None) -> None:
        if self._is_over(keeper):
            return
        world = self.host.world
        link = self.links.get(keeper.id)
        if link is not None and not link.is_stale:
            self._step_after(0.0, keeper)
        elif self._connects(keeper.id):
            world.at(world.now + 2 * self._round_trip(), self._open, keeper)
        else:
            self._step_after(CONNECT_WITHIN + PAUSE, keeper)

    def _open(self, keeper: _Keeper, _: None) -> None:
        if not self._is_over(keeper):
            keeper.link = Link(self, self.host.world.hosts[keeper.id])

    def _connects(self, id: str) -> bool:
        """Try a handshake. One lost packet of it costs TCP 1 s, which nobody waits for."""
        host = self.host
        world = host.world
        host.messages += 1
        host.bytes += OVERHEAD
        target = world.hosts[id]
        lost = world.rng.random() < world.loss or world.rng.random() < world.loss
        return target.runs and target.side == host.side and not lost

    def _round_trip(self) -> float:
        return self.host.world.latency() + self.host.world.latency()

    def accepted_by(self, link: Link) -> Link | None:
        """The other end of a stream of ours, made as its first message comes there."""
        to = link.to
        assert isinstance(to, LinkedHost)
        return Link(to.peers, self.host, link) if to.runs else None

    # -- which stream stays --

    def greeted(self, link: Link) -> bool:
        """Its peer has said who it is; whether to go on with it."""
        id = link.to.id
        old = self.links.get(id)
        if old is not None and not self._replaces(old, link):
            return False
        self.links[id] = link
        self.mesh.up(link.session)
        self.host.neighbours = list(self.links)
        if old is not None:
            old.close()
        self.member.stream_changed(id)
        return True

    def _replaces(self, old: Link, new: Link) -> bool:
        if old.is_stale or old.closed or old.dialer == new.dialer:
            return True
        return new.dialer == min(self.host.id, new.to.id)

    def went_stale(self, link: Link) -> None:
        """Nothing has come on it for a while."""
        keeper = self._keepers.get(link.to.id)
        if keeper is not None and keeper.link is link and not link.dialed:
            keeper.link = None
            self._step_after(0.0, keeper)

    def lost(self, link: Link) -> None:
        """It has ended."""
        id = link.to.id
        if self.links.get(id) is link:
            del self.links[id]
            self.mesh.down(link.session)
            self.host.neighbours = list(self.links)
            if self.host.runs:
                self.member.stream_changed(id)
        keeper = self._keepers.get(id)
        if keeper is not None and keeper.link is link:
            keeper.link = None
            leave = GRACE if self._leaves_it_to(id) else 0.0
            self._step_after(PAUSE if link.dialed else leave, keeper)

    def stop(self) -> None:
        """The agent has died: the kernel closes its streams."""
        for link in list(self.links.values()):
            link.close()
