"""Watch: every change of the node's views as events, in the order in which they happened.

A bounded history lets a watcher that was away go on where it was; one that asks for a
revision older than that is told to begin anew. A watcher that reads too slowly is cut off
rather than letting memory grow.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

from agent.api import convert
from agent.core.members import EndpointChange, Member
from agent.errors import Exhausted, Invalid
from agent.node import NodeState
from agent.rpc import control_pb2 as pb
from agent.rpc import types_pb2 as types
from agent.views import Change

HISTORY = 10_000  # events kept, some 500 bytes each
PAGE = 500  # endpoints a turn of the loop
BACKLOG = 1_000  # changes a watcher may lag behind
WATCHERS_MAX = 256  # each is handed every change, and may hold back as many as that


class Item(NamedTuple):
    """One change as it is kept."""

    revision: int
    time: float  # seconds since the epoch
    made: list[pb.Event]  # at once, as what they show is another one later, or gone
    endpoints: list[EndpointChange]  # made when asked for, as they are many
    names: dict[str, str]  # of the networks of those


class Watchers:
    """All watchers of this node."""

    def __init__(self, node: NodeState, health: convert.Health) -> None:
        self.node = node
        self.health = health
        self._history: collections.deque[Item] = collections.deque()
        self._events_kept = 0
        self._began = node.clock()  # what happened before is not in the history
        self._queues: set[asyncio.Queue[Item | None]] = set()
        node.listeners.append(self._changed)

    def _changed(self, change: Change) -> None:
        networks = {each.network for each in change.endpoints}
        names = {id: self.node.catalogue.name(id) for id in networks}
        made = list(self._make(change))
        item = Item(self.node.revision, self.node.clock(), made, change.endpoints, names)
        self._history.append(item)
        self._events_kept += _weight(item)
        while self._events_kept > HISTORY and len(self._history) > 1:
            gone = self._history.popleft()
            self._events_kept -= _weight(gone)
            self._began = gone.time
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

    async def watch(self, request: pb.WatchRequest) -> AsyncIterator[pb.Event]:
        """Events after a revision; with 0 first the present state or the history, then `synced`."""
        if len(self._queues) >= WATCHERS_MAX:
            raise Exhausted("watches", f"{WATCHERS_MAX} are open already", "End some of them")
        queue: asyncio.Queue[Item | None] = asyncio.Queue(BACKLOG)
        past = list(self._history)
        began, revision, since = self._began, self.node.revision, request.since
        self._queues.add(queue)
        try:
            if since:
                if since > revision or (
                    since < revision and (not past or past[0].revision > since + 1)
                ):
                    raise Invalid(
                        f"revision {since}",
                        "is not in this agent's history (it may have been started since)",
                        "Watch from 0, or give a time",
                    )
                past = [item for item in past if item.revision > since]
            elif request.history:
                if request.not_before and request.not_before < began:
                    yield pb.Event(revision=revision, time=_text(began), action="trimmed")
                past = [item for item in past if item.time >= request.not_before]
            else:
                past = []
                async for event in self._present(revision):
                    yield event
            for count, item in enumerate(past):
                for event in self._events(item):
                    yield event
                if count % PAGE == PAGE - 1:
                    await asyncio.sleep(0)
            if request.history or not since:
                yield pb.Event(revision=revision, time=_text(self.node.clock()), action="synced")
            if request.end:
                return
            while (next_ := await queue.get()) is not None:
                for event in self._events(next_):
                    yield event
            raise Exhausted("watch", "was ended: it lagged too far, or the agent stops", "Again")
        finally:
            self._queues.discard(queue)

    async def _present(self, revision: int) -> AsyncIterator[pb.Event]:
        """What there is. Changes meanwhile are queued, and may be told twice, never not at all."""
        node, now = self.node, _text(self.node.clock())

        def event(**what: Any) -> pb.Event:
            return pb.Event(revision=revision, time=now, action="create", **what)

        for each in list(node.nodes.values()):
            yield event(node=convert.node(node, self.health, each))
        for service in list(node.services.all()):
            yield event(service=convert.service(node, service))
        for network in list(node.catalogue.all()):
            yield event(network=convert.network(node, network))
            members = node.members.get(network.id)
            for count, member in enumerate(list(members.all.values()) if members else ()):
                yield event(endpoint=convert.endpoint(node, member))
                if count % PAGE == PAGE - 1:
                    await asyncio.sleep(0)

    def _make(self, change: Change) -> Iterator[pb.Event]:
        """The events of all but endpoints, at the time of the change."""
        node = self.node
        for id in sorted(change.nodes | change.statuses.keys()):
            found = node.nodes.get(id)
            if found:
                yield pb.Event(action="update", node=convert.node(node, self.health, found))
            else:
                yield pb.Event(action="remove", node=types.Node(id=id))
        for id, old in change.networks.items():
            new = node.catalogue.get(id)
            shown = new or old
            if shown:
                action = "remove" if not new else "update" if old else "create"
                yield pb.Event(action=action, network=convert.network(node, shown))
        for id, was in change.services.items():
            service = node.services.get(id) or was
            if service:
                action = "remove" if not node.services.get(id) else "update" if was else "create"
                yield pb.Event(action=action, service=convert.service(node, service))
        anyway = {c.new.endpoint.id for c in change.endpoints if c.new} if change.health else ()
        for endpoint in sorted(change.health.difference(anyway)):
            members = node.members.get(node.network_of(endpoint))
            if members and endpoint in members.all:
                member = members.all[endpoint]
                yield pb.Event(action="update", endpoint=convert.endpoint(node, member))
        for notice in change.notices:
            told = pb.Notice(kind=notice.kind, message=notice.message, fields=notice.fields)
            yield pb.Event(action="notice", notice=told)

    def _events(self, item: Item) -> list[pb.Event]:
        events = list(item.made)
        for each in item.endpoints:
            member: Member | None = each.new or each.old
            if member:
                action = "remove" if not each.new else "update" if each.old else "create"
                event = pb.Event(action=action, endpoint=convert.endpoint(self.node, member))
                event.endpoint.network = item.names[each.network]
                events.append(event)
        for event in events:
            event.revision, event.time = item.revision, _text(item.time)
        return events


def _text(moment: float) -> str:
    return convert.time_text(moment)


def _weight(item: Item) -> int:
    return 1 + len(item.made) + len(item.endpoints)
