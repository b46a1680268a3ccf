"""How many calls of one node may be under way here at a time.

Some wait for long (for a kernel, for another node's answer), and each is a task and a few
kilobytes: a node that made ever more of them would take memory and the loop's time from all the
others. What stands opposite: server.py, whose handlers pass through here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from agent.cluster.callers import caller_of

# A node asks each other one a few things at a time; scripts that make endpoints in parallel have
# some hundred waits under way. 512 waits are some 5 MB here.
CALLS_MAX = 512
# Calls in which the caller has us ask another node: each is a call of ours, and often a channel.
ERRANDS_MAX = 32

T = TypeVar("T")
Method = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[T]]


class InFlight:
    """The calls under way, by node."""

    def __init__(self, most: int = CALLS_MAX) -> None:
        self.most = most
        self._calls: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._calls.total()

    def bounded(self, method: Method[T]) -> Method[T]:
        """The same method, which refuses a node that has too many calls under way."""

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> T:
            return await self.run(method, request, context)

        return call

    async def run(
        self, method: Method[T], request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> T:
        """Make one call; RESOURCE_EXHAUSTED if its node has too many under way."""
        node = caller_of(context).node
        if self._calls[node] >= self.most:
            why = f"{self.most} calls of this node are under way already"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        self._calls[node] += 1
        try:
            return await method(request, context)
        finally:
            self._calls[node] -= 1
            if not self._calls[node]:
                del self._calls[node]
