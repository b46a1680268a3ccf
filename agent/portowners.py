"""Who on this host has a port, for errors that say so.

What stands opposite: ports.py, which finds out that somebody has. Source: proc(5), the tables
of sockets in /proc/net and the links in /proc/PID/fd.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

PROC = Path("/proc")
_LISTENS, _UNCONNECTED = "0A", "07"  # states of TCP and of UDP (include/net/tcp_states.h)


class PortOwner(NamedTuple):
    """A process with a socket on a port of this host."""

    address: str  # that it is bound to; 0.0.0.0 or :: for all
    pid: int  # 0: not to be found, as when it is in another PID namespace
    command: str

    def __str__(self) -> str:
        """For people."""
        who = f"{self.command} (process {self.pid})" if self.pid else "another process"
        return f"{who} at {self.address}"


def find_owner(
    protocol: Literal["tcp", "udp"], port: int, address: str = "", proc: Path = PROC
) -> PortOwner | None:
    """Who has a port at `address`, or at any if that is empty; None if nobody does.

    Looks through all processes' open files: some 10 ms on a busy host, for a thread.
    """
    wanted = ipaddress.ip_address(address) if address else None
    for bound, inode in _sockets(protocol, port, proc):
        if wanted is None or wanted.is_unspecified or bound.is_unspecified or bound == wanted:
            pid, command = _process(inode, proc)
            return PortOwner(str(bound), pid, command)
    return None


def _sockets(
    protocol: str, port: int, proc: Path
) -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, str]]:
    """The address and the inode of every socket that takes what comes to a port."""
    for name in (protocol, f"{protocol}6"):
        try:
            lines = (proc / "self" / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue  # no IPv6
        for line in lines:
            fields = line.split()
            where, _, number = fields[1].partition(":")
            takes = fields[3] == (_LISTENS if protocol == "tcp" else _UNCONNECTED)
            if takes and int(number, 16) == port:
                yield _address(where), fields[9]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Words of 32 bits, each in the machine's byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    return ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))


def _process(inode: str, proc: Path) -> tuple[int, str]:
    link = f"socket:[{inode}]"
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if any(str(file.readlink()) == link for file in (folder / "fd").iterdir()):
                return int(folder.name), (folder / "comm").read_text().strip()
        except OSError:
            continue  # it has ended, or is not ours to look into
    return 0, ""
