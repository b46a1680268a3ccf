"""The paths from this node to all others: which to look at now, and what was found.

Each is looked at every `interval` s, or less often where nodes are many, so that all together
begin no more than PACE looks a second; a look at a path that is as it was costs one packet and a
small answer. A path that is new, or may have changed, is looked at as soon as its turn comes.
What stands opposite: pathmtu.py, one path; cluster/pathprober.py, which sends.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from math import inf
from typing import NamedTuple

from agent.core.bounds import UNDERLAY_MTU_MIN
from agent.core.pathmtu import Measure, Path, State
from agent.model import Node

PACE = 10.0  # looks begun a second, however many nodes there are
JITTER = (0.9, 1.1)  # of the interval, so that nodes do not keep step
NONCE_BITS = 64
UNDERLAY_MTU = 1500  # bytes; of a node that has not said
SIZE_MAX = 65535  # bytes of an IP packet


def expected(one: Node, other: Node) -> int:
    """The IP packets, in bytes, that the devices of both take, as they say."""
    most = min(one.mtu or UNDERLAY_MTU, other.mtu or UNDERLAY_MTU)
    return min(max(most, UNDERLAY_MTU_MIN), SIZE_MAX)


class Send(NamedTuple):
    """Send a packet of `size` bytes, IP header included, to a node."""

    node: str
    nonce: int
    size: int


class Found(NamedTuple):
    """A path is not what it was."""

    node: str
    before: Measure
    after: Measure


class Paths:
    """All paths of a node."""

    def __init__(self, interval: float, rng: random.Random, known: Mapping[str, int]) -> None:
        """`known`: what was found narrow in an earlier life, by node."""
        self._interval, self._rng, self._known = interval, rng, dict(known)
        self._paths: dict[str, Path] = {}
        self._begin: dict[str, float] = {}  # when the next look is due
        self._told: dict[str, Measure] = {}
        self._slot = -inf  # the next moment at which a look may begin

    def put(self, node: str, top: int, floor: int, now: float) -> bool:
        """A node to which packets of `top` bytes should get; whether that is new, so that
        `handle_timer` is due."""
        path = self._paths.get(node)
        if path is None:
            path = self._paths[node] = Path(top, floor, self._known.pop(node, 0))
            self._told[node] = path.measure
        elif not path.resize(top, floor):
            return False
        self._begin[node] = now
        return True

    def drop(self, node: str) -> None:
        """There is no path to that node any more."""
        for held in (self._paths, self._begin, self._told):
            held.pop(node, None)

    def nodes(self) -> set[str]:
        """To whom there are paths."""
        return set(self._paths)

    def hasten(self, nodes: Iterable[str], now: float) -> None:
        """Look at these as soon as may be: they may have changed."""
        for node in nodes:
            if node in self._begin:
                self._begin[node] = min(self._begin[node], now)

    def measure(self, node: str) -> Measure:
        """What is known of a path; unknown if there is none."""
        path = self._paths.get(node)
        return path.measure if path else Measure(State.UNKNOWN, 0, 0)

    def narrow(self) -> dict[str, int]:
        """What fits, by node, where it is less than should; and where an earlier life found so
        and it has not been looked at yet."""
        found = {node: path.mtu for node, path in self._paths.items() if path.is_narrow}
        return {**self._known, **found}

    def forget(self, nodes: Iterable[str]) -> None:
        """These are gone for good, also from what an earlier life found."""
        for node in nodes:
            self._known.pop(node, None)
            self.drop(node)

    def next_timer(self) -> float:
        """When `handle_timer` is due."""
        due = inf
        for node, path in self._paths.items():
            when = path.next_timer if path.is_looking else max(self._begin[node], self._slot)
            due = min(due, when)
        return due

    def handle_timer(self, now: float) -> list[Send]:
        """Go on; the packets that are to be sent now. Each counts as sent."""
        waiting = []
        for node, path in self._paths.items():
            if path.is_looking:
                path.handle_timer(now)
                self._note_end(node, path, now)
            elif self._begin[node] <= now:
                waiting.append((self._begin[node], node))
        for _, node in sorted(waiting):
            if now < self._slot:
                break
            self._slot = now + 1.0 / PACE
            self._begin[node] = inf
            self._paths[node].begin(now)
        sends = []
        for node, path in self._paths.items():
            for size in path.due(now):
                nonce = self._rng.getrandbits(NONCE_BITS)
                path.sent(nonce, size, now)
                sends.append(Send(node, nonce, size))
        return sends

    def answered(self, node: str, nonce: int, now: float) -> bool:
        """A packet came through; False if none such was sent."""
        path = self._paths.get(node)
        if path is None or not path.answered(nonce, now):
            return False
        self._note_end(node, path, now)
        return True

    def unsendable(self, node: str, now: float) -> None:
        """This host's own device does not take what was to be sent to a node."""
        if node in self._paths:
            self._paths[node].unsendable(now)

    def has_found(self) -> bool:
        """Whether `found` has something to give out."""
        return any(self._told[node] != path.measure for node, path in self._paths.items())

    def found(self) -> list[Found]:
        """The paths that are not what they were; each change is given out once."""
        out = []
        for node, path in self._paths.items():
            before, after = self._told[node], path.measure
            if before != after:
                self._told[node] = after
                out.append(Found(node, before, after))
        return out

    def _note_end(self, node: str, path: Path, now: float) -> None:
        if not path.is_looking and self._begin[node] == inf:
            every = max(self._interval, len(self._paths) / PACE)
            self._begin[node] = now + every * self._rng.uniform(*JITTER)
