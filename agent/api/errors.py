"""VxmeshError as a gRPC status with a google.rpc.ErrorInfo detail (AIP-193), and nothing else out.

What stands opposite: client.py, which makes VxmeshError of it again.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from agent.errors import VxmeshError

log = structlog.get_logger()
DOMAIN = "vxmesh"
# gRPC sends a status in one header block; what a person reads is shorter in any case.
TEXT_MAX = 1500

F = TypeVar("F", bound=Callable[..., Any])


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: VxmeshError) -> None:
    """End a call with an error; raises grpc.aio.AbortError."""
    parts = {"what": error.what, "why": error.why, "fix": error.fix}
    info = error_details_pb2.ErrorInfo(
        reason=error.code,
        domain=DOMAIN,
        metadata={key: text[:TEXT_MAX] for key, text in parts.items()},
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    code = getattr(grpc.StatusCode, error.code)
    status = status_pb2.Status(
        code=code.value[0], message=str(error)[: 2 * TEXT_MAX], details=[detail]
    )
    await context.abort_with_status(rpc_status.to_status(status))


def _unexpected(method: str, error: Exception) -> VxmeshError:
    log.error("api.failed", method=method, error=repr(error), exc_info=error)
    return VxmeshError(
        "the agent", f"failed unexpectedly ({error!r})", "This is a bug: report it with its log"
    )


def reports(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """For a method of a servicer with one answer: what it raises becomes a status."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(self, request, context)
        except VxmeshError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, _unexpected(method.__name__, error))

    return wrapped


def reports_stream(
    method: Callable[..., AsyncIterator[Any]],
) -> Callable[..., AsyncIterator[Any]]:
    """The same for a method with a stream of answers."""

    @functools.wraps(method)
    async def wrapped(
        self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        try:
            async for reply in method(self, request, context):
                yield reply
        except VxmeshError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, _unexpected(method.__name__, error))

    return wrapped
