"""Backends that have been drained for long enough: the services that have some are looked at
again when the time is up, and what is left of such a backend's connections is reset.

What stands opposite: core/services.py, which says that its time is over.
"""

from __future__ import annotations

import asyncio

from agent.node import NodeState
from agent.views import Change

LATE = 0.01  # s after the time is up: a timer may be early by the clock's resolution
LONGEST = 3600.0  # s; the wall clock may be set meanwhile


class Drains:
    """A timer for each service that has a backend whose time runs."""

    def __init__(self, node: NodeState) -> None:
        self.node = node
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self) -> None:
        """Begin to look; to be called in the event loop."""
        self.node.listeners.append(self._changed)
        for service in self.node.services.all():
            self._set(service.id)

    def stop(self) -> None:
        """End all timers."""
        self.node.listeners.remove(self._changed)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _changed(self, change: Change) -> None:
        for id in change.services:
            self._set(id)

    def _set(self, id: str) -> None:
        if timer := self._timers.pop(id, None):
            timer.cancel()
        service, now = self.node.services.get(id), self.node.clock()
        if service is None or not service.drain_timeout:
            return
        ends = [each.since + service.drain_timeout for each in service.backends if each.draining]
        left = [end - now for end in ends if end > now]
        if left:
            delay = min(min(left) + LATE, LONGEST)
            loop = asyncio.get_running_loop()
            self._timers[id] = loop.call_later(delay, self._look, id)

    def _look(self, id: str) -> None:
        self._set(id)
        self.node.look_again(id)
