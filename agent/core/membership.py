"""Who is there: SWIM (Das, Gupta, Motivala 2002) with Lifeguard (Dadgar, Phillips, Currey 2018).

PURE: rumours and answers go in with the time; probes, rumours to send and transitions come out.
Who drives it (cluster/, or the simulator) gives the rumours of a message in (`receive`) before it
answers that message, so that an answer already carries the incarnation that refutes them; and
after every input, and whenever `next_timer` is reached, calls `handle_timer`, then `actions`,
`gossip` and `transitions`.

Four rules are ours. A refused probe proves that the host lives, so its target becomes REFUSED
and not SUSPECT. Who hears of a suspicion probes the suspect at once (in a large cluster: a few,
by lot), which brings the confirmations, or tells the suspect what to refute. Nobody declares
another dead that it has not found silent itself. And a DEAD that others claim of a member that we
thought well is told to it, and held for as long as it may need to refute: else two halves of a
cluster that find each other again would bury each other's living.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from math import inf

from agent.core.probing import Ask, Outcome, Pending, Probe, Prober
from agent.core.roll import Case, Member, Roll, Transition
from agent.core.rumours import News, Rumour, State, fingerprint
from agent.core.suspicion import Health, Suspicion
from agent.core.tuning import PRESETS, Tuning

__all__ = [
    "GOSSIP",
    "PIGGYBACK",
    "PRESETS",
    "Ask",
    "Membership",
    "Outcome",
    "Probe",
    "Rumour",
    "State",
    "Transition",
    "Tuning",
]

PIGGYBACK = 64  # rumours on a ping or its answer: some 2 kB
GOSSIP = 512  # rumours on a message of gossip: when halves of hundreds meet, there is as much news

ALIVE, SUSPECT, REFUSED, DEAD, LEFT = State  # names of the module: read in every message

# What an entry of the timers is about: our next turn to probe, the DEAD, a member's case.
_TURN, _REVIVE, _CASE = range(3)

_HEARSAY = {
    ALIVE: "answers, as others heard",
    SUSPECT: "another node finds it silent",
    REFUSED: "its host answers, its agent does not, as another node found",
    DEAD: "declared dead by another node",
    LEFT: "left",
}


class Membership:
    """What one node knows of all, and its part in finding out."""

    def __init__(
        self, me: str, incarnation: int, tuning: Tuning, rng: random.Random, now: float
    ) -> None:
        self.me = me
        self.tuning = tuning
        self.health = Health(tuning.health_max)
        self._rng = rng
        self._roll = Roll(Rumour(me, incarnation, ALIVE, me), rng)
        self._count = self._roll.count
        self._members = self._roll.members
        self._forgotten: set[str] = set()
        self._left = False
        self._prober = Prober(tuning, self.health)
        self._watched: dict[str, None] = {}  # REFUSED, and now silent too: probed every turn
        self._told: dict[str, float] = {}  # who spoke without knowing what is said of it: when
        self._stale: set[str] = set()  # who spoke with a lower incarnation than is known of it
        self._timers: list[tuple[float, int, int, str]] = []
        self._entries = 0
        self._reviving = False
        self._news = News()
        self._gossip_at = now
        self._gossip_turn = rng.randrange(1 << 16)
        self._news.put(self._roll.own)
        self._at(now + tuning.probe_interval * rng.random(), _TURN)

    # -- what is known --

    @property
    def incarnation(self) -> int:
        """Ours: it goes on every message, and to disk before that."""
        return self._roll.own.incarnation

    def state(self, node: str) -> State:
        """What we believe of it; LEFT if it is not known at all."""
        if node == self.me:
            return self._roll.own.state
        member = self._members.get(node)
        return member.shown if member is not None else LEFT

    def live(self) -> list[str]:
        """Who is ALIVE or SUSPECT, this node included."""
        own = [] if self._left else [self.me]
        return own + [m.node for m in self._members.values() if m.shown <= SUSPECT]

    def table(self) -> list[Rumour]:
        """Everything that is claimed, ourselves first: for a stream that opens."""
        return [self._roll.own, *(member.claim() for member in self._members.values())]

    def digest(self) -> int:
        """64 bits that are equal where every (node, incarnation, state) of two tables is."""
        return self._roll.digest ^ fingerprint(*self._roll.own[:3])

    def transitions(self) -> list[Transition]:
        """What we believe has changed since the last call."""
        return self._roll.transitions()

    def actions(self) -> list[Probe | Ask]:
        """What is to be sent; each is given out once."""
        return self._prober.actions()

    # -- who belongs to it --

    def add(self, node: str, now: float, incarnation: int = 0) -> None:
        """A node is known from its record. It starts ALIVE, and probing finds out."""
        if node == self.me:
            return
        self._forgotten.discard(node)
        member = self._members.get(node)
        if member is None:
            self._roll.insert(node, incarnation)
        elif incarnation > member.incarnation:
            self._claim(member, Rumour(node, incarnation, ALIVE), now, "started anew")

    def forget(self, node: str) -> None:
        """It was removed for good: nothing said about it counts until it is added again."""
        if node == self.me:
            return
        self._forgotten.add(node)
        self._roll.remove(node)
        self._watched.pop(node, None)
        self._told.pop(node, None)
        self._stale.discard(node)
        self._news.drop(node)
        self._rearm()

    def leave(self, now: float) -> None:
        """We go, as planned: nobody is to look for us."""
        if not self._left:
            self._left = True
            self._prober.stop()
            self._roll.own = self._roll.own._replace(state=LEFT)
            self._news.put(self._roll.own)
            self._gossip_at = now

    # -- what comes in --

    def receive(self, rumours: Iterable[Rumour], now: float, table: bool = False) -> None:
        """Take what a message carried. Old and known claims change nothing.

        `table`: they are the peer's whole table. That it is full of nodes that we did not know
        of is no news to anybody else.
        """
        members = self._members
        for rumour in rumours:
            node, incarnation, state, _by = rumour
            member = members.get(node)
            if member is None:
                self._about_stranger(rumour, now, table)
            elif incarnation < member.incarnation:
                continue
            elif incarnation > member.incarnation or state > member.state:
                self._claim(member, rumour, now, _HEARSAY[state])
            elif state is SUSPECT and member.case is not None:
                self._confirm(member, member.case, rumour, now)
            elif state is member.state and self._news:
                self._news.again(node, "", self._transmissions)

    def heard(self, node: str, incarnation: int, now: float) -> None:
        """A message came directly from `node`, which speaks with `incarnation`."""
        member = self._members.get(node)
        if member is None:
            if node != self.me and node not in self._forgotten:
                member = self._roll.insert(node, incarnation)
                member.heard = now
                self._news.put(member.claim())
            return
        member.heard = now
        if incarnation > member.incarnation:
            self._stale.discard(node)
            self._claim(member, Rumour(node, incarnation, ALIVE), now, "answers")
        elif (member.state or incarnation < member.incarnation or self._stale) and not self._left:
            self._inform(member, incarnation, now)

    def _inform(self, member: Member, incarnation: int, now: float) -> None:
        """It speaks, and does not know what is said of it, or not yet: a ping is to tell it."""
        node = member.node
        if incarnation < member.incarnation:
            self._stale.add(node)
        else:
            self._stale.discard(node)
            if member.state is ALIVE or member.state is LEFT:
                return
        if now - self._told.get(node, -inf) >= self.tuning.probe_interval:
            self._told[node] = now
            self._prober.start(node, member.incarnation, self._roll.size, now)

    def acked(self, seq: int, incarnation: int, now: float) -> None:
        """The target of a Probe answered."""
        pending = self._prober.finish(seq)
        if pending is not None:
            self.health.better()
            self.heard(pending.node, incarnation, now)

    def refused(self, seq: int, now: float) -> None:
        """The target's host answered a Probe, its agent did not."""
        pending = self._prober.finish(seq)
        if pending is not None:
            self.health.better()
            self._refused(pending.node, now)

    def refuses(self, node: str, now: float) -> None:
        """The same, too late for the probe: the host took a connection at once, and then its
        agent was given time that it did not use."""
        self._refused(node, now)

    def answered(self, seq: int, helper: str, outcome: Outcome, now: float) -> None:
        """A helper tells how its ping went."""
        pending = self._prober.get(seq)
        if pending is None or helper not in (pending.asked or ()):
            return
        if outcome is Outcome.SILENT:
            pending.silent.add(helper)
            return
        self._prober.finish(seq)
        if outcome is Outcome.REFUSED:
            self._refused(pending.node, now)

    # -- time --

    def next_timer(self) -> float:
        """When `handle_timer` and `gossip` are to be called though nothing has come in."""
        due = inf if self._left else min(self._timers[0][0], self._prober.next_timer())
        return min(due, self._gossip_at) if self._news else due

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        timers, prober = self._timers, self._prober
        if self._left:
            return
        late = now - min(timers[0][0], prober.next_timer())
        if late < 0:
            return
        if late > self.tuning.probe_timeout:
            self._stalled(late)
        for pending in prober.handle_timer(now, self._helpers):
            self._silent(pending, now)
        while timers[0][0] <= now:
            _, _, kind, node = heappop(timers)
            if kind == _CASE:
                self._judge(node, now)
            elif kind == _TURN:
                self._turn(now)
            else:
                self._revive(now)

    def _at(self, when: float, kind: int, node: str = "") -> None:
        self._entries += 1
        heappush(self._timers, (when, self._entries, kind, node))

    def _stalled(self, late: float) -> None:
        """We were not run for `late` s. What came meanwhile has not been read yet, so nobody was
        silent in that time: every clock stands still for as long."""
        self.health.worse()
        self._prober.postpone(late)
        for member in self._members.values():
            if member.case is not None:
                member.case.held += late
                if member.case.suspicion is not None:
                    member.case.suspicion.begin += late

    # -- probing --

    def _turn(self, now: float) -> None:
        """One probe interval has passed: the next in turn."""
        interval = self.tuning.probe_interval * self.health.factor
        self._at(now + interval * self._rng.uniform(0.9, 1.1), _TURN)
        node = self._roll.rotation.next()
        for each in [node, *self._watched] if node is not None else ():
            self._look(self._members[each], now)

    def _revive(self, now: float) -> None:
        """One of the DEAD is tried, in case it came back."""
        member = self._roll.next_dead()
        self._reviving = member is not None
        if member is not None:
            self._look(member, now)
            self._schedule_revival(now)

    def _schedule_revival(self, now: float) -> None:
        self._reviving = True
        interval = self.tuning.dead_interval(self._roll.size)
        self._at(now + interval * self._rng.uniform(0.9, 1.1), _REVIVE)

    def hasten(self, node: str, now: float) -> None:
        """Probe `node` now, whoever's turn it is: something says that it may have gone."""
        member = self._members.get(node)
        if member is not None and member.shown < DEAD:
            self._look(member, now)

    def _look(self, member: Member, now: float) -> None:
        if not self._left and not self._prober.under_way(member.node):
            self._prober.start(member.node, member.incarnation, self._roll.size, now)

    def _helpers(self, target: str) -> list[str]:
        """Whom to ask about `target`: of some that are well, those heard last."""
        members, wanted = self._members, self.tuning.indirect_probes
        if target not in members or members[target].shown >= DEAD:
            return []
        some = self._roll.rotation.sample(
            2 * wanted, lambda node: node != target and members[node].shown is ALIVE
        )
        return sorted(some, key=lambda node: -members[node].heard)[:wanted]

    def _silent(self, pending: Pending, now: float) -> None:
        """Neither the target nor a helper answered in time."""
        self.health.worse(pending.missing())
        member = self._members.get(pending.node)
        if member is None or member.shown >= DEAD:
            return
        if member.heard > pending.begin or member.incarnation > pending.incarnation:
            return  # it gave a sign of life meanwhile, to us or to others
        rumour = Rumour(member.node, member.incarnation, SUSPECT, self.me)
        if member.case is None:
            since = max(member.heard, pending.begin)
            self._claim(member, rumour, now, f"silent for {now - since:.1f} s", since)
        else:
            self._confirm(member, member.case, rumour, now)

    def _refused(self, node: str, now: float) -> None:
        """First-hand, or by a helper: the host is there and the agent is not."""
        member = self._members.get(node)
        if member is None:
            return
        if member.state < REFUSED:
            rumour = Rumour(node, member.incarnation, REFUSED, self.me)
            self._claim(member, rumour, now, "its host answers, its agent does not")
        elif member.shown is REFUSED and member.case is not None:
            member.case.suspicion, member.case.seen = None, False
            self._watched.pop(node, None)

    # -- claims --

    def _claim(
        self,
        member: Member,
        rumour: Rumour,
        now: float,
        reason: str,
        since: float | None = None,
        known: bool = True,
    ) -> None:
        """A greater claim about a member: keep it, pass it on, and believe what follows from it.

        `since` when it is so, if not since now; `known`: we had heard of the member before this.
        """
        node, incarnation, state, by = rumour
        old, shown = member.case, member.shown
        self._roll.claim(member, incarnation, state)
        self._news.put(rumour)
        self._watched.pop(node, None)
        if state is ALIVE:
            member.case = None
            self._told.pop(node, None)
            self._show(member, ALIVE, reason, by, now)
            if shown >= DEAD and self._by_lot():
                self._look(member, now)  # it may believe that we are dead, too
            return
        case = member.case = Case(by, now if since is None else since)
        case.seen = by == self.me and state is not REFUSED
        if state is SUSPECT:
            self._show(member, SUSPECT, reason, by, now)
            case.suspicion = self._suspicion(by, now)
            if by != self.me and self._by_lot():
                self._look(member, now)
        elif state is DEAD and by != self.me and known and self._doubtful(member, now):
            if shown is SUSPECT and old is not None:
                case.since = old.since
            case.held = now + self.tuning.minimum(self._roll.size)
            self._show(member, SUSPECT, reason, by, now)
            if self._by_lot():
                self._look(member, now)
        else:
            self._show(member, state, reason, by, now)
        self._arm(member, case)

    def _doubtful(self, member: Member, now: float) -> bool:
        """Whether a DEAD that others claim contradicts what we have seen."""
        return member.shown is ALIVE or (
            member.shown is SUSPECT and member.heard > now - self.tuning.probe_interval
        )

    def _by_lot(self) -> bool:
        """Whether it is on us to look at a suspect: on everybody in a small cluster, in a large
        one on twice as many as are wanted to confirm."""
        return self._rng.random() * self._count[ALIVE] < 2 * self.tuning.confirmations

    def _suspicion(self, by: str, now: float) -> Suspicion:
        minimum = self.tuning.minimum(self._roll.size) * self.health.patience
        maximum = minimum * self.tuning.suspicion_max_factor
        wanted = min(self.tuning.confirmations, self._count[ALIVE])
        return Suspicion(by, now, minimum, maximum, wanted)

    def _confirm(self, member: Member, case: Case, rumour: Rumour, now: float) -> None:
        """An accusation of a member that there is a case against already."""
        first_hand = rumour.by == self.me and not case.seen
        case.seen |= first_hand
        if member.state < DEAD:
            refused, suspicion = member.state is REFUSED, case.suspicion
            new = suspicion is None or (refused and now > suspicion.begin + suspicion.maximum)
            if suspicion is None or new:
                suspicion = case.suspicion = self._suspicion(rumour.by, now)
            if first_hand and refused:
                # Others' accusations waited for ours: a dead agent cannot refute for its host.
                suspicion.begin = now
                self._watched[member.node] = None
                new = True
            if suspicion.confirm(rumour.by) or new:
                self._news.confirm(rumour)
            elif self._news:
                self._news.again(member.node, rumour.by, self._transmissions)
                return
        self._arm(member, case)

    def _about_stranger(self, rumour: Rumour, now: float, table: bool) -> None:
        """A claim about one that is not a member yet, is forgotten, or is ourselves."""
        node, incarnation, state, _ = rumour
        if node == self.me:
            self._about_me(incarnation, state)
        elif node not in self._forgotten:
            member = self._roll.insert(node, incarnation)
            if state is not ALIVE:
                self._claim(member, rumour, now, _HEARSAY[state], known=False)
            elif not table:
                self._news.put(rumour)

    def _about_me(self, incarnation: int, state: State) -> None:
        """Somebody speaks of us. What is wrong is refuted, at an incarnation above it."""
        own = self._roll.own
        if incarnation < own.incarnation:
            if state is not own.state and self.me not in self._news:
                self._news.put(own)  # who says this has not heard of us since
        elif incarnation > own.incarnation or state > own.state:
            if state is not own.state:
                self.health.worse()
            self._roll.own = own._replace(incarnation=incarnation + 1)
            self._news.put(self._roll.own)

    def _show(self, member: Member, state: State, reason: str, by: str, now: float) -> None:
        """Believe it."""
        if self._roll.show(member, state, reason, by):
            if state is DEAD and not self._reviving:
                self._schedule_revival(now)
            self._rearm()

    # -- judging --

    def _rearm(self) -> None:
        """With few nodes left there are fewer who could confirm a suspicion."""
        if self._count[ALIVE] < self.tuning.confirmations:
            for member in self._roll.suspected():
                if member.case is not None:
                    self._arm(member, member.case)

    def _due(self, member: Member, case: Case) -> float:
        """When something is to be decided about a member."""
        due = case.held
        if case.suspicion is not None and (case.seen or member.state is not REFUSED):
            due = case.suspicion.deadline(self._count[ALIVE])
        # Not while we hear it, whatever others say.
        due = max(due, case.looked, member.heard + self.tuning.probe_interval)
        if member.shown is REFUSED:
            due = min(due, case.since + self.tuning.agent_grace)
        return due

    def _arm(self, member: Member, case: Case) -> None:
        due = self._due(member, case)
        if due < case.timer:
            case.timer = due
            self._at(due, _CASE, member.node)

    def _judge(self, node: str, now: float) -> None:
        """A case is due, or was before something spoke for the member."""
        member = self._members.get(node)
        if member is None or member.case is None or member.shown >= DEAD:
            return
        case = member.case
        case.timer = inf
        if self._due(member, case) > now:
            self._arm(member, case)
        elif member.shown is REFUSED and case.since + self.tuning.agent_grace <= now:
            reason = f"its agent did not come back within {self.tuning.agent_grace:.0f} s"
            self._bury(member, now, case.since, reason)
        elif not case.seen:
            # Nobody is declared dead on hearsay: perhaps the refutation has passed us by.
            self._look(member, now)
            case.looked = now + self.tuning.window(self._roll.size) * self.health.factor
            self._arm(member, case)
        elif member.state is DEAD:
            self._show(member, DEAD, f"{_HEARSAY[DEAD]}, and silent", case.by, now)
        elif case.suspicion is not None:
            since = case.suspicion.begin if member.state is REFUSED else case.since
            count = len(case.suspicion.accusers)
            nodes = "1 node" if count == 1 else f"{count} nodes"
            silent = now - max(since, member.heard)
            self._bury(member, now, since, f"silent for {silent:.1f} s; suspected by {nodes}")

    def _bury(self, member: Member, now: float, since: float, reason: str) -> None:
        rumour = Rumour(member.node, member.incarnation, DEAD, self.me)
        self._claim(member, rumour, now, reason, since)

    # -- what goes out --

    @property
    def _transmissions(self) -> int:
        return self.tuning.transmissions(self._roll.size)

    def piggyback(self, target: str = "", limit: int = PIGGYBACK) -> list[Rumour]:
        """What to put on a message to `target`: that we go, what is said against it, news."""
        member = self._members.get(target)
        against = [self._roll.own] if self._left else []
        if member is not None and (member.state or target in self._stale):
            against.append(member.claim())
        if not self._news:
            return against
        return against + self._news.take(limit - len(against), 1, self._transmissions)

    def gossip(self, now: float, candidates: Sequence[str]) -> tuple[list[str], list[Rumour]]:
        """Whom of `candidates` (streams that are open) to tell what now; nothing without news."""
        if not self._news or now < self._gossip_at:
            return [], []
        self._gossip_at = now + self.tuning.gossip_interval
        fanout = min(len(candidates), self.tuning.gossip_fanout)
        if not fanout:
            return [], []
        turn = self._gossip_turn % len(candidates)
        self._gossip_turn = turn + fanout
        peers = [candidates[(turn + i) % len(candidates)] for i in range(fanout)]
        return peers, self._news.take(GOSSIP, fanout, self._transmissions)
