"""Between click's synchronous commands and the async client: one call, one answer, as a dict.

Imported by the noun modules, so only when one of them runs. Over the socket of this host nothing
here needs an event loop, and none is loaded: that and gRPC's library take 0.1 s to import.
"""

from __future__ import annotations

import binascii
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agent import loading
from agent.client import Client
from agent.clientunix import finish
from agent.errors import Invalid

if TYPE_CHECKING:
    from google.protobuf.message import Message

T = TypeVar("T")


def call(host: str, function: Callable[[Client], Awaitable[T]]) -> T:
    """Run `function` with a client of the agent at `host` (empty: the default). It is to wait for
    calls of this client, or `pause`, and for nothing else. KeyboardInterrupt at SIGINT."""
    context = click.get_current_context(silent=True)
    tls = context.obj.get("tls", "") if context and context.obj else ""
    client = Client(host, tls, blocks=True)
    if not client.blocks:
        from agent.cli.loop import run_until_interrupted  # asyncio and gRPC: 0.13 s
    loading.end()

    async def main() -> T:
        async with client:
            return await function(client)

    return finish(main()) if client.blocks else run_until_interrupted(main())


async def pause(client: Client, seconds: float) -> None:
    """Wait between two calls of a client."""
    if client.blocks:
        time.sleep(seconds)  # noqa: ASYNC251 - there is no loop
    else:
        import asyncio

        await asyncio.sleep(seconds)


def to_dict(message: Message, *without: str) -> dict[str, Any]:
    """A message as INTERFACE's fields: snake case, nothing left out but `without`.

    As google.protobuf.json_format has it, which takes 10 ms to import: what is set comes first,
    numbers of 64 bits are text and bytes are base64. Enumerations and Google's own types, which
    it writes in ways of their own, are in none of our answers.
    """
    found = {field.name: _value(field, value) for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.name not in found and not field.has_presence:
            found[field.name] = _value(field, getattr(message, field.name))
    for name in without:
        found.pop(name, None)
    return found


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        of = field.message_type.fields_by_name["value"]
        return {key: _one(of, value[key]) for key in value}
    if field.is_repeated:
        return [_one(field, each) for each in value]
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if field.message_type:
        return to_dict(value)
    if field.type == field.TYPE_BYTES:
        return binascii.b2a_base64(value, newline=False).decode()
    if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
        return str(value)
    return value


def pairs(values: Sequence[str], flag: str) -> dict[str, str]:
    """key=value arguments as a dict; Invalid names the one that has no '='."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise Invalid(f"{flag} {value[:40]!r}", "is malformed", "Write it as key=value")
        found[key] = text
    return found
