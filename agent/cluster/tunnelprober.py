"""Sends frames through VXLAN to the other nodes, and hears from them in what state they came.

The frames go by a VXLAN device of their own; reports come outside of it, by the socket that
measures paths. Only who answers there that it takes frames is sent any.
What stands opposite: this file on the other nodes; core/tunnels.py, which decides;
datapath/probetunnel.py, the device; agent/pathwatch.py, which is told what was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from agent.cluster.pathprober import AFTER_FAULT, IDLE, PathProber
from agent.core.tunnels import Tunnel, Tunnels, Turn
from agent.errors import VxmeshError
from agent.node import NodeState
from agent.views import Change

log = structlog.get_logger()

TOLD_AFTER = 5  # attempts to make the device
AGAIN_SOON, AGAIN = 0.5, 30.0  # s between two of them


class Device(Protocol):
    """What carries frames."""

    async def open(self, vtep: str, port: int) -> None: ...

    async def close(self) -> None: ...

    @property
    def is_open(self) -> bool: ...

    async def send(self, vtep: str, data: bytes, offloaded: bool) -> None: ...


class TunnelProber:
    """Of one node. `found` is told each change of what is known."""

    def __init__(
        self,
        node: NodeState,
        paths: PathProber,
        interval: float,
        found: Callable[[list[Turn]], Awaitable[None]],
    ) -> None:
        self._node, self._paths, self._told = node, paths, found
        self._tunnels = Tunnels(interval, random.Random())
        self._device: Device | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def start(self, device: Device) -> None:
        """Begin, with a device whose frames go to `paths.take_frame`. While it cannot be made no
        frame is sent or taken, and the others know."""
        if not self._paths.is_measuring:
            return
        self._device = device
        self._paths.hears = lambda: device.is_open
        self._paths.on_answer = self._answered
        self._paths.on_report = self._reported
        self._node.listeners.append(self._changed)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Send and take no more."""
        if self._device is None:
            return
        self._node.listeners.remove(self._changed)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._device.close()
        self._device = None

    def states(self) -> dict[str, Tunnel]:
        """What is known, by node."""
        return {node: self._tunnels.state(node) for node in self._tunnels.nodes()}

    def hasten(self) -> None:
        """Look at all of them again: the host's device may be another, or set otherwise."""
        self._tunnels.hasten(self._tunnels.nodes(), time.monotonic())
        self._wake.set()

    def _changed(self, change: Change) -> None:
        for id in change.nodes:
            if id not in self._node.nodes:
                self._tunnels.drop(id)

    def _answered(self, node: str, hears: bool) -> None:
        # Most say what is known: then nothing is due for it.
        now = time.monotonic()
        if not hears:
            self._tunnels.drop(node)
        elif self._tunnels.put(node, now) or self._tunnels.answered(node, now):
            self._wake.set()

    def _reported(self, node: str, nonce: int, is_right: bool) -> None:
        if self._tunnels.reported(node, nonce, is_right, time.monotonic()):
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                wait = await self._once()
            except Exception:
                log.exception("tunnels.fault")
                await asyncio.sleep(AFTER_FAULT)
                continue
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with
            # what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(wait, 0.001), IDLE)):
                    await self._wake.wait()

    async def _once(self) -> float:
        """Do what is due; how long there is then nothing to do, in s."""
        if self._device is not None and not self._device.is_open:
            await self._open()
        frames, asked = self._tunnels.handle_timer(time.monotonic())
        for frame in frames:
            await self._send(frame.node, frame.nonce, frame.offloaded)
        if asked:
            self._paths.hasten(asked)
        if turns := self._tunnels.turns():
            await self._told(turns)
        return self._tunnels.next_timer() - time.monotonic()

    async def _open(self) -> None:
        """Make the device. One of an agent that was killed takes the kernel a moment to take apart,
        and who has the port for something else may give it up."""
        assert self._device is not None
        me = self._node.nodes[self._node.me]
        for attempt in itertools.count():
            try:
                await self._device.open(me.vtep, me.data_port)
                return
            except (OSError, VxmeshError) as error:
                if attempt == TOLD_AFTER:
                    why = str(error)
                    log.warning("tunnels.untried", vtep=me.vtep, port=me.data_port, error=why)
                await asyncio.sleep(AGAIN_SOON if attempt < TOLD_AFTER else AGAIN)

    async def _send(self, id: str, nonce: int, offloaded: bool) -> None:
        node, data = self._node.nodes.get(id), self._paths.frame(id, nonce)
        if node is None or not data or self._device is None:
            return
        try:
            await self._device.send(node.vtep, data, offloaded)
        except OSError as error:
            log.warning("tunnels.unsent", node=id, error=str(error))
