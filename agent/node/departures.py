"""Nodes that go: this one, which hands its addresses over, or lost ones, which it inherits.

A removed node is forgotten altogether, and a record of the removal, kept for good, sees to it
that nothing of it is ever taken again. What stands opposite: agent/departures.py, the two
procedures from beginning to end; core/removal.py, who may inherit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Set

import msgspec

from agent.core.catalogue import is_closed_as
from agent.core.judging import Named
from agent.core.removal import Removals
from agent.core.replica import Change as Update
from agent.errors import VxmeshError
from agent.model import Network, Node, Notice, Removal
from agent.node.records import Recording, expelled_error, log
from agent.node.services import Services
from agent.views import NETWORK, REMOVAL, SERVICE, Change

LEFT = "left"  # the state of a node that said goodbye


class Departures(Services):
    """The methods of a node that are about nodes that go; core/removal.py's Sight."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me, clock, rng)
        self.removing = Removals(self)
        # For spans of time, which a clock that is set must not stretch or cut. The daemon has
        # one; where `clock` is not the wall's (a simulation) that will do.
        self.monotonic = clock
        self.is_linked: Callable[[str], bool] = lambda node: False  # a stream lives; cluster/ knows
        self.on_expelled: Callable[[VxmeshError], None] = lambda error: None

    # -- what core/removal.py sees --

    def voters(self) -> set[str]:
        """All nodes that have neither left nor been removed, with this one."""
        return {id for id in self.nodes if id == self.me or not self._has_left(id)}

    def is_removed(self, node: str) -> bool:
        """Whether this node knows that `node` was removed."""
        return node in self.removals

    def has_removed(self, node: str) -> bool:
        """Whether it was this node that removed `node`."""
        removal = self.removals.get(node)
        return removal is not None and removal.by == self.me

    def is_alive(self, node: str) -> bool:
        """Whether `node` lives, or may do so, as far as this node can tell."""
        return self.is_linked(node) or self.condition(node).state in ("alive", "suspect")

    def version(self, origin: str) -> int:
        """The version of `origin` that is here without holes."""
        return self.replica.version(origin)

    def _has_left(self, node: str) -> bool:
        known = self.status.get(node)
        return known is not None and known.state == LEFT

    def is_heard(self, origin: str) -> bool:
        """Whether records of `origin` are taken."""
        return origin not in self.removals and not self.removing.remover(origin, self.monotonic())

    # -- lost nodes --

    def inherit(self, ids: Iterable[str]) -> None:
        """Remove lost nodes and own what they owned, in this one step; consent is there.

        What they stated of addresses, and what they wrote of networks that nobody has written
        since, goes on as this node's.
        """
        lost = [id for id in ids if id not in self.removals and id != self.me]
        if not lost:
            return
        me = self.nodes[self.me]
        with Recording(self) as change:
            for id in lost:
                self._copy(id, set(lost), change)
            gained = {id: self._reclaim(id) for id in lost}
            for network in list(self.addresses):
                self._state_claims(network)
            for id in lost:
                stamp = self.hybrid.next(self.clock())
                name = self.node_name(id)
                record = Removal(id, name, self.me, stamp, self.clock(), me.name)
                self._put(REMOVAL + id, record)
                self.inherited.add(id)
                self._unheeded.append(record)
            for network in self._forget_removed(change):
                self._state_claims(network)
            for id, counts in gained.items():
                self._note_reclaimed(id, counts, change)
            self.settle_conflicts()  # of networks that the lost ones made
            self.settle_services()

    def _copy(self, lost: str, all_lost: set[str], change: Change) -> None:
        for key, _, _ in self.replica.items(lost):
            about = key[2:]
            if key.startswith(REMOVAL) and about in self.removals:
                self._put(key, self.removals[about])
                self.inherited.add(about)
            elif key.startswith(NETWORK):
                networks = self.catalogue.records(about)
                if _rests_on(lost, networks, all_lost):
                    network, own = networks[lost], networks.get(self.me)
                    if own and not network.deleted:
                        newer = max(network, own, key=lambda record: record.stamp)
                        network = msgspec.structs.replace(
                            newer,
                            encrypted=network.encrypted or own.encrypted,
                            internal=network.internal or own.internal,
                        )
                    self._put(key, network)
                    self._take_network(self.me, network, change)
            elif key.startswith(SERVICE):
                services = self.services.records(about)
                if _rests_on(lost, services, all_lost):
                    self._put(key, services[lost])
                    self._take_service(self.me, services[lost], change)

    def _reclaim(self, lost: str) -> dict[str, int]:
        gained = {}
        for network, addresses in self.addresses.items():
            count = sum(addresses.reclaim(lost).values())
            if count:
                gained[network] = count
        return gained

    def _note_reclaimed(self, lost: str, counts: dict[str, int], change: Change) -> None:
        name, total = self.node_name(lost), sum(counts.values())
        where = ", ".join(f"{n} in {self.catalogue.name(id)}" for id, n in counts.items())
        message = f"took over {total} addresses of {name}" + (f": {where}" if where else "")
        fields = {"node": lost, "name": name, "addresses": str(total)}
        log.info("space.reclaimed", message=message, **fields)
        change.notices.append(Notice("space.reclaimed", message, fields))

    def _forget_removed(self, change: Change) -> set[str]:
        """Act on the removals that `apply` met; the networks whose ownership may have moved."""
        touched: set[str] = set()
        while self._unheeded:
            removal = self._unheeded.pop()
            id = removal.node
            if id == self.me:
                self._be_expelled(removal, change)
            elif id not in self.removals:
                self.removals[id] = removal
                touched |= self._forget(id, change)
                self._note_removal(removal, change)
        return touched

    def _forget(self, lost: str, change: Change) -> set[str]:
        gone: list[Update] = []
        for update in self.replica.forget(lost):
            about = update.key[2:]
            networks, services = self.catalogue.records(about), self.services.records(about)
            # Where its heir's copy is on its way the network or service must not go meanwhile.
            if update.key.startswith(NETWORK) and _rests_on(lost, networks):
                self._orphans.setdefault(about, {})[lost] = networks[lost]
            elif update.key.startswith(SERVICE) and _rests_on(lost, services):
                self._service_orphans.setdefault(about, {})[lost] = services[lost]
            else:
                gone.append(update)
        self.nodes.pop(lost, None)
        self.status.pop(lost, None)
        self.withdrawn.discard(lost)
        change.nodes.add(lost)
        return self.apply(gone, change)

    def _note_removal(self, removal: Removal, change: Change) -> None:
        message = f"{removal.name} was removed by {removal.by_name or removal.by}"
        fields = {"node": removal.node, "name": removal.name, "by": removal.by}
        if self._change is change:  # not while it is read back from disk
            log.info("member.removed", message=message, **fields)
        change.notices.append(Notice("member.removed", message, fields))

    # -- this node --

    def expel(self, removal: Removal) -> None:
        """A peer says that this node was removed."""
        with Recording(self) as change:
            self._be_expelled(removal, change)

    def _be_expelled(self, removal: Removal, change: Change) -> None:
        # Two halves that removed each other would else end each other's nodes: theirs is no
        # cluster of ours any more.
        if self.expelled is not None or removal.by in self.removals:
            return
        self.expelled = removal
        self._note_removal(removal, change)
        error = expelled_error(removal)
        log.error("member.removed", error=str(error))
        self.on_expelled(error)

    def hand_over(self, network: str, to: str) -> int:
        """Donate all of a network's addresses that this node owns; how many."""
        addresses = self.addresses.get(network)
        if addresses is None:
            return 0
        with Recording(self):
            count = addresses.hand_over(to)
            self._state_claims(network)
        return count


def _rests_on(origin: str, records: Mapping[str, Named], lost: Set[str] = frozenset()) -> bool:
    """Whether what `origin` wrote of an object counts, of all `records` of it by origin, and
    nobody else's that stays (those of `lost` do not) says the same. As core/judging.py: a
    deletion is final; and as core/catalogue.py: what was made closed stays so, whoever wrote
    later."""
    others = dict(records)
    own = others.pop(origin, None)
    if own is None:
        return False
    if own.deleted:
        return not any(other.deleted for id, other in others.items() if id not in lost)
    if any(other.deleted for other in others.values()):
        return False
    staying = [other for id, other in others.items() if id not in lost]
    if isinstance(own, Network) and not is_closed_as(
        own, (other for other in staying if isinstance(other, Network))
    ):
        return True
    return all(
        other.stamp <= own.stamp if id in lost else other.stamp < own.stamp
        for id, other in others.items()
    )
