"""Rows deleted behind an agent's back, as fast as the kernel takes it, and when they are back.

Opposite: observe.py, which sees them come back.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

from agent.datapath import packing
from agent.datapath.packing import Batch
from tests.bench.observe import PREFIX, Enter, Observer

RECEIVE = 1 << 16


class Damage:
    """The rows of the benchmark's endpoints on one VXLAN device."""

    def __init__(self, enter: Enter, device: str) -> None:
        """`enter` runs a function in the device's namespace. OSError if there is no such device."""
        self._observer = Observer(enter, device)
        self._socket = enter(_netlink)

    def wait(self, count: int) -> None:
        """Return when as many FDB rows and as many neighbour rows are there."""
        self._observer.watch(count, count).result()

    def mend(self, count: int) -> float:
        """Delete all of `count` FDB rows and `count` neighbour rows; seconds from the first
        deletion until all are there again, by the kernel's events and by a dump."""
        ifindex = self._observer.ifindex
        macs, addresses = self._observer.dump()
        fdb = packing.pack_fdb(ifindex, [(PREFIX + mac, None) for mac in macs])
        neighbours = packing.pack_neighbours(ifindex, [(address, None) for address in addresses])
        batches = [*fdb, *neighbours]
        assert (len(macs), len(addresses)) == (count, count)
        begin = time.monotonic()
        self._send(batches)
        return self._observer.watch(count, count).result() - begin

    def close(self) -> None:
        """Look no more."""
        self._observer.close()
        self._socket.close()

    def _send(self, batches: Iterable[Batch]) -> None:
        """OSError if a row was not there: then less was deleted than is said."""
        for data, _ in batches:
            self._socket.send(data)
            is_done = False
            while not is_done:
                for code, message in packing.answers(self._socket.recv(RECEIVE)):
                    if code:
                        raise OSError(code, f"deletion of row {packing.describe(message)}")
                    is_done = packing.is_last(message)


def _netlink() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    return socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
