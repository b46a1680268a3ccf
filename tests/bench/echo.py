"""Datagrams from a workload to another and back: when they get through, and how many are lost.

Opposite: lookups.py, the names that go with them. The same for whoever carries them.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

from agent.syscalls import socket_in
from tests.bench.lookups import Workload

PORT = 7  # RFC 862
INTERVAL = 0.01  # seconds between two datagrams, while the way is to open
PATIENCE = 2.0  # seconds for the last to come back
SIZE = 64  # bytes
BUFFER = 16 << 20  # bytes: more than all datagrams of a stream, so that nothing is lost in it
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
_NUMBER = struct.Struct(">Q")


class Server:
    """Sends back whatever comes, in a workload, until it is closed."""

    def __init__(self, workload: Workload) -> None:
        self._socket = _socket(workload)
        self._socket.bind(("", PORT))
        self._socket.settimeout(0.2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="echo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send back no more."""
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):  # nothing came, or there is no way back
                self._socket.sendto(*self._socket.recvfrom(2048))


def wait(workload: Workload, address: str, limit: float) -> float | None:
    """When (time.monotonic) the first datagram came back; None if none did in `limit` seconds.

    Sends every 10 ms.
    """
    deadline = time.monotonic() + limit
    with _socket(workload) as sock:
        sock.setblocking(False)
        sock.connect((address, PORT))
        while (now := time.monotonic()) < deadline:
            with contextlib.suppress(OSError):  # no route, refused: not yet
                sock.send(bytes(SIZE))
            while (left := now + INTERVAL - time.monotonic()) > 0:
                select.select([sock], [], [], left)
                with contextlib.suppress(OSError):
                    if sock.recv(2048):
                        return time.monotonic()
    return None


class Stream:
    """Datagrams at a steady rate, in a thread; each has a number, so each that is lost is seen."""

    def __init__(self, workload: Workload, address: str, count: int, rate: float) -> None:
        """Send `count` datagrams to the Server at `address`, `rate` of them a second; more, if
        result() is asked for later than that."""
        self._socket = _socket(workload)
        self._socket.setblocking(False)
        self._socket.connect((address, PORT))
        self._count, self._interval = count, 1 / rate
        self._missing: set[int] = set()
        self._may_end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="stream", daemon=True)
        self._thread.start()

    def result(self) -> int:
        """How many never came back; waits for the end."""
        self._may_end.set()
        self._thread.join()
        return len(self._missing)

    def _work(self) -> None:
        with self._socket:
            due, number = time.monotonic(), 0
            while number < self._count or not self._may_end.is_set():
                self._missing.add(number)
                with contextlib.suppress(OSError):  # what could not be sent is lost
                    self._socket.send(_NUMBER.pack(number) + bytes(SIZE - _NUMBER.size))
                number += 1
                due += self._interval
                self._receive(due)
                time.sleep(max(0.0, due - time.monotonic()))
            self._receive(time.monotonic() + PATIENCE)

    def _receive(self, until: float) -> None:
        """Take what comes until then, or until nothing is missing."""
        while self._missing:
            try:
                self._missing.discard(_NUMBER.unpack_from(self._socket.recv(2048))[0])
            except BlockingIOError:
                if (left := until - time.monotonic()) <= 0:
                    return
                select.select([self._socket], [], [], left)
            except OSError:  # a refusal of an earlier one is told here, udp(7)
                continue


def _socket(workload: Workload) -> socket.socket:
    sock = socket_in(workload.netns, socket.AF_INET, socket.SOCK_DGRAM)
    for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    return sock
