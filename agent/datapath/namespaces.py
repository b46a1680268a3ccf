"""Our own network namespace: a file that outlives the agent, so that traffic does too.

What stands opposite: syscalls.py for the calls, reconciler.py for what goes into it.
Source: namespaces(7), mount_namespaces(7), ioctl_ns(2); iproute2 ip/ipnetns.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.errors import Conflict
from agent.syscalls import (
    CLONE_NEWNET,
    MNT_DETACH,
    MS_BIND,
    in_netns,
    in_thread,
    mount,
    setns,
    umount,
    unshare,
)

NS_GET_NSTYPE = 0xB703
SYSCTL = Path("/proc/sys/net")

# Of our own namespace. `default` first: devices that come later inherit it.
OWN = {
    # Each bridge answers for its own gateway only: the weak host model would let a sandbox
    # reach another network's.
    "ipv4/conf/all/arp_ignore": "1",
    # Which way a packet may come is nftables' affair here (see nft.py).
    "ipv4/conf/default/rp_filter": "0",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    # Hardly anything that comes is for a socket of this namespace: of each packet that one was
    # looked for before its way was. It holds for IPv6 too.
    "ipv4/ip_early_demux": "0",
    "ipv6/conf/default/accept_ra": "0",
    "ipv6/conf/default/autoconf": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/dad_transmits": "0",
    "ipv6/conf/default/addr_gen_mode": "1",  # IN6_ADDR_GEN_MODE_NONE
    "ipv6/conf/default/disable_ipv6": "0",
    "ipv6/conf/all/disable_ipv6": "0",
    # Where br_netfilter is loaded it shows each bridged frame to the inet tables as well, which
    # costs and decides nothing: what a port may send, its guard says (guardrules.py).
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "bridge/bridge-nf-call-arptables": "0",
}
OPTIONAL = ("ipv6", "bridge")  # folders that are not there in every kernel

# The same, but only once the rules are there which keep the networks apart.
FORWARDING = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}

# What devices have inherited, and what each of them could be given instead.
DEVICE = {
    "ipv4/conf/{}/forwarding": "1",
    "ipv4/conf/{}/rp_filter": "0",
    "ipv4/conf/{}/send_redirects": "0",
    "ipv6/conf/{}/disable_ipv6": "0",
    "ipv6/conf/{}/forwarding": "1",
}


def of_device(name: str) -> dict[str, str]:
    """The sysctls of one device of our own namespace, once it forwards."""
    return {file.format(name): value for file, value in DEVICE.items()}


def is_network_namespace(path: str | Path) -> bool:
    """Whether `path` is a network namespace (and not merely a file in its place)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False
    finally:
        os.close(fd)


def inode(path: str | Path) -> int:
    """What tells the namespace at `path` from every other one; 0 if there is none."""
    try:
        return Path(path).stat().st_ino if is_network_namespace(path) else 0
    except OSError:
        return 0


def ensure(path: Path) -> bool:
    """Make the namespace at `path` unless it is there; True if it was made.

    Conflict if something else is there; OSError if the kernel refuses.
    """
    if is_network_namespace(path):
        return False
    _make_file(path)
    try:
        in_thread(lambda: _mount_here(path, lambda: unshare(CLONE_NEWNET)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def bind(fd: int, path: Path) -> None:
    """Have the namespace of `fd` at `path`, in place of whatever somebody else put there.

    Conflict or OSError if that cannot be.
    """
    remove(path)
    _make_file(path)
    # Not from /proc/self/fd: where the mount that `fd` was opened on has been detached, Linux
    # 6.18 leaks the copy, and the namespace with it, if a third mount namespace has one too.
    in_thread(lambda: _mount_here(path, lambda: setns(fd, CLONE_NEWNET)))


def _mount_here(path: Path, enter: Callable[[], None]) -> None:
    enter()
    mount("/proc/thread-self/ns/net", str(path), flags=MS_BIND)


def _make_file(path: Path) -> None:
    """A file to mount on. One that is there: a namespace was, until a restart or an unmount."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
    except OSError as error:
        raise Conflict(
            f"namespace {path}", f"cannot be made ({error.strerror})", "Move it out of the way"
        ) from None


def remove(path: Path) -> None:
    """Take the namespace at `path` away; fine if there is none.

    With its last mount, socket and process gone the kernel takes it apart. Other mount
    namespaces may hold copies of the mount (a workload's, made while ours was there); where
    the mount is not shared with them, it is the unlink that detaches it there.
    """
    while True:
        try:
            umount(str(path), MNT_DETACH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            break
    path.unlink(missing_ok=True)


def set_sysctls(netns: str | Path, values: Mapping[str, str]) -> int:
    """Write sysctls, by their path below /proc/sys/net, in the namespace at `netns`.

    /proc/sys/net shows the namespace of the thread that opens it. What is so already is not
    written; IPv6's are left out where the kernel has no IPv6, and likewise those of br_netfilter.
    Returns how many were written.
    """

    def write() -> int:
        written = 0
        for name, value in values.items():
            file = SYSCTL / name
            folder = name.partition("/")[0]
            if folder in OPTIONAL and not (SYSCTL / folder).exists():
                continue
            if file.read_text().strip() != value:
                file.write_text(value)
                written += 1
        return written

    return in_netns(netns, write)


def get_sysctl(netns: str | Path, name: str) -> str:
    """One sysctl of the namespace at `netns`; empty if it has none of that name."""

    def read() -> str:
        try:
            return (SYSCTL / name).read_text().strip()
        except OSError:
            return ""

    return in_netns(netns, read)
