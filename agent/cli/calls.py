"""Between click's synchronous commands and the async client: one call, one answer, as a dict.

Imported by the noun modules, so only when one of them runs: gRPC takes 0.1 s to import.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from google.protobuf.message import Message


# gRPC would start its threads again in a forked child, and a process with threads cannot move
# into another mount namespace: `vxmesh exec` forks for just that.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import click

from agent.client import Client
from agent.errors import Invalid

T = TypeVar("T")


def call(host: str, function: Callable[[Client], Awaitable[T]]) -> T:
    """Run `function` with a client of the agent at `host` (empty: the default).

    KeyboardInterrupt at SIGINT. asyncio.run's own handler is not enough: a signal that comes just
    before the loop waits for its files does not end that wait, and a quiet stream (`events
    --follow`) would never be told.
    """
    interrupted = False
    context = click.get_current_context(silent=True)
    tls = context.obj.get("tls", "") if context and context.obj else ""

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            task.cancel()

        # Whoever started us may want it ignored, and only a main thread can handle it.
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError, RuntimeError):
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        async with Client(host, tls) as client:
            return await function(client)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise


def to_dict(message: Message, *without: str) -> dict[str, Any]:
    """A message as INTERFACE's fields: snake case, nothing left out but `without`."""
    from google.protobuf.json_format import MessageToDict  # 20 ms that announce does without

    found: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for name in without:
        found.pop(name, None)
    return found


def pairs(values: Sequence[str], flag: str) -> dict[str, str]:
    """key=value arguments as a dict; Invalid names the one that has no '='."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise Invalid(f"{flag} {value[:40]!r}", "is malformed", "Write it as key=value")
        found[key] = text
    return found
