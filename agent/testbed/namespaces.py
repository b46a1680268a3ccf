"""What makes a namespace a host: entering it, and the files that are its own.

A host sees the machine's files, but its own /run and /var/lib/vxmesh (so that every default
path holds in it) and a resolv.conf that leads to the outsider. Its mount namespace is kept by
binding it to a file, as `ip netns` does for network namespaces; see namespaces(7),
mount_namespaces(7). Opposite: fabric.py has the wire between them, processes.py what runs there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent import syscalls

STATE_DIR = "/var/lib/vxmesh"
RUN = "/run"
RESOLV_CONF = "/etc/resolv.conf"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Paths of a host's network and mount namespace."""

    net: str
    mnt: str

    def enter(self) -> None:
        """Move the calling thread in, keeping its directory if the host has it too.

        OSError if one of them is gone.
        """
        try:
            directory = Path.cwd()
        except FileNotFoundError:  # somebody removed it
            directory = Path("/")
        net = os.open(self.net, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mnt = os.open(self.mnt, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # The kernel refuses to change the mounts of threads that share a directory.
                syscalls.unshare(syscalls.CLONE_FS)
                syscalls.setns(net, syscalls.CLONE_NEWNET)
                syscalls.setns(mnt, syscalls.CLONE_NEWNS)
            finally:
                os.close(mnt)
        finally:
            os.close(net)
        with contextlib.suppress(OSError):
            os.chdir(directory)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` inside, in a throw-away thread; whatever it starts is inside too."""

        def work() -> T:
            self.enter()
            return function()

        return syscalls.in_thread(work)


def mount_points(pid: str = "thread-self", kind: str = "") -> list[str]:
    """Where something is mounted, in the order of mounting; with `kind`, of that file system;
    proc(5) on mountinfo."""
    # Others' names may have any byte; the kernel escapes those that would end a field or a line.
    text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    lines = text.rstrip("\n").split("\n")
    return [
        re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split(" ")[4])
        for line in lines
        if not kind or line.partition(" - ")[2].split(" ")[0] == kind
    ]


def make_mounts(run: Path, resolv_conf: Path) -> int:
    """A new mount namespace with a host's files; a descriptor of it, for keep() or setns(2).

    `run` becomes its /run and stays visible outside, so that a host's socket can be reached
    from there. What it calls /var/lib/vxmesh nobody else has mounted: devices_of() knows
    a host's processes by it.
    """

    def work() -> int:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        resolver = os.path.realpath(RESOLV_CONF)
        content = resolv_conf.read_text()
        below_run = resolver.startswith(f"{RUN}/")
        if not below_run and Path(resolver).exists():
            syscalls.mount(str(resolv_conf), resolver, flags=syscalls.MS_BIND)
        # The copies of the machine's mounts below /run must go, not only be covered, and those of
        # namespaces elsewhere: each holds one that would outlive its removal.
        syscalls.mount(str(run), STATE_DIR, flags=syscalls.MS_BIND)
        held = set(mount_points(kind="nsfs"))
        for point in reversed(mount_points()):
            if point == RUN or point.startswith(f"{RUN}/") or point in held:
                _detach(point)
        syscalls.mount(STATE_DIR, RUN, flags=syscalls.MS_BIND)
        syscalls.umount(STATE_DIR, syscalls.MNT_DETACH)
        safe = syscalls.MS_NOSUID | syscalls.MS_NODEV
        syscalls.mount("vxmesh-testbed", STATE_DIR, "tmpfs", safe, "mode=0700")
        if below_run:
            Path(resolver).parent.mkdir(parents=True, exist_ok=True)
            Path(resolver).write_text(content)
        return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    return syscalls.in_thread(work)


def _detach(point: str) -> None:
    try:
        syscalls.umount(point, syscalls.MNT_DETACH)
    except OSError as error:
        # Whoever deletes the file below a mount takes it away in all mount namespaces: the mount
        # first, then the name.
        gone = error.errno in (errno.EINVAL, errno.ENOENT) and point not in mount_points()
        if not gone:
            raise


def keep(fd: int, file: Path) -> None:
    """Bind a mount namespace to `file`, which keeps it without a process.

    OSError where the kernel refuses: `file` must be on a private mount of an older namespace.
    """
    file.touch()
    syscalls.mount(f"/proc/self/fd/{fd}", str(file), flags=syscalls.MS_BIND)


@contextlib.contextmanager
def devices_of(hosts: Sequence[Namespaces]) -> Iterator[list[str]]:
    """MAJOR:MINOR of the mounts that only processes of these hosts have; of one that is gone none.

    They are held meanwhile: where a process keeps a host, its mounts go with the last one, and the
    next mount on this machine, of whatever other testbed, would get the same number.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for host in hosts:
            with contextlib.suppress(OSError):
                if (fd := host.call(_open_own)) >= 0:
                    stack.callback(os.close, fd)
                    device = os.fstat(fd).st_dev
                    found.append(f"{os.major(device)}:{os.minor(device)}")
        yield found


def _open_own() -> int:
    """A descriptor of the calling host's mount; -1 if it is gone."""
    if STATE_DIR not in mount_points():
        return -1
    return os.open(STATE_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
