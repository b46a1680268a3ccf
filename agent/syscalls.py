"""System calls that CPython 3.11 lacks: setns, unshare, mount, umount2, through libc by ctypes.

The lowest room: datapath/, cli/ and testbed/ stand on it, and it imports nothing of vxmesh.
Each call raises OSError with the kernel's errno. See namespaces(7), mount(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 32, 4096, 16384, 1 << 18, 1 << 19
MNT_DETACH = 2
_PR_SET_NAME = 15
_NR_OPENAT2 = 437  # on every architecture; Linux 5.6
_RESOLVE_IN_ROOT = 0x10  # linux/openat2.h
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Linux 4.13
_NGROUPS_MAX = 65536  # linux/limits.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)

_libc.getsockopt.argtypes = (
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint32),
)

T = TypeVar("T")


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")


def setns(fd: int, kind: int = 0) -> None:
    """Move the calling *thread* into the namespace that `fd` refers to; see setns(2)."""
    _check(_libc.setns(fd, kind), "setns")


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces of the kinds in `flags`; see unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def mount(
    source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str = ""
) -> None:
    """mount(2)."""
    encoded = [None if v is None else os.fsencode(v) for v in (source, target, fstype)]
    _check(_libc.mount(*encoded, flags, data.encode() or None), f"mount {target}")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def open_in_root(root: int, path: str, flags: int) -> int:
    """A file descriptor of `path` as a process whose root directory is `root` finds it, symbolic
    links included; see openat2(2)."""
    how = struct.pack("QQQ", flags, 0, _RESOLVE_IN_ROOT)
    fd = int(_libc.syscall(_NR_OPENAT2, root, os.fsencode(path), how, len(how)))
    _check(min(fd, 0), f"openat2 {path}")
    return fd


def set_thread_name(name: str) -> None:
    """What the kernel calls the calling thread, 15 bytes at most; see PR_SET_NAME in prctl(2)."""
    _check(_libc.prctl(_PR_SET_NAME, os.fsencode(name), 0, 0, 0), "prctl")


def in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a throw-away thread, which may change its own namespaces.

    The thread ends with the call, so no other code can ever run in what it entered. A process
    started inside inherits the thread's namespaces and directory. Raises what `function` raises.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="in-thread")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def in_netns(path: str | Path, function: Callable[[], T]) -> T:
    """Run `function` in a throw-away thread inside the network namespace at `path`.

    A socket made inside stays in that namespace for life, wherever it is used later.
    Raises OSError if the path is no network namespace, and whatever `function` raises.
    """

    def work() -> T:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(fd, CLONE_NEWNET)
        finally:
            os.close(fd)
        return function()

    return in_thread(work)


def socket_in(path: str | Path, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket that lives in the network namespace at `path`."""
    return in_netns(path, lambda: socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))


def raise_file_limit() -> int:
    """Let this process have as many files open as it may be allowed; how many. setrlimit(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def start_time(pid: int) -> int:
    """When `pid` started, in clock ticks since boot; 0 if there is no such process.

    A pid with its start time names a process for ever; a pid alone may be used again.
    Field 22 of /proc/PID/stat, proc(5).
    """
    try:
        # A process may call itself whatever it likes.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()
    return 0 if fields[0] == "Z" else int(fields[19])


class PeerCredentials(NamedTuple):
    """Who connected a unix socket, as the kernel noted it when they did."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]  # supplementary ones


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Who is at the other end of a connected unix socket; see SO_PEERCRED in unix(7).

    The groups are the kernel's too (SO_PEERGROUPS): those that the process had, which a look
    into the group database or at /proc/PID (a pid that may be another's by now) need not give.
    Numbers of another user namespace come out as this one's, or as the overflow ids (65534).
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    pid, uid, gid = struct.unpack("iII", raw)
    held = (ctypes.c_uint32 * _NGROUPS_MAX)()
    size = ctypes.c_uint32(ctypes.sizeof(held))
    result = _libc.getsockopt(
        sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, held, ctypes.byref(size)
    )
    _check(result, "getsockopt SO_PEERGROUPS")
    return PeerCredentials(pid, uid, gid, frozenset(held[: size.value // 4]))
