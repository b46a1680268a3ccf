"""One end of a stream between two hosts: a TCP connection, and the session that speaks on it.

As agent/cluster/link.py, on the virtual clock. What is lost is sent again (world.py) and holds up
what follows; across a cut TCP tries again ever more seldom, and what waits comes when a try gets
through. Either end ends a stream on which nothing has come for SILENCE, and takes another one
from STALE on. What stands opposite: peers.py, which opens and accepts streams.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from agent.cluster.link import SILENCE, STALE, WATCH_INTERVAL
from agent.core.replica import Delta
from agent.core.session import Message, Session
from tests.sim.large.host import Host
from tests.sim.large.sizes import size_of
from tests.sim.large.world import OVERHEAD, RETRANSMISSION, SLOW

if TYPE_CHECKING:
    from tests.sim.large.peers import Peers

RECORDS = -1  # the channel of the session's own messages; others are those of host.protocols
NEVER = float("inf")


class Link:
    """Our end. `far` is the other one, from the arrival of the first message on."""

    __slots__ = (
        "_held",
        "_last",
        "_pause",
        "_peers",
        "_timer",
        "closed",
        "dialed",
        "far",
        "greeted",
        "session",
        "taken",
        "to",
    )

    def __init__(self, peers: Peers, to: Host, far: Link | None = None) -> None:
        world = peers.host.world
        rng = random.Random(world.rng.getrandbits(64))
        self.session = Session(peers.state, peers.hello, rng, world.now, peers.mesh)
        self.to = to
        self.far = far
        self.dialed = far is None
        self.greeted = False
        self.closed = False
        self.taken = 0.0  # when it was last heard, as membership knows
        self._peers = peers
        self._last = 0.0  # when the last message that was sent arrives
        self._timer = NEVER
        self._held: list[tuple[int, Any]] | None = None  # what waits for a way to be there
        self._pause = RETRANSMISSION
        self.flush()
        self._watch_at(world.now + STALE)

    @property
    def is_stale(self) -> bool:
        """Whether nothing has come for a while: another stream is wanted in its place."""
        return self._peers.host.world.now - self.session.heard > STALE

    @property
    def dialer(self) -> str:
        """The id of the host that opened the stream."""
        return self._peers.host.id if self.dialed else self.to.id

    # -- out --

    def flush(self) -> None:
        """Send what the session has to say, and see when to ask it again."""
        if self.closed:
            return
        session, world = self.session, self._peers.host.world
        for message in session.to_send(world.now):
            self.send(RECORDS, message, size_of(message))
        due = session.next_timer()
        if due < self._timer:
            self._timer = due
            late = world.noise * world.rng.random() if world.noise else 0.0
            world.at(due + late, self._tick, due)

    def _tick(self, due: float, _: None) -> None:
        if due == self._timer and self._peers.host.runs:
            self._timer = NEVER
            self.flush()

    def send(self, channel: int, message: Any, size: int) -> None:
        """A message of `size` bytes: handled after all that were sent before it."""
        host = self._peers.host
        world = host.world
        host.messages += 1
        host.bytes += OVERHEAD + size
        arrival = world.now + world.transit()
        if self.to.slow:
            arrival += world.rng.uniform(*SLOW)
        self._last = arrival = max(arrival, self._last)
        world.at(arrival, self._arrive, channel, message)

    def _way(self) -> bool:
        """Whether packets get to the other host now."""
        return self.to.up and self.to.side == self._peers.host.side

    def _arrive(self, channel: int, message: Any) -> None:
        if self._held is not None:
            self._held.append((channel, message))
        elif self._way():
            self._hand_over(channel, message)
        else:
            self._held = [(channel, message)]
            self._pause = RETRANSMISSION
            self._wait()

    def _wait(self) -> None:
        world = self._peers.host.world
        world.at(world.now + self._pause, self._again)

    def _again(self, _: None, __: None) -> None:
        """TCP's timer."""
        if self.closed or self._held is None:
            return
        if not self._way():
            self._pause *= 2
            self._wait()
            return
        held, self._held = self._held, None
        for channel, message in held:
            self._hand_over(channel, message)

    def _hand_over(self, channel: int, message: Any) -> None:
        if self.far is None and not self.closed:
            self.far = self._peers.accepted_by(self)
        if self.far is not None:
            self.far.take(channel, message)
        else:
            self.close()  # nobody listens

    # -- in --

    def take(self, channel: int, message: Any) -> None:
        """A message has come."""
        peers = self._peers
        if self.closed or not peers.host.runs:
            return
        if channel == RECORDS:
            self._take(message)
        else:
            self.session.heard = peers.host.world.now
            if peers.links.get(self.to.id) is self:  # one that was given up has told it too
                peers.host.protocols[channel].receive(self.to, message)

    def _take(self, message: Message) -> None:
        peers = self._peers
        self.session.receive(message, peers.host.world.now)
        if not self.greeted:
            self.greeted = True
            if not peers.greeted(self):
                self.close()
                return
        self.flush()
        if isinstance(message, Delta):
            peers.pass_on()

    # -- the end --

    def _watch_at(self, when: float) -> None:
        world = self._peers.host.world
        world.at(when + WATCH_INTERVAL * world.rng.random(), self._watch)

    def _watch(self, _: None, __: None) -> None:
        if self.closed or not self._peers.host.runs:
            return
        silent = self._peers.host.world.now - self.session.heard
        if silent > SILENCE:
            self.close()
        elif silent > STALE:
            self._peers.went_stale(self)
            self._watch_at(self.session.heard + SILENCE)
        else:
            self._watch_at(self.session.heard + STALE)

    def close(self) -> None:
        """End it; the other host hears of that if there is a way to it."""
        if self.closed:
            return
        self.closed = True
        self._peers.lost(self)
        if self.far is not None:
            world = self._peers.host.world
            world.at(world.now + world.transit(), self._reset)

    def _reset(self, _: None, __: None) -> None:
        if self.far is not None and self._way() and self.to.agent:
            self.far.close()
