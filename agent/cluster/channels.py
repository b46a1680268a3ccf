"""Channels for pings, kept open for the next one; and knocking, to tell a dead agent from a dead
host. What stands opposite: detector.py, which decides what to ask."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import grpc.aio

from agent.cluster.dialer import Dialer, target_of
from agent.core.membership import Outcome
from agent.model import Node
from agent.rpc import peer_pb2_grpc as pb_grpc

CHANNELS_MAX = 64  # each costs a connection and some 50 kB
CLOSE_WITHIN = 2.0  # s; longer than any ping
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class _Held(NamedTuple):
    channel: grpc.aio.Channel
    stub: Any  # a caller for each method: not made anew for each ping
    target: str
    generation: int  # of the keyring
    since: float  # monotonic


class Channels:
    """One channel a node; of too many, those used longest ago go.

    None becomes older than `check_interval`, or than the certificates that hold now: what was
    believed when it was made may not be any more.
    """

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._channels: dict[str, _Held] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, node: Node) -> Any:
        """The Peer service of a node."""
        held = self._channels.pop(node.id, None)
        if held is not None and not self._is_good(held, node):
            self._close_soon(held.channel)
            held = None
        if held is None:
            channel = self._dialer.channel(node, _OPTIONS)
            generation = self._dialer.keyring.generation
            stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            held = _Held(channel, stub, target_of(node), generation, time.monotonic())
        self._channels[node.id] = held
        while len(self._channels) > CHANNELS_MAX:
            self._close_soon(self._channels.pop(next(iter(self._channels))).channel)
        return held.stub

    def _is_good(self, held: _Held, node: Node) -> bool:
        return (
            held.target == target_of(node)
            and held.generation == self._dialer.keyring.generation
            and time.monotonic() - held.since < self._dialer.check_interval
        )

    def drop(self, id: str) -> None:
        """Use another channel for a node from now on; what is under way on this one goes on."""
        held = self._channels.pop(id, None)
        if held:
            self._close_soon(held.channel)

    async def close(self) -> None:
        """Close all."""
        channels = [held.channel for held in self._channels.values()]
        self._channels.clear()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*(c.close() for c in channels), *self._closing, return_exceptions=True)

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.get_running_loop().create_task(_close(channel))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(channel: grpc.aio.Channel) -> None:
    # With grace: without it other calls on the channel end as if they had been cancelled.
    await channel.close(grace=CLOSE_WITHIN)


async def knock(node: Node, timeout: float) -> Outcome | None:
    """Connect to a node's port by TCP: REFUSED or SILENT; None if the connection was taken."""
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(node.address, node.port)
    except ConnectionRefusedError:
        return Outcome.REFUSED
    except (OSError, TimeoutError):
        return Outcome.SILENT
    writer.close()
    return None
