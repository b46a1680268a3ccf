"""Questions to one node, each on a channel of its own: addresses, and what its kernel has.

Not on a stream's channel, which may be closed for a better one at any moment, and many nodes
have no stream to us. What stands opposite: server.py of the other node.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from agent.cluster.dialer import Denied, Dialer
from agent.errors import Unavailable
from agent.model import Node
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc

SPACE_WITHIN = 2.0  # s; for an owner to donate addresses
AWAIT_MOST = 60.0  # s; that who asks what our kernel has is kept waiting
ROUND_ABOUT_AFTER = 0.3  # s without an answer; then others are asked to ask
AGAIN = 0.1  # s; after a node did not answer
WITHHELD_AGAIN = 0.2  # s; after it said that something is in a network's way
WHY_MAX = 300  # characters of what it says
DENIED_AGAIN = 1.0  # s; after it was there, but one did not believe the other


async def request_space(
    dialer: Dialer, node: Node, request: pb.SpaceRequest, tries: int = 1
) -> pb.SpaceReply:
    """Ask an owner of addresses for some; Unavailable if it does not answer.

    On a way that loses packets the first try may be lost with them. To ask twice is to be given
    twice at worst: nothing is lost by that, the addresses are the asker's then.
    """
    for _ in range(tries - 1):
        with contextlib.suppress(Unavailable):
            return await _request_space(dialer, node, request)
    return await _request_space(dialer, node, request)


async def _request_space(dialer: Dialer, node: Node, request: pb.SpaceRequest) -> pb.SpaceReply:
    channel = dialer.channel(node)
    try:
        stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
        reply: pb.SpaceReply = await stub.RequestSpace(request, timeout=SPACE_WITHIN)
        return reply
    except grpc.aio.AioRpcError as error:
        raise dialer.heed(error, node.id) from None
    finally:
        await channel.close()


@dataclass(slots=True)
class Question:
    """Whether a kernel has `origin`'s records up to `version`, and all of `networks` (ids), before
    the deadline (on the monotonic clock)."""

    origin: str
    version: int
    deadline: float
    networks: tuple[str, ...] = ()
    why: str = ""  # it has not, as far as was said


async def await_applied(
    dialer: Dialer, node: Node, question: Question, via: Sequence[Node] = ()
) -> bool:
    """Ask a node. One that does not answer is asked again until the deadline.

    `via` are nodes that are asked to ask it, if it is slow: the way between us may be cut.
    """
    ways = [asyncio.create_task(_await_applied(dialer, node, question, ""))]
    try:
        left = question.deadline - time.monotonic()
        await asyncio.wait(ways, timeout=min(ROUND_ABOUT_AFTER, left))
        if not ways[0].done() and not question.why:  # one that says why can be reached
            ways += [
                asyncio.create_task(_await_applied(dialer, other, question, node.id))
                for other in via
            ]
        running = set(ways)
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if any(way.result() for way in done):
                return True
        return False
    finally:
        for way in ways:
            way.cancel()


async def _await_applied(dialer: Dialer, node: Node, question: Question, of: str) -> bool:
    channel = dialer.channel(node)
    try:
        stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
        while (left := question.deadline - time.monotonic()) > 0:
            request = pb.AppliedRequest(
                origin=question.origin,
                version=question.version,
                seconds=min(left, AWAIT_MOST),
                node=of,
                networks=question.networks,
            )
            try:
                reply: pb.Applied = await stub.AwaitApplied(request, timeout=left)
                question.why = reply.why[:WHY_MAX]
                if question.why:
                    await asyncio.sleep(min(WITHHELD_AGAIN, left))
                elif reply.version >= question.version:
                    return True
            except grpc.aio.AioRpcError as error:
                is_denied = isinstance(dialer.heed(error, node.id), Denied)
                await asyncio.sleep(min(DENIED_AGAIN if is_denied else AGAIN, left))
        return False
    finally:
        await channel.close()


def clamp(seconds: float, least: float, most: float) -> float:
    """A time that a peer names, within bounds; `least` if it is no number."""
    return min(seconds, most) if seconds > least else least
