"""Tells when mounts come or go: that is how our namespace loses its place in the filesystem.

What stands opposite: namespaces.py binds it there again. Source: poll(2) on
/proc/PID/mountinfo as in proc_pid_mountinfo(5); Linux fs/proc_namespace.c (mounts_poll).
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from pathlib import Path


class MountWatch:
    """The mounts of this process's mount namespace."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever there was a mount or an unmount, of whatever.

        mountinfo can always be read; that it changed is POLLPRI, which an event loop does not
        ask for. So an epoll set asks, and the loop asks the set.
        """
        self._changed = changed
        self._file = Path("/proc/self/mountinfo").open("rb")  # noqa: SIM115 - closed in close()
        self._set = select.epoll()
        self._set.register(self._file, select.EPOLLPRI)
        self._set.poll(0)
        asyncio.get_running_loop().add_reader(self._set, self._ready)

    def close(self) -> None:
        """Watch no more."""
        asyncio.get_running_loop().remove_reader(self._set)
        self._set.close()
        self._file.close()

    def _ready(self) -> None:
        self._set.poll(0)
        self._changed()
