"""A netlink connection to one network namespace, through pyroute2.

The one file that sees pyroute2. It drops keywords that it does not know without a word, so
what is set by it is read back in the tests. It enters namespaces by forking, which gRPC's
threads do not survive: the socket is made in a throw-away thread instead and handed over.
And it sends in the event loop's thread, though the kernel works a request off in the thread
that sends it and makes it wait for every other one that changes a network device (the RTNL),
100 ms where many containers come and go: so it has a loop in a thread of its own here.
What stands opposite: routing.py and netlink.py say what is asked. Source: rtnetlink(7).
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent.syscalls import socket_in

T = TypeVar("T")
P = ParamSpec("P")

ANSWERED_WITHIN = 5.0  # s, of a kernel in which others make and delete many devices

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def _thread_loop() -> asyncio.AbstractEventLoop:
    """The loop in which all requests are made; its thread is started with the first one."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="netlink", daemon=True).start()
        return _loop


def in_thread(
    function: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Have a coroutine run in that loop, whatever loop it is called in.

    One that makes many requests is better sent there whole than each request by itself.
    """

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        coroutine = function(*args, **kwargs)
        loop = _thread_loop()
        if asyncio.get_running_loop() is loop:
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    return call


class Rtnetlink:
    """One namespace's kernel, to be asked."""

    def __init__(self, netns: str | Path) -> None:
        """Open in the namespace at path `netns`."""
        self._socket = socket_in(netns, socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
        self._opened: Any = None
        self._asking: set[asyncio.Task[Any]] = set()

    @property
    def _route(self) -> Any:
        """pyroute2's object, which belongs to the thread that makes it."""
        if (task := asyncio.current_task()) and task not in self._asking:
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        if self._opened is None:
            self._opened = AsyncIPRoute(use_socket=self._socket)
        return self._opened

    def close(self) -> None:
        """Close the socket, once what was asked is answered."""
        asyncio.run_coroutine_threadsafe(self._close(), _thread_loop()).result()

    async def _close(self) -> None:
        # With the first request pyroute2 hands the socket to the loop, which adds it a turn later:
        # closed in between, its number may be another's by then.
        if asking := self._asking - {asyncio.current_task()}:
            _, pending = await asyncio.wait(asking, timeout=ANSWERED_WITHIN)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if self._opened is not None:
            self._opened.close()
        self._socket.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await in_thread(self._close)()


async def request(coroutine: Awaitable[T]) -> T:
    """Make a request of pyroute2's; OSError if the kernel refuses it."""
    try:
        return await coroutine
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None


async def each(answer: AsyncIterator[T]) -> AsyncIterator[T]:
    """The messages of a dump; OSError if the kernel breaks it off."""
    try:
        async for message in answer:
            yield message
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None
