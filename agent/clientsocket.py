"""Which of an agent's unix sockets a user may connect, and what to tell who may connect none.

What stands opposite: api/front.py of the agent; clienttls.py is the way over TCP.
"""

from __future__ import annotations

import os

from agent.errors import Denied

SOCKET, READ_SOCKET = "agent.sock", "read.sock"


def unix_path(target: str) -> str | None:
    """The unix socket that a gRPC target names; None if it is another kind of target."""
    for prefix in ("unix://", "unix:"):
        if target.startswith(prefix):
            return target.removeprefix(prefix)
    return None


def _beside(path: str) -> str:
    """The socket for looking that is beside another."""
    directory, slash, _ = path.rpartition("/")
    return directory + slash + READ_SOCKET


def _is_open(path: str) -> bool:
    """Whether this process may connect a unix socket, as far as its mode goes; see unix(7)."""
    return os.access(path, os.W_OK, effective_ids=True)


def open_to_us(target: str) -> str:
    """The target that this user may connect: the socket for looking, where the other is shut."""
    path = unix_path(target)
    if path and path.rpartition("/")[2] == SOCKET and not _is_open(path):
        beside = _beside(path)
        if _is_open(beside):
            return f"unix://{beside}"
    return target


def shut_to_us(target: str) -> Denied | None:
    """The error if the agent's socket is there, but not for us."""
    path = unix_path(target)
    if path is None or _is_open(path):
        return None
    groups: list[str] = []
    try:
        groups.append(_group_of(path))
        groups.append(f"(to look only) {_group_of(_beside(path))}")
    except PermissionError:
        pass  # a directory before it is shut: to the groups too, perhaps
    except OSError:  # it, or what would be the other one, is not there
        if not groups:
            return None
    also = f" and the group {' and '.join(groups)}" if groups else ""
    return Denied(
        f"agent at {target}",
        f"is for root{also}, and you are uid {os.geteuid()}",
        "Run it as root" + (", or have yourself added to a group and log in again" if also else ""),
    )


def _group_of(path: str) -> str:
    """The group of a file by name, or by number if it has none; OSError as stat(2)."""
    import grp

    gid = os.stat(path).st_gid  # noqa: PTH116 (pathlib takes 4 ms to import)
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
