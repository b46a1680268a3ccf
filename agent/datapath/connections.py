"""Ends the connections that lead to a backend which is gone for good.

They are deleted from the table of connections, so that what still comes is no part of any:
TCP is reset (balancerules.py, chain `stray`), and clients are prodded so that something does
come at once, also from one that only waits for an answer; UDP begins anew at another backend.
What stands opposite: serviceapplier.py, which says which; conntrack.py and prods.py,
which know how.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from agent.datapath import prods
from agent.datapath.balancer import Publication, Way
from agent.datapath.conntrack import Conntrack, Entry, Tuple, with_table
from agent.drivers.marks import DOOR
from agent.notation import format_address, parse_address
from agent.syscalls import in_netns

log = structlog.get_logger()

FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}  # by length of address
DOORS = frozenset(parse_address(door) for door in DOOR.values())
FEW = 8  # addresses to look for in a message; with more it is quicker read


class Connections:
    """Those of one host."""

    def __init__(self, own: str | Path, host: str | Path) -> None:
        """`own` and `host` are the paths of our namespace and the host's."""
        self._own, self._host = own, host

    async def end(self, gone: Collection[Way]) -> None:
        """End those that go by one of these ways. OSError."""
        backends = {way.backend for way in gone}
        few = backends if len(backends) <= FEW else None
        for family in {FAMILIES[len(backend)] for backend in backends}:
            await asyncio.to_thread(self._end, family, few, lambda way: way in gone)

    async def end_others(self, known: Collection[Way]) -> None:
        """End those that were balanced and go by none of these ways: a start's compare."""
        for family in FAMILIES.values():
            await asyncio.to_thread(self._end, family, None, lambda way: way not in known)

    async def forget(self, opened: Collection[Publication]) -> None:
        """Have the host forget what it knows of UDP packets to these ports of its own, before they
        opened or while they were: the rules look at a connection's first packet only. What leads
        elsewhere by a port of that number is left alone. OSError."""
        wanted: dict[int, set[bytes]] = {}
        for publication in opened:
            if publication.protocol == "udp":
                wanted.setdefault(publication.port, set()).add(publication.address)
        if not wanted:
            return

        def work(table: Conntrack) -> None:
            for family in FAMILIES.values():
                found = [
                    entry
                    for entry in table.find(family)
                    if entry.protocol == socket.IPPROTO_UDP and entry.original.target_port in wanted
                ]
                own = in_netns(self._host, lambda: _own({e.original.target for e in found}))  # noqa: B023
                stale = []
                for entry in found:
                    target, addresses = entry.original.target, wanted[entry.original.target_port]
                    if target in addresses or (b"" in addresses and target in own):
                        stale.append(entry)
                table.delete(stale, family)

        await asyncio.to_thread(with_table, self._host, work)

    def _end(
        self, family: int, needles: Collection[bytes] | None, ends: Callable[[Way], bool]
    ) -> None:
        deleted: list[Entry] = []

        def work(table: Conntrack) -> None:
            found = [e for e in table.find(family, needles) if _is_balanced(e) and ends(_way(e))]
            deleted.extend(table.delete(found, family))

        with_table(self._own, work)
        if not deleted:
            return
        log.info("datapath.connections_ended", count=len(deleted))
        over_tcp = [e.original for e in deleted if e.protocol == socket.IPPROTO_TCP]
        inside = [_back(t) for t in over_tcp if t.target not in DOORS]
        outside = {t for t in over_tcp if t.target in DOORS}
        if inside:
            prods.send(self._own, family, inside)
        if outside:
            prods.send(self._host, family, self._seen_by_host(family, outside))

    def _seen_by_host(self, family: int, doors: Collection[Tuple]) -> list[Tuple]:
        """From whom to whom a prod is to go for connections that came to our doors: as the
        client knows it, before the host led it there."""
        found: list[Tuple] = []

        def work(table: Conntrack) -> None:
            for entry in table.find(family, DOORS):
                if _back(entry.reply) in doors:
                    found.append(_back(entry.original))

        with_table(self._host, work)
        return found


def _own(addresses: Collection[bytes]) -> set[bytes]:
    """Those of them that are this namespace's: only to them can a socket be bound."""
    own = set()
    for address in addresses:
        probe = socket.socket(FAMILIES[len(address)], socket.SOCK_DGRAM)
        with probe, contextlib.suppress(OSError):
            probe.bind((format_address(address), 0))
            own.add(address)
    return own


def _back(one: Tuple) -> Tuple:
    """The other direction, as it would be without translation."""
    return Tuple(one.target, one.target_port, one.source, one.source_port)


def _is_balanced(entry: Entry) -> bool:
    return entry.original.target != entry.reply.source


def _way(entry: Entry) -> Way:
    original, reply = entry.original, entry.reply
    protocol = "tcp" if entry.protocol == socket.IPPROTO_TCP else "udp"
    return Way(protocol, original.target, original.target_port, reply.source, reply.source_port)
