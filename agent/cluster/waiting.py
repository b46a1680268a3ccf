"""Waiting for other nodes: until their kernels have what we wrote, and until they told us theirs.

Who takes part tells by its stream what its kernel has; to whom there is no stream, and none to
be, the question goes by itself (calls.py), and by a few others if it does not get through.
What stands opposite: peers.py, which has the streams; the other nodes, whose sessions and
server.py say how far their kernels are.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence

from agent.cluster import calls
from agent.cluster.calls import Question
from agent.cluster.dialer import Dialer
from agent.cluster.link import SILENCE, Link
from agent.node import NodeState

HELPERS = 2  # who ask a node for us that we cannot reach
LOOK_AGAIN = 0.1  # s; while waiting for kernels, at who there is


class Waiting:
    """Waits on the streams of this node; `moved` is to be called when one of them told anything.

    `members` says which other nodes count as such, and `has_detector` whether a detector found
    that out; `wanted` says to whom there are to be streams. `down_since` (monotonic) has the
    nodes whose stream is gone.
    """

    def __init__(
        self,
        node: NodeState,
        dialer: Dialer,
        links: Mapping[str, Link],
        down_since: Mapping[str, float],
        members: Callable[[], list[str]],
        wanted: Callable[[], set[str]],
        has_detector: Callable[[], bool],
    ) -> None:
        self.node, self.dialer, self.links = node, dialer, links
        self.down_since = down_since
        self._members, self._wanted, self._has_detector = members, wanted, has_detector
        self._progress = asyncio.Event()
        self._started = time.monotonic()

    def moved(self) -> None:
        """Wake those who wait, to look again."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        """Wait until the kernel of every node that takes part has our records up to `version`,
        and lacks nothing of `networks` (ids).

        Returns the ids of the nodes that lack it when the time is up, and why if they said it.
        Who takes part is looked at again and again: nodes come, go and lose their streams
        meanwhile.
        """
        deadline = time.monotonic() + seconds
        streams = [id for id in self.links if id in self.node.nodes]
        helpers = random.sample(streams, min(HELPERS, len(streams)))
        via = [self.node.nodes[id] for id in helpers]
        asked: dict[str, asyncio.Task[bool]] = {}
        questions: dict[str, Question] = {}

        def ask(id: str) -> None:
            question = questions[id] = Question(self.node.me, version, deadline, tuple(networks))
            asking = calls.await_applied(self.dialer, self.node.nodes[id], question, via)
            asked[id] = asyncio.create_task(asking)

        def has_it(id: str) -> bool:
            link, task = self.links.get(id), asked.get(id)
            told = link is not None and link.session.peer_applied >= version
            if told and link and link.session.peer_withholds and networks:
                told = False  # whether it is one of these is to be asked
                if task is None:
                    ask(id)
            return told or (task is not None and task.done() and task.result())

        def lacking() -> dict[str, str]:
            for id in self._far():
                if id not in asked and not has_it(id):
                    ask(id)
            behind = [id for id in {*self._near(), *self._far()} if not has_it(id)]
            return {id: questions[id].why if id in questions else "" for id in behind}

        try:
            while lacking() and (left := deadline - time.monotonic()) > 0:
                progress = asyncio.ensure_future(self._progress.wait())
                pending = [task for task in asked.values() if not task.done()]
                await asyncio.wait(
                    [progress, *pending],
                    timeout=min(left, LOOK_AGAIN),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                progress.cancel()
            return lacking()
        finally:
            for task in asked.values():
                task.cancel()

    def _taking_part(self) -> list[str]:
        """The other nodes whose kernels count: the members, and those whose agent alone is dead.
        Their hosts' traffic goes on by what the kernel has, and others keep rows of them."""
        status = self.node.status
        down = [
            id
            for id in self.node.nodes
            if id in status and status[id].state == "unreachable" and not status[id].withdrawn
        ]
        return list(dict.fromkeys([*self._members(), *down]))

    def _near(self) -> list[str]:
        """The nodes that take part and tell by a stream what their kernel has, or will soon."""
        return [
            id
            for id in self._taking_part()
            if self._has_detector() or id in self.links or self._just_lost(id)
        ]

    def _far(self) -> list[str]:
        """Those that take part and have to be asked: there is no stream, and none to be."""
        return [
            id
            for id in self._taking_part()
            if id in self.node.nodes
            and id not in self.links
            and (self._has_detector() or id not in self._wanted())
        ]

    async def catch_up(self, seconds: float) -> list[str]:
        """Wait until everything that the nodes known now had to tell has come.

        Asked are those with whom a stream is wanted; what others have they have too, or will.
        Returns the ids of those that have not told all when the time is up.
        """
        deadline = time.monotonic() + seconds
        known = [id for id in self.node.nodes if id != self.node.me and id in self._wanted()]

        def behind() -> list[str]:
            links = {id: self.links.get(id) for id in known}
            return [
                id
                for id, link in links.items()
                if id not in self.node.withdrawn and (link is None or link.session.missing)
            ]

        while (left := deadline - time.monotonic()) > 0 and behind():
            try:
                async with asyncio.timeout(left):
                    await self._progress.wait()
            except TimeoutError:
                break
        return behind()

    def _just_lost(self, node: str) -> bool:
        """Whether a node without a stream may well be about to have one."""
        since = self.down_since.get(node, self._started)
        return node in self._wanted() and time.monotonic() - since < SILENCE
