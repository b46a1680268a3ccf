"""What follows from a claim, an accusation or a silence: suspicion, and in the end a verdict.

What stands opposite: core/membership.py, which brings in what was heard and what was not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf

from agent.core.roll import Case, Member, Roll
from agent.core.rumours import News, Rumour, State
from agent.core.suspicion import Health, Lenience, Suspicion
from agent.core.tuning import Tuning

ALIVE, SUSPECT, REFUSED, DEAD, LEFT = State

_HEARSAY = {
    ALIVE: "answers, as others heard",
    SUSPECT: "another node finds it silent",
    REFUSED: "its host answers, its agent does not, as another node found",
    DEAD: "declared dead by another node",
    LEFT: "left",
}


class Judge:
    """The cases against members. `look` has a member probed, now."""

    def __init__(
        self,
        roll: Roll,
        news: News,
        tuning: Tuning,
        health: Health,
        rng: random.Random,
        look: Callable[[Member, float], None],
    ) -> None:
        self.watched: dict[str, None] = {}  # REFUSED, and now silent too: to be probed every turn
        self.lenience = Lenience(tuning.lenience, tuning.lenience_decay)
        self._roll = roll
        self._news = news
        self._tuning = tuning
        self._health = health
        self._rng = rng
        self._look = look
        self._me = roll.own.node
        self._count = roll.count
        self._timers: list[tuple[float, str]] = []

    # -- what is said --

    def claim(
        self,
        member: Member,
        rumour: Rumour,
        now: float,
        reason: str = "",
        since: float | None = None,
        known: bool = True,
    ) -> None:
        """A greater claim about a member: keep it, pass it on, and believe what follows from it.

        `reason`: if it is not hearsay; `since` when it is so, if not since now; `known`: we had
        heard of the member before this.
        """
        node, incarnation, state, by = rumour
        reason = reason or _HEARSAY[state]
        old, before, shown = member.case, member.state, member.shown
        self._roll.claim(member, incarnation, state)
        self._news.put(rumour)
        self.watched.pop(node, None)
        if state is ALIVE:
            member.case = None
            if before is SUSPECT:
                self.lenience.refuted(node, now)
            self._show(member, ALIVE, reason, by)
            if shown >= DEAD and self._by_lot():
                self._look(member, now)  # it may believe that we are dead, too
            return
        case = member.case = Case(by, now if since is None else since)
        case.seen = by == self._me and state is not REFUSED
        if state is SUSPECT:
            self._show(member, SUSPECT, reason, by)
            case.suspicion = self._suspicion(by, now)
            if by != self._me and self._by_lot():
                self._look(member, now)
        elif state is DEAD and by != self._me and known and self._doubtful(member, now):
            if shown is SUSPECT and old is not None:
                case.since = old.since
            case.held = now + self._tuning.minimum(self._roll.size)
            self._show(member, SUSPECT, reason, by)
            if self._by_lot():
                self._look(member, now)
        else:
            self._show(member, state, reason, by)
        self._arm(member, case)

    def confirm(self, member: Member, case: Case, rumour: Rumour, now: float) -> None:
        """An accusation of a member that there is a case against already."""
        first_hand = rumour.by == self._me and not case.seen
        case.seen |= first_hand
        if member.state < DEAD:
            refused, suspicion = member.state is REFUSED, case.suspicion
            new = suspicion is None or (refused and now > suspicion.begin + suspicion.maximum)
            if suspicion is None or new:
                suspicion = case.suspicion = self._suspicion(rumour.by, now)
            if first_hand and refused:
                # Others' accusations waited for ours: a dead agent cannot refute for its host.
                suspicion.begin = now
                self.watched[member.node] = None
                new = True
            if not suspicion.confirm(rumour.by) and not new:
                return
            self._news.confirm(rumour)
        self._arm(member, case)

    # -- what we find --

    def silent(self, member: Member, begin: float, now: float) -> None:
        """It did not answer us since `begin`, nor any helper."""
        rumour = Rumour(member.node, member.incarnation, SUSPECT, self._me)
        if member.case is None:
            since = max(member.heard, begin)
            self.claim(member, rumour, now, f"silent for {now - since:.1f} s", since)
        else:
            self.confirm(member, member.case, rumour, now)

    def refused(self, member: Member, now: float) -> None:
        """Its host is there and its agent is not: we found it so, or a helper."""
        if member.state < REFUSED:
            rumour = Rumour(member.node, member.incarnation, REFUSED, self._me)
            self.claim(member, rumour, now, "its host answers, its agent does not")
        elif member.shown is REFUSED and member.case is not None:
            member.case.suspicion, member.case.seen = None, False
            self.watched.pop(member.node, None)

    def forget(self, node: str) -> None:
        """It is no member any more."""
        self.watched.pop(node, None)
        self.lenience.forget(node)
        self._rearm()

    # -- doubt --

    def _doubtful(self, member: Member, now: float) -> bool:
        """Whether a DEAD that others claim contradicts what we have seen."""
        return member.shown is ALIVE or (
            member.shown is SUSPECT and member.heard > now - self._tuning.probe_interval
        )

    def _by_lot(self) -> bool:
        """Whether it is on us to look at a suspect: on everybody in a small cluster, in a large
        one on twice as many as are wanted to confirm."""
        return self._rng.random() * self._count[ALIVE] < 2 * self._tuning.confirmations

    def _suspicion(self, by: str, now: float) -> Suspicion:
        minimum = self._tuning.minimum(self._roll.size) * self._health.patience
        maximum = minimum * self._tuning.suspicion_max_factor
        wanted = min(self._tuning.confirmations, self._count[ALIVE])
        return Suspicion(by, now, minimum, maximum, wanted)

    def _show(self, member: Member, state: State, reason: str, by: str) -> None:
        """Believe it."""
        if self._roll.show(member, state, reason, by):
            self._rearm()

    # -- time --

    def next_timer(self) -> float:
        """When `handle_timer` is due."""
        return self._timers[0][0] if self._timers else inf

    def handle_timer(self, now: float) -> None:
        """Decide what is due."""
        timers = self._timers
        while timers and timers[0][0] <= now:
            self._judge(heappop(timers)[1], now)

    def postpone(self, late: float) -> None:
        """Nothing was read for `late` s: nobody had a chance to refute."""
        for member in self._roll.cases():
            if member.case is not None:
                member.case.held += late
                if member.case.suspicion is not None:
                    member.case.suspicion.begin += late

    def _rearm(self) -> None:
        """With few nodes left there are fewer who could confirm a suspicion."""
        if self._count[ALIVE] < self._tuning.confirmations:
            for member in self._roll.cases():
                if member.case is not None and member.case.suspicion is not None:
                    self._arm(member, member.case)

    def _arm(self, member: Member, case: Case) -> None:
        due = self._due(member, case)
        if due < case.timer:
            case.timer = due
            heappush(self._timers, (due, member.node))

    def _due(self, member: Member, case: Case) -> float:
        """When something is to be decided about a member."""
        due = case.held
        if case.suspicion is not None and (case.seen or member.state is not REFUSED):
            due = case.suspicion.deadline(self._count[ALIVE])
        # Not while we hear it, whatever others say.
        due = max(due, case.looked, member.heard + self._tuning.probe_interval)
        if member.shown is REFUSED:
            due = min(due, case.since + self._tuning.agent_grace)
        return due

    def _judge(self, node: str, now: float) -> None:
        """A case is due, or was before something spoke for the member."""
        member = self._roll.members.get(node)
        if member is None or member.case is None or member.shown >= DEAD:
            return
        case = member.case
        case.timer = inf
        if self._due(member, case) > now:
            self._arm(member, case)
        elif member.shown is REFUSED and case.since + self._tuning.agent_grace <= now:
            reason = f"its agent did not come back within {self._tuning.agent_grace:.0f} s"
            self._bury(member, now, case.since, reason)
        elif not case.seen:
            # Nobody is declared dead on hearsay: perhaps the refutation has passed us by.
            self._look(member, now)
            case.looked = now + self._tuning.window(self._roll.size) * self._health.factor
            self._arm(member, case)
        elif member.state is SUSPECT and member.host >= case.since:
            # Its kernel took connections meanwhile: the agent hangs, the host does not.
            self.refused(member, now)
        elif member.state is DEAD:
            self._show(member, DEAD, f"{_HEARSAY[DEAD]}, and silent", case.by)
        elif case.suspicion is not None:
            since = case.suspicion.begin if member.state is REFUSED else case.since
            count = len(case.suspicion.accusers)
            nodes = "1 node" if count == 1 else f"{count} nodes"
            silent = now - max(since, member.heard)
            self._bury(member, now, since, f"silent for {silent:.1f} s; suspected by {nodes}")

    def _bury(self, member: Member, now: float, since: float, reason: str) -> None:
        rumour = Rumour(member.node, member.incarnation, DEAD, self._me)
        self.claim(member, rumour, now, reason, since)
