"""FDB and neighbour rows in bulk, through a raw netlink socket used by one thread.

The thread's system calls run without the GIL, so that the event loop goes on while the kernel
takes the rows in. 10,000 + 10,000 rows take some 0.1 s, one row 0.1 ms.
What stands opposite: packing.py for the bytes, reconciler.py for what to write.
Source: netlink(7), rtnetlink(7); Linux net/core/neighbour.c, drivers/net/vxlan/vxlan_core.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from agent.datapath import linkstate, packing
from agent.datapath.linkstate import LinkState
from agent.datapath.packing import AF_BRIDGE, AF_INET, AF_INET6, NTF_SELF, Batch, Defaults, Row
from agent.drivers.base import DEFAULT, Rows
from agent.syscalls import socket_in

SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER = 4 << 20  # bytes; a thousand failures of one batch must fit
RECEIVE = 1 << 16
MUTED_ROWS = 100  # from so many on, the events of our own rows are not worth hearing
DUMP_ATTEMPTS = 5  # a dump that others disturb is taken again; after that it is good enough

T = TypeVar("T")
Muting = Callable[[int, bool], AbstractContextManager[None]]
Dumped = tuple[bytes, bytes, int, int]  # MAC, destination, flags, state


class Bulk:
    """The rows of the devices in one network namespace."""

    def __init__(
        self,
        netns: str | Path,
        muting: Muting = lambda *_: contextlib.nullcontext(),
    ) -> None:
        """Open in the namespace at path `netns`. OSError if it is none.

        `muting` is entered with the device, and whether they are deleted, while many of its
        rows are written.
        """
        self._muting = muting
        self._sock = socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            self._sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        self._sock.bind((0, 0))
        self.port: int = self._sock.getsockname()[0]  # who asks, in what the kernel tells of it
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        # Where devices' default rows lead, as they were last written: reading them is reading all.
        # For the thread only.
        self._defaults: dict[int, frozenset[bytes]] = {}

    def close(self) -> None:
        """Close, once what is under way is done."""
        self._pool.shutdown(wait=True)
        self._sock.close()

    def write(
        self, ifindex: int, rows: Rows, keep: bool = False, fresh: bool = False
    ) -> asyncio.Future[tuple[int, int]]:
        """Begin to make the rows so; None deletes, and with `keep` default rows that are not
        wanted are left. What is already gone is fine; OSError for the rest. How many FDB and
        neighbour rows were written.

        Every row is attempted, whatever becomes of the others. Several writes that were begun
        are done one after the other. `fresh`: of a device that may have another one's number.
        """
        return self._run(lambda: self._write(ifindex, rows, False, keep, fresh))

    def note_defaults(self, ifindex: int, seen: Defaults) -> None:
        """Default rows of a device came or went. If any was not as it was written here, the next
        write looks at all.

        That is judged once what was begun before is done, whose own doing they may be.
        """
        self._pool.submit(self._note_defaults, ifindex, seen)

    async def restore(self, ifindex: int, rows: Rows) -> tuple[int, int]:
        """Put back those rows that are not there; how many FDB and neighbour rows that were."""
        return await self._run(lambda: self._write(ifindex, rows, True, True))

    async def correct(self, ifindex: int, rows: Rows) -> tuple[int, int]:
        """Write those rows that are not so; how many FDB and neighbour rows that were.

        Each is looked at by itself: for a few out of many.
        """
        return await self._run(lambda: self._correct(ifindex, rows))

    async def reconcile(
        self, ifindex: int, want: Rows, keep: bool = False
    ) -> tuple[set[bytes], set[bytes]]:
        """Compare all rows of a VXLAN device with `want` and write the difference only.

        With `keep` rows that are not wanted are left. Returns the MACs and the addresses of
        the rows that were written.
        """
        return await self._run(lambda: self._reconcile(ifindex, want, keep))

    async def dump_fdb(self, ifindex: int) -> dict[bytes, bytes]:
        """MAC -> VTEP of a VXLAN device."""
        return await self._run(lambda: self._dump_fdb(ifindex))

    async def dump_neighbours(self, ifindex: int) -> dict[bytes, bytes]:
        """Address -> MAC of a device, permanent rows only, IPv4 and IPv6."""
        return await self._run(lambda: self._dump_neighbours(ifindex))

    async def add_static(self, ifindex: int, mac: bytes) -> None:
        """On the bridge of port `ifindex`, lead `mac` to that port."""
        await self._run(lambda: self._send((packing.pack_static(ifindex, mac), 1)))

    async def drop_static(self, ifindex: int, mac: bytes) -> None:
        """Lead `mac` there no longer; fine if it was not."""
        await self._run(lambda: self._send((packing.pack_drop_static(ifindex, mac), 1)))

    async def static_macs(self, ifindex: int) -> set[bytes]:
        """The MACs that the bridge of port `ifindex` leads to that port by a static entry."""
        return await self._run(lambda: _statics(self._dump(AF_BRIDGE, ifindex)))

    async def misled(self, ports: Mapping[int, bytes]) -> set[int]:
        """Those ports (device -> the MAC behind it) that not just their own MAC is led to."""
        return await self._run(
            lambda: {i for i, mac in ports.items() if _statics(self._dump(AF_BRIDGE, i)) != {mac}}
        )

    async def links(self, bridge: int) -> list[LinkState]:
        """A bridge, if it is there, and the devices on it; with 0 all devices that there are."""
        return await self._run(lambda: self._links(bridge))

    async def addresses(self, ifindex: int) -> set[str]:
        """The addresses of a device, in interface notation."""
        return await self._run(lambda: self._addresses(ifindex))

    async def delete_link(self, ifindex: int) -> None:
        """Delete a device; fine if it is gone.

        Not by pyroute2: a netlink request is worked off in the thread that sends it, and the
        end of a device waits for all processors, some 20 ms (synchronize_net).
        """
        try:
            await self._run(lambda: self._send((packing.pack_delete_link(ifindex), 1)))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def _run(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Begin now, or after what was begun before; not only once the loop has its next turn,
        which it may have a delta of a thousand records later."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function)

    # -- in the thread --

    def _note_defaults(self, ifindex: int, seen: Defaults) -> None:
        known = self._defaults.get(ifindex)
        if known is not None and any(came != (vtep in known) for vtep, came in seen):
            del self._defaults[ifindex]

    def _write(
        self,
        ifindex: int,
        rows: Rows,
        exclusive: bool = False,
        keep: bool = False,
        fresh: bool = False,
    ) -> tuple[int, int]:
        if fresh:
            self._defaults.pop(ifindex, None)
        deleted = sum(value is None for part in (rows.fdb, rows.neighbours) for _, value in part)
        with contextlib.ExitStack() as stack:
            # Not both where it is one: others may delete what we are about to put back.
            if deleted > MUTED_ROWS:
                stack.enter_context(self._muting(ifindex, True))
            if len(rows.fdb) + len(rows.neighbours) - deleted > MUTED_ROWS:
                stack.enter_context(self._muting(ifindex, False))
            return self._write_all(ifindex, rows, exclusive, keep)

    def _write_all(self, ifindex: int, rows: Rows, exclusive: bool, keep: bool) -> tuple[int, int]:
        failures: list[OSError] = []
        defaults = led = 0
        if rows.defaults is not None:
            try:
                known = None if exclusive else self._defaults.get(ifindex)
                defaults = self._write_defaults(ifindex, rows.defaults, known, keep)
            except OSError as error:
                failures.append(error)
        if rows.floods:  # the bridge leads nothing there that the device has no row for
            gone = [row for row in rows.fdb if row[1] is None]
            led += self._send_each(packing.pack_entries(ifindex, gone), failures)
        fdb = self._send_each(packing.pack_fdb(ifindex, rows.fdb, exclusive), failures)
        if rows.floods:
            come = [row for row in rows.fdb if row[1] is not None]
            led += self._send_each(packing.pack_entries(ifindex, come, exclusive), failures)
        batches = packing.pack_neighbours(ifindex, rows.neighbours, exclusive)
        neighbours = self._send_each(batches, failures)
        if failures:
            raise failures[0]
        return max(fdb, led) + defaults, neighbours

    def _send_each(self, batches: Iterable[Batch], failures: list[OSError]) -> int:
        written = 0
        for batch in batches:
            try:
                written += self._send(batch)
            except OSError as error:
                failures.append(error)
        return written

    def _write_defaults(
        self,
        ifindex: int,
        want: frozenset[bytes],
        found: Iterable[bytes] | None = None,
        keep: bool = False,
    ) -> int:
        """Have a device's default rows lead to these VTEPs; how many of them did not, or did too
        many. `found` is where they lead, if that is known; `keep` as for `reconcile`.

        One that the kernel refuses keeps none of the others from being written.
        """
        found = list(_led(self._dump(AF_BRIDGE, ifindex)) if found is None else found)
        self._defaults.pop(ifindex, None)
        have = frozenset(found)
        come, gone = want - have, frozenset[bytes]() if keep else have - want
        changed = len(come) + len(gone)
        failures: list[OSError] = []
        is_ours = len(have) == len(found)  # no VTEP twice, by other ports or VNIs
        for vtep in gone:
            batch = packing.pack_default(ifindex, vtep, False), 1
            is_ours &= self._send_each([batch], failures) == 1
        if not is_ours:  # a row that is none of ours in more than its VTEP goes with all
            changed = max(1, changed)
            come = want | have if keep else want
            self._send_each(packing.pack_fdb(ifindex, [(DEFAULT, None)]), failures)
        batches = [(packing.pack_default(ifindex, vtep, True), 1) for vtep in come]
        self._send_each(batches, failures)
        if failures:
            raise failures[0]
        self._defaults[ifindex] = want | have if keep else want
        return changed

    def _send(self, batch: Batch) -> int:
        """Send a batch and take its answers in; how many rows were not fine already."""
        data, rows = batch
        self._sock.send(data)
        failure: OSError | None = None
        # The kernel has handled the whole batch, and queued all answers, when send returns.
        while True:
            try:
                received = self._sock.recv(RECEIVE)
            except OSError:
                self._drain()
                raise
            for code, message in packing.answers(received):
                if code in (errno.ENOENT, errno.ESRCH, errno.EEXIST):
                    rows -= 1
                elif code and failure is None:
                    failure = OSError(code, f"{packing.describe(message)}: {os.strerror(code)}")
                if packing.is_last(message):
                    if failure:
                        raise failure
                    return rows

    def _addresses(self, ifindex: int) -> set[str]:
        found: set[str] = set()
        self._sock.send(packing.pack_dump_addresses(ifindex))
        while not packing.read_addresses(self._sock.recv(RECEIVE), found):
            pass
        return found

    def _drain(self) -> None:
        """Forget what is still queued, so that the next batch gets its own answers."""
        with contextlib.suppress(OSError):
            while True:
                self._sock.recv(RECEIVE, socket.MSG_DONTWAIT)

    def _reconcile(self, ifindex: int, want: Rows, keep: bool) -> tuple[set[bytes], set[bytes]]:
        dumped = self._dump(AF_BRIDGE, ifindex)
        have = _rows(dumped)
        if want.defaults is not None:
            have.pop(DEFAULT, None)
        fdb = list(_difference(want.fdb, have, keep))
        neighbours = list(_difference(want.neighbours, self._dump_neighbours(ifindex), keep))
        # The bridge itself is to lead nothing here, as it floods; or just what there are rows for.
        astray = _statics(dumped)
        if want.floods:
            led, wanted, named = astray, {mac for mac, _ in want.fdb}, {mac for mac, _ in fdb}
            astray = set() if keep else led - wanted - named
            fdb += [row for row in want.fdb if row[0] not in led and row[0] not in named]
        failures: list[OSError] = []
        try:
            self._write(ifindex, Rows(fdb, neighbours, want.floods))
        except OSError as error:
            failures.append(error)
        batches = [(packing.pack_drop_static(ifindex, mac), 1) for mac in astray]
        self._send_each(batches, failures)
        changed = astray | {mac for mac, _ in fdb}
        try:
            if want.defaults is not None and self._write_defaults(
                ifindex, want.defaults, _led(dumped), keep
            ):
                changed.add(DEFAULT)
        except OSError as error:
            failures.append(error)
        if failures:
            raise failures[0]
        return changed, {address for address, _ in neighbours}

    def _correct(self, ifindex: int, rows: Rows) -> tuple[int, int]:
        fdb = [
            (mac, vtep)
            for mac, vtep in rows.fdb
            if _rows(self._get(packing.pack_get(ifindex, mac))).get(mac) != vtep
        ]
        neighbours = [
            (address, mac)
            for address, mac in rows.neighbours
            if _permanent(self._get(packing.pack_get_neighbour(ifindex, address))).get(address)
            != mac
        ]
        try:
            self._write(ifindex, Rows(fdb, neighbours, rows.floods))
        finally:  # whatever becomes of those
            defaults = 0 if rows.defaults is None else self._write_defaults(ifindex, rows.defaults)
        return len(fdb) + defaults, len(neighbours)

    def _get(self, request: bytes) -> list[Dumped]:
        reader = packing.DumpReader()
        self._sock.send(request)
        reader.feed(self._sock.recv(RECEIVE))  # one datagram: the row, or that there is none
        return reader.rows

    def _links(self, bridge: int) -> list[LinkState]:
        found = []
        requests = [(linkstate.pack_get_link(bridge), False)] if bridge else []
        for request, is_dump in [*requests, (linkstate.pack_dump_links(bridge), True)]:
            self._sock.send(request)
            more = True
            while more:
                data = self._sock.recv(RECEIVE)
                more = is_dump
                for offset, kind in packing.messages(data):
                    if kind == linkstate.RTM_NEWLINK:
                        found.append(linkstate.read_link(data, offset))
                    else:
                        more = False
        return found

    def _dump_fdb(self, ifindex: int) -> dict[bytes, bytes]:
        return _rows(self._dump(AF_BRIDGE, ifindex))

    def _dump_neighbours(self, ifindex: int) -> dict[bytes, bytes]:
        families = AF_INET, AF_INET6
        return _permanent([row for family in families for row in self._dump(family, ifindex)])

    def _dump(self, family: int, ifindex: int) -> list[Dumped]:
        request = packing.pack_dump(family, ifindex)
        for _ in range(DUMP_ATTEMPTS):
            reader = packing.DumpReader()
            self._sock.send(request)
            while not reader.feed(self._sock.recv(RECEIVE)):
                pass
            if reader.error:
                raise OSError(reader.error, f"dump of {ifindex}: {os.strerror(reader.error)}")
            if not reader.disturbed:
                break
        return reader.rows


def _led(dumped: Iterable[Dumped]) -> Iterator[bytes]:
    """Where a device's default rows lead."""
    return (vtep for mac, vtep, flags, _ in dumped if mac == DEFAULT and flags & NTF_SELF)


def _rows(dumped: Iterable[Dumped]) -> dict[bytes, bytes]:
    """MAC -> VTEP of a VXLAN device. Only DEFAULT, which is looked at by itself, and a group's
    MAC, which is never wanted, can have two."""
    return {mac: vtep for mac, vtep, flags, _ in dumped if flags & packing.NTF_SELF and vtep}


def _statics(dumped: Iterable[Dumped]) -> set[bytes]:
    """The MACs of a bridge's static entries, which have no flag at all."""
    return {
        mac
        for mac, _, flags, state in dumped
        if not flags & packing.NTF_SELF
        and state & packing.NUD_NOARP
        and not state & packing.NUD_PERMANENT
    }


def _permanent(dumped: Iterable[Dumped]) -> dict[bytes, bytes]:
    """Address -> MAC of the permanent neighbours."""
    return {dst: mac for mac, dst, _, state in dumped if state & packing.NUD_PERMANENT and mac}


def _difference(want: Iterable[Row], have: dict[bytes, bytes], keep: bool) -> Iterator[Row]:
    wanted = {key: value for key, value in want}  # noqa: C416 - dict() would keep the GIL for long
    for key, value in wanted.items():
        if have.get(key) != value:
            yield key, value
    for key in () if keep else have:
        if key not in wanted:
            yield key, None
