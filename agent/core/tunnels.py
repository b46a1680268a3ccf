"""In what state frames arrive that go through VXLAN: whole, with wrong checksums, or not at all.

A NIC that says it can compute the checksums of packets inside VXLAN, and does it wrongly, lets
pings through and stops TCP. So frames of both kinds are sent: with their checksum, and with the
NIC asked for it. The other end reports each that came, and whether its checksum was right. One of
the second kind that came right shows that all is well, and that is all a look costs then.
What stands opposite: cluster/tunnelprober.py, which sends and hears; pathmtu.py asks how large.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from enum import Enum
from math import inf
from typing import NamedTuple

ROUNDS = 10  # of a frame of each kind; all of one kind lost by chance, and none of the other: never
PLAIN_MIN = 8  # of them that have to come right for the others to be the NIC's doing
GAP = 0.15  # s between two rounds
LAST = 1.0  # s for the reports of the last one
PROOF = 4.0  # s for an answer outside of VXLAN, where nothing came through it
PACE = 5.0  # looks begun a second
JITTER = (0.9, 1.1)
NONCE_BITS = 64


class Tunnel(Enum):
    """What is known of the way to a node through VXLAN."""

    UNKNOWN = "unknown"  # not tried yet, or it cannot be said
    SOUND = "sound"
    CHECKSUMS = "checksums"  # what the NIC is to compute arrives wrong, or not at all
    BLOCKED = "blocked"  # nothing arrives, though the agents reach each other


class Frame(NamedTuple):
    """Send one to a node."""

    node: str
    nonce: int
    offloaded: bool


class Turn(NamedTuple):
    """The way to a node is not what it was."""

    node: str
    before: Tunnel
    after: Tunnel


class _Look:
    """One look at one node."""

    def __init__(self) -> None:
        self.rounds = 0
        self.due = -inf
        self.sent: dict[int, bool] = {}  # nonce -> offloaded
        self.plain = 0  # that came right
        self.any = False  # one came, right or wrong
        self.waits = False  # for an answer outside of VXLAN


class Tunnels:
    """The ways to all nodes that take frames. Each is looked at every `interval` s. Times in s on
    the caller's clock."""

    def __init__(self, interval: float, rng: random.Random) -> None:
        self._interval, self._rng = interval, rng
        self._states: dict[str, Tunnel] = {}
        self._begin: dict[str, float] = {}
        self._looks: dict[str, _Look] = {}
        self._turns: list[Turn] = []
        self._slot = -inf

    def put(self, node: str, now: float) -> bool:
        """A node that takes frames; whether that is new, so that `handle_timer` is due."""
        if node in self._states:
            return False
        self._states[node], self._begin[node] = Tunnel.UNKNOWN, now
        return True

    def drop(self, node: str) -> None:
        """It does not any more, or is gone."""
        for held in (self._states, self._begin, self._looks):
            held.pop(node, None)

    def nodes(self) -> set[str]:
        """Those that take frames."""
        return set(self._states)

    def state(self, node: str) -> Tunnel:
        """What is known of a way."""
        return self._states.get(node, Tunnel.UNKNOWN)

    def hasten(self, nodes: Iterable[str], now: float) -> None:
        """Look at these as soon as may be."""
        for node in nodes:
            if node in self._begin:
                self._begin[node] = min(self._begin[node], now)

    def next_timer(self) -> float:
        """When `handle_timer` is due."""
        due = min((look.due for look in self._looks.values()), default=inf)
        waiting = (at for node, at in self._begin.items() if node not in self._looks)
        return min(due, max(min(waiting, default=inf), self._slot))

    def handle_timer(self, now: float) -> tuple[list[Frame], list[str]]:
        """Frames to send now, and nodes of which is to be seen at once whether they answer."""
        for node in sorted(self._begin, key=self._begin.__getitem__):
            if node not in self._looks and self._begin[node] <= now and self._slot <= now:
                self._slot = now + 1.0 / PACE
                self._begin[node] = inf
                self._looks[node] = _Look()
        frames, asked = [], []
        for node, look in list(self._looks.items()):
            if look.due > now:
                continue
            if look.waits:
                self._end(node, None, now)  # it has gone: that says nothing
            elif look.rounds < ROUNDS:
                kinds = (True, False) if look.rounds else (True,)
                look.rounds += 1
                look.due = now + (LAST if look.rounds == ROUNDS else GAP)
                for offloaded in kinds:
                    # The last bit tells the kind, to who looks at the wire.
                    nonce = self._rng.getrandbits(NONCE_BITS - 1) << 1 | offloaded
                    look.sent[nonce] = offloaded
                    frames.append(Frame(node, nonce, offloaded))
            elif look.plain >= PLAIN_MIN:
                self._end(node, Tunnel.CHECKSUMS, now)
            elif not look.any:
                look.waits, look.due = True, now + PROOF
                asked.append(node)
            else:
                self._end(node, None, now)
        return frames, asked

    def reported(self, node: str, nonce: int, is_right: bool, now: float) -> bool:
        """A frame came there, with a checksum that is right or wrong; whether that ends a look."""
        look = self._looks.get(node)
        offloaded = look.sent.pop(nonce, None) if look else None
        if look is None or offloaded is None:
            return False
        look.any = True
        if offloaded and is_right:
            self._end(node, Tunnel.SOUND, now)
            return True
        look.plain += is_right
        return False

    def answered(self, node: str, now: float) -> bool:
        """A node has answered outside of VXLAN; whether that ends a look."""
        look = self._looks.get(node)
        if look is None or not look.waits:
            return False
        self._end(node, Tunnel.BLOCKED, now)
        return True

    def turns(self) -> list[Turn]:
        """The ways that are not what they were; each change is given out once."""
        out, self._turns = self._turns, []
        return out

    def _end(self, node: str, found: Tunnel | None, now: float) -> None:
        """A look is over; None: it showed nothing."""
        del self._looks[node]
        every = max(self._interval, len(self._states) / PACE)
        self._begin[node] = min(self._begin[node], now + every * self._rng.uniform(*JITTER))
        before = self._states[node]
        if found is not None and found is not before:
            self._states[node] = found
            self._turns.append(Turn(node, before, found))
