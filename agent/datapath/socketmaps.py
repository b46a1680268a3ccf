"""What belongs into the maps of the programs that balance at connect(2). Pure.

A frontend is one element by its VIP and port and one for each slot; the slots are those that the
rules have (balancing.assign), so weights, drains and the rest come out the same. A backend that
changes costs its own slots. What is not taken has no element, and goes the way of the rules:
UDP, affinity, what has no VIP or no backend that takes connections, backends in a node's own
stack or in another subnet than the VIP (a sandbox may reach that by another interface).
What stands opposite: socketprograms.py reads the maps; socketbalancer.py writes them.
"""

from __future__ import annotations

import itertools
import socket
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.datapath.balancerules import Placed
from agent.datapath.socketprograms import (
    ENTRY,
    FLAG,
    FRONTEND,
    MAPS,
    NUMBER,
    SANDBOX,
    SLOT,
)
from agent.drivers.balancing import FrontendKey
from agent.drivers.marks import LED, LED_MASK
from agent.notation import masked

Elements = dict[bytes, bytes]
WRITTEN = ("slots", "frontends", "sandboxes")  # maps that we alone write; in this order
HERE = FLAG.pack(1)  # value of a sandbox
UNCOUNTED = 0xFFFFFFFF  # number of a backend for which there is no room in the tallies
_MAPPED = bytes(10) + b"\xff\xff"


def entry(address: bytes, port: int) -> bytes:
    """An address (4 or 16 bytes) and port, as all maps have them."""
    return ENTRY.pack(_MAPPED + address if len(address) == 4 else address, socket.htons(port))


def mark(address: bytes, port: int) -> int:
    """The mark of sockets that were led by this VIP and port; the same after a restart. Two have
    the same one by a chance of one to 2^24; both must lead to one backend for it to matter."""
    return LED | (zlib.crc32(entry(address, port)) & ~LED_MASK & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Shape:
    """A frontend as the maps are to have it."""

    entry: bytes
    vni: int
    mark: int
    backends: tuple[str, ...]  # keys of all that there are: they are counted
    slots: tuple[tuple[str, bytes], ...]  # key and entry of each slot's; empty: not taken


def shape(placed: Placed, subnets: Collection[str]) -> Shape | None:
    """What belongs into the maps for a frontend; None if it has nothing to do with them.

    `subnets` (CIDR) are those of its network that are its own on this host.
    """
    frontend = placed.frontend
    if frontend.protocol != "tcp" or not frontend.address:
        return None
    targets = {b.key: entry(b.address, b.port) for b in frontend.backends}
    if not _is_taken(placed, subnets):
        slots: tuple[tuple[str, bytes], ...] = ()
    else:
        slots = tuple((key, targets[key]) for key in placed.slots)
    vip, port = frontend.address, frontend.port
    return Shape(entry(vip, port), frontend.vni, mark(vip, port), tuple(targets), slots)


def _is_taken(placed: Placed, subnets: Collection[str]) -> bool:
    frontend = placed.frontend
    if frontend.affinity or not placed.slots or any(b.outside for b in frontend.backends):
        return False
    for width, mask, start in map(masked, subnets):
        if width == len(frontend.address) and _number(frontend.address) & mask == start:
            return all(_number(b.address) & mask == start for b in frontend.backends)
    return False


def _number(address: bytes) -> int:
    return int.from_bytes(address, "big")


class Pair(NamedTuple):
    """Whose connections are counted."""

    service: str
    backend: str  # its key


@dataclass(slots=True)
class Changes:
    """What is to be done to the maps: first what comes, as WRITTEN says, then what goes, in the
    opposite order. So no frontend ever leads to a slot that is not there."""

    come: dict[str, Elements] = field(default_factory=lambda: {name: {} for name in WRITTEN})
    gone: dict[str, set[bytes]] = field(default_factory=lambda: {name: set() for name in WRITTEN})
    counted_anew: list[int] = field(default_factory=list)  # numbers of backends: from nought

    def set(self, name: str, key: bytes, value: bytes | None) -> None:
        """An element is to be so; None: not to be there."""
        if value is None:
            self.come[name].pop(key, None)
            self.gone[name].add(key)
        else:
            self.gone[name].discard(key)
            self.come[name][key] = value


@dataclass(slots=True)
class _Held:
    shape: Shape
    number: int  # of the frontend, no other's before or after
    tallies: dict[str, int]  # backend -> its number
    slots: tuple[bytes, ...]  # values


class Contents:
    """All that is to be in the maps of one host."""

    def __init__(self) -> None:
        self.wanted: dict[str, Elements] = {name: {} for name in WRITTEN}
        self.is_full = False  # something was left to the rules for want of room
        self._held: dict[FrontendKey, _Held] = {}
        # Who claims a VIP and port -> value, empty if it is left to the rules. By mistake two may:
        # then that with the lower key has it, as in the rules.
        self._claims: dict[bytes, dict[FrontendKey, bytes]] = {}
        # A program that is under way may still have a number that is no longer in use.
        self._numbers = itertools.count(1)
        self._tallies = iter(range(MAPS["tallies"].entries))
        self._free: list[int] = []

    def alter(
        self, shapes: Mapping[FrontendKey, Shape | None], changes: Changes | None = None
    ) -> Changes:
        """Take in frontends that came, changed or (None) went; what that changes, together with
        the `changes` of before."""
        if changes is None:
            changes = Changes()
        for key, shape in shapes.items():
            old = self._held.pop(key, None)
            new = self._hold(shape, old, changes) if shape else None
            if old:
                self._give_back(old, new)
                if new is None or new.shape.entry != old.shape.entry:
                    self._claim(old.shape.entry, key, None, changes)
            if new:
                self._held[key] = new
                self._slots(old, new, changes)
                self._claim(new.shape.entry, key, _value(new), changes)
            elif old:
                self._cut(old, 0, changes)
        return changes

    def admit(self, sandboxes: Iterable[tuple[int, int]]) -> Changes:
        """Take in which sandboxes there are: cookie of the namespace, VNI of a network."""
        wanted: Elements = {}
        for cookie, vni in sandboxes:
            if len(wanted) + 2 > MAPS["sandboxes"].entries:
                self.is_full = True
                break
            wanted[SANDBOX.pack(cookie, 0, 0)] = wanted[SANDBOX.pack(cookie, vni, 0)] = HERE
        changes, held = Changes(), self.wanted["sandboxes"]
        for key in held.keys() - wanted.keys():
            changes.set("sandboxes", key, None)
        for key in wanted.keys() - held.keys():
            changes.set("sandboxes", key, HERE)
        self.wanted["sandboxes"] = wanted
        return changes

    def numbers(self) -> dict[int, Pair]:
        """Whose connections each number in the tallies counts."""
        return {
            number: Pair(key.service, backend)
            for key, held in self._held.items()
            for backend, number in held.tallies.items()
            if number != UNCOUNTED
        }

    def _hold(self, shape: Shape, old: _Held | None, changes: Changes) -> _Held:
        before = old.tallies if old else {}
        tallies = {}
        for backend in shape.backends:
            if backend in before:
                tallies[backend] = before[backend]
                continue
            number = self._free.pop() if self._free else next(self._tallies, UNCOUNTED)
            tallies[backend] = number
            if number != UNCOUNTED:
                changes.counted_anew.append(number)
        slots = shape.slots
        room = MAPS["slots"].entries - len(self.wanted["slots"]) + (len(old.slots) if old else 0)
        if len(slots) > room or len(self.wanted["frontends"]) >= MAPS["frontends"].entries:
            self.is_full, slots = True, ()
        values = tuple(target + NUMBER.pack(tallies[key]) for key, target in slots)
        return _Held(shape, old.number if old else next(self._numbers), tallies, values)

    def _give_back(self, old: _Held, new: _Held | None) -> None:
        for backend, number in old.tallies.items():
            if number != UNCOUNTED and not (new and backend in new.tallies):
                self._free.append(number)

    def _slots(self, old: _Held | None, new: _Held, changes: Changes) -> None:
        before = old.slots if old else ()
        held = self.wanted["slots"]
        for slot, value in enumerate(new.slots):
            if slot >= len(before) or before[slot] != value:
                key = SLOT.pack(new.number, slot)
                held[key] = value
                changes.set("slots", key, value)
        if old:
            self._cut(old, len(new.slots), changes)

    def _cut(self, old: _Held, size: int, changes: Changes) -> None:
        for slot in range(size, len(old.slots)):
            key = SLOT.pack(old.number, slot)
            del self.wanted["slots"][key]
            changes.set("slots", key, None)

    def _claim(self, entry: bytes, key: FrontendKey, value: bytes | None, changes: Changes) -> None:
        claims = self._claims.setdefault(entry, {})
        claims.pop(key, None)
        if value is not None:
            claims[key] = value
        if not claims:
            del self._claims[entry]
        held = self.wanted["frontends"]
        now = claims[min(claims)] if claims else b""
        if held.get(entry, b"") == now:
            return
        if now:
            held[entry] = now
        else:
            del held[entry]
        changes.set("frontends", entry, now or None)


def _value(held: _Held) -> bytes:
    if not held.slots:
        return b""
    return FRONTEND.pack(held.shape.vni, held.number, len(held.slots), held.shape.mark)


def difference(wanted: Mapping[str, Elements], there: Mapping[str, Elements]) -> Changes:
    """What is to be done so that maps with these elements are as they should be."""
    changes = Changes()
    for name in WRITTEN:
        for key, value in wanted[name].items():
            if there[name].get(key) != value:
                changes.set(name, key, value)
        for key in there[name].keys() - wanted[name].keys():
            changes.set(name, key, None)
    return changes


def touched(changes: Changes, wanted: Mapping[str, Elements]) -> set[bytes]:
    """The keys of all frontends of which anything changes, were it a slot. `wanted` is what there
    is to be."""
    slots = changes.come["slots"].keys() | changes.gone["slots"]
    numbers = {SLOT.unpack(key)[0] for key in slots}
    led = {k for k, v in wanted["frontends"].items() if FRONTEND.unpack(v)[1] in numbers}
    return led | changes.come["frontends"].keys() | changes.gone["frontends"]


def count(changes: Changes) -> int:
    """How many elements."""
    return sum(map(len, changes.come.values())) + sum(map(len, changes.gone.values()))


def add_up(counts: Mapping[int, int], pairs: Mapping[int, Pair]) -> Counter[tuple[str, str]]:
    """Service and backend -> connections, of the counts by number."""
    found: Counter[tuple[str, str]] = Counter()
    for number, pair in pairs.items():
        found[pair] += counts.get(number, 0)
    return found
