"""Processes of the testbed: starting them in a host, knowing them, ending them.

A process is the testbed's if it inherited the token that everything started in a host is
given, or if it has a mount that exists in a host only: the second finds those that wrote over
their environment, as nginx does. Only such processes are ever signalled.
Opposite: namespaces.py has the hosts they live in.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from agent import syscalls
from agent.errors import Timeout
from agent.testbed.namespaces import Namespaces

HOST_VARIABLE = "VXMESH_TESTBED"
TOKEN_VARIABLE = "VXMESH_TESTBED_TOKEN"
KILL_GRACE = 5.0  # seconds from SIGKILL until it is an error; the kernel may be busy
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # and so by what it starts, unless reset


def environment(
    base: Mapping[str, str], host: str, token: str, agent_socket: str
) -> dict[str, str]:
    """What a command in a host gets: the caller's environment, and which host it is in.

    An empty `agent_socket` is a host without an agent.
    """
    found = {**base, HOST_VARIABLE: host, TOKEN_VARIABLE: token}
    found.pop("VXMESH_HOST", None)
    if agent_socket:
        found["VXMESH_HOST"] = agent_socket
    bin_dir = str(Path(sys.executable).parent)
    path = base.get("PATH", os.defpath).split(os.pathsep)
    found["PATH"] = os.pathsep.join([bin_dir, *(part for part in path if part != bin_dir)])
    return found


def spawn(
    namespaces: Namespaces, command: Sequence[str], env: Mapping[str, str], cwd: str, log: Path
) -> int:
    """Start a process that outlives us, in a session of its own; its pid.

    posix_spawn, so that nothing of Python runs between fork and exec: the caller may have
    threads, as tests do.
    """
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def work() -> int:
        os.chdir(cwd)
        return os.posix_spawn(
            command[0],
            list(command),
            env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, out, 1),
                (os.POSIX_SPAWN_DUP2, out, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=IGNORED_BY_PYTHON,
        )

    try:
        return namespaces.call(work)
    finally:
        os.close(out)


def is_running(pid: int, start_time: int) -> bool:
    """Whether that very process still runs. Reaps it if it was ours and has ended."""
    if not pid:
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return syscalls.start_time(pid) == start_time != 0


def find(token: str, devices: Sequence[str]) -> list[int]:
    """The testbed's processes: those with its token, or with a mount of one of `devices`."""
    needle = f"{TOKEN_VARIABLE}={token}".encode()
    mounts = {device.encode() for device in devices if device}
    seen: dict[str, bool] = {}  # mount namespace -> whether it has one of `devices`
    found = []
    for pid in _all():
        process = Path(f"/proc/{pid}")
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            namespace = str((process / "ns/mnt").readlink())
            if namespace not in seen:
                told = (process / "mountinfo").read_bytes()
                seen[namespace] = not mounts.isdisjoint(devices_in(told))
            if seen[namespace] or needle in (process / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def devices_in(mountinfo: bytes) -> Iterator[bytes]:
    """MAJOR:MINOR of each mount; proc(5). Its name may have any byte but those that the kernel
    escapes: a space, a tab, the end of a line."""
    return (line.split(b" ", 3)[2] for line in mountinfo.split(b"\n") if line)


def find_strangers(namespaces: Sequence[str], own: Sequence[int]) -> list[int]:
    """Processes in one of these network namespaces (paths) that are not in `own`."""
    inodes = set()
    for path in namespaces:
        with contextlib.suppress(OSError):
            inodes.add(Path(path).stat().st_ino)
    found = []
    for pid in _all():
        with contextlib.suppress(OSError):
            if pid not in own and Path(f"/proc/{pid}/ns/net").stat().st_ino in inodes:
                found.append(pid)
    return found


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def end(find_them: Callable[[], list[int]], grace: float) -> None:
    """End what `find_them` finds: SIGTERM, and SIGKILL to what is left after `grace` seconds.

    Looks again until nothing is found, since a process may start another while it ends.
    Timeout names those that even SIGKILL does not end.
    """
    asked: set[tuple[int, int]] = set()
    deadline = time.monotonic() + grace
    while True:
        # Opened first and found again after: a pid that ended in between and was used again
        # is then another process than the descriptor's, and not found.
        handles = {pid: fd for pid in find_them() if (fd := _open(pid)) >= 0}
        try:
            ours = set(find_them()) & set(handles)
            if not ours:
                if not handles:
                    return
                continue
            late = time.monotonic() >= deadline
            if time.monotonic() >= deadline + KILL_GRACE:
                raise Timeout(
                    f"processes {', '.join(map(str, sorted(ours)))}",
                    "do not end, not even by SIGKILL",
                    "See what they wait for in /proc/PID/stack",
                )
            for pid in ours:
                key = (pid, syscalls.start_time(pid))
                if late or key not in asked:
                    asked.add(key)
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(
                            handles[pid], signal.SIGKILL if late else signal.SIGTERM
                        )
            _wait_for_end([handles[pid] for pid in ours], 0.2)
        finally:
            for fd in handles.values():
                os.close(fd)


def _open(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _wait_for_end(handles: Sequence[int], seconds: float) -> None:
    """Return when all have ended, or after `seconds`; a pidfd is readable when its process has."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    for fd in handles:
        poll.register(fd, select.POLLIN)
    left = len(handles)
    while left and (wait := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(wait * 1000):
            poll.unregister(fd)
            left -= 1
