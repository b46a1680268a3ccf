"""Calls to a stand-in plugin on a unix socket: what it may answer, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from agent.errors import Invalid, NotFound, Timeout, Unavailable, VxmeshError
from agent.remote.client import Plugins, Refused

Answer = Callable[[web.Request], Awaitable[web.Response]]


async def _hangs(request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def _dies(request: web.Request) -> web.Response:
    assert request.transport
    request.transport.abort()
    return web.Response()


def _says(text: str, status: int = 200) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=text, status=status)

    return answer


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (_hangs, Timeout, "has not answered NetworkDriver.Join after 2 s"),
        (_dies, Unavailable, "does not answer NetworkDriver.Join"),
        (_says('{"Err": "no"}'), Refused, "refused NetworkDriver.Join: no"),
        (_says('{"Err": "no"}', 500), Refused, "refused NetworkDriver.Join: no"),
        (_says("not found", 404), Refused, "refused NetworkDriver.Join: not found"),
        (_says("{}", 302), Refused, "status 302"),
        (_says("<html>"), Refused, "refused NetworkDriver.Join: <html>"),
        (_says(" " * (2 << 20)), Invalid, "more than 1 MiB"),
    ],
)
async def test_each_way_to_fail_has_its_error(
    tmp_path: Path, answer: Answer, error: type[VxmeshError], why: str
) -> None:
    runner = await _serve(tmp_path, answer, '{"Implements": ["NetworkDriver"]}')
    try:
        with pytest.raises(error) as raised:
            within = 2.0 if answer is _hangs else 60.0
            await Plugins((str(tmp_path),), within).call("odd", "NetworkDriver.Join", {})
        assert why in raised.value.why
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("activated", "why"),
    [
        ("{}", "implements nothing"),
        ('{"Implements": ["IpamDriver"]}', "implements IpamDriver and not NetworkDriver"),
        ('{"Implements": 7}', "answered Plugin.Activate with what it cannot be"),
    ],
)
async def test_who_is_no_network_plugin_is_asked_nothing(
    tmp_path: Path, activated: str, why: str
) -> None:
    runner = await _serve(tmp_path, _says("{}"), activated)
    try:
        with pytest.raises(Invalid) as raised:
            await Plugins((str(tmp_path),), 60.0).call("odd", "NetworkDriver.Join", {})
        assert why in raised.value.why
    finally:
        await runner.cleanup()


async def test_a_plugin_that_nobody_knows_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await Plugins((str(tmp_path),), 60.0).call("odd", "NetworkDriver.Join", {})


async def _serve(directory: Path, answer: Answer, activated: str) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/Plugin.Activate", _says(activated))
    app.router.add_post("/NetworkDriver.Join", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(directory / "odd.sock")).start()
    return runner
