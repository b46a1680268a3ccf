"""The whole node: what its sessions ask, what comes of others, its life and its sandboxes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable

from agent.core.replica import Change as Update
from agent.core.replica import Delta, Record
from agent.errors import Conflict
from agent.model import ONLY, Node, Sandbox, TokenState, Trust
from agent.node.departures import Departures
from agent.node.records import Recording
from agent.views import ENDPOINT, NODE, TOKEN, TRUST, Change

COLLECT_AFTER = 30.0  # s that tombstones are kept after all have seen them


class NodeState(Departures):
    """This node: its replica, and the views that follow from all records it has."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me, clock, rng)
        self._kernel: dict[str, int] = {}  # origin -> version that our kernel has
        self._floors: deque[tuple[float, int]] = deque()  # when all had our records up to where
        self.collect_after = COLLECT_AFTER

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

    def merge(self, delta: Delta) -> bool:
        """Take a peer's delta; False if something before it is missing."""
        if not self.is_heard(delta.origin):
            return True  # there is nothing to ask for
        before = self.replica.version(delta.origin)
        updates = self.replica.merge(delta)
        if updates is None:
            return False
        # Also when no view changes by it: how far we have got is news to who waits for it.
        if updates or self.replica.version(delta.origin) != before:
            with Recording(self) as change:
                self._take(updates, change)
        return True

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        """A peer's digest: learn of lost records of ours."""
        theirs = entries.get(self.me, (0, 0))[0]
        if self.replica.surpass(theirs):
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
        self.sandboxes = {s.id: s for s in sandboxes}
        self.apply([Update(self.me, r.key, r.value) for r in records if r.value], Change())
        self._forget_removed(Change())

    def restore_peer(
        self, origin: str, records: Iterable[Record], version: int, floor: int
    ) -> None:
        """Take back what was known of another origin. After `restore`, before anything else."""
        if origin in self.removals:
            return
        self.apply(self.replica.restore_peer(origin, records, version, floor), Change())
        self._forget_removed(Change())

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
        """The kernel holds everything up to these versions."""
        self._kernel = versions

    # -- sandboxes --

    def put_sandbox(self, sandbox: Sandbox) -> None:
        """Add or replace a sandbox of this node; Conflict if its name is another's."""
        for other in self.sandboxes.values():
            if other.name == sandbox.name and other.id != sandbox.id:
                raise Conflict(f"sandbox {sandbox.name}", "exists", "Choose another --name")
        with Recording(self) as change:
            self.sandboxes[sandbox.id] = sandbox
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
        if change.networks:
            self.settle_conflicts()
