"""The peer port: takes connections, sees by TLS whose they are, and hands them on to gRPC.

gRPC for Python tells nothing of a handshake that failed, nor which certificate a caller has
shown. So the agent takes the port itself, and behind it stand two gRPC servers on unix sockets:
`inside` for nodes of this cluster, `outside` for everybody else, whom it enrols or tells why they
are refused (outside.py). Each connection ends in one of these, or is counted (refusals.py); but
for one that closes without having sent a byte, which is how nodes see whether an agent lives.
What stands opposite: dialer.py of another node.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import struct
import time
from pathlib import Path

import structlog
from cryptography import x509

from agent import splice
from agent.cluster.admission import Admission, group
from agent.cluster.callers import Caller
from agent.cluster.refusals import Reason, Refusals
from agent.cluster.trust import Bearer, Keyring, check_issued, is_within, read_bearer
from agent.errors import Conflict, Invalid
from agent.node import NodeState
from agent.unreadable import UNREADABLE
from agent.views import Change

log = structlog.get_logger()

BACKLOG = 1024  # connections that the kernel holds for us while the loop is busy
ACCEPT_AT_ONCE = 64  # some 15 µs each; then the rest of the loop has its turn
ACCEPT_AGAIN = 0.1  # s; when there are no descriptors left
# s; a round trip to the other side of the world is 0.3 s, a lost packet costs another 1 s.
FIRST_BYTE_WITHIN = 3.0
HANDSHAKE_WITHIN = 3.0
GOODBYE_WITHIN = 1.0  # s; for TLS to be ended on both sides, when a connection is closed
TOLD_WITHIN = 0.3  # s; that what a removed node is told has left, before it is cut off
# Of one node: its stream, its pings, and one for each of its questions under way. Each has three
# descriptors here.
INSIDE_MOST = 256
# Of those outside: to enrol takes three round trips and a signature, well below a second.
OUTSIDE_LIFE = 20.0  # s
OUTSIDE_MOST = 64  # the oldest goes; each costs some 200 kB in all
OUTSIDE_MOST_OF_ONE = 4  # address
OUTSIDE_BYTES = 256 << 10  # a request to enrol has some 2 kB, HTTP/2 around it as much
# s; after a CA was taken away. Who has a certificate of the new one shows it within 5 s
# (recheck.py).
VOID_AFTER = 30.0
KEEPALIVE_AFTER, KEEPALIVE_EVERY, KEEPALIVE_TRIES = 30, 10, 3  # s, s: a dead host costs a minute
LOOK_EVERY = 60.0  # s; whether a node's newest certificate holds still: clocks are set
TLS_HANDSHAKE = b"\x16"  # the first byte of any TLS connection (RFC 8446, 5.1)


class Connection:
    """One that was accepted."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        self.address = address
        self.node = ""  # whose certificate it has shown, once that is known
        self.side: splice.Side | None = None  # once TLS stands
        self.task: asyncio.Task[None] | None = None
        self.is_evicted = False

    def evict(self) -> None:
        """End it at once: another one needs its place."""
        self.is_evicted = True
        if self.task:
            self.task.cancel()


class Front:
    """Everything on one port. `inside` and `outside` are the sockets of the servers behind it."""

    def __init__(
        self, node: NodeState, keyring: Keyring, refusals: Refusals, inside: Path, outside: Path
    ) -> None:
        self._node, self._keyring, self._refusals = node, keyring, refusals
        self._inside, self._outside = inside, outside
        self._members: set[str] = set()  # addresses
        self._admission = Admission(lambda: self._members)
        self._connections: set[Connection] = set()
        self._of_node: dict[str, set[Connection]] = {}
        self._shown: dict[str, x509.Certificate] = {}  # by each such node; the newest
        self._strangers: dict[Connection, None] = {}  # outside; oldest first
        self._listener: socket.socket | None = None
        self._authorities = keyring.current.authorities

    async def start(self, address: str, port: int) -> None:
        """Listen; Conflict if the port cannot be taken."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise Conflict(
                f"peer port {address}:{port}",
                f"cannot be taken ({error.strerror})",
                "Stop what holds it, or choose another with --port (and --advertise)",
            ) from None
        self._listener.setblocking(False)
        self._node.listeners.append(self._changed)
        self._keyring.on_change.append(self._keys_changed)
        self._look_at_members()
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Take no more connections."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._changed in self._node.listeners:
            self._node.listeners.remove(self._changed)
            self._keyring.on_change.remove(self._keys_changed)
        self.close()
        tasks = [c.task for c in self._connections if c.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- taking connections --

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if self._listener is None:
                return
            try:
                sock, name = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.error("peer.unacceptable", error=str(error))
                    self._pause()
                    return
                continue  # that one is gone already
            sock.setblocking(False)
            connection = Connection(sock, str(name[0]))
            if refused := self._admission.enter(connection):
                self._refusals.note(refused, connection.address)
                _reset(sock)
                continue
            self._connections.add(connection)
            connection.task = asyncio.ensure_future(self._serve(connection))

    def _pause(self) -> None:
        loop, listener = asyncio.get_running_loop(), self._listener
        assert listener is not None
        loop.remove_reader(listener)

        def again() -> None:
            if self._listener is listener:
                loop.add_reader(listener, self._accept)

        loop.call_later(ACCEPT_AGAIN, again)

    async def _serve(self, connection: Connection) -> None:
        """The whole life of one connection."""
        try:
            side = connection.side = await self._shake_hands(connection)
            self._admission.leave(connection)
            if side:
                await self._hand_on(connection, side)
        except asyncio.CancelledError:  # only by this file: evicted, cut off, or the port closes
            if connection.is_evicted:
                self._refusals.note(Reason.BUSY, connection.address, connection.node)
        except OSError as error:
            log.warning("peer.lost", address=connection.address, error=str(error))
        except Exception as error:
            log.exception("peer.failed", address=connection.address, error=repr(error))
        finally:
            self._admission.leave(connection)
            self._connections.discard(connection)
            if connection.side is None:
                _reset(connection.sock)
            elif connection.side.transport:
                connection.side.transport.abort()

    async def _shake_hands(self, connection: Connection) -> splice.Side | None:
        """The end of a TLS connection; None if there is none to be, which is noted."""
        address, sock = connection.address, connection.sock
        try:
            async with asyncio.timeout(FIRST_BYTE_WITHIN):
                first = await _peek(sock)
        except TimeoutError:
            self._refusals.note(Reason.SLOW, address)
            return None
        except OSError:
            return None
        if not first:
            return None  # it knocked
        if refused := self._admission.attempt(address, time.monotonic()):
            self._refusals.note(refused, address)
            return None
        if first != TLS_HANDSHAKE:
            self._refusals.note(Reason.NO_TLS, address)
            return None
        _tune(sock)
        try:
            _, side = await asyncio.get_running_loop().connect_accepted_socket(
                splice.Side,
                sock,
                ssl=self._keyring.server_context(),
                ssl_handshake_timeout=HANDSHAKE_WITHIN,
                ssl_shutdown_timeout=GOODBYE_WITHIN,
            )
            return side
        except ssl.SSLCertVerificationError as error:
            self._refusals.note(Reason.FOREIGN, address, detail=error.verify_message)
        except ssl.SSLError as error:
            reason = (error.reason or "").replace("_", " ").lower()
            self._refusals.note(Reason.NO_TLS, address, detail=reason)
        except ConnectionAbortedError:  # asyncio's, when the time is over
            self._refusals.note(Reason.SLOW, address)
        except OSError:
            # An agent of the cluster may have given a dial up; of those that are none it is how
            # one shows that has another cluster's identity.
            tell = address not in self._members
            self._refusals.note(Reason.ABANDONED, address, tell=tell)
        return None

    # -- whose it is --

    def _judge(
        self, connection: Connection, der: bytes | None
    ) -> tuple[Caller, x509.Certificate | None]:
        """Who has shown this certificate (DER), which the cluster's CA has signed."""
        address = connection.address
        if der is None:
            return Caller("", address, Reason.NO_CERTIFICATE), None
        try:
            certificate = x509.load_der_x509_certificate(der)
            bearer = read_bearer(certificate)
        except (Invalid, *UNREADABLE):
            return Caller("", address, Reason.NAMELESS), None
        refused = self._refusal(bearer, certificate)
        return Caller(bearer.node, address, refused), certificate

    def _refusal(self, bearer: Bearer, certificate: x509.Certificate) -> Reason | None:
        now = time.time()
        if bearer.cluster != self._keyring.current.cluster:
            return Reason.FOREIGN
        if bearer.node in self._node.removals:
            return Reason.REMOVED
        if certificate.not_valid_after_utc.timestamp() < now:
            return Reason.EXPIRED
        if not is_within(certificate, now):
            return Reason.EARLY
        return None if self._is_issued(certificate) else Reason.FOREIGN

    def _is_issued(self, certificate: x509.Certificate) -> bool:
        """Whether a CA that is valid now has signed it: TLS has not looked at any time."""
        now = time.time()
        valid = [
            pem
            for pem in self._keyring.current.authorities
            if is_within(x509.load_pem_x509_certificate(pem), now)
        ]
        try:
            check_issued(certificate, valid)
        except Invalid:
            return False
        return True

    # -- handing it on --

    async def _hand_on(self, connection: Connection, side: splice.Side) -> None:
        if side.transport is None:
            return  # it is gone already
        tls = side.transport.get_extra_info("ssl_object")
        caller, certificate = self._judge(connection, tls.getpeercert(binary_form=True))
        connection.node = caller.node
        if caller.refused is None and certificate is not None:
            await self._let_in(connection, side, caller, certificate)
            return
        # One without a certificate may have come to enrol: it is refused when it asks for more.
        if caller.refused and caller.refused is not Reason.NO_CERTIFICATE:
            self._refusals.note(caller.refused, caller.address, caller.node)
        await self._leave_outside(connection, side, caller)

    async def _let_in(
        self,
        connection: Connection,
        side: splice.Side,
        caller: Caller,
        certificate: x509.Certificate,
    ) -> None:
        node = caller.node
        held = self._of_node.setdefault(node, set())
        if len(held) >= INSIDE_MOST:
            self._refusals.note(Reason.BUSY, caller.address, node)
            return
        held.add(connection)
        shown = self._shown.get(node)
        if shown is None or shown.not_valid_before_utc <= certificate.not_valid_before_utc:
            self._shown[node] = certificate
        inner: splice.Side | None = None
        try:
            inner = await splice.connect(self._inside, caller.name)
            side.join(inner)
            await self._while_valid(connection, side)
        finally:
            if inner and inner.transport:
                inner.transport.close()
            held.discard(connection)
            if not held:
                self._of_node.pop(node, None)
                self._shown.pop(node, None)

    async def _while_valid(self, connection: Connection, side: splice.Side) -> None:
        """Until it ends, or the node's last certificate: that of this connection may be over if
        the node has shown a newer one since, as it does when it has been given one."""
        while not side.closed.done():
            ends = self._shown[connection.node].not_valid_after_utc.timestamp()
            left = ends - time.time()
            if left < 0:
                self._refusals.note(Reason.EXPIRED, connection.address, connection.node)
                return
            await asyncio.wait([side.closed], timeout=min(left + 0.001, LOOK_EVERY))

    async def _leave_outside(
        self, connection: Connection, side: splice.Side, caller: Caller
    ) -> None:
        key = group(caller.address)
        if sum(group(c.address) == key for c in self._strangers) >= OUTSIDE_MOST_OF_ONE:
            self._refusals.note(Reason.BUSY, caller.address, caller.node)
            return
        if len(self._strangers) >= OUTSIDE_MOST:
            next(iter(self._strangers)).evict()
        self._strangers[connection] = None
        inner: splice.Side | None = None
        try:
            inner = await splice.connect(self._outside, caller.name)
            side.budget = OUTSIDE_BYTES
            side.join(inner)
            await asyncio.wait([side.closed], timeout=OUTSIDE_LIFE)
        finally:
            if inner and inner.transport:
                inner.transport.close()
            self._strangers.pop(connection, None)

    # -- what changes meanwhile --

    def _changed(self, change: Change) -> None:
        if not change.nodes:
            return
        self._look_at_members()
        for id in change.nodes:
            if id in self._node.removals:
                self._cut(id)

    def _look_at_members(self) -> None:
        self._members = {node.address for node in self._node.nodes.values()}

    def _cut(self, id: str) -> None:
        """Close a node's connections. Meanwhile its calls are ended by what stands behind
        (claims.py), so that it learns why."""
        loop = asyncio.get_running_loop()
        for connection in list(self._of_node.get(id, ())):
            if connection.task:
                loop.call_later(TOLD_WITHIN, connection.task.cancel)

    def _keys_changed(self) -> None:
        if self._keyring.current.authorities == self._authorities:
            return
        self._authorities = self._keyring.current.authorities
        # Nobody is cut off who has a new certificate and is about to show it (recheck.py).
        asyncio.get_running_loop().call_later(VOID_AFTER, self._cut_void)

    def _cut_void(self) -> None:
        """Cut off those that have shown only a certificate of a CA that is believed no more."""
        for id, certificate in list(self._shown.items()):
            if not self._is_issued(certificate):
                for address in {c.address for c in self._of_node.get(id, ())}:
                    self._refusals.note(Reason.FOREIGN, address, id)
                self._cut(id)


async def _peek(sock: socket.socket) -> bytes:
    """The first byte that comes, which stays to be read; nothing if none will."""
    loop = asyncio.get_running_loop()
    while True:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            return sock.recv(1, socket.MSG_PEEK)
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(sock)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _tune(sock: socket.socket) -> None:
    """Let the kernel find out when the other host is gone; by itself it would keep the
    connection for good."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEPALIVE_AFTER),
        (socket.TCP_KEEPINTVL, KEEPALIVE_EVERY),
        (socket.TCP_KEEPCNT, KEEPALIVE_TRIES),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _reset(sock: socket.socket) -> None:
    """Close at once, and keep nothing of it, no state in TIME-WAIT either."""
    with contextlib.suppress(OSError):  # it is closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
