"""This node's own records, and how a change of the node is told.

A change goes into the replica and comes out as one `Change` to listeners that do not know each
other: cluster/ pushes records, drivers/ and datapath/ mend the kernel, resolver/ is fed, the
store writes. Time and chance come from outside, so that a simulation can own them.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterable

import msgspec
import structlog

from agent.core.bounds import clip_time
from agent.core.members import Member
from agent.core.replica import Replica
from agent.errors import InUse, VxmeshError
from agent.lookups import Lookups
from agent.model import Node, Notice, Removal, encode
from agent.views import ENDPOINT, Change, Status

log = structlog.get_logger()

JOIN_ANEW = "Start it with --reset-state to join as a new one"  # what a removed node can do


class Records(Lookups):
    """The writing half of a node. `clock` gives seconds since the epoch."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me)
        self.clock = clock
        self.rng = rng
        self.replica = Replica(me.id)
        self.listeners: list[Callable[[Change], None]] = []
        # Milliseconds of the start: a watcher of this agent's earlier life is told apart.
        self.revision = int(clock() * 1000)
        self._change: Change | None = None
        self.leaving = False  # nothing new is made here any more

    def endpoints_of(self, node: str) -> list[tuple[str, Member]]:
        """The endpoints that live on a node, with the ids of their networks.

        The cost is their number, not that of all there are.
        """
        found = []
        for record in self.replica.items(node):
            if record.key.startswith(ENDPOINT):
                id = record.key[len(ENDPOINT) :]
                network = self.network_of(id)
                member = self.members[network].all.get(id) if network else None
                if member and member.node == node:
                    found.append((network, member))
        return found

    def tell(self, kind: str, message: str, /, **fields: str) -> None:
        """Tell an operator of something that is no object of its own; see model.Notice."""
        log.info(kind, **{"message": message, **fields})
        with Recording(self) as change:
            change.notices.append(Notice(kind, message, fields))

    def set_status(self, node: str, status: Status) -> None:
        """What this node now believes of another one (core/membership.py decides it)."""
        before = self.status.get(node)
        if before == status or node in self.removals:
            return
        with Recording(self) as change:
            self.status[node] = status
            change.statuses.setdefault(node, before)
            if status.withdrawn:
                self.withdrawn.add(node)
            else:
                self.withdrawn.discard(node)

    def check_stays(self) -> None:
        """VxmeshError if this node is leaving, or was removed: nothing new is made then."""
        if self.expelled:
            raise expelled_error(self.expelled)
        if self.leaving:
            raise InUse("this node", "is leaving the cluster", "Use another node")

    def versions(self) -> dict[str, int]:
        """Origin -> version, of all that has been taken in: a mark for `kernel_has`."""
        versions = {origin: self.replica.version(origin) for origin in self.replica.origins()}
        versions[self.me] = self.replica.written()
        return versions

    def _close(self, change: Change) -> None:
        """Add what follows from a change as a whole, before it is told."""
        self._select(change)
        for id, before in change.statuses.items():
            if (before is not None and before.withdrawn) != (id in self.withdrawn):
                for _, member in self.endpoints_of(id):
                    change.led |= self.selection.services_of(member.endpoint.id)

    def _put(self, key: str, value: msgspec.Struct) -> None:
        assert self._change is not None
        self._change.own.append(self.replica.put(key, encode(value)))

    def _put_all(self, values: Iterable[tuple[str, msgspec.Struct]]) -> None:
        assert self._change is not None
        self._change.own += self.replica.put_all([(key, encode(value)) for key, value in values])

    def _delete(self, key: str) -> None:
        assert self._change is not None
        self._change.own.append(self.replica.delete(key))

    def _new_id(self) -> str:
        return self.rng.randbytes(8).hex()


def expelled_error(removal: Removal) -> VxmeshError:
    """What an agent ends with that was removed."""
    moment = datetime.datetime.fromtimestamp(clip_time(removal.when), datetime.UTC)
    return VxmeshError(
        "this node",
        f"was removed from the cluster by {removal.by_name or removal.by} at "
        f"{moment:%Y-%m-%dT%H:%M:%SZ}, and its addresses are others' now",
        JOIN_ANEW,
    )


class Recording:
    """Collects one Change, nested calls into one, and tells the listeners at its end."""

    def __init__(self, node: Records) -> None:
        self.node = node
        self.outer = node._change

    def __enter__(self) -> Change:
        if self.node._change is None:
            self.node._change = Change()
        return self.node._change

    def __exit__(self, *error: object) -> None:
        node, change = self.node, self.node._change
        node._change = self.outer
        if self.outer is None and change is not None:
            node._close(change)
            node.revision += 1
            for listener in list(node.listeners):
                try:
                    listener(change)
                except Exception as failure:
                    # One that fails must not keep the change from the others.
                    log.exception("listener.failed", error=repr(failure))
