"""Streams that stand are looked at again: is who was believed when they were made so still?

TLS asks only when a connection is made, and a stream lives for as long as both agents. So from
time to time another connection is made to each node to which this one has opened a stream. It
shows them our certificate, which may be a new one, and us theirs.
What stands opposite: front.py, which does so for the streams that others have opened to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable

import structlog

from agent.cluster.dialer import Dialer, Distrusted, target_of
from agent.cluster.link import Link
from agent.errors import Unavailable
from agent.node import NodeState

log = structlog.get_logger()

WITHIN = 5.0  # s; for all streams, one after the other, so that many cost no stall


class Recheck:
    """The streams of a node; `links` gives those that there are."""

    def __init__(
        self, node: NodeState, dialer: Dialer, links: Callable[[], Iterable[Link]]
    ) -> None:
        self._node, self._dialer, self._links = node, dialer, links
        self._now = asyncio.Event()

    def hasten(self) -> None:
        """Look at all of them now: our certificate is new, or whom we believe has changed."""
        self._now.set()

    async def run(self) -> None:
        """Look at them every so often, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._dialer.check_interval):
                    await self._now.wait()
            self._now.clear()
            dialed = [link for link in self._links() if link.dialed]
            for link in random.sample(dialed, len(dialed)):
                await self._check(link)
                spread = min(WITHIN, self._dialer.check_interval)
                await asyncio.sleep(spread / len(dialed) * random.random())

    async def _check(self, link: Link) -> None:
        node = self._node.nodes.get(link.peer)
        if node is None or link.closed.is_set():
            return
        try:
            await self._dialer.who_is(target_of(node), node.id)
        except Distrusted as error:
            log.warning("peer.distrusted", peer=node.id, error=str(error))
            link.close()
        except Unavailable:
            pass  # that is for the failure detection to find out
