"""The listeners of the node's changes, none of which knows the others.

ToStore writes own records and publishes them once they are on disk; ToKernel says what to
look at again; ToResolver feeds the name server. (cluster/ listens by itself, for new nodes.)
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterable
from typing import Protocol

import structlog

from agent.drivers.balancing import FrontendKey
from agent.node import NodeState
from agent.plan import Plan
from agent.store import HELD, WITHDRAWN, Batch, PeerBatch
from agent.views import Change

log = structlog.get_logger()

PEERS_BEHIND = 1.0  # s; what others wrote may be lost for this long: they tell it again
RETRY_AFTER = 1.0  # s; after a write that failed
PEER_ROWS = 5000  # a transaction; between two of them own records get their turn


class Disk(Protocol):
    """What takes batches in the order of calls; see store.Store."""

    def write(self, batch: Batch | PeerBatch) -> asyncio.Future[None]:
        """The future is done when the batch would outlive this process."""


class ToStore:
    """Own records to disk, then to everyone."""

    def __init__(
        self,
        node: NodeState,
        store: Disk,
        published: Callable[[], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`published` is called when there is something new for peers.

        `loop` is the running one, if it is not given: the simulation has its own.
        """
        self.node = node
        self.store = store
        self._published = published
        self._loop = loop or asyncio.get_running_loop()
        self._last: asyncio.Future[None] | None = None
        self._broken = False  # a write was lost: until one succeeds, each is of everything
        self._behind: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None  # when a failed write is made up for
        self._withdrawn = self._gone()  # as it is on disk
        self._held = self._consents()  # as it is on disk
        self._kept: dict[str, tuple[int, int, int]] = {
            o: self._state(o) for o in node.replica.origins()
        }
        self._prunings: dict[str, int] = {}  # origin -> how often its seals on disk were pruned
        # Of these something may be left on disk, from before the last stop.
        self._forgotten = set(node.removals)
        node.replica.changed.clear()
        node.listeners.append(self.changed)

    def changed(self, change: Change) -> None:
        """Queue what has to be written."""
        if self._behind is None:
            self._behind = self._loop.call_later(PEERS_BEHIND, self._catch_up)
        if change.statuses:
            self._keep_withdrawn()
        if change.nodes:
            # Who is there must not be forgotten: without their consent no lost node is removed.
            self.keep_peers()
        if not (change.own or change.sandboxes or change.floor or change.rewritten):
            return
        whole = change.rewritten or self._broken
        if change.own:
            # What we write rests on what others wrote (an endpoint on its network): together.
            self.keep_peers()
        version = self.node.replica.written()
        boxes = self.node.sandboxes if whole else change.sandboxes
        batch = Batch(
            records=self.node.replica.records(self.node.me) if whole else change.own,
            version=version,
            floor=self.node.floor(self.node.me) if change.floor or whole else 0,
            replace=whole,
            size=self.node.replica.size(self.node.me),
            sandboxes={id: self.node.sandboxes.get(id) for id in boxes},
        )
        future = self.store.write(batch)
        future.add_done_callback(lambda done: self._written(version, whole, done))
        self._last = future
        self._drop_forgotten()

    def _written(self, version: int, whole: bool, done: asyncio.Future[None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error:
            # Not published: peers must not know what we could forget. Callers get the error.
            # What is written next is all there is, or the disk would have a hole.
            log.error("store.failed", error=str(error))
            self._broken = True
            if self._again is None:
                self._again = self._loop.call_later(RETRY_AFTER, self._retry)
            return
        if self._broken and not whole:
            return  # there is a hole before it, until all has been written anew
        self._broken = False
        self.node.replica.publish(version)
        self._published()

    def _state(self, origin: str) -> tuple[int, int, int]:
        replica = self.node.replica
        return replica.generation(origin), replica.version(origin), replica.floor(origin)

    def _keep_withdrawn(self) -> None:
        """Who counts as gone: a restart must not bring back names that were withdrawn."""
        text = self._gone()
        if text != self._withdrawn:
            self._withdrawn = text
            done = self.store.write(Batch(meta={WITHDRAWN: text}))
            done.add_done_callback(self._withdrawn_written)

    def _gone(self) -> str:
        gone = {
            id: [status.state, status.incarnation]
            for id, status in self.node.status.items()
            if status.withdrawn
        }
        return json.dumps(gone, sort_keys=True)

    def _withdrawn_written(self, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and done.exception():
            log.error("store.failed", error=str(done.exception()))
            self._withdrawn = ""  # with the next change

    def _catch_up(self) -> None:
        self.keep_peers()
        self._drop_forgotten()

    def keep_peers(self) -> None:
        """Write what came of other origins since the last time."""
        if self._behind:
            self._behind.cancel()
            self._behind = None
        changed = self.node.replica.changed
        for origin in sorted(changed):  # a set has another order in each process
            changed.discard(origin)
            now = self._state(origin)
            before = self._kept.get(origin, (-1, 0, 0))
            if now[0] < 0:
                self._forgotten.add(origin)
            if now[0] < 0 or now == before:
                continue
            # Below the floor tombstones are gone: what came after `before` does not tell them.
            replace = now[0] != before[0] or before[1] < now[2]
            records = self.node.since(origin, 0 if replace else before[1])
            for start in range(0, max(1, len(records)), PEER_ROWS):
                part = records[start : start + PEER_ROWS]
                last = start + PEER_ROWS >= len(records)
                version = now[1] if last else part[-1].version
                batch = PeerBatch(
                    origin,
                    part,
                    version,
                    now[2],
                    replace and start == 0,
                    size=self.node.replica.size(origin),
                    seals=self.node.replica.seals(origin, part, version),
                )
                done = self.store.write(batch)
                done.add_done_callback(functools.partial(self._peer_written, origin))
            self._kept[origin] = now
            self._keep_pruned(origin, now)

    def _keep_pruned(self, origin: str, now: tuple[int, int, int]) -> None:
        """Write an origin's seals anew once some of them were dropped."""
        seals, prunings = self.node.replica.all_seals(origin)
        if self._prunings.get(origin, 0) != prunings:
            self._prunings[origin] = prunings
            size = self.node.replica.size(origin)
            batch = PeerBatch(origin, [], now[1], now[2], size=size, seals=seals, reseal=True)
            done = self.store.write(batch)
            done.add_done_callback(functools.partial(self._peer_written, origin))

    def _drop_forgotten(self) -> None:
        """Take removed nodes off the disk: after what says so, and what took their place."""
        for origin in sorted(self._forgotten):
            self._forgotten.discard(origin)
            self._kept.pop(origin, None)
            self._prunings.pop(origin, None)
            done = self.store.write(PeerBatch(origin, [], 0, 0, gone=True))
            done.add_done_callback(functools.partial(self._peer_written, origin))

    def _peer_written(self, origin: str, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and done.exception():
            log.error("store.failed", peer=origin, error=str(done.exception()))
            self._kept[origin] = (-1, 0, 0)  # all of it again, with the next change
            self.node.replica.changed.add(origin)

    def _retry(self) -> None:
        self._again = None
        if self._broken:
            self.changed(Change(rewritten=True))

    async def durable(self) -> None:
        """Return when everything changed so far is on disk; raise what kept it from there."""
        if self._consents() != self._held:
            await asyncio.shield(self._keep_consents())
        if self._last is not None:
            await asyncio.shield(self._last)

    def _consents(self) -> str:
        return json.dumps(self.node.removing.held, sort_keys=True)

    async def _keep_consents(self) -> None:
        """Forced removals that this node agreed to: a restart must not open the door again."""
        text = self._consents()
        await self.store.write(Batch(meta={HELD: text}))
        self._held = text


class Touch(Protocol):
    """The synchronous half of datapath's reconciler."""

    def touch_bridge(self, vni: int) -> None: ...

    def touch_rows(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None: ...

    def touch_forwards(self) -> None: ...

    def touch_nothing(self) -> None: ...

    def touch_all(self) -> None: ...

    def touch_wireguard(self) -> None: ...

    def touch_services(self, keys: Iterable[FrontendKey]) -> None: ...


class ToKernel:
    """What changed, as what to look at again in the kernel."""

    def __init__(self, node: NodeState, plan: Plan, kernel: Touch) -> None:
        self._plan = plan
        self._kernel = kernel
        node.listeners.append(self.changed)

    def changed(self, change: Change) -> None:
        """Pass a change on."""
        touched = self._plan.touched(change)
        if touched.everything:
            self._kernel.touch_all()
        if touched.wireguard:
            self._kernel.touch_wireguard()
        for vni in touched.bridges:
            self._kernel.touch_bridge(vni)
        for vni in touched.macs.keys() | touched.addresses.keys():
            macs, addresses = touched.macs.get(vni, ()), touched.addresses.get(vni, ())
            self._kernel.touch_rows(vni, macs, addresses)
        if touched.services:
            self._kernel.touch_services(touched.services)
        if touched.forwards:
            self._kernel.touch_forwards()
        # A network that was made and removed again before we heard of it changes nothing here,
        # and who waits for all kernels waits for ours as well.
        self._kernel.touch_nothing()
