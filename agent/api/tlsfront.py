"""The control port: TLS 1.3 with certificates on both sides, then as by the unix sockets.

Only with --control-listen. Who comes has to show a certificate of the cluster's CA that names a
user (agent/users.py): a node's certificate is not enough, or whoever broke into one node could
change all others. Every connection ends in the gRPC server, in the user's name, or is told as
`control.refused`; but for one that ends without a byte. What a connection was let in by holds
it up: it ends with the certificate, or with the CA that issued it.
What stands opposite: client.py; front.py for the sockets of this host.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog
from cryptography import x509

from agent import splice
from agent.api.front import BACKLOG, Limits, Places
from agent.api.refusals import Note
from agent.api.rights import Caller, Right, Way
from agent.errors import Conflict, Invalid
from agent.unreadable import UNREADABLE
from agent.users import read_user

log = structlog.get_logger()

HANDSHAKE_WITHIN = 5.0  # s; a few round trips, and the agent may be busy
GOODBYE_WITHIN = 1.0  # s
HANDSHAKES_MOST = 32  # at a time; some 100 kB and a signature each
CHECK_EVERY = 60.0  # s; for certificates that have ended since

Context = Callable[[], ssl.SSLContext]  # as it is now: it changes with certificate and CA
Believed = Callable[[x509.Certificate], None]  # raises Invalid unless a CA that holds signed it


class TlsFront:
    """Takes connections on one port, for the gRPC server at `inner`."""

    def __init__(
        self, inner: Path, context: Context, believed: Believed, refused: Note, limits: Limits
    ) -> None:
        self._inner = inner
        self._context, self._believed = context, believed
        self._refused = refused
        self._places = Places(limits)
        self._server: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes = 0
        self._open: dict[splice.Side, x509.Certificate] = {}

    async def listen(self, address: str, port: int) -> None:
        """Take connections; Conflict if the port cannot be taken."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._server = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise Conflict(
                f"--control-listen {address} port {port}",
                f"cannot be listened on ({error.strerror})",
                "Choose an address of this host and a free port",
            ) from None
        self._server.setblocking(False)
        for work in (self._accept(self._server), self._check()):
            self._start(work)

    @property
    def port(self) -> int:
        """The port that it listens on: that of `listen`, or what the kernel chose for 0."""
        assert self._server
        return int(self._server.getsockname()[1])

    async def close(self) -> None:
        """Take no more, and close those that stand."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server:
            self._server.close()
        for side in list(self._open):
            _abort(side)

    def recheck(self) -> None:
        """Cut those off whose certificate has ended, or is of a CA that is void by now."""
        for side, certificate in list(self._open.items()):
            try:
                if certificate.not_valid_after_utc.timestamp() <= time.time():
                    raise Invalid("certificate", "has ended")
                self._believed(certificate)
            except Invalid as error:
                log.info("control.cut_off", user=read_user(certificate).name, reason=error.why)
                _abort(side)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY)
            self.recheck()

    async def _accept(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, name = await loop.sock_accept(server)
            except OSError as error:  # no descriptors are left, say
                log.error("control.unacceptable", error=str(error))
                await asyncio.sleep(0.1)
                continue
            address = str(name[0])
            if self._handshakes >= HANDSHAKES_MOST:
                self._refused("busy", address, f"{address} found all places for newcomers taken")
                sock.close()
                continue
            self._start(self._take(sock, address))

    async def _take(self, sock: socket.socket, address: str) -> None:
        side = None
        try:
            side = await self._shake_hands(sock, address)
            if side is not None:
                await self._admit(side, address)
        except BaseException as error:
            if side is not None:
                _abort(side)
            sock.close()
            if not isinstance(error, OSError):
                raise
            log.error("control.inner_gone", error=str(error))

    async def _shake_hands(self, sock: socket.socket, address: str) -> splice.Side | None:
        self._handshakes += 1
        try:
            _, side = await asyncio.get_running_loop().connect_accepted_socket(
                splice.Side,
                sock,
                ssl=self._context(),
                ssl_handshake_timeout=HANDSHAKE_WITHIN,
                ssl_shutdown_timeout=GOODBYE_WITHIN,
            )
            return side
        except ssl.SSLCertVerificationError as error:
            self._refuse(address, f"its certificate is not believed ({error.verify_message})")
        except ssl.SSLError as error:
            reason = (error.reason or "no TLS").replace("_", " ").lower()
            self._refuse(address, f"no certificate was shown ({reason})")
        except ConnectionAbortedError:  # asyncio's, when the time is over
            self._refuse(address, f"it said nothing for {HANDSHAKE_WITHIN:g} s")
        except ConnectionResetError:  # it went away: a scan, or somebody who sees who listens
            self._refuse(address, "it ended before it had shown a certificate")
        finally:
            self._handshakes -= 1
        sock.close()
        return None

    async def _admit(self, side: splice.Side, address: str) -> None:
        if side.transport is None:
            return  # gone already
        der = side.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        try:
            certificate = x509.load_der_x509_certificate(der or b"")
            user = read_user(certificate)
        except (Invalid, *UNREADABLE) as error:
            why = error.why if isinstance(error, Invalid) else "is malformed"
            self._refuse(address, f"its certificate {why}")
            _abort(side)
            return
        caller = Caller(Right(user.right), Way.TLS, user.name)
        who = f"user {user.name}"
        if not self._places.take(who):
            self._refused("busy", who, f"{who} at {address} has too many connections, or all have")
            _abort(side)
            return
        self._open[side] = certificate

        def gone(_: object) -> None:
            self._open.pop(side, None)
            self._places.leave(who)

        side.closed.add_done_callback(gone)
        side.join(await splice.connect(self._inner, caller.name))

    def _refuse(self, address: str, why: str) -> None:
        self._refused("certificate", address, f"{address} may not control this agent: {why}")


def _abort(side: splice.Side) -> None:
    if side.transport:
        with contextlib.suppress(OSError):
            side.transport.abort()
