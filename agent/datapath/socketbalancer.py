"""Balancing at connect(2) on one host: programs and maps in the kernel, kept as frontends say.

An accelerator, and nothing that others rely on: what it takes goes past the rules, which hold
the same in any case (balancer.py). All of it ends with the agent, however that ends, and where
the kernel refuses it there is none, which is told once.
What stands opposite: socketmaps.py says what is in the maps, bpf.py knows how;
serviceapplier.py says when; ledsockets.py ends connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Collection, Mapping

import structlog

from agent.datapath import bpf, sockdiag, socketmaps
from agent.datapath.balancerules import Placed
from agent.datapath.networks import Held
from agent.datapath.sandbox import in_namespaces
from agent.datapath.socketmaps import WRITTEN, Changes, Contents, Shape
from agent.datapath.socketprograms import MAPS, NOTE, PROGRAMS, TALLY
from agent.drivers.balancing import FrontendKey
from agent.drivers.base import Port

log = structlog.get_logger()

SO_NETNS_COOKIE = 71  # asm-generic/socket.h; Linux 5.14

COOKIE = struct.Struct("=Q")
FEW = 64  # elements that are written without a thread of their own
TOGETHER = 50  # frontends that are taken in at once, which takes some 3 ms; then others have a turn

Where = tuple[str, int]  # path and inode of a sandbox's namespace


class SocketBalancer:
    """The programs and maps of one agent, which act for its own sandboxes only."""

    def __init__(self, held: Mapping[int, Held], wanted: bool = True) -> None:
        """`held` are the networks as they are; not `wanted`: there is none of it."""
        self._held, self._wanted = held, wanted
        self._contents = Contents()
        self._placed: dict[FrontendKey, Placed] = {}
        self._of: dict[int, set[FrontendKey]] = {}  # those of each VNI
        self._due: set[FrontendKey] = set()  # may have changed, and are not taken in yet
        self._subnets: dict[int, tuple[str, ...]] = {}  # by VNI, as frontends were judged by
        # By VNI, as sandboxes were last admitted by; None: not all of them could be told.
        self._ports: dict[int, dict[str, tuple[Port, int]]] | None = None
        self._cookies: dict[Where, int] = {}
        self._maps: dict[str, bpf.Map] = {}
        self._programs: dict[int, int] = {}  # kind of attachment -> descriptor
        self._links: dict[int, int] = {}
        self._cgroup = -1
        self._tallies: mmap.mmap | None = None
        self._is_sure = False  # the maps have what they should, unless others changed them
        self._stack = contextlib.ExitStack()
        # A thread goes on when who waits for it is cancelled: descriptors are to live as long.
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def is_on(self) -> bool:
        """Whether anything is balanced so."""
        return bool(self._programs)

    def open(self) -> None:
        """Make the maps, and have the programs run, if this kernel lets us: they do nothing yet.
        Blocks."""
        with self._lock, contextlib.ExitStack() as stack:
            if not self._wanted or self._is_closed:
                return
            try:
                _cookie_here()
                sockdiag.check_possible()
                self._open(stack)
            except OSError as error:
                self._detach()
                log.warning(
                    "balancing.sockets_off",
                    why=str(error),
                    effect="connections to services go through nftables, which is slower",
                )
                return
            self._stack = stack.pop_all()

    def _open(self, stack: contextlib.ExitStack) -> None:
        btf = bpf.describe_notes(NOTE.size)
        stack.callback(os.close, btf)
        for name, spec in MAPS.items():
            self._maps[name] = bpf.Map(name, spec, btf if name == "notes" else 0)
            stack.callback(self._maps[name].close)
        tallies = self._maps["tallies"]
        self._tallies = mmap.mmap(tallies.fd, tallies.spec.entries * TALLY.size)
        stack.callback(self._tallies.close)
        descriptors = {name: each.fd for name, each in self._maps.items()}
        for kind, lines in PROGRAMS.items():
            self._programs[kind] = bpf.load(
                f"vxmesh_{kind}", lines, descriptors, bpf.CGROUP_SOCK_ADDR, kind
            )
            stack.callback(os.close, self._programs[kind])
        self._cgroup = bpf.open_cgroups()
        stack.callback(os.close, self._cgroup)
        self._attach()

    def close(self) -> None:
        """From here on new connections are balanced by the rules; those that there are go on."""
        with self._lock:
            self._is_closed = True
            self._detach()
            self._stack.close()

    def _detach(self) -> None:
        bpf.close_all(self._links.values())
        self._links = {}
        self._programs = {}

    # -- what is to be --

    async def alter(
        self,
        placed: Mapping[FrontendKey, Placed],
        networks: Collection[int],
        keys: Collection[FrontendKey] | None = None,
    ) -> None:
        """Take in how the frontends of these keys are by now, or all of them, and the sandboxes of
        the networks that have some. OSError: then everything is looked at again by `audit`."""
        if not self.is_on:
            return
        was_sure, self._is_sure = self._is_sure, False
        subnets = {vni: _own(self._held[vni]) for vni in networks if vni in self._held}
        moved = {v for v in networks if subnets.get(v) != self._subnets.get(v)}
        was_full = self._contents.is_full
        self._due |= self._placed.keys() | placed.keys() if keys is None else set(keys)
        self._due.update(*(self._of.get(vni, ()) for vni in moved))
        changes = await self._take_in(placed, subnets, moved)
        self._subnets = subnets
        sandboxes = await self._admit(networks)
        if self._contents.is_full and not was_full:
            log.warning("balancing.sockets_full", effect="what has no room goes through nftables")
        if not was_sure:
            await self.audit()
        else:
            await self._write(changes, sandboxes)

    async def _take_in(
        self,
        placed: Mapping[FrontendKey, Placed],
        subnets: Mapping[int, tuple[str, ...]],
        moved: Collection[int],
    ) -> Changes:
        """Frontends that are due as they are by now; those of networks that `moved` are judged
        anew."""
        # First what goes, which makes room.
        changes, several = Changes(), sorted(self._due, key=lambda key: (key in placed, key))
        for start in range(0, len(several), TOGETHER):
            shapes: dict[FrontendKey, Shape | None] = {}
            now = {key: placed.get(key) for key in several[start : start + TOGETHER]}
            for key, one in now.items():
                old = self._placed.get(key)
                if one is None:
                    if old:
                        shapes[key] = None
                elif (one is not old and one != old) or one.frontend.vni in moved:
                    vni = one.frontend.vni
                    shapes[key] = socketmaps.shape(one, subnets.get(vni, ()))
            changes = self._contents.alter(shapes, changes)
            # Only now: after a fault they are due as before.
            for key, one in now.items():
                self._place(key, one)
            self._due -= now.keys()
            if not shapes:
                continue
            for number in changes.counted_anew:
                self._tally(number, 0)
            changes.counted_anew.clear()
            await asyncio.sleep(0)
        return changes

    def _place(self, key: FrontendKey, one: Placed | None) -> None:
        """A frontend was taken in so; None: it has gone."""
        old = self._placed.pop(key, None)
        if old:
            vni = old.frontend.vni
            self._of[vni].remove(key)
            if not self._of[vni]:
                del self._of[vni]
        if one:
            self._placed[key] = one
            self._of.setdefault(one.frontend.vni, set()).add(key)

    async def audit(self) -> int:
        """Compare maps and links with what they should be, and put right what is not; how many
        elements and links others had changed. OSError."""
        if not self.is_on:
            return 0
        was_sure, self._is_sure = self._is_sure, False
        # A namespace may have gone, and another one be where it was.
        self._cookies, self._ports = {}, None
        asked_for = await self._admit(self._subnets)
        wanted = self._contents.wanted

        def work() -> int:
            with self._lock:
                if self._is_closed:
                    return 0
                there = {name: self._maps[name].read() for name in WRITTEN}
                changes = socketmaps.difference(wanted, there)
                # What does not belong there may be what takes the room of what does.
                self._apply(changes, goes_first=True)
                return socketmaps.count(changes) - socketmaps.count(asked_for)

        found = await asyncio.to_thread(work)
        found += self._attach()
        self._is_sure = True
        return found if was_sure else 0

    def counts(self) -> Counter[tuple[str, str]]:
        """Service and backend (ids) -> connections that were led from the one to the other."""
        if not self.is_on:
            return Counter()
        pairs = self._contents.numbers()
        return socketmaps.add_up({number: self._tally(number) for number in pairs}, pairs)

    # -- how it becomes so --

    async def _write(self, *several: Changes) -> None:
        self._is_sure = False

        def work() -> None:
            with self._lock:
                for changes in () if self._is_closed else several:
                    self._apply(changes)

        if sum(map(socketmaps.count, several)) > FEW:
            await asyncio.to_thread(work)
        else:
            work()
        self._is_sure = True

    def _apply(self, changes: Changes, goes_first: bool = False) -> None:
        """OSError: then all that changes is left to the rules, rather than led as it was."""
        try:
            if goes_first:
                self._delete(changes)
            for name in WRITTEN:
                self._maps[name].update(changes.come[name])
            if not goes_first:
                self._delete(changes)
        except OSError:
            with contextlib.suppress(OSError):
                led = socketmaps.touched(changes, self._contents.wanted)
                self._maps["frontends"].delete(led)
                self._maps["sandboxes"].delete(changes.gone["sandboxes"])
            raise

    def _delete(self, changes: Changes) -> None:
        for name in reversed(WRITTEN):
            self._maps[name].delete(changes.gone[name])

    def _attach(self) -> int:
        """Have all programs run; how many others had detached. OSError."""
        lost = 0
        for kind, program in self._programs.items():
            link = self._links.get(kind)
            if link is not None and bpf.is_attached(link):
                continue
            if link is not None:
                os.close(self._links.pop(kind))
                lost += 1
            self._links[kind] = bpf.attach(str(kind), program, self._cgroup, kind)
        return lost

    async def _admit(self, networks: Collection[int]) -> Changes:
        """Take in the sandboxes of these networks that can be told, if other ports are there."""
        ports = {vni: self._held[vni].ports for vni in networks if vni in self._held}
        if ports == self._ports:
            return Changes()
        ports, self._ports = {vni: dict(each) for vni, each in ports.items()}, None
        found = [
            (inside, vni)
            for vni, each in ports.items()
            for port, _ in each.values()
            if (inside := port.inside)
        ]
        unknown = {_where(port): port for port, _ in found if _where(port) not in self._cookies}
        if unknown:
            self._cookies |= await asyncio.to_thread(_read_cookies, unknown)
        wheres = {_where(port) for port, _ in found}
        self._cookies = {where: self._cookies[where] for where in wheres & self._cookies.keys()}
        changes = self._contents.admit(
            (c, vni) for port, vni in found if (c := self._cookies.get(_where(port)))
        )
        if len(self._cookies) == len(wheres):
            self._ports = ports
        return changes

    def _tally(self, number: int, value: int | None = None) -> int:
        """What has been counted by that number; with a value, from there on."""
        assert self._tallies is not None
        at = number * TALLY.size
        if value is not None:
            TALLY.pack_into(self._tallies, at, value)
        return int(TALLY.unpack_from(self._tallies, at)[0])


def _own(held: Held) -> tuple[str, ...]:
    """The subnets of a network that are its own on this host."""
    return tuple(s for s in held.bridge.subnets if s not in held.bridge.apart)


def _where(port: Port) -> Where:
    return port.netns, port.inode


def _read_cookies(ports: Mapping[Where, Port]) -> dict[Where, int]:
    """What the programs know each namespace by; those that are gone are left out."""
    return dict(in_namespaces(ports.values(), lambda port: (_where(port), _cookie_here())))


def _cookie_here() -> int:
    """That of the calling thread's namespace. OSError before Linux 5.14."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return int(
            COOKIE.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, COOKIE.size))[0]
        )
