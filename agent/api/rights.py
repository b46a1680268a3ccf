"""Who may do what with an agent: look, or change. Each method is one of the two.

Whoever takes connections (front.py for unix sockets, tlsfront.py for TCP) finds out who calls
and with which right, and hands the bytes on to the gRPC server in that name (splice.py). The
`Guard` reads the name again at each call, refuses what the right does not cover, and writes
every change to the log with who made it.
What stands opposite: control.py, whose methods are listed here.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import pwd
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog

from agent import splice
from agent.api.errors import abort
from agent.errors import Denied, VxmeshError
from agent.rpc import control_pb2

log = structlog.get_logger()

CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
# Every method of Control is in one of these (a test looks). One that is in neither changes.
CHANGES = frozenset(
    f"/{CONTROL}/{name}"
    for name in (
        "RemoveNode",
        "RotateKeys",
        "LeaveNode",
        "CreateNetwork",
        "RemoveNetwork",
        "PruneNetworks",
        "CreateEndpoint",
        "Announce",
        "RemoveEndpoint",
        "CreateSandbox",
        "RemoveSandbox",
        "GetJoinToken",  # who has it can bring a node in
        "RotateAuthority",
        "IssueUser",
        "CreateService",
        "UpdateService",
        "RemoveServices",
        "AddBackend",
        "RemoveBackend",
        "DrainBackend",
        "SetEndpointHealth",
    )
)
READS = frozenset(
    f"/{CONTROL}/{name}"
    for name in (
        "GetInfo",
        "ListNodes",
        "GetNode",
        "ListNetworks",
        "GetNetwork",
        "ListEndpoints",
        "GetEndpoint",
        "ListSandboxes",
        "GetSandbox",
        "Resolve",
        "Watch",
        "GetMetrics",
        "GetCluster",
        "ListServices",
        "GetService",
    )
)
# Services that only tell of themselves, whole.
READ_SERVICES = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)
OBJECT_MAX = 200  # characters of what was changed, in the log

Context = grpc.aio.ServicerContext[Any, Any]


class Right(enum.StrEnum):
    """What a caller may do; each includes those before it."""

    NONE = "none"
    READ = "read"
    CHANGE = "change"


class Way(enum.StrEnum):
    """By what a caller came, and so what `Caller.who` is."""

    SOCKET = "uid"  # agent.sock: a uid
    READ_SOCKET = "reader"  # read.sock, and could do more by the other one: a uid
    TLS = "user"  # TCP: the name in a certificate


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of a connection; `who` is free of "/"."""

    right: Right
    way: Way
    who: str

    @property
    def name(self) -> str:
        """For splice.bound."""
        return f"{self.right}-{self.way}-{self.who}"

    @classmethod
    def parse(cls, name: str) -> Caller:
        """The caller of a name; ValueError if it is none."""
        right, way, who = name.split("-", 2)
        return cls(Right(right), Way(way), who)

    def field(self) -> dict[str, str | int]:
        """Who it is, for the log: `uid` or `user`."""
        return {"user": self.who} if self.way is Way.TLS else {"uid": int(self.who)}

    def describe(self) -> str:
        """Who it is, for people. Looks into the user database, which can block."""
        if self.way is Way.TLS:
            return f"user {self.who}"
        try:
            return f"{pwd.getpwuid(int(self.who)).pw_name} (uid {self.who})"
        except (KeyError, ValueError, OSError):
            return f"uid {self.who}"


def needed(method: str) -> Right:
    """The right that a method (/package.Service/Name) takes."""
    service = method.split("/")[1] if method.startswith("/") else ""
    return Right.READ if method in READS or service in READ_SERVICES else Right.CHANGE


def covers(right: Right, wanted: Right) -> bool:
    """Whether who has `right` may do what takes `wanted`."""
    order = list(Right)
    return order.index(right) >= order.index(wanted)


class Guard(grpc.aio.ServerInterceptor):
    """Looks at each call of a server on whose socket only the fronts can connect.

    `groups` are those that may change and that may look, as people know them; `refused` is told
    of each call that was refused.
    """

    def __init__(
        self, groups: tuple[str, str], refused: Callable[[Caller, str], None] = lambda c, m: None
    ) -> None:
        self._change_group, self._read_group = groups
        self._refused = refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, behind the check: only there is it known who calls."""
        handler = await continuation(details)
        return None if handler is None else self._guarded(details.method, handler)

    def _guarded(self, method: str, handler: Any) -> Any:
        wanted = needed(method)
        unary = handler.unary_unary or handler.stream_unary
        inner: Callable[..., Any] = unary or handler.unary_stream or handler.stream_stream

        async def answer(request: Any, context: Context) -> Any:
            caller = await self._check(method, wanted, context)
            if wanted is Right.READ:
                return await inner(request, context)
            return await _logged(method, caller, request, context, inner)

        async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._check(method, wanted, context)
            async for reply in inner(request, context):
                yield reply

        makes = {
            "unary_unary": grpc.unary_unary_rpc_method_handler,
            "stream_unary": grpc.stream_unary_rpc_method_handler,
            "unary_stream": grpc.unary_stream_rpc_method_handler,
            "stream_stream": grpc.stream_stream_rpc_method_handler,
        }
        kind = next(kind for kind in makes if getattr(handler, kind))
        # A stream of answers may be written to the context as well, by a coroutine.
        guarded = answers if not unary and inspect.isasyncgenfunction(inner) else answer
        return makes[kind](guarded, handler.request_deserializer, handler.response_serializer)

    async def _check(self, method: str, wanted: Right, context: Context) -> Caller:
        try:
            caller = Caller.parse(splice.caller(context.peer()) or "")
        except ValueError:
            why = "did not come by one of the agent's sockets"
            await abort(context, Denied("the caller", why, "Use agent.sock"))
            raise AssertionError("abort raises") from None
        if not covers(caller.right, wanted):
            self._refused(caller, method)
            await abort(context, await asyncio.to_thread(self._error, caller, method, wanted))
        return caller

    def _error(self, caller: Caller, method: str, wanted: Right) -> VxmeshError:
        who, verb = caller.describe(), method.rsplit("/", 1)[-1]
        if caller.way is Way.TLS:
            return Denied(
                f"{who}'s certificate",
                f"lets them look and not change, as {verb} does",
                f"Have one issued that may: 'vxmesh cluster user {caller.who}'",
            )
        if caller.way is Way.READ_SOCKET:
            return Denied(
                who,
                f"came by read.sock, by which nobody changes anything, as {verb} does",
                f"Use agent.sock, as root or a member of the group {self._change_group}",
            )
        group = self._change_group if wanted is Right.CHANGE else self._read_group
        may = "may look and not change" if caller.right is Right.READ else "has no right here"
        return Denied(
            who,
            f"{may}: {verb} is for root and the group {group}",
            f"Run it as root, or have {who.split(' ')[0]} added to that group and log in again",
        )


async def _logged(
    method: str, caller: Caller, request: Any, context: Context, inner: Callable[..., Any]
) -> Any:
    """Run a changing call. It is in the log however it ends: a call that fails, or whose caller
    went away, may have changed something all the same."""
    began = time.monotonic()
    result = "gone"
    try:
        reply = await inner(request, context)
        result = "ok"
        return reply
    except grpc.aio.AbortError:
        result = context.details() or "failed"
        raise
    finally:
        log.info(
            "control.change",
            method=method.rsplit("/", 1)[-1],
            object=_object(request),
            result=result,
            seconds=round(time.monotonic() - began, 3),
            **caller.field(),
        )


def _object(request: Any) -> str:
    """What a request is about, as far as it says: names as they were given."""
    parts = [getattr(request, key, "") for key in ("network", "name", "ref", "endpoint")]
    parts += getattr(request, "refs", ())
    return " ".join(str(part) for part in parts if part)[:OBJECT_MAX]
