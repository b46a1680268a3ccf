"""Whether a caller is who it says it is: each request names its sender, and so does its
certificate. What stands opposite: server.py and consent.py, which ask before they act."""

from __future__ import annotations

from typing import Any

import grpc.aio

from agent.cluster.callers import Caller, caller_of
from agent.cluster.outside import refuse
from agent.cluster.refusals import Reason, Refusals
from agent.node import NodeState


class Claims:
    """The checks, which end a call (by raising) that does not pass."""

    def __init__(self, node: NodeState, refusals: Refusals) -> None:
        self._node, self._refusals = node, refusals

    async def check(self, claimed: str, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Who calls, if it is `claimed`."""
        caller = await self.member(context)
        if claimed != caller.node:
            await self.impostor(caller, context)
        return caller

    async def member(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Who calls, if it has not been removed since its connection was let in."""
        caller = caller_of(context)
        if removal := self._node.removals.get(caller.node):
            await refuse(context, Reason.REMOVED, removal)
        return caller

    async def impostor(self, caller: Caller, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """End a call of who speaks for another node."""
        self._refusals.note(Reason.IMPOSTOR, caller.address, caller.node)
        await refuse(context, Reason.IMPOSTOR)
