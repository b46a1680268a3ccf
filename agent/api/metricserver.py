"""GET /metrics over HTTP, for a Prometheus that scrapes; only with --metrics-listen.

There is no authentication: the address decides who may look. What stands opposite: metrics.py.
"""

from __future__ import annotations

from aiohttp import web

from agent.api.metrics import Metrics
from agent.errors import Conflict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHUTDOWN_WITHIN = 0.5  # s for a scrape under way when the agent stops


class MetricServer:
    """Serves on one address."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_WITHIN)

    async def start(self, address: str, port: int) -> None:
        """Listen; Conflict if the address or port cannot be had."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, address, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise Conflict(
                f"--metrics-listen {address} port {port}",
                f"cannot be listened on ({error.strerror})",
                "Choose an address of this host and a free port",
            ) from None

    @property
    def port(self) -> int:
        """The port that it listens on: that of `start`, or what the kernel chose for 0."""
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()

    async def _answer(self, _: web.Request) -> web.Response:
        body = await self._metrics.text()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
