"""Removing lost nodes, so that of several who try at once only one inherits their addresses.

PURE: asks and answers go in with the time; who carries them is cluster/'s business. A remover
needs the consent of every other voter: each node that it knows of and that has neither left,
nor been removed, nor is named as lost itself. The rules of a voter:

* who sees one of the lost alive refuses;
* who is removing one of them itself has not inherited yet. The smaller id of the two goes on
  and refuses; the larger gives up its own attempt in the same step in which it consents.

So no two inherit one node. Say A and B both did. Each had the other's consent, and gave its own
before it inherited (after that it answers `settled`). When B consented to A it had no attempt
any more, so the attempt that B inherited by began later, and asked A later still; by the same
argument A's began after A's consent to that, which is after B's consent to A's. It cannot have
begun after an answer that it got. No promise has to be kept over a crash, for a crash ends an
attempt; nor do clocks matter for it.

What the lost one gave away must not be inherited with the rest. So an answer tells how far the
voter is on the records of the lost and on its own, and the remover first catches up with all of
that. And a voter that consented takes no record of the lost ones any more until the attempt is
over (`FROZEN_FOR`): a donation of theirs that is still on its way would come too late.

With `force` the lost may live, and then no time is long enough: a voter that does not hear of the
end would take what they give away after another one inherited it. So such a consent holds, over
crashes too, until the voter knows how it ended: the remover gives up (a number tells its attempts
apart, since messages overtake each other), says when asked that it has given up, has removed them,
or is removed itself. And whom a voter closed its door to gets no consent of it any more.

What stands opposite: cluster/consent.py carries, node/departures.py inherits.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

ATTEMPT_WITHIN = 10.0  # s; for all to consent and the records to come, else nothing is changed
# s; longer than an attempt, so that one whose end is not heard of is over. Clocks only have to
# run equally fast. Also longer than a message of a node that died can be on its way.
FROZEN_FOR = 15.0
HELD_MAX = 1000  # nodes that one remover has us hold off


class Verdict(enum.IntEnum):
    """What a voter says. The numbers are those of proto/peer.proto."""

    AGREED = 0
    STRANGER = 1  # it does not know who asks, or counts it as left or removed
    ALIVE = 2  # one of the lost lives
    RIVAL = 3  # it is removing one of them itself


@dataclass(frozen=True, slots=True)
class Ask:
    """`remover` wants to remove `lost` and inherit what they own."""

    remover: str
    lost: frozenset[str]
    force: bool = False  # though they live
    number: int = 0  # of a forced attempt: higher than any that `remover` made before


@dataclass(frozen=True, slots=True)
class Answer:
    """A voter's answer. `about` is the living one, or the rival."""

    verdict: Verdict
    about: str = ""
    settled: frozenset[str] = frozenset()  # of the lost: removed already, as the voter knows
    versions: dict[str, int] = field(default_factory=dict)  # origin -> how far the voter is
    voters: frozenset[str] = frozenset()  # who else must be asked, as far as the voter knows


class Sight(Protocol):
    """What this node sees."""

    me: str

    def voters(self) -> set[str]:
        """All nodes that have neither left nor been removed, with this one."""

    def is_removed(self, node: str) -> bool:
        """Whether this node knows that `node` was removed."""

    def has_removed(self, node: str) -> bool:
        """Whether it was this node that removed `node`."""

    def is_alive(self, node: str) -> bool:
        """Whether this node believes that `node` lives, or may do so."""

    def version(self, origin: str) -> int:
        """How far this node is on the records of `origin`."""


@dataclass(slots=True)
class Attempt:
    """One try of this node to remove `lost`. Over when `failed`, or when the node inherited."""

    ask: Ask
    deadline: float
    waiting: set[str]  # voters that have not answered
    agreed: set[str] = field(default_factory=set)
    versions: dict[str, int] = field(default_factory=dict)  # to catch up with
    settled: set[str] = field(default_factory=set)  # of the lost: another node removed them
    failed: Answer | None = None  # why it ended: a refusal, or the rival that it gave way to


class Removals:
    """This node's part in removals: its own attempt, and its consent to those of others."""

    def __init__(self, sight: Sight) -> None:
        self.attempt: Attempt | None = None
        self._sight = sight
        self._frozen: dict[str, dict[str, float]] = {}  # lost node -> remover -> until when
        # Forced: lost node -> remover -> number of its attempt. Kept on disk by who carries it.
        self.held: dict[str, dict[str, int]] = {}

    # -- as a voter --

    def decide(self, ask: Ask, now: float) -> Answer:
        """Answer another node. What it agrees to ends a rival attempt of our own."""
        sight = self._sight
        if ask.remover not in sight.voters() or ask.remover == sight.me:
            return Answer(Verdict.STRANGER)
        own = self.attempt
        self._thaw(now)
        if not self._has_room(ask):
            return Answer(Verdict.STRANGER)
        if self._holds(ask.remover) or (own and own.ask.force and ask.remover in own.ask.lost):
            return Answer(Verdict.STRANGER)
        if sight.me in ask.lost:
            return Answer(Verdict.ALIVE, sight.me)
        settled = frozenset(node for node in ask.lost if sight.is_removed(node))
        for node in sorted(ask.lost - settled):
            if sight.is_alive(node) and not ask.force:
                return Answer(Verdict.ALIVE, node)
        if own and own.ask.lost & ask.lost:
            if sight.me < ask.remover:
                return Answer(Verdict.RIVAL, sight.me)
            self._fail(own, Answer(Verdict.RIVAL, ask.remover))
        for node in ask.lost - settled:
            self._frozen.setdefault(node, {})[ask.remover] = now + FROZEN_FOR
            if ask.force:
                by = self.held.setdefault(node, {})
                by[ask.remover] = max(ask.number, by.get(ask.remover, 0))
        told = {origin: sight.version(origin) for origin in (ask.lost - settled) | {sight.me}}
        return Answer(Verdict.AGREED, "", settled, told, frozenset(sight.voters()))

    def release(self, ask: Ask) -> None:
        """The remover gave up: its lost ones may be heard again."""
        for node in ask.lost:
            by = self.held.get(node, {})
            if by.get(ask.remover, ask.number + 1) <= ask.number:
                self._let_go(node, ask.remover)
            elif ask.remover in by:
                continue  # it has begun another attempt since
            self._frozen.get(node, {}).pop(ask.remover, None)  # not what another one waits for

    def remover(self, node: str, now: float) -> str:
        """Who is removing `node` with our consent, so that it is not to be heard; or nothing."""
        for who, until in self._frozen.get(node, {}).items():
            if now < until and not self._is_over(node, who):
                return who
        return self._holds(node)

    def _holds(self, node: str) -> str:
        """Who removes `node` by force with our consent, and has not ended it; or nothing."""
        for who in self.held.get(node, ()):
            if not self._is_over(node, who) and not self._sight.is_removed(who):
                return who
        return ""

    def _is_over(self, node: str, who: str) -> bool:
        """Who agreed to our own attempt has none any more, and who is lost does not either."""
        own = self.attempt
        if own is None or node in own.settled:
            return False
        if node in own.ask.lost:
            return who in own.agreed | own.ask.lost
        # A voter that one of the lost was removing: what it knows is needed to inherit from that
        # one, but not before all have agreed that it is lost.
        return who in own.ask.lost and not own.waiting

    def _has_room(self, ask: Ask) -> bool:
        frozen = {node for node, by in self._frozen.items() if ask.remover in by}
        held = {node for node, by in self.held.items() if ask.remover in by}
        return len(frozen | held | ask.lost) <= HELD_MAX

    def _thaw(self, now: float) -> None:
        for node, by in list(self._frozen.items()):
            self._frozen[node] = {who: until for who, until in by.items() if now < until}
            if not self._frozen[node]:
                del self._frozen[node]

    def open_ends(self) -> list[Ask]:
        """Of each remover the first forced removal whose end we do not know.

        It is to be asked whether it `pursues` that. What has ended is dropped here.
        """
        for node in list(self.held):
            for who in list(self.held[node]):
                if self._sight.is_removed(who) or self._sight.is_removed(node):
                    self._let_go(node, who)
        found: dict[str, dict[int, set[str]]] = {}
        for node, by in self.held.items():
            for who, number in by.items():
                found.setdefault(who, {}).setdefault(number, set()).add(node)
        firsts = [(who, min(attempts)) for who, attempts in found.items()]
        return [Ask(who, frozenset(found[who][n]), True, n) for who, n in firsts]

    def _let_go(self, node: str, who: str) -> None:
        del self.held[node][who]
        if not self.held[node]:
            del self.held[node]

    # -- as a remover --

    def begin(self, lost: set[str], now: float, force: int = 0) -> Attempt:
        """Start an attempt in place of any other of ours. None of `lost` may be this node.

        `force`: they may live; a number higher than with any attempt before, in any life.
        """
        sight = self._sight
        assert sight.me not in lost
        ask = Ask(sight.me, frozenset(lost), force > 0, force)
        waiting = sight.voters() - lost - {sight.me}
        self.attempt = Attempt(ask, now + ATTEMPT_WITHIN, waiting)
        return self.attempt

    def pursues(self, ask: Ask) -> bool:
        """Whether this attempt of ours may still come, or has come, to its end: a removal.

        Not one by another node: who waits for our answer may be holding that one off.
        """
        return (self.attempt is not None and self.attempt.ask.number == ask.number) or any(
            self._sight.has_removed(node) for node in ask.lost
        )

    def take(self, attempt: Attempt, voter: str, answer: Answer) -> None:
        """A voter's answer to this attempt's ask."""
        if attempt is not self.attempt:
            return
        if answer.verdict is not Verdict.AGREED:
            self._fail(attempt, answer)
            return
        attempt.agreed.add(voter)
        attempt.settled |= answer.settled & attempt.ask.lost
        for origin, version in answer.versions.items():
            if origin == voter or origin in attempt.ask.lost:
                attempt.versions[origin] = max(version, attempt.versions.get(origin, 0))
        attempt.waiting |= answer.voters - attempt.ask.lost
        self.look(attempt)

    def look(self, attempt: Attempt) -> list[str]:
        """Who has to be asked now (some, perhaps, for a second time); the sight may be new."""
        attempt.waiting |= self._sight.voters()
        attempt.waiting -= attempt.agreed | attempt.ask.lost | {self._sight.me}
        attempt.waiting = {id for id in attempt.waiting if not self._sight.is_removed(id)}
        return sorted(attempt.waiting)

    def lacking(self, attempt: Attempt) -> list[str]:
        """The origins whose records have not come as far as voters had them."""
        sight = self._sight
        found = {
            origin
            for origin, version in attempt.versions.items()
            if sight.version(origin) < version and not sight.is_removed(origin)
        }
        return sorted(found | {id for id in attempt.settled if not sight.is_removed(id)})

    def is_ready(self, attempt: Attempt, now: float) -> bool:
        """Whether this node may inherit, in this very step; `finish` is to follow in it."""
        return (
            attempt is self.attempt
            and now < attempt.deadline
            and not self.look(attempt)
            and not self.lacking(attempt)
            and not any(
                not attempt.ask.force and self._sight.is_alive(node)
                for node in attempt.ask.lost
                if not self._sight.is_removed(node)
            )
        )

    def finish(self, attempt: Attempt) -> None:
        """The attempt is over, one way or the other."""
        if attempt is self.attempt:
            self.attempt = None

    def _fail(self, attempt: Attempt, why: Answer) -> None:
        attempt.failed = why
        self.finish(attempt)
