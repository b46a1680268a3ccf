"""Who is there: SWIM (Das, Gupta, Motivala 2002) with Lifeguard (Dadgar, Phillips, Currey 2018).

PURE: rumours and answers go in with the time; probes, rumours to send and transitions come out.
Who drives it (cluster/, or the simulator) gives the rumours of a message in (`receive`) before it
answers that message, so that an answer already carries the incarnation that refutes them; and
after every input, and whenever `next_timer` is reached, calls `handle_timer`, then `actions`,
`gossip` and `transitions`.

Five rules are ours. A refused probe proves that the host lives, so its target becomes REFUSED
and not SUSPECT. Who hears of a suspicion probes the suspect at once (in a large cluster: a few,
by lot), which brings the confirmations, or tells the suspect what to refute. Nobody declares
another dead without a last look, helpers included, who tell what they know of it. Who refuted a
suspicion gets more time with the next probes: it is slow, and not dead. And a DEAD that others
claim of a member that we thought well is told to it, and held for as long as it may need to
refute: else two halves of a cluster that find each other again would bury each other's living.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from math import inf

from agent.core.judgement import Judge
from agent.core.probing import Ask, Outcome, Pending, Probe, Prober
from agent.core.roll import Member, Roll, Transition
from agent.core.rumours import News, Rumour, State, fingerprint
from agent.core.suspicion import Health
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

# How far above what is known of a node others may claim an incarnation of it. Its own word and its
# record count wherever they are. So nobody can claim one that leaves the node no room above it.
AHEAD_MAX = 1 << 24  # sixteen lives of an agent (agent/thisnode.py)

ALIVE, SUSPECT, REFUSED, DEAD, LEFT = State  # names of the module: read in every message


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
        self._members = self._roll.members
        self._news = News()
        self._prober = Prober(tuning, self.health)
        self._judge = Judge(self._roll, self._news, tuning, self.health, rng, self._look)
        self._forgotten: set[str] = set()
        self._left = False
        self._told: dict[str, float] = {}  # who spoke without knowing what is said of it: when
        self._stale: set[str] = set()  # who spoke with a lower incarnation than is known of it
        self._turn_at = now + tuning.probe_interval * rng.random()
        self._turns = 0
        self._gossip_at = now
        self._gossip_turn = rng.randrange(1 << 16)
        self._news.put(self._roll.own)

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
            self._judge.claim(member, Rumour(node, incarnation, ALIVE), now, "started anew")

    def forget(self, node: str) -> None:
        """It was removed for good: nothing said about it counts until it is added again."""
        if node == self.me:
            return
        self._forgotten.add(node)
        self._roll.remove(node)
        self._judge.forget(node)
        self._told.pop(node, None)
        self._stale.discard(node)
        self._news.drop(node)

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
        for rumour in rumours:  # nearly all are known: this is the busiest loop of all
            node, incarnation, state, by = rumour
            member = members.get(node)
            if member is None:
                self._about_stranger(rumour, now, table)
            elif incarnation < member.incarnation or incarnation > member.incarnation + AHEAD_MAX:
                continue
            elif incarnation > member.incarnation or state > member.state:
                self._judge.claim(member, rumour, now)
            elif state is SUSPECT:
                case = member.case
                if case is None or (case.suspicion is not None and by in case.suspicion.accusers):
                    continue
                self._judge.confirm(member, case, rumour, now)

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
            self._told.pop(node, None)
            self._judge.claim(member, Rumour(node, incarnation, ALIVE), now, "answers")
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
        if now - self._told.get(node, -inf) >= self.tuning.minimum(self._roll.size):
            self._told[node] = now
            self._start(member, now)

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

    def host_answers(self, seq: int, now: float) -> None:
        """The target's host took a connection; its agent, which may be busy, has said nothing.

        Not yet a reason to call it REFUSED. But a suspicion that comes of it ends in that, and
        one that is REFUSED already stays so.
        """
        pending = self._prober.get(seq)
        member = self._members.get(pending.node) if pending is not None else None
        if member is not None:
            member.host = now
            if member.shown is REFUSED:
                self.refused(seq, now)

    def answered(self, seq: int, helper: str, outcome: Outcome, now: float) -> None:
        """A helper tells how its ping went."""
        pending = self._prober.get(seq)
        if pending is None or helper not in pending.asked:
            return
        if outcome is Outcome.SILENT:
            pending.silent.add(helper)
            if pending.again:
                pending.due = pending.deadline = now  # late, but the way out of here is in order
            return
        self._prober.finish(seq)
        if outcome is Outcome.REFUSED:
            self._refused(pending.node, now)

    # -- time --

    def next_timer(self) -> float:
        """When `handle_timer` and `gossip` are to be called though nothing has come in."""
        due = inf if self._left else self._next()
        return self._gossip_at if self._news and self._gossip_at < due else due

    def _next(self) -> float:
        due = self._turn_at
        if self._prober.pending and (probe := self._prober.next_timer()) < due:
            due = probe
        return verdict if (verdict := self._judge.next_timer()) < due else due

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if self._left or (late := now - self._next()) < 0:
            return
        if late > self.tuning.probe_timeout:
            # We were not run. What came meanwhile has not been read yet, so nobody was silent in
            # that time: every clock stands still for as long.
            if late > self.tuning.probe_interval:
                self.health.worse()
            self._prober.postpone(late)
            self._judge.postpone(late)
        for pending in self._prober.handle_timer(now, self._helpers):
            self._silent(pending, now)
        self._judge.handle_timer(now)
        if self._turn_at <= now:
            self._turn(now)

    # -- probing --

    def _turn(self, now: float) -> None:
        """One probe interval has passed: the next in turn, and now and then one of the DEAD."""
        tuning, roll = self.tuning, self._roll
        interval = tuning.probe_interval * self.health.factor
        self._turn_at = now + interval * self._rng.uniform(0.9, 1.1)
        self._turns += 1
        if (node := roll.rotation.next()) is not None:
            self._look(self._members[node], now)
        for node in self._judge.watched:
            self._look(self._members[node], now)
        if self._turns % tuning.dead_turns(roll.size) == 0 and (dead := roll.next_dead()):
            self._look(dead, now)

    def hasten(self, node: str, now: float) -> None:
        """Probe `node` now, whoever's turn it is: something says that it may have gone."""
        member = self._members.get(node)
        if member is not None and member.shown < DEAD:
            self._look(member, now)

    def _look(self, member: Member, now: float) -> None:
        """Probe it, unless we are at it."""
        if not self._left and not self._prober.under_way(member.node):
            self._start(member, now)

    def _start(self, member: Member, now: float) -> None:
        lenience = self._judge.lenience.factor(member.node, now)
        self._prober.start(member.node, member.incarnation, self._roll.size, lenience, now)

    def _helpers(self, pending: Pending) -> list[str]:
        """Whom to ask about a target: of some that are well, those heard last."""
        members, wanted, target = self._members, self.tuning.indirect_probes, pending.node
        member = members.get(target)
        if member is None or member.shown >= DEAD or member.heard > pending.begin:
            return []
        some = self._roll.rotation.sample(
            2 * wanted, lambda node: node != target and members[node].shown is ALIVE
        )
        return sorted(some, key=lambda node: -members[node].heard)[:wanted]

    def _silent(self, pending: Pending, now: float) -> None:
        """Neither the target nor a helper with news of it answered in time."""
        alone = pending.alone()
        if alone:
            self.health.worse()
        member = self._members.get(pending.node)
        if member is None or member.shown >= DEAD:
            return
        if member.heard > pending.begin or member.incarnation > pending.incarnation:
            return  # it gave a sign of life meanwhile, to us or to others
        if alone and not pending.again and not self._left:
            # Not even the helpers: rather it is us. Look longer before we accuse anybody.
            self._prober.again(pending, self._roll.size, now)
            return
        self._judge.silent(member, pending.begin, now)

    def _refused(self, node: str, now: float) -> None:
        member = self._members.get(node)
        if member is not None:
            self._judge.refused(member, now)

    # -- of whom we hear --

    def _about_stranger(self, rumour: Rumour, now: float, table: bool) -> None:
        """A claim about one that is not a member yet, is forgotten, or is ourselves."""
        node, incarnation, state, _ = rumour
        if node == self.me:
            self._about_me(incarnation, state)
        elif node not in self._forgotten:
            member = self._roll.insert(node, incarnation)
            if state is not ALIVE:
                self._judge.claim(member, rumour, now, known=False)
            elif not table:
                self._news.put(rumour)

    def _about_me(self, incarnation: int, state: State) -> None:
        """Somebody speaks of us. What is wrong is refuted, at an incarnation above it."""
        own = self._roll.own
        if incarnation > own.incarnation + AHEAD_MAX:
            return  # nobody believes it
        if incarnation < own.incarnation:
            if state is not own.state and self.me not in self._news:
                self._news.put(own)  # who says this has not heard of us since
        elif incarnation > own.incarnation or state > own.state:
            if state is not own.state:
                self.health.worse()
            self._roll.own = own._replace(incarnation=incarnation + 1)
            self._news.put(self._roll.own)

    # -- what goes out --

    @property
    def _transmissions(self) -> int:
        return self.tuning.transmissions(self._roll.size)

    def piggyback(self, target: str = "", limit: int = PIGGYBACK, about: str = "") -> list[Rumour]:
        """What to put on a message to `target`: that we go, what is said against it, what we know
        `about` another (between a prober and its helpers: the one that they look at), then news."""
        first = [self._roll.own] if self._left else []
        member = self._members.get(target)
        if member is not None and (member.state or target in self._stale):
            first.append(member.claim())
        if about and (member := self._members.get(about)) is not None:
            first.append(member.claim())
        if not self._news:
            return first
        return first + self._news.take(limit - len(first), 1, self._transmissions)

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
