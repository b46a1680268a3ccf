"""The networks of the cluster, which any node may write, as one view that all nodes share.

Two halves of a cluster that cannot see each other can make two networks of one name, of one
VNI, or with subnets that overlap. When they meet, the older one (core/judging.py) keeps what
both claim, and nothing of the other is dropped:

* its name: it is shown as NAME-<6 of its id>;
* its VNI: it has another one, by its id and the VNIs in use, so that its traffic goes on;
* a subnet: both keep theirs, as workloads run with its addresses. The two are separate
  segments; where one host has both, `give_way` says who does without a way out.

Whoever may, its creator or who removes the winner, then writes this into the network's own
record, so that it stays so when the winner goes.
What stands opposite: agent/node/networks.py writes the records, core/replica.py carries them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import msgspec

from agent.core.judging import Age, Claimants, Written, age
from agent.core.overlaps import Block, Overlaps, block
from agent.errors import Invalid
from agent.model import VNI_MAX, Loss, Network

VNI_MIN_CHOSEN = 4096  # below: left for those who choose their own
VNIS_CHOSEN = VNI_MAX - VNI_MIN_CHOSEN + 1
NAME_MAX = 63  # of a DNS label
# Networks with a record of one node. Each change of one of them is judged beside all conflicts
# there are, so a node that makes nothing but conflicts costs the others the square of this.
NETWORKS_MAX = 1000
# Networks that one subnet may overlap. No node makes one that overlaps what it knows of, so only
# parts of a cluster that were apart bring some; each pair of them is kept, told and shown.
OVERLAPS_MAX = 32
ID_PIECES = (6, 8, 10, 12, 14, 16)  # how much of the id a loser's name has: the first is enough


class Conflict(NamedTuple):
    """Network `loser` does without `value`, which the older `winner` has."""

    loser: str
    winner: str
    what: str  # name, vni or subnet
    value: str


def free_vni(id: str, used: Container[int]) -> int:
    """A VNI that is not `used`, the same on every node that asks for the same `id`."""
    start = int.from_bytes(hashlib.blake2s(id.encode(), digest_size=8).digest())
    offset = start % VNIS_CHOSEN
    while offset + VNI_MIN_CHOSEN in used:
        offset = (offset + 1) % VNIS_CHOSEN
    return offset + VNI_MIN_CHOSEN


class Catalogue:
    """Every origin's network records, and the view that follows from them."""

    def __init__(self) -> None:
        self._written: Written[Network] = Written()
        self._best: dict[str, Network] = {}  # as written: the records that count
        self._networks: dict[str, Network] = {}  # as judged: with the name and VNI they have
        self._ids: dict[str, str] = {}  # name -> id
        self._names: Claimants[str] = Claimants()
        self._vnis: Claimants[int] = Claimants()
        self._subnets = Overlaps()
        self._overlapping: dict[str, set[Conflict]] = {}  # id of either -> its conflicts
        self._losers: set[str] = set()  # ids that are judged otherwise than written
        self._lost: set[str] = set()  # ids whose record tells of something lost
        self._moved: set[str] = set()  # ids whose record that counts is another one since judged
        self._is_held = False

    # -- what there is --

    def get(self, id: str) -> Network | None:
        """A living network by its whole id, with the name and VNI that it has."""
        return self._networks.get(id)

    def written(self, id: str) -> Network | None:
        """The same as its record says, before it was judged beside the others."""
        return self._best.get(id)

    def named(self, name: str) -> Network | None:
        """A living network by its name."""
        id = self._ids.get(name)
        return self._networks[id] if id else None

    def name(self, id: str) -> str:
        """The name of a network; its id if it is not known."""
        network = self._networks.get(id)
        return network.name if network else id

    def all(self) -> Iterable[Network]:
        """The living networks."""
        return self._networks.values()

    def writers(self, id: str) -> set[str]:
        """The origins that have a record about this network."""
        return set(self._written.records(id))

    def records(self, id: str) -> dict[str, Network]:
        """Origin -> its record about this network, dead or alive."""
        return self._written.records(id)

    # -- conflicts --

    def conflicts(self) -> set[Conflict]:
        """Those that stand: between networks that are both there."""
        found: set[Conflict] = set()
        for id in self._losers | self._lost | self._overlapping.keys():
            found.update(self.conflicts_of(id))
        return found

    def conflicts_of(self, id: str) -> list[Conflict]:
        """Those that one network lost, and those over a subnet that it won, sorted."""
        network = self._networks.get(id)
        found = set(self._overlapping.get(id, ()))
        for loss in network.lost if network else ():
            if loss.winner in self._networks:
                found.add(Conflict(id, loss.winner, loss.what, loss.value))
        return sorted(found)

    def unsettled(self) -> Iterator[Network]:
        """The networks whose record does not yet say what they are judged to be."""
        for id in sorted(self._losers):
            yield self._networks[id]

    def overlapping(self) -> Iterable[str]:
        """The ids of networks with a subnet that overlaps another one's."""
        return self._overlapping.keys()

    def overlap(self, id: str) -> bool:
        """Whether a network has a subnet that overlaps another one's."""
        return id in self._overlapping

    def has_room(self, origin: str, network: Network | None = None) -> bool:
        """Whether `origin` may have a record about a network (a new one: None) besides those
        that it has. It may delete as many as it likes."""
        if self._written.count(origin) < NETWORKS_MAX or (network and network.deleted):
            return True
        own = self._written.records(network.id).get(origin) if network else None
        return own is not None and not own.deleted

    def check_overlaps(self, network: Network) -> None:
        """Invalid if one of its subnets overlaps those of too many others."""
        for subnet in network.subnets:
            others = {id for _, id in self._subnets.meeting(subnet)} - {network.id}
            if len(others) >= OVERLAPS_MAX:
                raise Invalid("network", f"overlaps {len(others)} others with {subnet}")

    # -- how records become the view --

    def put(self, origin: str, network: Network) -> dict[str, Network | None]:
        """Take a record; the networks that look different now, each as it was before."""
        self._written.put(origin, network)
        return self._judge(network.id)

    def drop(self, origin: str, id: str) -> dict[str, Network | None]:
        """An origin withdrew its record; as for `put`."""
        self._written.drop(origin, id)
        return self._judge(id)

    def _judge(self, id: str) -> dict[str, Network | None]:
        old, new = self._best.get(id), self._strict(id)
        if old != new:
            if old:
                self._withdraw(old)
            if new:
                self._enter(new)
            self._moved.add(id)
        return {} if self._is_held else self.release()

    def hold(self) -> None:
        """Take records from now on without a look at the others, until `release`: of many that
        come at once all are judged together, not each beside all."""
        self._is_held = True

    def release(self) -> dict[str, Network | None]:
        """Judge what was taken since `hold`; the networks that look different now, as `put`."""
        self._is_held = False
        if not self._moved:
            return {}
        moved, self._moved = self._moved, set()
        losers = self._settle()
        before: dict[str, Network | None] = {}
        after: dict[str, Network] = {}
        for each in moved | self._losers | losers.keys():
            was, now = self._networks.get(each), losers.get(each) or self._best.get(each)
            if was != now:
                before[each] = was
                if now:
                    after[each] = now
        self._losers = set(losers)
        for each, was in before.items():
            self._networks.pop(each, None)
            if was and self._ids.get(was.name) == each:
                del self._ids[was.name]
        for each, now in after.items():
            self._networks[each] = now
            self._ids[now.name] = each
        return before

    def _strict(self, id: str) -> Network | None:
        """The record that counts; encrypted, or without a way out, if any record says so: no
        later one, of whatever node, opens what was made closed."""
        best = self._written.best(id)
        if best is None or (best.encrypted and best.internal):
            return best
        records = self._written.records(id).values()
        encrypted = any(record.encrypted for record in records)
        internal = any(record.internal for record in records)
        if (encrypted, internal) == (best.encrypted, best.internal):
            return best
        return msgspec.structs.replace(best, encrypted=encrypted, internal=internal)

    def _enter(self, network: Network) -> None:
        self._best[network.id] = network
        self._names.add(network.name, age(network))
        self._vnis.add(network.vni, age(network))
        for mine in network.subnets:
            for theirs, other in self._subnets.meeting(mine):
                self._note_overlap(network, mine, self._best[other], theirs)
        self._subnets.add(network.id, network.subnets)
        if network.lost:
            self._lost.add(network.id)

    def _note_overlap(self, network: Network, mine: str, other: Network, theirs: str) -> None:
        if age(network) > age(other):
            conflict = Conflict(network.id, other.id, "subnet", mine)
        else:
            conflict = Conflict(other.id, network.id, "subnet", theirs)
        for id in (network.id, other.id):
            self._overlapping.setdefault(id, set()).add(conflict)

    def _withdraw(self, network: Network) -> None:
        del self._best[network.id]
        self._names.discard(network.name, age(network))
        self._vnis.discard(network.vni, age(network))
        self._subnets.discard(network.id, network.subnets)
        self._lost.discard(network.id)
        for conflict in self._overlapping.pop(network.id, set()):
            other = conflict.loser if conflict.winner == network.id else conflict.winner
            rest = self._overlapping[other]
            rest.discard(conflict)
            if not rest:
                del self._overlapping[other]

    def _settle(self) -> dict[str, Network]:
        """Those that cannot have what their record says, each as it is instead.

        All of them anew, the oldest first, each beside what the records claim and what its
        elders were given: so the order in which records came leaves no trace.
        """
        names = dict(self._names.losers())
        vnis = dict(self._vnis.losers())
        given_names: set[str] = set()
        given_vnis: set[int] = set()
        losers: dict[str, Network] = {}
        for loser in sorted(names.keys() | vnis.keys()):
            network = self._best[loser[1]]
            lost = {loss.what: loss for loss in network.lost}
            name, vni = network.name, network.vni
            if loser in names:
                lost["name"] = Loss("name", name, self._names.holder(name))
                name = self._free_name(loser, name, given_names)
                given_names.add(name)
            if loser in vnis:
                lost["vni"] = Loss("vni", str(vni), self._vnis.holder(vni))
                vni = free_vni(network.id, _Either(self._vnis, given_vnis))
                given_vnis.add(vni)
            losers[network.id] = msgspec.structs.replace(
                network, name=name, vni=vni, lost=tuple(lost[what] for what in sorted(lost))
            )
        return losers

    def _free_name(self, loser: Age, name: str, given: set[str]) -> str:
        for size in ID_PIECES:
            shown = f"{name[: NAME_MAX - 1 - size]}-{loser[1][:size]}"
            if shown not in self._names and shown not in given:
                break
        return shown


class _Either(Container[int]):
    def __init__(self, *parts: Container[int]) -> None:
        self._parts = parts

    def __contains__(self, number: object) -> bool:
        return any(number in part for part in self._parts)


def is_closed_as(record: Network, others: Iterable[Network]) -> bool:
    """Whether a network stays encrypted, and without a way out, as far as a record of it says so,
    when of it these others are left."""
    others = list(others)
    return all(
        not closed or any(left)
        for closed, left in (
            (record.encrypted, [other.encrypted for other in others]),
            (record.internal, [other.internal for other in others]),
        )
    )


def give_way(networks: Iterable[Network]) -> dict[str, frozenset[str]]:
    """The subnets that have no way out where all of `networks` are: network id -> CIDR.

    One address can lead to one network only. The oldest has it; a younger one has what does
    not overlap any subnet that an older one there has.
    """
    taken: list[Block] = []
    found: dict[str, frozenset[str]] = {}
    for network in sorted(networks, key=age):
        lost = {s for s in network.subnets if any(block(s).meets(other) for other in taken)}
        taken += [block(s) for s in network.subnets if s not in lost]
        if lost:
            found[network.id] = frozenset(lost)
    return found
