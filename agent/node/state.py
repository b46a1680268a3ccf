"""The whole node: what its sessions ask, what comes of others, its life and its sandboxes."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable

from agent.core.replica import ORIGINS_MAX, Delta, Record
from agent.core.replica import Change as Update
from agent.core.seals import REASONS, Seal, Unproven
from agent.core.waysout import renewed
from agent.errors import Conflict
from agent.model import ONLY, Node, Sandbox, TokenState, Trust
from agent.node.departures import Departures
from agent.node.records import Recording
from agent.views import ENDPOINT, NODE, TOKEN, TRUST, Change

# s; what a peer tells of our own lost records makes us write all of them anew, so it is heeded
# this often. Honest peers tell it after a start, and the first of them is nearly always enough.
SURPASS_EVERY = 10.0
COLLECT_AFTER = 30.0  # s that tombstones are kept after all have seen them
REFUSED_TOLD_EVERY = 10.0  # s between two events about records that one sender cannot prove
REFUSED_SENDERS_MAX = 1000  # of which it is known when they were last told of


class NodeState(Departures):
    """This node: its replica, and the views that follow from all records it has."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me, clock, rng)
        self._withheld: dict[str, str] = {}  # network that our kernel lacks a part of -> why
        self._kernel: dict[str, int] = {}  # origin -> version that our kernel has
        self._floors: deque[tuple[float, int]] = deque()  # when all had our records up to where
        self.collect_after = COLLECT_AFTER
        # Whether a node keeps the CA's key, which a record only claims: the node's identity judges
        # it, and without one nobody does.
        self.is_keeper: Callable[[Node], bool] = lambda node: False
        self.overfull: set[str] = set()  # origins that wrote more than anybody may
        self._surpassed = float("-inf")  # when, on the clock
        self._unbelievable: set[str] = set()  # peers that told of what we cannot have written
        self.refused = Counter[str](dict.fromkeys(REASONS, 0))  # deltas, by reason
        self._refused_told: dict[str, tuple[float, int]] = {}  # sender -> when, how many since
        self.replica.on_false = lambda error: self._refuse(error, error.origin)

    # -- what sessions ask (core/session.py: Store) --

    def digest(self) -> dict[str, tuple[int, int]]:
        """What this node has of each origin."""
        return self.replica.digest()

    def floor(self, origin: str) -> int:
        """Up to where tombstones of `origin` are gone."""
        return self.replica.floor(origin)

    def since(self, origin: str, version: int) -> list[Record]:
        """Records of `origin` after `version`."""
        return self.replica.since(origin, version)

    def applied(self, origin: str) -> int:
        """Up to which version of `origin` this node's kernel is right."""
        return self._kernel.get(origin, 0)

    def delta(self, origin: str, known: int) -> Delta:
        """What is here of `origin` after `known`; all of it if tombstones in between are gone.
        With its seals, and only as far as it can be proven: maybe nothing."""
        floor = self.floor(origin)
        reset = known < floor
        base = 0 if reset else known
        records, upto = self.since(origin, base), self.version(origin)
        delta = Delta(origin, base, upto, records, floor, reset, reset)
        if not self.replica.prove(delta, introduce=True):
            return Delta(origin, base, base, [], floor)
        return delta

    def is_doubted(self, origin: str) -> bool:
        """Whether `origin` itself is to be asked what it holds; see Replica.doubted."""
        return origin in self.replica.doubted

    def prove(self, delta: Delta, introduce: bool) -> bool:
        """Add its seals to a delta; see Replica.prove."""
        return self.replica.prove(delta, introduce)

    def merge(self, delta: Delta, sender: str = "") -> bool:
        """Take a delta that `sender` sent; False if something before it is missing.

        Unproven, counted and told, if it is another node's and `sender` does not show that.
        """
        if not self.is_heard(delta.origin):
            return True  # there is nothing to ask for
        if not self.replica.admits(delta):
            self._take_no_more(delta.origin)
            return True
        before = self.replica.version(delta.origin)
        try:
            updates = self.replica.merge(delta, sender)
        except Unproven as error:
            self._refuse(error, sender)
            raise
        if updates is None:
            return False
        # Also when no view changes by it: how far we have got is news to who waits for it.
        if updates or self.replica.version(delta.origin) != before:
            with Recording(self) as change:
                self._take(updates, change)
        return True

    def is_heard(self, origin: str) -> bool:
        """Whether records of `origin` are taken."""
        return origin not in self.overfull and super().is_heard(origin)

    def _take_no_more(self, origin: str) -> None:
        """Take nothing of an origin any more: it wrote more than anybody may."""
        if len(self.overfull) < ORIGINS_MAX:
            self.overfull.add(origin)
            why = "wrote more records than a node may; no more of them are taken"
            self.tell("origin.overfull", f"{self.node_name(origin)[:80]} {why}", node=origin[:80])

    def _refuse(self, error: Unproven, sender: str) -> None:
        """Count what was refused, and tell of it, but of one sender not again and again."""
        self.refused[error.reason] += 1
        now = self.clock()
        last, count = self._refused_told.get(sender, (0.0, 0))
        if 0 <= now - last < REFUSED_TOLD_EVERY:
            self._refused_told[sender] = last, count + 1
            return
        if len(self._refused_told) >= REFUSED_SENDERS_MAX:
            self._refused_told.clear()
        self._refused_told[sender] = now, 0
        name = self.node_name(sender)
        self.tell(
            "records.refused",
            f"{name} sent what {self.node_name(error.origin)} has not written: {error.why}",
            sender=sender,
            name=name,
            origin=error.origin,
            reason=error.reason,
            count=str(count + 1),
        )

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        """A peer's digest: learn of lost records of ours."""
        theirs, now = entries.get(self.me, (0, 0))[0], self.clock()
        if theirs <= self.replica.written() or 0 <= now - self._surpassed < SURPASS_EVERY:
            return
        if not self.replica.is_believable(theirs):
            if peer not in self._unbelievable and len(self._unbelievable) < ORIGINS_MAX:
                self._unbelievable.add(peer)
                why = "tells of records of this node that it cannot have written"
                self.tell("version.unbelievable", f"{self.node_name(peer)} {why}", node=peer)
            return
        if self.replica.surpass(theirs):
            self._surpassed = now
            with Recording(self) as change:
                change.rewritten = True
                change.own = self.replica.items(self.me)

    def stable(self, version: int) -> None:
        """Every live node has our records up to `version`: collect tombstones."""
        self._collect(version)

    def _collect(self, seen_by_all: int) -> None:
        """Drop tombstones that all have had for a while.

        Not at once: who keeps records a little behind on disk would have to write all of them
        anew if tombstones went before they were written.
        """
        now = self.clock()
        if not self._floors or self._floors[-1][1] < seen_by_all:
            self._floors.append((now, seen_by_all))
        floor = 0
        while self._floors and self._floors[0][0] <= now - self.collect_after:
            floor = self._floors.popleft()[1]
        if floor and self.replica.collect(self.me, floor):
            with Recording(self) as change:
                change.floor = floor

    # -- life --

    def restore(
        self, records: Iterable[Record], sandboxes: Iterable[Sandbox], version: int, floor: int
    ) -> None:
        """Take back what was stored before the last stop, before anything else is called."""
        records = list(records)
        self.replica.restore(records, version, floor)
        self.sandboxes = {s.id: renewed(s) for s in sandboxes}
        change = Change()
        self.apply([Update(self.me, r.key, r.value) for r in records if r.value], change)
        self._forget_removed(change)
        self._select(change)

    def restore_peer(
        self,
        origin: str,
        records: Iterable[Record],
        version: int,
        floor: int,
        seals: Iterable[Seal] = (),
    ) -> None:
        """Take back what was known of another origin. After `restore`, before anything else."""
        if origin in self.removals:
            return
        change = Change()
        self.apply(self.replica.restore_peer(origin, records, version, floor, seals), change)
        self._forget_removed(change)
        self._select(change)

    def describe(self, node: Node) -> None:
        """State what this node is (at start, and when its routes or MTU change)."""
        with Recording(self) as change:
            self._put(NODE + node.id, node)
            self.nodes[node.id] = node
            change.nodes.add(node.id)

    def state_trust(self, trust: Trust) -> None:
        """State whom the cluster trusts."""
        with Recording(self) as change:
            self._put(TRUST + ONLY, trust)
            self.trusts[self.me] = trust
            change.trust = True

    def state_token(self, token: TokenState) -> None:
        """State which join token holds."""
        with Recording(self) as change:
            self._put(TOKEN + ONLY, token)
            self.tokens[self.me] = token
            change.trust = True

    def kernel_has(self, versions: dict[str, int]) -> None:
        """The kernel holds everything up to these versions, but for what is withheld."""
        self._kernel = versions

    def kernel_withholds(self, networks: dict[str, str]) -> None:
        """What concerns these networks (ids) cannot be in the kernel now: why, for people."""
        self._withheld = networks

    def withholds(self) -> bool:
        """Whether the kernel lacks anything that is not new."""
        return bool(self._withheld)

    def why_withheld(self, networks: Iterable[str]) -> str:
        """Why the kernel lacks something of these networks; empty if it does not."""
        return "; ".join(
            dict.fromkeys(self._withheld[id] for id in networks if id in self._withheld)
        )

    # -- sandboxes --

    def put_sandbox(self, sandbox: Sandbox) -> None:
        """Add or replace a sandbox of this node; Conflict if its name is another's."""
        for other in self.sandboxes.values():
            if other.name == sandbox.name and other.id != sandbox.id:
                raise Conflict(f"sandbox {sandbox.name}", "exists", "Choose another --name")
        with Recording(self) as change:
            self.sandboxes[sandbox.id] = self.with_ways(sandbox)
            change.sandboxes.add(sandbox.id)

    def drop_sandbox(self, id: str) -> None:
        """Remove a sandbox with its endpoints; no error if it is gone."""
        sandbox = self.sandboxes.get(id)
        if sandbox is None:
            return
        with Recording(self) as change:
            del self.sandboxes[id]
            change.sandboxes.add(id)
            held = [e for e in sandbox.endpoints if e in self._network_of]
            for endpoint in held:
                self._delete(ENDPOINT + endpoint)
                self._drop_endpoint(endpoint, change)

    def _take(self, updates: list[Update], change: Change) -> None:
        touched = self.apply(updates, change)
        for network in touched | self._forget_removed(change):
            self._state_claims(network)
            if network in change.networks and not self.catalogue.get(network):
                # Removed elsewhere while we made endpoints in it: nobody could name them any more.
                members = self.members.get(network)
                for id in list(members.local) if members else ():
                    self._delete(ENDPOINT + id)
                    self._drop_endpoint(id, change)
                self.leave_network(network)
        if change.networks:
            for sandbox in self.sandboxes.values():
                fresh = self.with_ways(sandbox)
                if fresh != sandbox:
                    self.sandboxes[sandbox.id] = fresh
                    change.sandboxes.add(sandbox.id)
            self.settle_conflicts()
        if change.services:
            self.settle_services()
