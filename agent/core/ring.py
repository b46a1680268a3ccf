"""Who owns which addresses of one network: a ring that nodes own parts of, as a CRDT.

After the ring of weave's ipam, with each node's statements kept apart by their origin. The
creator of the network owns all of it at epoch 0. Ownership moves by donation only: the owner
writes that another one owns the addresses now, at a higher epoch. So the epochs of an address
form one line, each written by the owner before, and the truth is, address by address, the
statement with the highest epoch. No partition can make two nodes own one address.
The one exception is a node that is lost for good: one other node, by consent of all, inherits
what it owned and stated (`reclaim`), as if it had donated it.

Each node publishes one `Claims` record: for every address that it *ever* owned, either that it
owns it, or to whom it gave it. It never stops saying what it gave away. If it did once the
receiver says so itself, a node that restarts with nothing but its own records could be told by
an old statement of a third node that it owns what it gave away long ago, and believe it.
So each node's statements only ever rise, and what a node knows of its own past is enough.

What stands opposite: core/space.py says what is free inside; core/addresses.py joins the two.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from agent.errors import Conflict, Invalid
from agent.model import Claims, Segment
from agent.notation import format_address

EPOCH_MAX = 1 << 62  # above it is garbage; keeps the next epochs inside msgpack's 64 bits
_WIDTH = {4: 4, 6: 16}  # family -> bytes of an address


class _Part(NamedTuple):
    """Addresses start..end, both included, are `owner`'s since `epoch`."""

    start: int
    end: int
    owner: str
    epoch: int

    def clip(self, start: int, end: int) -> _Part:
        if start <= self.start and self.end <= end:
            return self
        return _Part(max(self.start, start), min(self.end, end), self.owner, self.epoch)

    def over(self, other: _Part) -> bool:
        # Equal epochs of two owners are against the rules (a disk that was set back); the name
        # decides then, so that all still see the same owner.
        return (self.epoch, self.owner) > (other.epoch, other.owner)


def _join(parts: Iterable[_Part], raising: str = "") -> list[_Part]:
    """Adjacent parts of one owner and epoch become one; those of `raising` at any epoch."""
    joined: list[_Part] = []
    for part in parts:
        if joined:
            last = joined[-1]
            if (
                last.end + 1 == part.start
                and last.owner == part.owner
                and (last.epoch == part.epoch or part.owner == raising)
            ):
                epoch = max(last.epoch, part.epoch)
                joined[-1] = _Part(last.start, part.end, part.owner, epoch)
                continue
        joined.append(part)
    return joined


class _Cover:
    """Sorted, disjoint parts; there may be holes between them."""

    __slots__ = ("parts", "starts")

    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts
        self.starts = [p.start for p in parts]

    def cut(self, start: int, end: int) -> Iterator[_Part]:
        """The parts inside start..end, clipped to it."""
        first = max(bisect_right(self.starts, start) - 1, 0)
        for part in self.parts[first : bisect_right(self.starts, end)]:
            if part.end >= start:
                yield part.clip(start, end)

    def lift(self, new: _Part) -> None:
        """Put `new` wherever it is newer than what is there, or nothing is there."""
        first = max(bisect_left(self.starts, new.start) - 1, 0)  # with the neighbours, to join
        last = bisect_right(self.starts, new.end + 1)
        old = self.parts[first:last]
        pieces: list[_Part] = []
        behind: list[_Part] = []
        todo = new.start
        for part in old:
            if part.end < new.start:
                pieces.append(part)
                continue
            if part.start > new.end:
                behind.append(part)
                continue
            if todo < part.start:
                pieces.append(new.clip(todo, part.start - 1))
            if new.over(part):
                if part.start < new.start:
                    pieces.append(part.clip(part.start, new.start - 1))
                pieces.append(new.clip(part.start, part.end))
                if part.end > new.end:
                    pieces.append(part.clip(new.end + 1, part.end))
            else:
                pieces.append(part)
            todo = part.end + 1
        if todo <= new.end:
            pieces.append(new.clip(todo, new.end))
        pieces = _join(pieces + behind)
        if pieces != old:
            self.parts[first:last] = pieces
            self.starts[first:last] = [p.start for p in pieces]

    def covers(self, older: Iterable[_Part]) -> bool:
        """Whether this has all addresses of `older`, none of them at an older epoch."""
        for part in older:
            size = 0
            for mine in self.cut(part.start, part.end):
                if part.over(mine):
                    return False
                size += mine.end - mine.start + 1
            if size != part.end - part.start + 1:
                return False
        return True


class _Line:
    """The ring of one subnet: what each origin states, and the view that follows."""

    def __init__(self, creator: str, subnet: str) -> None:
        network = ipaddress.ip_network(subnet)
        self.family = network.version
        self.low = int(network.network_address)
        self.high = int(network.broadcast_address)
        self.creator = creator
        self.stated: dict[str, _Cover] = {}
        self.view = self._base()

    def _base(self) -> _Cover:
        return _Cover([_Part(self.low, self.high, self.creator, 0)])

    def read(self, segments: Iterable[Segment]) -> _Cover:
        """What of a record is about this subnet and makes sense; the rest is left out."""
        width = _WIDTH[self.family]
        found = []
        for s in segments:
            if s.family != self.family or len(s.start) != width or len(s.end) != width:
                continue
            start = max(int.from_bytes(s.start), self.low)
            end = min(int.from_bytes(s.end), self.high)
            if start <= end and s.owner and 0 <= s.epoch <= EPOCH_MAX:
                found.append(_Part(start, end, s.owner, s.epoch))
        found.sort()
        disjoint: list[_Part] = []
        for part in found:
            if not disjoint or disjoint[-1].end < part.start:
                disjoint.append(part)
        return _Cover(_join(disjoint))

    def state(self, origin: str, new: _Cover) -> bool:
        """Replace what `origin` stated; whether that is something else than before."""
        old = self.stated.get(origin)
        if new.parts == (old.parts if old else []):
            return False
        if new.parts:
            self.stated[origin] = new
        else:
            del self.stated[origin]
        before = set(old.parts) if old else set()
        after = set(new.parts)
        if new.covers(before - after):
            for part in after - before:
                self.view.lift(part)
        else:  # an origin that lost its disk, or is forgotten
            self.view = self._base()
            for cover in self.stated.values():
                for part in cover.parts:
                    self.view.lift(part)
        return True

    def claim(self, me: str) -> tuple[bool, list[_Part]]:
        """Bring what `me` states up to what it now owns; whether that changed it, and it."""
        found = [p for p in self.view.parts if p.owner == me]
        before = self.stated.get(me)
        for then in before.parts if before else ():
            for now in self.view.cut(then.start, then.end):
                if now.owner == me:
                    continue
                if then.owner == me:  # taken from it by another way than donation: remember
                    found.append(now)
                else:
                    found.append(then.clip(now.start, now.end))
        found.sort()
        # Own neighbours are stated as one, at the higher epoch of the two. That is safe: only
        # the owner at the highest epoch may write the next one, and that is `me`, so nobody
        # else can have written, or can ever write, an epoch of these addresses in between.
        # It is a donation to itself, as often as needed.
        cover = _Cover(_join(found, raising=me))
        return self.state(me, cover), cover.parts

    def give(self, me: str, to: str, start: int, end: int) -> None:
        """Donate what `me` owns all of. One epoch above all of it, for the reason in `claim`."""
        epoch = 1 + max(p.epoch for p in self.view.cut(start, end))
        part = _Part(start, end, to, epoch)
        self.view.lift(part)
        self.stated.setdefault(me, _Cover([])).lift(part)

    def inherit(self, lost: str, heir: str) -> int:
        """Have `heir` own what `lost` owns, and state what is known; how many it owns by that."""
        if not self.names(lost):
            return 0
        mine = self.stated.setdefault(heir, _Cover([]))
        moved = [p._replace(owner=heir, epoch=p.epoch + 1) for p in self.view.parts
                 if p.owner == lost]  # fmt: skip
        for part in moved:
            self.view.lift(part)
        for part in self.view.parts:
            mine.lift(part)
        return sum(part.end - part.start + 1 for part in moved)

    def names(self, node: str) -> bool:
        """Whether `node` owns, or by anybody's word ever owned, anything here."""
        return node == self.creator or any(
            part.owner == node for cover in self.stated.values() for part in cover.parts
        )

    def segments(self, parts: Iterable[_Part]) -> Iterator[Segment]:
        width = _WIDTH[self.family]
        for p in parts:
            yield Segment(
                self.family, p.start.to_bytes(width), p.end.to_bytes(width), p.owner, p.epoch
            )


class Ring:
    """The ownership of one network's addresses, as this node knows it.

    `creator` is a node id, `subnets` are CIDR without host bits that do not overlap.
    """

    def __init__(self, creator: str, subnets: Iterable[str]) -> None:
        lines = [_Line(creator, subnet) for subnet in subnets]
        self._lines = sorted(lines, key=lambda line: (line.family, line.low))
        self._by_width = {
            width: [line for line in self._lines if line.family == family]
            for family, width in _WIDTH.items()
        }
        self._owned: dict[tuple[str, int], list[tuple[int, int]]] | None = None
        self._claims: dict[str, Claims] = {}  # what has been asked for since the last change

    def merge(self, origin: str, claims: Claims) -> bool:
        """Replace what `origin` stated; whether that is something else than before.

        To be called with an origin's records in the order of their versions (core/replica.py
        sees to that); the order between origins does not matter. What is malformed, or outside
        the subnets, is left out.
        """
        changed = False
        for line in self._lines:
            changed |= line.state(origin, line.read(claims.segments))
        return self._note(changed)

    def forget(self, origin: str) -> bool:
        """Take back all that `origin` stated; whether there was something."""
        changed = False
        for line in self._lines:
            changed |= line.state(origin, _Cover([]))
        return self._note(changed)

    def owner(self, address: bytes) -> str | None:
        """The node id of an address's owner; None if it is outside every subnet."""
        number = int.from_bytes(address)
        for line in self._by_width.get(len(address), ()):
            if line.low <= number <= line.high:
                view = line.view
                return view.parts[bisect_right(view.starts, number) - 1].owner
        return None

    def owners_of(self, addresses: Sequence[bytes]) -> set[str | None]:
        """The owners of many; one look is enough where all lie within one part."""
        if addresses and len(set(map(len, addresses))) == 1:
            low, high = min(addresses), max(addresses)
            first, last = int.from_bytes(low), int.from_bytes(high)
            for line in self._by_width.get(len(low), ()):
                if line.low <= first and last <= line.high:
                    view = line.view
                    place = bisect_right(view.starts, first) - 1
                    if place == bisect_right(view.starts, last) - 1:
                        return {view.parts[place].owner}
        return set(map(self.owner, addresses))

    def owned(self, node: str, family: int) -> list[tuple[int, int]]:
        """The addresses of `node`, as sorted (first, last) inside one subnet each.

        Neighbours are joined whatever their epochs. The list is shared: do not change it.
        """
        if self._owned is None:
            self._owned = {}
            for line in self._lines:
                for p in line.view.parts:
                    spans = self._owned.setdefault((p.owner, line.family), [])
                    if spans and spans[-1][1] + 1 == p.start and p.start != line.low:
                        spans[-1] = (spans[-1][0], p.end)
                    else:
                        spans.append((p.start, p.end))
        return self._owned.get((node, family), [])

    def segments(self) -> list[Segment]:
        """All of the network, IPv4 first, sorted; neighbours of one owner and epoch joined."""
        return [s for line in self._lines for s in line.segments(line.view.parts)]

    def donate(self, me: str, to: str, start: int, end: int, family: int) -> None:
        """Make `to` the owner of start..end, both included, which must all be `me`'s.

        Conflict if they are not, Invalid if `to` is nobody else; nothing is changed then. The
        donation holds once `claims(me)` is on disk, which must be before `to` hears of it.
        """
        spans = [
            (line, max(start, line.low), min(end, line.high))
            for line in self._lines
            if line.family == family and start <= line.high and end >= line.low
        ]
        own = sum(
            p.end - p.start + 1
            for line, low, high in spans
            for p in line.view.cut(low, high)
            if p.owner == me
        )
        if start > end or own != end - start + 1:
            raise Conflict(
                f"addresses {_text(start, family)} to {_text(end, family)}",
                "are not all this node's to give",
                "Ask their owner",
            )
        if not to or to == me:
            raise Invalid(f"node id {to!r}", "is no other node's", "Give the id of the receiver")
        for line, low, high in spans:
            line.give(me, to, low, high)
        self._note(True)

    def reclaim(self, lost: str, heir: str) -> dict[int, int]:
        """Make `heir` the owner of all that `lost` owns; family -> how many addresses.

        Only for the one node that may do it: who removed `lost` with the consent of all others
        (core/removal.py). From here on `heir` also states what the ring looks like now, and with
        that all that `lost` ever stated: whoever forgets `lost` (and be it `heir` itself, after
        a restart with nothing but its own records) must not believe an older third statement
        about what it gave away. It holds once `claims(heir)` is on disk, as with a donation.
        """
        moved: dict[int, int] = {}
        for line in self._lines:
            moved[line.family] = moved.get(line.family, 0) + line.inherit(lost, heir)
        self._note(True)
        return moved

    def claims(self, me: str, network: str) -> Claims:
        """What `me` must publish now about the network with this id; empty if it never owned.

        From here on the ring takes it for stated: epochs that it raised stay raised.
        """
        known = self._claims.get(me)
        if known is not None and known.network == network:
            return known
        found: list[Segment] = []
        changed = False
        for line in self._lines:
            fresh, parts = line.claim(me)
            changed |= fresh
            found += line.segments(parts)
        self._note(changed)
        claims = self._claims[me] = Claims(network, tuple(found))
        return claims

    def check(self) -> None:
        """AssertionError unless each subnet is covered exactly, by disjoint parts with owners."""
        for line in self._lines:
            view = line.view
            at = line.low
            for part in view.parts:
                assert part.start == at, f"a hole or an overlap at {_text(at, line.family)}"
                assert part.end >= part.start, f"an empty part: {part}"
                assert part.owner and part.epoch >= 0, f"no owner or epoch: {part}"
                at = part.end + 1
            assert at == line.high + 1, f"ends at {at}, not {line.high + 1}"
            assert _join(view.parts) == view.parts, "neighbours that should be one"
            for origin, cover in [*line.stated.items(), ("", view)]:
                assert cover.starts == [p.start for p in cover.parts], f"index of {origin}"
                assert view.covers(cover.parts), f"the view is older than what {origin} states"

    def _note(self, changed: bool) -> bool:
        if changed:
            self._owned = None
            self._claims.clear()
        return changed


def _text(number: int, family: int) -> str:
    width = _WIDTH.get(family, 0)
    return format_address(number.to_bytes(width)) if 0 <= number < 1 << 8 * width else str(number)
