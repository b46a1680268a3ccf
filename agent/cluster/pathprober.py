"""Measures the paths to all other nodes, and answers those who measure theirs: the UDP socket.

It has the number of the peer port. What is sent may not be cut up on the way (IP_PMTUDISC_PROBE:
DF set, and what ICMP says of the path is not heeded). Answered are members alone, at the address
that they say is theirs, with less than they sent, and no more than RATE a second each.
What stands opposite: this file on the other nodes; core/paths.py, which decides what to send;
agent/pathwatch.py, which is told what was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from agent.cluster import pathwire
from agent.cluster.pathkeys import PairKeys
from agent.cluster.trust import Keyring
from agent.core.bounds import UNDERLAY_MTU_MIN
from agent.core.pathmtu import Measure
from agent.core.paths import SIZE_MAX, Found, Paths, Send, expected
from agent.core.ratelimit import Buckets
from agent.model import Node
from agent.node import NodeState
from agent.notation import parse_address
from agent.views import Change

log = structlog.get_logger()

FLOOR = {4: UNDERLAY_MTU_MIN, 6: 1280}  # bytes; RFC 791, RFC 8200
DRAINED = 64  # datagrams at a wake-up, so that a flood of them does not hold up the loop
RATE, BURST = 100.0, 200.0  # answers a second to one node; a look in a hurry takes some 40 in all
IDLE = 3600.0  # s; there is nobody to probe
# s between two times that what changed is told: it is in this node's record, which goes to all, and
# where the whole underlay is narrow paths are found so one after the other.
TOGETHER = 1.0
AFTER_FAULT = 5.0  # s after something that nobody expected, until it is gone on
# Of <linux/in.h> and <linux/in6.h>; the socket module has no names for them.
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE, IPV6_DONTFRAG = 10, 23, 3, 62


class PathProber:
    """The paths of this node. `found` is told what changed, also by a node that is gone; `known` is
    what was found narrow in an earlier life, by node."""

    def __init__(
        self,
        node: NodeState,
        keyring: Keyring,
        interval: float,
        known: Mapping[str, int],
        found: Callable[[list[Found]], None],
    ) -> None:
        self._node, self._told = node, found
        self._keys = PairKeys(keyring, self._certificate_of)
        self._paths = Paths(interval, random.Random(), known)
        self._answers = Buckets(RATE, BURST, 4096)
        self._socket: socket.socket | None = None
        self._family = 6 if ":" in node.nodes[node.me].vtep else 4
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_gone = False  # a node, and nobody was told yet
        self._tell_at = 0.0
        # For tunnelprober.py: whether frames through VXLAN are taken here; a node has answered, and
        # takes them or not; it has got one, and its checksum was right or not.
        self.hears: Callable[[], bool] = lambda: False
        self.on_answer: Callable[[str, bool], None] = lambda node, hears: None
        self.on_report: Callable[[str, int, bool], None] = lambda node, nonce, is_right: None

    async def start(self) -> None:
        """Begin. If the port is taken nothing is measured, and nobody answered."""
        me = self._node.nodes[self._node.me]
        try:
            self._socket = _bound(me.vtep, me.port)
        except OSError as error:
            log.warning("paths.unmeasured", address=me.vtep, port=me.port, error=str(error))
            return
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        self._node.listeners.append(self._changed)
        self._take_nodes(self._node.nodes)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Measure no more, and answer nobody."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        self._node.listeners.remove(self._changed)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def is_measuring(self) -> bool:
        """Whether it could be started."""
        return self._socket is not None

    def measure(self, node: str) -> Measure:
        """What is known of the path to a node."""
        return self._paths.measure(node)

    def measures(self) -> dict[str, Measure]:
        """What is known of all paths, by node."""
        return {node: self._paths.measure(node) for node in self._paths.nodes()}

    def narrow(self) -> dict[str, int]:
        """What fits, by node, where that is less than should."""
        return self._paths.narrow()

    def hasten(self, nodes: Iterable[str] | None = None) -> None:
        """The way to these nodes may have changed (none given: the host's own, to all of them):
        look at it again."""
        self._paths.hasten(self._paths.nodes() if nodes is None else nodes, time.monotonic())
        self._wake.set()

    # -- who there is --

    def _certificate_of(self, id: str) -> bytes:
        node = self._node.nodes.get(id)
        return node.certificate if node else b""

    def _changed(self, change: Change) -> None:
        are_others = self._take_nodes(change.nodes) if change.nodes else False
        back = [
            id
            for id, before in change.statuses.items()
            if before is not None and before.state != self._node.condition(id).state == "alive"
        ]
        self._paths.hasten(back, time.monotonic())
        if are_others or back:
            self._wake.set()

    def _take_nodes(self, ids: Iterable[str]) -> bool:
        """Nodes whose records are others now; whether there is something to do for it."""
        nodes, me = self._node.nodes, self._node.nodes[self._node.me]
        gone = [id for id in ids if id not in nodes]
        self._paths.forget(gone)
        self._is_gone |= bool(gone)
        for id in gone:
            self._keys.forget(id)
        are_others = bool(gone)
        # This host's own MTU counts for each path.
        for id in list(nodes) if me.id in ids else ids:
            if id == me.id or id not in nodes:
                continue
            if (":" in nodes[id].vtep) != (self._family == 6):
                self._paths.drop(id)  # no VXLAN goes there either
            else:
                top = expected(me, nodes[id])
                are_others |= self._paths.put(id, top, FLOOR[self._family], time.monotonic())
        return are_others

    # -- the loop --

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                wait = self._once(time.monotonic())
            except Exception:
                log.exception("paths.fault")
                self._is_gone = True  # what was not told may be known from what is
                await asyncio.sleep(AFTER_FAULT)
                continue
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with
            # what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(wait, 0.001), IDLE)):
                    await self._wake.wait()

    def _once(self, now: float) -> float:
        """Do what is due; how long there is then nothing to do, in s."""
        for send in self._paths.handle_timer(now):
            self._send(send)
        if now >= self._tell_at and self._tell():
            self._tell_at = now + TOGETHER
        due = self._paths.next_timer()
        if self._is_gone or self._paths.has_found():
            due = min(due, self._tell_at)
        return due - time.monotonic()

    def _tell(self) -> bool:
        """Whether there was anything to tell."""
        changes, is_gone, self._is_gone = self._paths.found(), self._is_gone, False
        if changes or is_gone:
            self._told(changes)
        return bool(changes or is_gone)

    def _send(self, send: Send) -> None:
        node, key = self._node.nodes.get(send.node), self._keys.key(send.node)
        if node is None or key is None or self._socket is None:
            return
        data = pathwire.build(
            pathwire.PROBE, send.nonce, send.size, self._node.me, key, self._family
        )
        try:
            self._socket.sendto(data, (node.vtep, node.port))
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._paths.unsendable(send.node, time.monotonic())
            # Else there is no way there now, or no room: as if it were lost.

    def _read(self) -> None:
        for _ in range(DRAINED):
            if self._socket is None:
                return
            try:
                data, source = self._socket.recvfrom(SIZE_MAX)
            except BlockingIOError:
                break
            except OSError:
                continue  # an ICMP error of something that was sent
            self._take(data, source[0])

    def _take(self, data: bytes, address: str) -> None:
        datagram = pathwire.parse(data, self._family)
        node = self._node.nodes.get(datagram.sender) if datagram else None
        if datagram is None or node is None or node.id == self._node.me:
            return
        if parse_address(node.vtep) != parse_address(address.partition("%")[0]):
            return
        key = self._keys.key(node.id)
        if key is None or not pathwire.is_proven(datagram, key):
            return
        now = time.monotonic()
        if datagram.kind in (pathwire.ANSWER, pathwire.HEARING):
            if self._paths.answered(node.id, datagram.nonce, now):
                self._wake.set()
                self.on_answer(node.id, datagram.kind == pathwire.HEARING)
        elif datagram.kind == pathwire.REPORT:
            self.on_report(node.id, datagram.nonce, datagram.size == 1)
        elif datagram.kind == pathwire.PROBE and self._answers.take(node.id, now):
            kind = pathwire.HEARING if self.hears() else pathwire.ANSWER
            self._reply(node, kind, datagram.nonce, datagram.size, key)

    def take_frame(self, data: bytes, is_right: bool) -> None:
        """A frame came through VXLAN: report it to the member who sent it, if it was one."""
        frame = pathwire.parse(data, self._family)
        node = self._node.nodes.get(frame.sender) if frame else None
        key = self._keys.key(node.id) if node else None
        if frame is None or node is None or key is None or frame.kind != pathwire.FRAME:
            return
        is_proven = pathwire.is_proven(frame, key) and node.id != self._node.me
        if is_proven and self._answers.take(node.id, time.monotonic()):
            self._reply(node, pathwire.REPORT, frame.nonce, int(is_right), key)

    def frame(self, node: str, nonce: int) -> bytes:
        """What is in a frame for a node; empty if it would not take it."""
        key = self._keys.key(node)
        if key is None:
            return b""
        return pathwire.build(pathwire.FRAME, nonce, 0, self._node.me, key, self._family)

    def _reply(self, node: Node, kind: int, nonce: int, size: int, key: bytes) -> None:
        data = pathwire.build(kind, nonce, size, self._node.me, key, self._family)
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.sendto(data, (node.vtep, node.port))


def _bound(address: str, port: int) -> socket.socket:
    """A UDP socket whose datagrams are not cut up. OSError."""
    is_six = ":" in address
    sock = socket.socket(socket.AF_INET6 if is_six else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if is_six:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock
