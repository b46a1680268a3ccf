"""Finding peers on the LAN: mDNS (RFC 6762, 6763) under --mdns, by zeroconf.

Each agent announces _vxmesh._tcp.local with its node id and dials whom it sees.
What stands opposite: peers.py, which keeps the streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import structlog
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from agent.model import Node

log = structlog.get_logger()

TYPE = "_vxmesh._tcp.local."
RESOLVE_WITHIN_MS = 3000


class Mdns:
    """Announces this node, and calls `found` with host:port of each other one."""

    def __init__(self, me: Node, found: Callable[[str], None], cluster: str = "") -> None:
        """Nodes of other clusters than `cluster` (empty: not known yet) are passed over."""
        self.me = me
        self._cluster = cluster
        self._found = found
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to announce and to look, on the interface of the advertised address."""
        await self.look()
        assert self._zeroconf is not None
        family = socket.AF_INET6 if ":" in self.me.address else socket.AF_INET
        info = AsyncServiceInfo(
            TYPE,
            f"{self.me.id}.{TYPE}",
            addresses=[socket.inet_pton(family, self.me.address)],
            port=self.me.port,
            properties={"node": self.me.id, "cluster": self._cluster},
            server=f"{self.me.id}.local.",
        )
        await self._zeroconf.async_register_service(info)

    async def look(self) -> None:
        """Begin to look, without announcing anything."""
        v6 = ":" in self.me.address
        self._zeroconf = AsyncZeroconf(
            interfaces=[self.me.address],
            ip_version=IPVersion.V6Only if v6 else IPVersion.V4Only,
        )
        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, TYPE, handlers=[self._changed])

    async def stop(self) -> None:
        """Say goodbye and stop."""
        for task in self._tasks:
            task.cancel()
        if self._browser:
            await self._browser.async_cancel()
        if self._zeroconf:
            await self._zeroconf.async_unregister_all_services()
            await self._zeroconf.async_close()

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed or name.startswith(self.me.id):
            return
        task = asyncio.ensure_future(self._resolve(zeroconf, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(TYPE, name)
        if await info.async_request(zeroconf, RESOLVE_WITHIN_MS) and info.port:
            theirs = info.decoded_properties.get("cluster") or ""
            if self._cluster and theirs and theirs != self._cluster:
                return
            for address in info.parsed_addresses():
                log.info("mdns.found", address=address, port=info.port)
                host = f"[{address}]" if ":" in address else address
                self._found(f"{host}:{info.port}")


@contextlib.asynccontextmanager
async def seen_on_lan(me: Node) -> AsyncIterator[Callable[[], list[str]]]:
    """Meanwhile look who is there, without being seen; gives what to ask for host:port of all
    seen by now. For a node that has no identity yet."""
    seen: list[str] = []
    mdns = Mdns(me, seen.append)
    await mdns.look()
    try:
        yield lambda: list(seen)
    finally:
        await mdns.stop()
