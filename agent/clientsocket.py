"""Which of an agent's unix sockets a user may connect, and what to tell who may connect none.

What stands opposite: api/front.py of the agent; clienttls.py is the way over TCP.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.errors import Denied

SOCKET, READ_SOCKET = "agent.sock", "read.sock"


def _path(target: str) -> Path | None:
    """The unix socket that a gRPC target names; None if it is another kind of target."""
    for prefix in ("unix://", "unix:"):
        if target.startswith(prefix):
            return Path(target.removeprefix(prefix))
    return None


def _is_open(path: Path) -> bool:
    """Whether this process may connect a unix socket, as far as its mode goes; see unix(7)."""
    return os.access(path, os.W_OK, effective_ids=True)


def open_to_us(target: str) -> str:
    """The target that this user may connect: the socket for looking, where the other is shut."""
    path = _path(target)
    if path and path.name == SOCKET and not _is_open(path):
        beside = path.with_name(READ_SOCKET)
        if _is_open(beside):
            return f"unix://{beside}"
    return target


def shut_to_us(target: str) -> Denied | None:
    """The error if the agent's socket is there, but not for us."""
    path = _path(target)
    if path is None or _is_open(path):
        return None
    groups: list[str] = []
    try:
        groups.append(_group_of(path))
        groups.append(f"(to look only) {_group_of(path.with_name(READ_SOCKET))}")
    except FileNotFoundError:
        if not groups:
            return None
    except PermissionError:
        pass  # a directory before it is shut: to the groups too, perhaps
    also = f" and the group {' and '.join(groups)}" if groups else ""
    return Denied(
        f"agent at {target}",
        f"is for root{also}, and you are uid {os.geteuid()}",
        "Run it as root" + (", or have yourself added to a group and log in again" if also else ""),
    )


def _group_of(path: Path) -> str:
    """The group of a file by name, or by number if it has none; OSError as stat(2)."""
    import grp

    gid = path.stat().st_gid
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
