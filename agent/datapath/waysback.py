"""Which sandboxes have the way back that balanced connections need, and have to have it.

All on networks with a service have it, before anybody can choose one as a backend: a
connection that came before would be answered wrongly. The rest are left alone.
What stands opposite: replies.py, which knows how.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Mapping

from agent.datapath import replies, sandbox
from agent.datapath.backlog import Attempt
from agent.datapath.networks import Held
from agent.drivers.base import Port
from agent.errors import VxmeshError

TOGETHER = 8  # sandboxes at once
AUDITED = 10  # at one audit of a network: each takes some 5 ms

What = tuple[Port, int, tuple[str, ...]]  # the port, the index of our end, the gateways


class WaysBack:
    """Those of one host."""

    def __init__(self, held: Mapping[int, Held], attempt: Attempt) -> None:
        """`held` are the networks as they are; `attempt` notes what fails."""
        self._held, self._attempt = held, attempt
        self._done: dict[str, What] = {}  # by endpoint id

    async def furnish(self, networks: Collection[int]) -> None:
        """Give the ports of these networks what they lack, and take it from others."""
        wanted: dict[str, tuple[int, What]] = {}
        for vni in networks:
            held = self._held.get(vni)
            for endpoint, (port, index) in held.ports.items() if held else ():
                inside = port.inside
                if inside is None:
                    continue  # where it has gone is not known here
                wanted[endpoint] = vni, (inside, index, held.bridge.gateways if held else ())
        present = {e for held in self._held.values() for e in held.ports}
        for endpoint in self._done.keys() - wanted.keys():
            port, _, _ = self._done.pop(endpoint)
            with contextlib.suppress(VxmeshError, OSError):  # the sandbox is going
                await self._clear(port, endpoint not in present)
        missing = [(e, vni, what) for e, (vni, what) in wanted.items() if self._done.get(e) != what]
        for start in range(0, len(missing), TOGETHER):
            attempts = (
                self._attempt(("replies", vni, endpoint), self._furnish(endpoint, what))
                for endpoint, vni, what in missing[start : start + TOGETHER]
            )
            await asyncio.gather(*attempts)

    async def audit(self, vni: int) -> int:
        """Look at the next few of a network and put them right; how many things were not."""
        held = self._held.get(vni)
        found = [e for e in self._done if held and e in held.ports]
        changes = 0
        for endpoint in found[:AUDITED]:
            what = self._done.pop(endpoint)
            self._done[endpoint] = what  # to the end of the line
            with contextlib.suppress(VxmeshError, OSError):
                changes += await _furnish(what[0], what[2])
        return changes

    async def _furnish(self, endpoint: str, what: What) -> None:
        port, _, gateways = what
        await _furnish(port, gateways)
        self._done[endpoint] = what

    async def _clear(self, port: Port, is_gone: bool) -> None:
        fd = sandbox.open_netns(port)
        try:
            await replies.clear(fd, port, is_gone)
        finally:
            os.close(fd)


async def _furnish(port: Port, gateways: tuple[str, ...]) -> int:
    fd = sandbox.open_netns(port)
    try:
        return await replies.furnish(fd, port, gateways)
    finally:
        os.close(fd)
