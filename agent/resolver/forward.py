"""Questions that are not ours, put to the resolvers of the host.

The sockets are the host's: this process runs in the host's namespace, only its listening
sockets do not. Each question has a socket of its own, connected, so that the kernel chooses a
random source port and drops what comes from elsewhere, and a random id (RFC 5452).
Answers are kept as long as they may be (cache.py). Who asks what is being asked for already waits
for the same answer: so a loop that leads back to us by way of a sandbox asks once, and ends.
What stands opposite: server.py asks; messages.py checks that an answer is one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import dns.message
import dns.rcode

from agent.resolver.cache import Cache, Key, key_of
from agent.resolver.messages import read_upstream, relay, upstream_query
from agent.resolver.wire import Asked

ATTEMPT_SECONDS = 1.2  # one upstream's time: a good one takes 0.1
TOTAL_SECONDS = 4.5  # C libraries wait 5, and an answer that comes later helps nobody
IN_FLIGHT_MAX = 512
IN_FLIGHT_PER_SOURCE_MAX = 64  # one sandbox cannot take the way out from the others
AVOID_SECONDS = 10.0  # an upstream that did not answer is asked last for this long
_RECHECK_SECONDS = 5.0  # gateways come and go: whether an upstream is ourselves changes
_UPSTREAMS_MAX = 8
_STRANGERS_MAX = 64  # datagrams that are no answer to what was asked, for one question
_NO_EDNS = (dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS)

_log = logging.getLogger("vxmesh.resolver.forward")


class Upstream(NamedTuple):
    """A resolver of the host."""

    text: str  # as in resolv.conf
    family: socket.AddressFamily
    address: tuple[str, int] | tuple[str, int, int, int]


def parse_resolv_conf(text: str, port: int) -> list[Upstream]:
    """The name servers of a resolv.conf, resolv.conf(5), in order; what is malformed is skipped."""
    upstreams: list[Upstream] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            found = socket.getaddrinfo(
                words[1], port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
            )
        except (OSError, UnicodeError):
            continue
        family, _, _, _, address = found[0]
        upstreams.append(Upstream(words[1], family, (str(address[0]), port, *address[2:])))
    return list(dict.fromkeys(upstreams))[:_UPSTREAMS_MAX]


class Forwarder:
    """Asks the resolvers of a resolv.conf, which is read again whenever it changes.

    `is_ours(address, port)` says which of them are ourselves: those are never asked.
    """

    def __init__(
        self,
        path: Path,
        is_ours: Callable[[str, int], bool],
        rng: random.Random | None = None,
        port: int = 53,
        attempt_seconds: float = ATTEMPT_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._path = path
        self._is_ours = is_ours
        self._rng = rng or random.SystemRandom()
        self._port = port
        self._attempt_seconds = attempt_seconds
        self._total_seconds = total_seconds
        self._stamp: tuple[int, int, int] | None = None
        self._upstreams: list[Upstream] = []
        self._usable: list[Upstream] = []
        self._checked = float("-inf")
        self._avoid: dict[Upstream, float] = {}  # until when, on the loop's clock
        self._in_flight: Counter[bytes] = Counter()
        self._cache = Cache()
        self._asking: dict[Key, asyncio.Task[dns.message.Message | None]] = {}

    def upstreams(self) -> list[Upstream]:
        """Whom to ask now, in order: without ourselves, the silent ones last."""
        now = asyncio.get_running_loop().time()
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp != self._stamp:
                text = self._path.read_text(errors="replace")
                self._upstreams = parse_resolv_conf(text, self._port)
                self._stamp = stamp
                self._checked = float("-inf")
                self._avoid = {}
                self._cache.clear()
        except OSError as error:
            if self._stamp is not None or self._checked < 0:
                _log.warning("resolv.conf", extra={"fields": {"error": str(error)}})
            self._stamp, self._upstreams, self._usable, self._checked = None, [], [], now
        if now - self._checked >= _RECHECK_SECONDS:
            usable = [up for up in self._upstreams if not self._is_ours(up.address[0], self._port)]
            if usable != self._usable:
                fields = {"upstreams": [up.text for up in usable]}
                _log.info("upstreams", extra={"fields": fields})
            self._usable = usable
            self._checked = now
        self._avoid = {up: until for up, until in self._avoid.items() if until > now}
        return sorted(self._usable, key=lambda up: self._avoid.get(up, 0.0))

    def admit(self, source: bytes) -> bool:
        """Whether one more question from this asker may be put now; if so, it counts."""
        full = self._in_flight.total() >= IN_FLIGHT_MAX
        if full or self._in_flight[source] >= IN_FLIGHT_PER_SOURCE_MAX:
            self.counters["forward_refused_busy"] += 1
            return False
        self._in_flight[source] += 1
        return True

    def release(self, source: bytes) -> None:
        """The question that `admit` let in is done with."""
        self._in_flight[source] -= 1
        if not self._in_flight[source]:
            del self._in_flight[source]

    def kept(self, asked: Asked) -> bytes | None:
        """The wire form of an answer that need not be asked for; None if there is none."""
        wire = self._cache.get(asked, time.monotonic())
        if wire is not None:
            self.counters["forward_kept"] += 1
        return wire

    async def answer(self, asked: Asked) -> bytes | None:
        """The wire form of the answer; None if no upstream gave one in time."""
        key = key_of(asked)
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.get_running_loop().create_task(self._fetch(asked))
            self._asking[key] = asking
            asking.add_done_callback(lambda _: self._asking.pop(key))
        else:
            self.counters["forward_joined"] += 1
        message = await asyncio.shield(asking)  # who asked first may go away before the others
        return relay(asked, message) if message is not None else None

    async def _fetch(self, asked: Asked) -> dns.message.Message | None:
        started = time.monotonic()
        message, _ = await self.resolve(asked)
        self.counters["forward_us"] += int((time.monotonic() - started) * 1e6)
        if message is not None:
            self._cache.put(asked, message, time.monotonic())
        return message

    async def resolve(self, asked: Asked) -> tuple[dns.message.Message | None, str]:
        """The first answer from an upstream, and which; NXDOMAIN is one, SERVFAIL is none.

        Each is tried once, then each once more, all within `total_seconds`.
        """
        self.counters["forwarded"] += 1
        upstreams = self.upstreams()
        try:
            async with asyncio.timeout(self._total_seconds):
                for upstream in upstreams * 2:
                    message = await self._try(upstream, asked)
                    if message is not None:
                        return message, upstream.text
        except TimeoutError:
            pass
        self.counters["forward_failed" if upstreams else "forward_no_upstream"] += 1
        return None, ""

    async def _try(self, upstream: Upstream, asked: Asked) -> dns.message.Message | None:
        query = upstream_query(asked, self._rng.getrandbits(16))
        try:
            async with asyncio.timeout(self._attempt_seconds):
                message = await self._udp(upstream, query)
                if message is not None and message.rcode() in _NO_EDNS:
                    query.use_edns(False)  # RFC 6891, section 7: it may know no EDNS
                    message = await self._udp(upstream, query)
                if message is not None and message.flags & dns.flags.TC:
                    message = await self._tcp(upstream, query)
        except (OSError, asyncio.IncompleteReadError) as error:
            # TimeoutError is an OSError. A refusal comes at once, and is remembered as well.
            if upstream not in self._avoid:
                fields = {"upstream": upstream.text, "error": str(error) or "no answer"}
                _log.warning("upstream silent", extra={"fields": fields})
            self._avoid[upstream] = asyncio.get_running_loop().time() + AVOID_SECONDS
            return None
        sound = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
        return message if message is not None and message.rcode() in sound else None

    async def _udp(
        self, upstream: Upstream, query: dns.message.Message
    ) -> dns.message.Message | None:
        loop = asyncio.get_running_loop()
        with socket.socket(upstream.family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(upstream.address)
            await loop.sock_sendall(sock, query.to_wire())
            for _ in range(_STRANGERS_MAX):
                message = read_upstream(await loop.sock_recv(sock, 65535), query)
                if message is not None:
                    return message
        return None

    async def _tcp(
        self, upstream: Upstream, query: dns.message.Message
    ) -> dns.message.Message | None:
        self.counters["forwarded_tcp"] += 1
        reader, writer = await asyncio.open_connection(upstream.text, self._port)
        try:
            wire = query.to_wire()
            writer.write(len(wire).to_bytes(2, "big") + wire)
            size = int.from_bytes(await reader.readexactly(2), "big")
            return read_upstream(await reader.readexactly(size), query)
        finally:
            writer.close()
