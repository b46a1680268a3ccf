"""Watches the processes of sandboxes, so that what a workload had goes when it ends.

By pidfd (pidfd_open(2)), which cannot mean another process that got the same pid.
What stands opposite: operations.py drops what has ended.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

import structlog

from agent.model import Sandbox
from agent.node import NodeState
from agent.views import Change
from agent.workload import is_alive

log = structlog.get_logger()


class Watcher:
    """Calls `gone` with a sandbox's id once its process has ended."""

    def __init__(self, node: NodeState, gone: Callable[[str], None]) -> None:
        self.node = node
        self._gone = gone
        self._fds: dict[str, int] = {}

    def start(self) -> None:
        """Watch the sandboxes that there are, and those to come."""
        self.node.listeners.append(self._changed)
        for sandbox in list(self.node.sandboxes.values()):
            self._watch(sandbox)

    def stop(self) -> None:
        """Watch no more."""
        self.node.listeners.remove(self._changed)
        for id in list(self._fds):
            self._forget(id)

    def _changed(self, change: Change) -> None:
        for id in change.sandboxes:
            sandbox = self.node.sandboxes.get(id)
            if sandbox is None:
                self._forget(id)
            elif id not in self._fds:
                self._watch(sandbox)

    def _watch(self, sandbox: Sandbox) -> None:
        if not sandbox.pid:
            return  # its namespace tells: datapath sees the interface go
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(sandbox.pid)
        except OSError as error:
            # Its number may be a thread's by now, of whatever process.
            if error.errno not in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                raise
            loop.call_soon(self._end, sandbox.id)
            return
        self._fds[sandbox.id] = fd
        loop.add_reader(fd, self._end, sandbox.id)
        if not is_alive(sandbox):
            loop.call_soon(self._end, sandbox.id)

    def _end(self, id: str) -> None:
        self._forget(id)
        sandbox = self.node.sandboxes.get(id)
        if sandbox:
            log.info("sandbox.ended", sandbox=id, name=sandbox.name)
            self._gone(id)

    def _forget(self, id: str) -> None:
        fd = self._fds.pop(id, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
