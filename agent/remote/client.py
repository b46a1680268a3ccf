"""Calls to plugins: HTTP POST of JSON, each with a time limit and a bound on its answer.

A plugin is asked what it implements before it is asked anything else. No connection is kept:
calls are few, and a plugin that was started anew is found where it is now.
Source: Docker's plugin protocol (docs/extend/plugin_api.md), libnetwork's docs/remote.md.
What stands opposite: a plugin's process; discovery.py says where; driver.py says what.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from agent.drivers.remote import Answer, decode
from agent.errors import Invalid, NotFound, Timeout, Unavailable, VxmeshError
from agent.remote import discovery

ACCEPT = "application/vnd.docker.plugins.v1.2+json"
ANSWER_BYTES_MAX = 1 << 20
CALL_WITHIN = 20.0  # s, connecting included; a plugin may have to ask a controller elsewhere
NETWORK_DRIVER, IPAM_DRIVER = "NetworkDriver", "IpamDriver"


class Refused(VxmeshError):
    """The plugin did what it was asked to answer: it said that it will not."""

    code = "FAILED_PRECONDITION"

    def __init__(self, plugin: str, method: str, said: str, status: int) -> None:
        why = f"refused {method}: {said}" if said else f"refused {method} (status {status})"
        super().__init__(f"plugin {plugin}", why, "See the plugin's log")
        self.is_unknown = status == 404  # it does not know the method


class _Activated(Answer):
    Implements: list[str] | None = None


class _Error(Answer):
    Err: str | None = None  # libnetwork drivers/remote/api
    Error: str | None = None  # libnetwork ipams/remote/api


class Plugins:
    """All plugins of this host, by name."""

    def __init__(self, directories: Sequence[str], within: float = CALL_WITHIN) -> None:
        """`within` is how long a call may take, s."""
        self._directories, self.within = tuple(directories), within
        self._implements: dict[tuple[str, discovery.Place], list[str]] = {}

    async def call(
        self, plugin: str, method: str, body: dict[str, Any], within: float = 0.0
    ) -> bytes:
        """Call `method`, such as NetworkDriver.Join, and return the JSON of its answer.

        NotFound if no plugin has that name, Unavailable if it does not listen or breaks off,
        Timeout if it hangs, Refused if it answers an error, Invalid if that is no answer or it
        does not implement what the method is of. `within` is s, if not as long as any call.
        """
        place = await asyncio.to_thread(discovery.find, plugin, self._directories)
        kind = method.partition(".")[0]
        key = (plugin, place)
        if place.tls is not None or key not in self._implements:
            answer = await self._post(plugin, place, "Plugin.Activate", {})
            try:
                found = decode(answer, _Activated).Implements or []
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                why = f"answered Plugin.Activate with what it cannot be: {error}"
                raise Invalid(f"plugin {plugin}", why, "Tell its maker") from None
            self._implements = {k: v for k, v in self._implements.items() if k[0] != plugin}
            self._implements[key] = found
        if kind not in self._implements[key]:
            has = ", ".join(self._implements[key])[:100] or "nothing"
            self._implements.pop(key)  # another one may be there by the next time
            raise Invalid(
                f"plugin {plugin}", f"implements {has} and not {kind}", "Use another plugin"
            )
        try:
            return await self._post(plugin, place, method, body, within)
        except (Unavailable, Timeout):
            self._implements.pop(key, None)
            raise

    async def _post(
        self,
        plugin: str,
        place: discovery.Place,
        method: str,
        body: dict[str, Any],
        within: float = 0.0,
    ) -> bytes:
        # In a thread, and only where there is a plugin: 0.1 s, for which the loop would stand.
        if "aiohttp" not in sys.modules:
            await asyncio.to_thread(importlib.import_module, "aiohttp")
        import aiohttp

        connector = (
            aiohttp.UnixConnector(place.socket)
            if place.socket
            else aiohttp.TCPConnector(ssl=place.tls or True)
        )
        try:
            async with (
                asyncio.timeout(within or self.within),
                aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
                session.post(
                    f"{place.url}/{method}",
                    data=msgspec.json.encode(body) if method != "Plugin.Activate" else b"",
                    headers={"Accept": ACCEPT},
                    skip_auto_headers=("Content-Type", "Accept-Encoding"),
                    allow_redirects=False,
                ) as response,
            ):
                answer = bytearray()
                async for piece in response.content.iter_chunked(1 << 16):
                    answer += piece
                    if len(answer) > ANSWER_BYTES_MAX:
                        why = f"answered {method} with more than {ANSWER_BYTES_MAX >> 20} MiB"
                        raise Invalid(f"plugin {plugin}", why, "Tell its maker")
                status = response.status
        except TimeoutError:
            raise Timeout(
                f"plugin {plugin}",
                f"has not answered {method} after {within or self.within:g} s",
                "See the plugin's log, or start it anew",
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(
                f"plugin {plugin}", f"does not answer {method} ({error})", "Start it"
            ) from None
        said = _said(bytes(answer))
        if status != 200 or said:
            raise Refused(plugin, method, said, status)
        return bytes(answer)


def is_away(error: VxmeshError) -> bool:
    """Whether the plugin may do later what it did not do now."""
    return isinstance(error, Unavailable | Timeout | NotFound)


def _said(answer: bytes) -> str:
    """The error that an answer has, in one line; empty if it has none."""
    try:
        found = decode(answer, _Error)
        return " ".join((found.Err or found.Error or "").split())[:500]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return " ".join(answer[:500].decode(errors="replace").split())
