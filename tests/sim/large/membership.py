"""The driver of agent/core/membership.py on a simulated host, as cluster/ is on a real one.

Pings and their answers, and what is asked of helpers, are exchanges of their own; gossip goes
over streams. Every SYNC s neighbours compare digests, and send tables if these differ although
both have stood still since the last comparison: what gossip did not carry comes that way.
"""

from __future__ import annotations

import random
from typing import Any, Protocol

from agent.core.membership import (
    Ask,
    Membership,
    Outcome,
    Probe,
    Rumour,
    State,
    Transition,
    Tuning,
)
from tests.sim.large import host as hosts
from tests.sim.large.host import Host

SYNC = 2.0  # s between two comparisons with a neighbour


class Observer(Protocol):
    """Hears what each host comes to believe."""

    def transition(self, host: Host, transition: Transition) -> None: ...


def size_of(rumours: list[Rumour]) -> int:
    """Bytes on the wire: two ids of 16 digits, a varint, an enum, their tags and lengths."""
    return sum([45 if rumour.by else 27 for rumour in rumours])


class Member(hosts.Protocol):
    """One host's membership."""

    __slots__ = ("_compared", "_help", "_helping", "_wake", "core", "observer")

    def __init__(self, host: Host, tuning: Tuning, observer: Observer) -> None:
        super().__init__(host)
        world = host.world
        rng = random.Random(world.rng.getrandbits(64))
        self.core = Membership(host.id, 1, tuning, rng, world.now)
        self.observer = observer
        self._wake = float("inf")
        self._help = 0
        self._helping: dict[int, tuple[Host, int]] = {}  # our ping -> who asked, its probe
        self._compared: dict[str, tuple[int, int]] = {}  # neighbour -> its digest, ours then

    def start(self) -> None:
        world = self.host.world
        for id in world.hosts:
            self.core.add(id, world.now, 1)
        while self.core.piggyback():  # everybody knows us from our record already
            pass
        world.at(world.now + SYNC * world.rng.random(), self._sync)
        self._pump()

    # -- out --

    def _pump(self) -> None:
        """After every input: send what is to be sent, and see when to come back."""
        core, host = self.core, self.host
        world = host.world
        for action in core.actions():
            if isinstance(action, Probe):
                self._probe(action)
            else:
                self._ask(action)
        due = core.next_timer()
        if due <= world.now:
            peers, rumours = core.gossip(world.now, host.neighbours)
            size = size_of(rumours)
            message = (core.incarnation, rumours)
            for peer in peers:
                world.stream(host, world.hosts[peer], self.channel, message, size)
            due = core.next_timer()
        for transition in core.transitions():
            self.observer.transition(host, transition)
            if transition.before is State.DEAD and transition.node in host.neighbours:
                self._open(world.hosts[transition.node])
        if due < self._wake:
            self._wake = due
            late = world.noise * world.rng.random() if world.noise else 0.0
            world.at(due + late, self._timer, due)

    def _timer(self, due: float, _: None) -> None:
        if due == self._wake and self.host.runs:
            self._wake = float("inf")
            self.core.handle_timer(self.host.world.now)
            self._pump()

    def _probe(self, probe: Probe) -> None:
        host = self.host
        rumours = self.core.piggyback(probe.target)
        target = host.world.hosts[probe.target]
        ping = (self.core.incarnation, rumours, probe.seq, self.on_ack)
        host.world.exchange(
            host, target, _of(target).on_ping, ping, size_of(rumours), self.on_refused
        )

    def _ask(self, ask: Ask) -> None:
        host = self.host
        for id in ask.helpers:
            rumours = self.core.piggyback(id)
            helper = host.world.hosts[id]
            message = (self.core.incarnation, rumours, ask.seq, ask.target, ask.timeout)
            host.world.exchange(host, helper, _of(helper).on_ask, message, size_of(rumours), None)

    def _sync(self, _: None, __: None) -> None:
        host = self.host
        world = host.world
        world.at(world.now + SYNC, self._sync)
        if host.runs:
            for peer in host.neighbours:
                self.send(world.hosts[peer], (self.core.incarnation, self.core.digest()), 9)

    # -- in --

    def _heard(self, peer: Host, incarnation: int, rumours: list[Rumour]) -> None:
        now = self.host.world.now
        if rumours:
            self.core.receive(rumours, now)
        self.core.heard(peer.id, incarnation, now)

    def receive(self, peer: Host, message: Any) -> None:
        incarnation, content = message[:2]
        if isinstance(content, int):
            self._compare(peer, content)
            content = []
        elif len(message) == 3:
            self.core.receive(content, self.host.world.now, table=True)
            content = []
        self._heard(peer, incarnation, content)
        self._pump()

    def _open(self, peer: Host) -> None:
        """The stream to `peer`, closed as it was dead, is there again: tell everything."""
        table = self.core.table()
        self.send(peer, (self.core.incarnation, table, True), size_of(table))

    def _compare(self, peer: Host, theirs: int) -> None:
        ours = self.core.digest()
        if theirs != ours and self._compared.get(peer.id) == (theirs, ours):
            self._open(peer)
        self._compared[peer.id] = (theirs, ours)

    def on_ping(self, peer: Host, message: Any) -> None:
        """We are pinged, by a prober or a helper."""
        incarnation, rumours, seq, answer = message
        self._heard(peer, incarnation, rumours)
        back = self.core.piggyback(peer.id)
        ack = (self.core.incarnation, back, seq)
        self.host.world.exchange(self.host, peer, answer, ack, size_of(back), None)
        self._pump()

    def on_ack(self, peer: Host, message: Any) -> None:
        """Our probe was answered."""
        incarnation, rumours, seq = message
        self._heard(peer, incarnation, rumours)
        self.core.acked(seq, incarnation, self.host.world.now)
        self._pump()

    def on_refused(self, peer: Host, message: Any) -> None:
        """Our probe was refused."""
        if self.host.runs:
            self.core.refused(message[2], self.host.world.now)
            self._pump()

    # -- helping --

    def on_ask(self, peer: Host, message: Any) -> None:
        """`peer` asks us to ping `target` for up to `timeout` s."""
        incarnation, rumours, seq, target_id, timeout = message
        self._heard(peer, incarnation, rumours)
        host = self.host
        world = host.world
        self._help += 1
        self._helping[self._help] = (peer, seq)
        rumours = self.core.piggyback(target_id)
        target = world.hosts[target_id]
        ping = (self.core.incarnation, rumours, self._help, self.on_help_ack)
        world.exchange(
            host, target, _of(target).on_ping, ping, size_of(rumours), self.on_help_refused
        )
        world.at(world.now + timeout, self._help_over, self._help, Outcome.SILENT)
        self._pump()

    def on_help_ack(self, peer: Host, message: Any) -> None:
        incarnation, rumours, number = message
        self._heard(peer, incarnation, rumours)
        self._help_over(number, Outcome.ACK)
        self._pump()

    def on_help_refused(self, peer: Host, message: Any) -> None:
        self._help_over(message[2], Outcome.REFUSED)

    def _help_over(self, number: int, outcome: Outcome) -> None:
        asked = self._helping.pop(number, None)
        if asked is None or not self.host.runs:
            return
        peer, seq = asked
        rumours = self.core.piggyback(peer.id)
        message = (self.core.incarnation, rumours, seq, outcome)
        self.host.world.exchange(
            self.host, peer, _of(peer).on_answer, message, size_of(rumours), None
        )

    def on_answer(self, peer: Host, message: Any) -> None:
        """A helper tells how its ping went."""
        incarnation, rumours, seq, outcome = message
        self._heard(peer, incarnation, rumours)
        self.core.answered(seq, peer.id, outcome, self.host.world.now)
        self._pump()


def _of(host: Host) -> Member:
    """The membership of a host: always its first protocol."""
    member = host.protocols[0]
    assert isinstance(member, Member)
    return member
