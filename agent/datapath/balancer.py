"""The balancing of services on one host: its table in the kernel, kept as frontends say.

What each frontend has in the sets and maps is known here, so a change is the difference of
what it had and has. Where two claim one key (a backend of two services; by mistake, one
published port) it stays until both are gone, and the frontend with the lower key holds it.
What stands opposite: serviceapplier.py, which says when; balancerules.py, which has the rules.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import structlog

from agent.datapath import affinityrules, balancerules
from agent.datapath.balancerules import BALANCE_TABLE, Claims, Placed
from agent.datapath.nftables import LIBRARY, Nftables
from agent.drivers.balancing import Frontend, FrontendKey, assign, eligible
from agent.drivers.marks import DOOR
from agent.notation import parse_address

log = structlog.get_logger()

SPANS_UNUSED = 8  # time-outs of affinity whose chains stay for a while without a frontend
AT_ONCE = 50  # frontends that are worked out before others have a turn: some 5 ms
# Elements that go into the kernel in one transaction, by a thread, while the next frontends are
# worked out; those of one frontend go at once. Many more would overrun the socket on which we hear
# of changes (tablemonitor.py), and then the whole table would be looked at.
TOGETHER = 5000

Touched = dict[str, dict[str, str | None]]  # set or map -> key -> value before, None: it was not


class Publication(NamedTuple):
    """A published port of this host: what the host's own table leads to a door of ours."""

    version: int
    address: bytes  # of the host; b"": any
    protocol: str
    port: int


class Way(NamedTuple):
    """What tells connections through a frontend to one backend in the tracking table."""

    protocol: str
    entry: bytes  # the VIP, or our end of the uplink
    entry_port: int
    backend: bytes
    backend_port: int


@dataclass(slots=True)
class Outcome:
    """What a change of frontends asks for besides the table."""

    published: bool = False  # the host's maps of published ports are others
    networks: set[int] = field(default_factory=set)  # VNIs that have a service now, or no longer
    vips: dict[int, list[bytes]] = field(default_factory=dict)  # by VNI, that came or went
    gone: set[Way] = field(default_factory=set)  # whose connections are to end
    opened: set[Publication] = field(default_factory=set)  # and published ports that came or went


class Balancer:
    """The table `inet vxmesh_balance` of our namespace."""

    def __init__(self, netns: str | Path, library: str = LIBRARY) -> None:
        """For the namespace at path `netns`."""
        self.table = Nftables(netns, library, BALANCE_TABLE)
        self._placed: dict[FrontendKey, Placed] = {}
        self._networks: Counter[int] = Counter()  # VNI -> how many of them are in it
        self.altered: set[FrontendKey] = set()  # of which they are others; for who takes that in
        self._claims: dict[FrontendKey, Claims] = {}
        # Set or map -> key -> who claims it -> value.
        self._claimed: dict[str, dict[str, dict[FrontendKey, str]]] = {}
        self._doors: dict[Publication, tuple[FrontendKey, int]] = {}
        self._local: frozenset[str] = frozenset()
        self._loaded = False
        self._is_there = True  # maybe, by an agent before
        self._spans: frozenset[int] = frozenset()  # time-outs of affinity that have their chains
        self._in_force: Counter[int] = Counter()  # those that frontends have -> how many
        self._is_full = False  # that there are too many has been told
        self._owed = Outcome()  # of changes that did not get into the kernel

    def close(self) -> None:
        """End the thread. The table stays."""
        self.table.close()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to balance."""
        return not self._placed

    @property
    def networks(self) -> frozenset[int]:
        """The VNIs in which there is a service."""
        return frozenset(self._networks)

    @property
    def publishes_ipv6(self) -> bool:
        """Whether a port is published over IPv6."""
        return any(publication.version == 6 for publication in self._doors)

    def published(self) -> dict[tuple[str, str], str]:
        """Elements of the host's maps of published ports: (map, key) -> value."""
        return balancerules.doors({p: door for p, (_, door) in self._doors.items()})

    @property
    def placed(self) -> Mapping[FrontendKey, Placed]:
        """The frontends that there are, as they are placed: another object for each change."""
        return self._placed

    def frontends(self) -> list[Frontend]:
        """Those that there are."""
        return [placed.frontend for placed in self._placed.values()]

    def ways(self, vips: Collection[bytes] | None = None) -> set[Way]:
        """All that connections may go by; or those of frontends with one of these VIPs."""
        return {
            way
            for placed in self._placed.values()
            if vips is None or placed.frontend.address in vips
            for way in _ways(placed)
        }

    async def retire(self) -> None:
        """Take the table out if there is nothing to balance: each packet would be looked at for
        it, and tracking would look for its connection. VxmeshError."""
        if self.is_idle and self._is_there:
            self._loaded = False
            await self.table.remove()
            self._is_there = False

    async def load(
        self, frontends: Mapping[FrontendKey, Frontend], local: frozenset[str]
    ) -> Outcome:
        """Make the table that of these frontends and of no other. VxmeshError.

        `local` are the ids of the endpoints on this host.
        """
        self._loaded = False
        changes: dict[FrontendKey, Frontend | None] = dict.fromkeys(self._placed)
        return await self.alter({**changes, **frontends}, local)

    async def alter(
        self, changes: Mapping[FrontendKey, Frontend | None], local: frozenset[str]
    ) -> Outcome:
        """Take in frontends that came, changed or (None) went. VxmeshError; what that change asks
        for is then in the outcome of the next one that succeeds."""
        outcome = self._owed
        before = self.networks
        changes = {**self._moved(local), **changes}
        self._local = local
        # Who got a door or lost one by that is to be placed anew, too.
        changes = {**self._allot(changes, outcome), **changes}
        doors: dict[FrontendKey, list[int]] = {}
        for owner, door in self._doors.values():
            doors.setdefault(owner, []).append(door)
        if not self._is_there and any(changes.values()):
            # Empty first: then it is filled piece by piece, while the next pieces are worked out.
            await self.table.load(balancerules.ruleset([], ()))
            self._is_there, self._loaded, self._spans = True, True, frozenset()
        whole, touched, sent = not self._loaded, Touched(), list[asyncio.Task[None]]()
        self._loaded = False  # whatever becomes of it
        try:
            for number, (key, frontend) in enumerate(changes.items(), 1):
                if not whole and sum(map(len, touched.values())) >= TOGETHER:
                    sent += self._send(touched)
                if number % AT_ONCE == 0:
                    await asyncio.sleep(0)
                old = self._placed.pop(key, None)
                self._count(old, -1)
                new = self._place(frontend, old, doors.get(key, ())) if frontend else None
                self._count(new, 1)
                if new:
                    self._placed[key] = new
                if old != new:
                    self.altered.add(key)
                    self._claim(key, balancerules.claims(new) if new else {}, touched)
                    _note(old, new, outcome)
            outcome.networks |= self.networks ^ before
            spans = frozenset(self._in_force)
            if not whole and len(self._spans - spans) <= SPANS_UNUSED:
                sent += self._send(touched)
        finally:
            failed = await asyncio.gather(*sent, return_exceptions=True)
        for error in filter(None, failed):
            raise error
        if whole and self.is_idle:
            pass  # whatever is in the table: the host may still lead there, and `retire` is next
        else:
            if whole or len(self._spans - spans) > SPANS_UNUSED:
                self._is_there = True
                await self.table.load(balancerules.ruleset([self._all()], spans))
                self._spans = spans
            self._loaded = self._is_there
        self._owed = Outcome()
        return outcome

    def _send(self, touched: Touched) -> list[asyncio.Task[None]]:
        """Begin to bring what was touched so far into the kernel; it is no longer touched then."""
        come: dict[str, dict[str, str]] = {}
        gone: dict[str, dict[str, str]] = {}
        for name, keys in touched.items():
            held = self._claimed.get(name, {})
            out, new = dict[str, str](), dict[str, str]()
            for text, value in keys.items():
                now = _first(held.get(text))
                if value == now:
                    continue
                if value is not None:
                    out[text] = value
                if now is not None:
                    new[text] = now
            if out:
                gone[name] = out
            if new:
                come[name] = new
        touched.clear()
        if not come and not gone:
            return []
        spans = frozenset(self._in_force)
        chains = affinityrules.chains(spans - self._spans)
        self._spans |= spans
        return [asyncio.create_task(self.table.alter(come, gone, chains))]

    def _moved(self, local: frozenset[str]) -> dict[FrontendKey, Frontend | None]:
        """The frontends that have a backend which came to this host or left it."""
        moved = local ^ self._local
        if not moved:
            return {}
        return {
            key: placed.frontend
            for key, placed in self._placed.items()
            if any(backend.key in moved for backend in placed.frontend.backends)
        }

    def _place(self, frontend: Frontend, old: Placed | None, doors: Iterable[int]) -> Placed:
        able = eligible(frontend, self._local)
        sticky = frontend.affinity > 0
        before = old.slots if old and not old.frontend.affinity else ()
        placed = Placed(
            frontend,
            assign(able, sticky, before),
            tuple(sorted(doors)),
            frozenset(b.key for b in frontend.backends if b.key in self._local),
        )
        stateful = self._in_force.keys() - {affinityrules.STATELESS}
        if not sticky or placed.span in stateful or len(stateful) < affinityrules.SPANS_MAX:
            return placed
        if not self._is_full:
            self._is_full = True
            most = affinityrules.SPANS_MAX
            log.warning("affinity.timeouts", most=most, service=frontend.service)
        return dataclasses.replace(placed, stateless=True)

    def _count(self, placed: Placed | None, by: int) -> None:
        """A network has one frontend more or one less, and so has its time-out."""
        if placed is None:
            return
        self._networks[placed.frontend.vni] += by
        if not self._networks[placed.frontend.vni]:
            del self._networks[placed.frontend.vni]
        if placed.span:
            self._in_force[placed.span] += by
            if not self._in_force[placed.span]:
                del self._in_force[placed.span]

    def _allot(
        self, changes: Mapping[FrontendKey, Frontend | None], outcome: Outcome
    ) -> dict[FrontendKey, Frontend | None]:
        """Give each published port its door: that of the same number if it is free.

        Then a rule of the host's that names the port means what it says in its forward chains
        too. Only one port at two addresses of a host, for two services, needs another number.
        """
        before_of = {key: self._placed[key].frontend for key in changes if key in self._placed}
        if all(
            (f.published if f else ()) == (before_of[key].published if key in before_of else ())
            for key, f in changes.items()
        ):
            return {}
        wanted: dict[Publication, FrontendKey] = {}
        held = {key: placed.frontend for key, placed in self._placed.items()} | dict(changes)
        for key, frontend in sorted(held.items()):
            for address, port in frontend.published if frontend else ():
                any_address = b"" if not any(address) else address
                publication = Publication(key.version, any_address, key.protocol, port)
                wanted.setdefault(publication, key)
        before = self._doors
        self._doors = {p: before[p] for p, key in wanted.items() if before.get(p, ("",))[0] == key}
        used = {(p.version, p.protocol, door) for p, (_, door) in self._doors.items()}
        for publication in sorted(wanted.keys() - self._doors.keys()):
            version, _, protocol, port = publication
            door = port
            while (version, protocol, door) in used:
                door = door - 1 if door != port else 65535
            used.add((version, protocol, door))
            self._doors[publication] = (wanted[publication], door)
        outcome.published |= before != self._doors
        moved = {
            p for p in before.keys() | self._doors.keys() if before.get(p) != self._doors.get(p)
        }
        outcome.opened |= moved
        owners = [doors[p][0] for p in moved for doors in (before, self._doors) if p in doors]
        return {key: held.get(key) for key in owners}

    def _claim(self, owner: FrontendKey, claims: Claims, touched: Touched) -> None:
        """Replace what `owner` claims; `touched` takes in the values before of what may differ."""
        old = self._claims.pop(owner, {})
        for name, elements in old.items():
            keep = claims.get(name, {})
            held, before = self._claimed[name], touched.setdefault(name, {})
            for text, value in elements.items():
                if keep.get(text) != value:
                    owners = held[text]
                    before.setdefault(text, _first(owners))
                    del owners[owner]
                    if not owners:
                        del held[text]
        for name, elements in claims.items():
            known = old.get(name, {})
            held, before = self._claimed.setdefault(name, {}), touched.setdefault(name, {})
            for text, value in elements.items():
                if known.get(text) != value:
                    before.setdefault(text, _first(held.get(text)))
                    held.setdefault(text, {})[owner] = value
        if claims:
            self._claims[owner] = claims

    def _all(self) -> Claims:
        return {
            name: {text: owners[min(owners)] for text, owners in keys.items()}
            for name, keys in self._claimed.items()
        }


def _first(owners: Mapping[FrontendKey, str] | None) -> str | None:
    """What the one of them that holds the key says; None if there is none."""
    return owners[min(owners)] if owners else None


def _ways(placed: Placed) -> Iterable[Way]:
    frontend = placed.frontend
    entries = [(parse_address(DOOR[frontend.version]), door) for door in placed.doors]
    if frontend.address:
        entries.append((frontend.address, frontend.port))
    for address, port in entries:
        for backend in frontend.backends:
            yield Way(frontend.protocol, address, port, backend.address, backend.port)


def _note(old: Placed | None, new: Placed | None, outcome: Outcome) -> None:
    """What the change of one frontend asks for."""
    ways = set(_ways(new) if new else ())
    outcome.gone |= set(_ways(old) if old else ())
    outcome.gone -= ways
    vips = {(p.frontend.vni, p.frontend.address) for p in (old, new) if p and p.frontend.address}
    if not (old and new and len(vips) == 1):
        for vni, vip in vips:
            outcome.vips.setdefault(vni, []).append(vip)
