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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from agent.datapath import packing
from agent.datapath.packing import AF_BRIDGE, AF_INET, AF_INET6, Batch, Row
from agent.drivers.base import Rows
from agent.syscalls import socket_in

SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER = 4 << 20  # bytes; a thousand failures of one batch must fit
RECEIVE = 1 << 16
DUMP_ATTEMPTS = 5  # a dump that others disturb is taken again; after that it is good enough

T = TypeVar("T")


class Bulk:
    """The rows of the devices in one network namespace."""

    def __init__(self, netns: str | Path) -> None:
        """Open in the namespace at path `netns`. OSError if it is none."""
        self._sock = socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            self._sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def close(self) -> None:
        """Close, once what is under way is done."""
        self._pool.shutdown(wait=True)
        self._sock.close()

    async def write(self, ifindex: int, rows: Rows) -> None:
        """Make the rows so; None deletes. What is already gone is fine; OSError for the rest.

        Every row is attempted, whatever becomes of the others.
        """
        await self._run(lambda: self._write(ifindex, rows, False))

    async def restore(self, ifindex: int, rows: Rows) -> tuple[int, int]:
        """Put back those rows that are not there; how many FDB and neighbour rows that were."""
        return await self._run(lambda: self._write(ifindex, rows, True))

    async def reconcile(self, ifindex: int, want: Rows, keep: bool = False) -> tuple[int, int]:
        """Compare all rows of a VXLAN device with `want` and write the difference only.

        With `keep` rows that are not wanted are left. Returns how many FDB and neighbour rows
        were written.
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

    async def static_macs(self, ifindex: int) -> set[bytes]:
        """The MACs that the bridge of port `ifindex` leads to that port by a static entry."""
        dumped = await self._run(lambda: self._dump(AF_BRIDGE, ifindex))
        return {
            mac
            for mac, _, flags, state in dumped
            if not flags & packing.NTF_SELF  # a bridge's own entries have no flag at all
            and state & packing.NUD_NOARP
            and not state & packing.NUD_PERMANENT
        }

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

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    # -- in the thread --

    def _write(self, ifindex: int, rows: Rows, exclusive: bool) -> tuple[int, int]:
        written = [0, 0]
        failures: list[OSError] = []
        for i, batches in enumerate(
            (
                packing.pack_fdb(ifindex, rows.fdb, exclusive),
                packing.pack_neighbours(ifindex, rows.neighbours, exclusive),
            )
        ):
            for batch in batches:
                try:
                    written[i] += self._send(batch)
                except OSError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        return written[0], written[1]

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

    def _reconcile(self, ifindex: int, want: Rows, keep: bool) -> tuple[int, int]:
        fdb = list(_difference(want.fdb, self._dump_fdb(ifindex), keep))
        neighbours = list(_difference(want.neighbours, self._dump_neighbours(ifindex), keep))
        self._write(ifindex, Rows(fdb, neighbours), False)
        return len(fdb), len(neighbours)

    def _dump_fdb(self, ifindex: int) -> dict[bytes, bytes]:
        return {
            mac: dst
            for mac, dst, flags, _ in self._dump(AF_BRIDGE, ifindex)
            if flags & packing.NTF_SELF and dst
        }

    def _dump_neighbours(self, ifindex: int) -> dict[bytes, bytes]:
        return {
            dst: mac
            for family in (AF_INET, AF_INET6)
            for mac, dst, _, state in self._dump(family, ifindex)
            if state & packing.NUD_PERMANENT and mac
        }

    def _dump(self, family: int, ifindex: int) -> list[tuple[bytes, bytes, int, int]]:
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


def _difference(want: Iterable[Row], have: dict[bytes, bytes], keep: bool) -> Iterator[Row]:
    wanted = {key: value for key, value in want}  # noqa: C416 - dict() would keep the GIL for long
    for key, value in wanted.items():
        if have.get(key) != value:
            yield key, value
    for key in () if keep else have:
        if key not in wanted:
            yield key, None
