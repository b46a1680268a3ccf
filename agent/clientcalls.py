"""What a way to an agent does for the typed client, and how it says that a call was refused.

What stands opposite: client.py, which calls; clientunix.py and clientgrpc.py, which are such ways.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

MESSAGE_MAX = 64 << 20  # bytes of one answer


class Refused(Exception):
    """A call that failed: gRPC's name of its status, a text, and a google.rpc.Status or nothing."""

    def __init__(self, code: str, text: str, details: bytes = b"") -> None:
        super().__init__(code, text)
        self.code, self.text, self.details = code, text, details


class Calls(Protocol):
    """A connection to one agent. Methods are named as in proto/control.proto; all raise Refused."""

    async def call(self, method: str, request: Any) -> Any:
        """One request, one answer."""

    async def upload(self, method: str, requests: Iterable[Any]) -> Any:
        """Many requests, one answer."""

    def stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        """One request, many answers."""

    async def close(self) -> None:
        """Close the connection."""
