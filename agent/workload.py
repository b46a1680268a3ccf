"""Namespaces of workloads: which one is meant, whether it lives, and how to step into it.

Used by the agent (to know) and by the command line's run and exec (to enter); see
namespaces(7), pidfd_open(2), ioctl_ns(2).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent import syscalls
from agent.errors import Conflict, Invalid, NotFound

if TYPE_CHECKING:
    from agent.model import Sandbox  # 15 ms to import, which `vxmesh run` does without

NS_GET_NSTYPE = 0xB703
SIOCGIFHWADDR = 0x8927
NETNS_DIR = "/run/netns"
TMPFS = "vxmesh"  # what the tmpfs with a sandbox's resolv.conf is called in its list of mounts


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace: where it is found, and which one it is."""

    path: str
    inode: int
    start_time: int = 0


def identify(ref: str, pid: int = 0, host: bool = False) -> Namespace:
    """The network namespace with that name (of `ip netns`) or path; with `pid`, of a process.

    NotFound if there is none, Invalid if it is something else, Conflict if it is the host's; or
    with `host`, if it is not.
    """
    path = ref if "/" in ref else f"{NETNS_DIR}/{ref}"
    what = f"process {pid}" if pid else f"network namespace {ref[:80]}"
    if "\0" in path:
        raise Invalid(what[:-1], "is no path", "Give a name of 'ip netns' or a path")
    started = syscalls.start_time(pid) if pid else 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        fix = "Start it first" if pid else "See 'ip netns', or give the path of one"
        raise NotFound(what, "does not exist", fix) from None
    except OSError as error:
        raise Invalid(
            what, f"cannot be opened ({error.strerror})", "Give the path of a network namespace"
        ) from None
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE) if stat.S_ISREG(os.fstat(fd).st_mode) else 0
        inode = os.fstat(fd).st_ino
    except OSError:
        kind = inode = 0
    finally:
        os.close(fd)
    if kind != syscalls.CLONE_NEWNET:
        raise Invalid(what, f"is no network namespace ({path})", "Give the path of one")
    if pid and not started:
        raise NotFound(what, "has ended", "Start it again")
    is_hosts = inode == Path("/proc/self/ns/net").stat().st_ino
    if is_hosts and not host:
        raise Conflict(
            what, "is in the host's own network namespace", "Give it one of its own first"
        )
    if host and not is_hosts:
        raise Conflict(what, "is not in the host's own network namespace", "Start it there")
    return Namespace(path, inode, started)


def find_interface(netns: str, mac: bytes) -> tuple[int, str]:
    """The inode of the namespace at path `netns`, and the name of the interface there with `mac`.

    NotFound if there is no such; netdevice(7).
    """

    def look() -> tuple[int, str]:
        inode = Path("/proc/thread-self/ns/net").stat().st_ino
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _, name in socket.if_nameindex():
                request = struct.pack("16sH14x", name.encode(), 0)
                found = fcntl.ioctl(sock, SIOCGIFHWADDR, request)
                if found[18:24] == mac:
                    return inode, name
        raise NotFound(f"an interface with MAC {mac.hex(':')}", f"is not in {netns}")

    try:
        return syscalls.in_netns(netns, look)
    except OSError as error:
        what = f"network namespace {netns}"
        raise NotFound(what, f"cannot be entered ({error.strerror})") from None


def is_alive(sandbox: Sandbox) -> bool:
    """Whether the sandbox's process (or without one, its namespace) is still the one meant."""
    if sandbox.pid:
        return syscalls.start_time(sandbox.pid) == sandbox.start_time
    try:
        return Path(sandbox.netns).stat().st_ino == sandbox.inode
    except OSError:
        return False


def tell_resolver(pid: int, start_time: int, content: str) -> bool:
    """Have the /etc/resolv.conf that `own_resolver` gave a process say `content` from now on.

    False if the process has ended, or sees another file there: no file but ours is written.
    """
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if syscalls.start_time(pid) != start_time:
            return False
        file = syscalls.open_in_root(root, "etc/resolv.conf", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    finally:
        os.close(root)
    try:
        if not (stat.S_ISREG(os.fstat(file).st_mode) and _is_own_tmpfs(pid, file)):
            return False
        writable = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            text = content.encode()
            # In this order no reader finds it empty.
            os.pwrite(writable, text, 0)
            os.ftruncate(writable, len(text))
        finally:
            os.close(writable)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _is_own_tmpfs(pid: int, file: int) -> bool:
    """Whether an open file lies on what `own_resolver` mounted; proc(5), fdinfo and mountinfo."""
    info = Path(f"/proc/self/fdinfo/{file}").read_text().split()
    mount = info[info.index("mnt_id:") + 1]
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines():
        if line.split(" ", 1)[0] == mount:
            return line.partition(" - ")[2].split()[:2] == ["tmpfs", TMPFS]
    return False


def own_resolver(content: str) -> None:
    """Give the calling process a mount namespace in which /etc/resolv.conf says `content`."""
    cover_resolver().write_text(content)


def cover_resolver() -> Path:
    """Give the calling process a mount namespace with an /etc/resolv.conf of its own, still empty;
    its path, for who writes it.

    The file lives on a tmpfs that only this namespace knows, so nothing is left when the last
    process in it ends, however it ends.
    """
    import tempfile  # 5 ms; `vxmesh run` has it loaded while it loads other things

    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    target = os.path.realpath("/etc/resolv.conf")
    if not Path(target).exists():
        raise FileNotFoundError(2, f"this host has no {target} to cover; make an empty one")
    with tempfile.TemporaryDirectory() as directory:
        syscalls.mount(
            TMPFS, directory, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=64k"
        )
        file = Path(directory, "resolv.conf")
        file.touch()
        syscalls.mount(str(file), target, flags=syscalls.MS_BIND)
        syscalls.umount(directory, syscalls.MNT_DETACH)
    return Path(target)
