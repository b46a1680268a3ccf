"""Whom to probe next, and the probes that are under way.

SWIM probes in turn over a list in random order (Das, Gupta, Motivala 2002, 4.3), so that each
member is probed once a round. The paper shuffles anew after each round, which lets two probes of
one member lie nearly two rounds apart; here the order stays and only new members come in at
random places, so the longest gap is one round. What stands opposite: core/membership.py draws
the conclusions, cluster/ sends the pings.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum
from math import inf
from typing import NamedTuple

from agent.core.suspicion import Health
from agent.core.tuning import Tuning

REPORT = 0.9  # of a window: when who pings gives up, so that its report is in before the end


class Outcome(Enum):
    """How a probe ended."""

    ACK = "ack"
    REFUSED = "refused"  # the host answers, the agent does not
    SILENT = "silent"  # of a helper: the nack


class Probe(NamedTuple):
    """Ping `target`, and report what came within `timeout` s: `acked` or `refused`, or nothing.

    Helpers are asked before that time is up; an answer until then still counts. A host that took
    the connection is reported at once by `host_answers`, whatever comes of it. One `seq` may
    be pinged twice.
    """

    seq: int
    target: str
    timeout: float


class Ask(NamedTuple):
    """Have `helpers` ping `target` for up to `timeout` s each and report with `answered`.

    A helper that hears nothing answers SILENT when `timeout` s are over: that shows that the
    helper and the way to it are in order.
    """

    seq: int
    target: str
    helpers: tuple[str, ...]
    timeout: float


class Pending:
    """A probe under way. Times in s on the core's clock."""

    __slots__ = (
        "again",
        "asked",
        "begin",
        "deadline",
        "due",
        "incarnation",
        "node",
        "seq",
        "silent",
    )

    def __init__(
        self, seq: int, node: str, incarnation: int, begin: float, due: float, deadline: float
    ) -> None:
        self.seq = seq
        self.node = node
        self.incarnation = incarnation  # as it was known when the probe began
        self.begin = begin
        self.due = due  # when to look at it: first to ask helpers, then the deadline
        self.deadline = deadline
        self.asked: tuple[str, ...] = ()
        self.silent: set[str] = set()  # helpers that answered, but had no answer themselves
        self.again = False  # it has been given a second window

    def alone(self) -> bool:
        """Helpers were asked, and not one of them answered."""
        return bool(self.asked) and not self.silent


class Rotation:
    """Nodes in a random order, taken in turn."""

    __slots__ = ("_next", "_nodes", "_rng")

    def __init__(self, rng: random.Random) -> None:
        self._nodes: list[str] = []
        self._next = 0
        self._rng = rng

    def insert(self, node: str) -> None:
        """A new one, at a random place: in this round or in the next."""
        place = self._rng.randint(0, len(self._nodes))
        self._nodes.insert(place, node)
        if place < self._next:
            self._next += 1

    def remove(self, node: str) -> None:
        """One that is not to be probed any more."""
        place = self._nodes.index(node)
        del self._nodes[place]
        if place < self._next:
            self._next -= 1

    def next(self) -> str | None:
        """The next in turn; None if there is none."""
        if not self._nodes:
            return None
        if self._next >= len(self._nodes):
            self._next = 0
        self._next += 1
        return self._nodes[self._next - 1]

    def sample(self, count: int, wanted: Callable[[str], bool]) -> list[str]:
        """Up to `count` different ones that are `wanted`, at random."""
        nodes = self._nodes
        found: list[str] = []
        # Few tries find them in a large cluster that is mostly well; else look at all.
        if len(nodes) > 8 * count:
            for _ in range(4 * count):
                node = nodes[self._rng.randrange(len(nodes))]
                if node not in found and wanted(node):
                    found.append(node)
                    if len(found) == count:
                        return found
        rest = [node for node in nodes if node not in found and wanted(node)]
        return found + self._rng.sample(rest, min(count - len(found), len(rest)))


class Prober:
    """The probes under way, from the ping to its answer or the end of the window."""

    def __init__(self, tuning: Tuning, health: Health) -> None:
        self._tuning = tuning
        self._health = health
        self.pending: dict[int, Pending] = {}
        self._seq = 0
        self._actions: list[Probe | Ask] = []

    def under_way(self, node: str) -> bool:
        """Whether `node` is being probed."""
        return any(pending.node == node for pending in self.pending.values())

    def start(self, node: str, incarnation: int, n: int, lenience: int, now: float) -> None:
        """Probe `node`, one of `n`, with `lenience` times the usual patience."""
        factor = self._health.factor * lenience
        window = self._tuning.window(n) * factor
        due = min(window, self._tuning.timeout(n) * factor)
        self._seq += 1
        self.pending[self._seq] = Pending(
            self._seq, node, incarnation, now, now + due, now + window
        )
        self._actions.append(Probe(self._seq, node, window * REPORT))

    def again(self, pending: Pending, n: int, now: float) -> None:
        """A second window, by the local health of now; late answers of helpers still count."""
        window = self._tuning.window(n) * self._health.factor
        pending.again = True
        pending.due = pending.deadline = now + window
        self.pending[pending.seq] = pending
        self._actions.append(Probe(pending.seq, pending.node, window * REPORT))

    def get(self, seq: int) -> Pending | None:
        """The probe, if it is under way."""
        return self.pending.get(seq)

    def finish(self, seq: int) -> Pending | None:
        """It was answered; None if it is not under way."""
        return self.pending.pop(seq, None)

    def stop(self) -> None:
        """No more probes."""
        self.pending.clear()
        self._actions.clear()

    def postpone(self, late: float) -> None:
        """Nothing was read for `late` s: that is no silence."""
        for pending in self.pending.values():
            pending.begin += late
            pending.due += late
            pending.deadline += late

    def actions(self) -> list[Probe | Ask]:
        """What is to be sent; each is given out once."""
        if not self._actions:
            return []
        out, self._actions = self._actions, []
        return out

    def next_timer(self) -> float:
        """When `handle_timer` is due."""
        due = inf
        for pending in self.pending.values():
            if pending.due < due:
                due = pending.due
        return due

    def handle_timer(self, now: float, helpers: Callable[[Pending], list[str]]) -> list[Pending]:
        """Ask for help where it is time; the probes whose time is over are returned.

        `helpers` says who may be asked to ping its target.
        """
        over: list[Pending] = []
        for seq, pending in list(self.pending.items()):
            if pending.due > now:
                continue
            if pending.deadline <= now:
                del self.pending[seq]
                over.append(pending)
                continue
            pending.due = pending.deadline
            pending.asked = tuple(helpers(pending))
            if pending.asked:
                left = pending.deadline - now
                back = max(1.2 * self._tuning.probe_timeout, 0.3 * left)  # the nacks' way
                timeout = left - min(back, 0.6 * left)
                self._actions.append(Ask(seq, pending.node, pending.asked, timeout))
        return over
