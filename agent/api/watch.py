"""Watch: every change of the node's views as events, in the order in which they happened.

A bounded history lets a watcher that was away go on where it was; one that asks for a
revision older than that is told to begin anew. A watcher that reads too slowly is cut off
rather than letting memory grow.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from typing import Any

from agent.api import convert
from agent.core.members import Member
from agent.errors import Exhausted, Invalid
from agent.node import NodeState
from agent.rpc import control_pb2 as pb
from agent.views import Change

HISTORY = 10_000  # events kept, some 500 bytes each
PAGE = 500  # endpoints a turn of the loop
BACKLOG = 1_000  # changes a watcher may lag behind


class Watchers:
    """All watchers of this node."""

    def __init__(self, node: NodeState, health: convert.Health) -> None:
        self.node = node
        self.health = health
        self._history: collections.deque[tuple[int, float, Change]]
        self._history = collections.deque()
        self._events_kept = 0
        self._queues: set[asyncio.Queue[tuple[int, float, Change] | None]] = set()
        node.listeners.append(self._changed)

    def _changed(self, change: Change) -> None:
        # Without what only the store needs, which would keep every record in memory.
        told = Change(nodes=change.nodes, networks=change.networks, endpoints=change.endpoints)
        item = (self.node.revision, self.node.clock(), told)
        self._history.append(item)
        self._events_kept += _weight(told)
        while self._events_kept > HISTORY:
            self._events_kept -= _weight(self._history.popleft()[2])
        for queue in list(self._queues):
            try:
                queue.put_nowait(item)
            except asyncio.QueueFull:
                self._queues.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)

    def close(self) -> None:
        """End every watch: the agent is stopping."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
        self._queues.clear()

    async def watch(self, since: int) -> AsyncIterator[pb.Event]:
        """Events after revision `since`; with 0 the present state first, then `synced`."""
        queue: asyncio.Queue[tuple[int, float, Change] | None] = asyncio.Queue(BACKLOG)
        past = list(self._history)
        revision = self.node.revision
        self._queues.add(queue)
        try:
            if since:
                if since > revision or (since < revision and (not past or past[0][0] > since + 1)):
                    raise Invalid(
                        f"revision {since}",
                        "is not in this agent's history (it may have been started since)",
                        "Watch from 0",
                    )
                for number, moment, change in past:
                    if number > since:
                        for event in self._events(number, moment, change):
                            yield event
            else:
                async for event in self._present(revision):
                    yield event
            while (item := await queue.get()) is not None:
                for event in self._events(*item):
                    yield event
            raise Exhausted("watch", "was ended: it lagged too far, or the agent stops", "Again")
        finally:
            self._queues.discard(queue)

    async def _present(self, revision: int) -> AsyncIterator[pb.Event]:
        """What there is. Changes meanwhile are queued, and may be told twice, never not at all."""
        node, now = self.node, convert.time_text(self.node.clock())

        def event(**what: Any) -> pb.Event:
            return pb.Event(revision=revision, time=now, **what)

        for each in list(node.nodes.values()):
            yield event(action="create", node=convert.node(node, self.health, each))
        for network in list(node.catalogue.all()):
            yield event(action="create", network=convert.network(node, network))
            members = node.members.get(network.id)
            for count, member in enumerate(list(members.all.values()) if members else ()):
                yield event(action="create", endpoint=convert.endpoint(node, member))
                if count % PAGE == PAGE - 1:
                    await asyncio.sleep(0)
        yield event(action="synced")

    def _events(self, revision: int, moment: float, change: Change) -> list[pb.Event]:
        node = self.node
        events = []
        for id in change.nodes:
            found = node.nodes.get(id)
            if found:
                event = pb.Event(action="update", node=convert.node(node, self.health, found))
                events.append(event)
        for id, old in change.networks.items():
            new = node.catalogue.get(id)
            shown = new or old
            if shown:
                action = "remove" if not new else "update" if old else "create"
                events.append(pb.Event(action=action, network=convert.network(node, shown)))
        for _, before, after in change.endpoints:
            member: Member | None = after or before
            if member:
                action = "remove" if not after else "update" if before else "create"
                events.append(pb.Event(action=action, endpoint=convert.endpoint(node, member)))
        for event in events:
            event.revision, event.time = revision, convert.time_text(moment)
        return events


def _weight(change: Change) -> int:
    return 1 + len(change.nodes) + len(change.networks) + len(change.endpoints)
