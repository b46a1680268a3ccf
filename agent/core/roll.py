"""The roll: all members that one node knows, what is claimed of each, and what it believes.

The two differ only while a DEAD that others claim is held. What stands opposite:
core/membership.py decides; here is kept what must fit together (counts, digest, who is probed in
turn, who is tried now and then, what is yet to be told to the rest of the agent).
"""

from __future__ import annotations

import random
from math import inf
from typing import NamedTuple

from agent.core.probing import Rotation
from agent.core.rumours import Rumour, State, fingerprint
from agent.core.suspicion import Suspicion

ALIVE, SUSPECT, REFUSED, DEAD, LEFT = State  # names of the module: read in every message


class Transition(NamedTuple):
    """What this node believes of another has changed. `reason` is a part of a sentence for
    people; `by` the node whose finding it is ("": its own word, or its record's)."""

    node: str
    before: State
    after: State
    incarnation: int
    reason: str
    by: str = ""


class Case:
    """What stands against a member, as long as it is not ALIVE. Times in s."""

    __slots__ = ("by", "held", "looked", "seen", "since", "suspicion", "timer")

    def __init__(self, by: str, since: float) -> None:
        self.by = by
        self.since = since  # silent (SUSPECT, DEAD) or without agent (REFUSED) since
        self.seen = False  # we found it silent ourselves
        self.looked = -inf  # until when we look at it, before we decide
        self.suspicion: Suspicion | None = None
        self.held = inf  # when a DEAD that others claim is believed
        self.timer = inf  # the earliest timer that looks at this case again


class Member:
    """One of the others."""

    __slots__ = ("case", "heard", "host", "incarnation", "node", "shown", "state")

    def __init__(self, node: str, incarnation: int) -> None:
        self.node = node
        self.incarnation = incarnation
        self.state = ALIVE  # the greatest claim
        self.shown = ALIVE  # what we believe
        self.heard = -inf  # when a message came from it directly
        self.host = -inf  # when its host last took a connection, whether or not its agent spoke
        self.case: Case | None = None

    def claim(self) -> Rumour:
        """What is claimed of it."""
        by = self.case.by if self.case is not None else ""
        return Rumour(self.node, self.incarnation, self.state, by)


class Roll:
    """The others by node id, and what this node says of itself: `own`."""

    def __init__(self, own: Rumour, rng: random.Random) -> None:
        self.own = own
        self.members: dict[str, Member] = {}
        self.rotation = Rotation(rng)  # who is probed in turn: all but the DEAD and LEFT
        self.count = dict.fromkeys(State, 0)  # by what we believe
        self.digest = 0  # of the claims about the others
        self._dead: dict[str, None] = {}  # an ordered set
        self._transitions: list[Transition] = []

    @property
    def size(self) -> int:
        """How many live, this node included: the n of every formula."""
        return 1 + self.count[ALIVE] + self.count[SUSPECT]

    def insert(self, node: str, incarnation: int) -> Member:
        """One more, ALIVE."""
        member = self.members[node] = Member(node, incarnation)
        self.digest ^= fingerprint(node, incarnation, ALIVE)
        self.count[ALIVE] += 1
        self.rotation.insert(node)
        return member

    def remove(self, node: str) -> None:
        """One that is no member any more."""
        member = self.members.pop(node, None)
        if member is None:
            return
        self.digest ^= fingerprint(node, member.incarnation, member.state)
        self.count[member.shown] -= 1
        if member.shown < DEAD:
            self.rotation.remove(node)
        self._dead.pop(node, None)

    def claim(self, member: Member, incarnation: int, state: State) -> None:
        """A greater claim."""
        node = member.node
        self.digest ^= fingerprint(node, member.incarnation, member.state)
        self.digest ^= fingerprint(node, incarnation, state)
        member.incarnation, member.state = incarnation, state

    def show(self, member: Member, state: State, reason: str, by: str) -> bool:
        """What we believe of it from now on; whether that is something else than before."""
        before, node = member.shown, member.node
        if before is state:
            return False
        member.shown = state
        self.count[before] -= 1
        self.count[state] += 1
        if state >= DEAD > before:
            self.rotation.remove(node)
        elif before >= DEAD > state:
            self.rotation.insert(node)
        if state is DEAD:
            self._dead[node] = None
        elif before is DEAD:
            del self._dead[node]
        self._transitions.append(Transition(node, before, state, member.incarnation, reason, by))
        return True

    def next_dead(self) -> Member | None:
        """The DEAD member that was tried longest ago; None if nobody is DEAD."""
        for node in self._dead:
            del self._dead[node]
            self._dead[node] = None
            return self.members[node]
        return None

    def cases(self) -> list[Member]:
        """Those that there is something against."""
        return [member for member in self.members.values() if member.case is not None]

    def transitions(self) -> list[Transition]:
        """What we believe has changed since the last call."""
        if not self._transitions:
            return []
        out, self._transitions = self._transitions, []
        return out
