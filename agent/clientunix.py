"""The way to the agent of this host for who has nothing else to do meanwhile: a blocking socket.

It needs no event loop, so that a command loads neither asyncio nor gRPC's library, which take
longer than all that it does. Its coroutines never wait for a loop, so `finish` can run them.
What stands opposite: api/front.py of the agent; clientgrpc.py is the other way there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf.message_factory import GetMessageClass

from agent.clientcalls import Refused
from agent.http2 import Broken, Connection
from agent.rpc import control_pb2 as pb

OPEN_WITHIN = 20.0  # s until the agent's first word, as gRPC's library waits for it
FULL_AGAIN = 0.01  # s until it is tried again where too many wait for the agent
PIECE = 1 << 18  # bytes read at a time
_FIELDS = {
    b":authority": b"localhost",
    b"te": b"trailers",
    b"content-type": b"application/grpc",
    b"user-agent": b"vxmesh",
}

T = TypeVar("T")


class UnixCalls:
    """Calls on a unix socket, one at a time. It is connected when the first one is made, and anew
    when one is made after that connection has ended, as by an agent that starts again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: Connection  # from when there is
        self._sock: socket.socket | None = None
        self._deadline = 0.0
        self._service = pb.DESCRIPTOR.services_by_name["Control"]

    async def call(self, method: str, request: Any) -> Any:
        return await self.upload(method, (request,))

    async def upload(self, method: str, requests: Iterable[Any]) -> Any:
        answers = list(self._run(method, requests))
        if len(answers) != 1:
            raise Refused("INTERNAL", f"there are {len(answers)} answers")
        return answers[0]

    async def stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        for answer in self._run(method, (request,)):
            yield answer

    async def close(self) -> None:
        self._forget()

    def _forget(self) -> None:
        if self._sock:
            self._sock.close()  # which ends what is under way
        self._sock = None

    def _run(self, method: str, requests: Iterable[Any]) -> Iterator[Any]:
        """Make a call; its answers as they come."""
        read = GetMessageClass(self._service.methods_by_name[method].output_type).FromString
        self._look()
        self._exchange(lambda: False)
        call = self._connection
        try:
            call.begin(f"/{self._service.full_name}/{method}", _FIELDS)
        except Broken as error:
            raise Refused("UNAVAILABLE", str(error)) from None
        try:
            for request in requests:
                call.send(request.SerializeToString())
                self._exchange(lambda: call.waiting)
                if call.status:
                    break
            call.finish()
            while not call.status or call.messages:
                self._exchange(lambda: not call.messages and not call.status)
                while call.messages:
                    yield read(call.messages.popleft())
        finally:
            call.cancel()
        if call.status.code != "OK":
            raise Refused(call.status.code, call.status.text, call.status.details)

    def _look(self) -> None:
        """Take in what came since the last call, and forget the connection if that ended it."""
        if self._sock is None:
            return
        try:
            while not self._connection.is_ending:
                self._connection.feed(self._sock.recv(PIECE, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return  # there is no more
        except OSError:
            pass
        self._forget()

    def _exchange(self, is_blocked: Callable[[], object]) -> None:
        """Send what is to go out, and take in what comes as long as `is_blocked`."""
        try:
            sock = self._connect()
            while True:
                if out := self._connection.take():
                    # If it takes no more, what it said before that is to be read all the same.
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        sock.sendall(out)
                if not is_blocked():
                    return
                is_open = self._connection.is_open
                left = None if is_open else self._deadline - time.monotonic()
                if not _await_input(sock, left):
                    raise TimeoutError("the agent says nothing")
                self._connection.feed(sock.recv(PIECE))
        except OSError as error:
            self._forget()
            raise Refused("UNAVAILABLE", str(error)) from None

    def _connect(self) -> socket.socket:
        if self._sock is None:
            self._deadline = time.monotonic() + OPEN_WITHIN
            self._connection = Connection()
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.settimeout(OPEN_WITHIN)
            while True:
                try:
                    self._sock.connect(self._path)
                    break
                except BlockingIOError:  # so many wait to be accepted that there is no room
                    if time.monotonic() >= self._deadline:
                        raise TimeoutError("the agent accepts no connection") from None
                    time.sleep(FULL_AGAIN)
            self._sock.settimeout(None)
        return self._sock


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine comes to that makes calls of this module, and waits for nothing else."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise RuntimeError("a coroutine that waits for an event loop, where there is none")


def _await_input(sock: socket.socket, seconds: float | None) -> bool:
    """Return when there is something to read, with whether there is.

    A signal that comes just before the wait would not end it, and a quiet stream (`events
    --follow`) would never be told: so it is written to a pipe too, which is waited for.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = None
    try:
        with contextlib.suppress(ValueError):  # only a main thread hears of signals
            before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            poll.register(read, select.POLLIN)
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0) * 1000
            ready = {fd for fd, _ in poll.poll(left)}
            if sock.fileno() in ready:
                return True
            if not ready:
                return False
            os.read(read, 512)
    finally:
        if before is not None:
            signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
