"""Names asked from inside a workload: when an answer changes, and how many answers fail.

Raw questions over UDP, as the name server sees them from any workload; no resolver library, so
that nothing is asked twice or kept. The same for whoever answers. Source: RFC 1035, section 4.
Opposite: echo.py, the traffic that goes with them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from agent.syscalls import socket_in

PORT = 53
INTERVAL = 0.01  # seconds between two questions, while an answer is to change
ANSWER_TIMEOUT = 2.0  # seconds; a resolver's client asks again after five, resolv.conf(5)
BUFFER = 1 << 20  # bytes
NOERROR, NXDOMAIN = 0, 3
TYPE_A, CLASS_IN = 1, 1
RECURSION_DESIRED, RESPONSE = 0x0100, 0x8000

_HEADER = struct.Struct(">6H")  # id, flags, counts of questions, answers, authority, additional
_RECORD = struct.Struct(">HHIH")  # type, class, TTL, length of what follows


@dataclass(frozen=True, slots=True)
class Workload:
    """One that runs: where it is, what it is called, and whom it asks for names."""

    pid: int
    name: str
    address: str
    name_server: str

    @property
    def netns(self) -> Path:
        """Its network namespace."""
        return Path(f"/proc/{self.pid}/ns/net")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a name server says: `address` is empty if the name does not resolve.

    `is_certain`: it said so (NXDOMAIN, or no records), and did not fail itself (SERVFAIL …).
    """

    id: int
    address: str
    is_certain: bool


def question(id: int, name: str) -> bytes:
    """Which IPv4 address a name has, as one datagram."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    header = _HEADER.pack(id, RECURSION_DESIRED, 1, 0, 0, 0)
    return header + labels + b"\0" + struct.pack(">HH", TYPE_A, CLASS_IN)


def read_answer(data: bytes) -> Answer | None:
    """None if it is no answer at all."""
    try:
        id, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
        if not flags & RESPONSE:
            return None
        code = flags & 0xF
        if code != NOERROR or not answers:
            return Answer(id, "", is_certain=code in (NOERROR, NXDOMAIN))
        at = _HEADER.size
        for _ in range(questions):
            at = _skip_name(data, at) + 4
        for _ in range(answers):
            at = _skip_name(data, at)
            kind, _, _, length = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            if kind == TYPE_A and length == 4:
                return Answer(id, str(ipaddress.IPv4Address(data[at : at + 4])), is_certain=True)
            at += length
    except (struct.error, IndexError, ValueError):
        return None
    return Answer(id, "", is_certain=True)


def _skip_name(data: bytes, at: int) -> int:
    """Where what follows a name begins; a pointer (two bits set) ends one."""
    while length := data[at]:
        if length >= 0xC0:
            return at + 2
        at += length + 1
    return at + 1


class Asker:
    """Questions from a workload to its name server, on a socket of its own."""

    def __init__(self, workload: Workload) -> None:
        self._socket = socket_in(workload.netns, socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._socket.setblocking(False)
        self._socket.connect((workload.name_server, PORT))
        self._ids = itertools.cycle(range(1 << 16))

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget what is still to be answered."""
        self._socket.close()

    def ask(self, name: str) -> int:
        """Send one question; the id that its answer will have."""
        id = next(self._ids)
        with contextlib.suppress(OSError):  # a refusal of an earlier one is told here, udp(7)
            self._socket.send(question(id, name))
        return id

    def answers(self, seconds: float) -> list[Answer]:
        """What has come; waits so long for the first."""
        select.select([self._socket], [], [], max(0.0, seconds))
        found: list[Answer] = []
        while True:
            try:
                answer = read_answer(self._socket.recv(4096))
            except BlockingIOError:
                return found
            except OSError:
                continue
            if answer:
                found.append(answer)


def wait(
    workload: Workload, name: str, limit: float, *, resolves: bool
) -> tuple[float, str] | None:
    """When (time.monotonic) the first answer came that the name resolves, or does not any more;
    and the address. None if no such answer came within `limit` seconds.

    Asks every 10 ms. No answer, and an answer that says that the server failed, count as nothing.
    """
    deadline = time.monotonic() + limit
    with Asker(workload) as asker:
        while (now := time.monotonic()) < deadline:
            tick = now + INTERVAL
            asker.ask(name)
            while (left := tick - time.monotonic()) > 0:
                for answer in asker.answers(left):
                    if answer.is_certain and bool(answer.address) == resolves:
                        return time.monotonic(), answer.address
    return None


class Lookups:
    """Many questions at a steady rate, in a thread; what fails is counted."""

    def __init__(self, workload: Workload, name: str, address: str, rate: float) -> None:
        """Ask `rate` times a second for `name`, which has that address."""
        self._asker = Asker(workload)
        self._name, self._address, self._interval = name, address, 1 / rate
        self._stop = threading.Event()
        self._asked: set[int] = set()
        self.asked = self.wrong = 0
        self._thread = threading.Thread(target=self._work, name="lookups", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End it; how many questions were answered wrongly or not within two seconds."""
        self._stop.set()
        self._thread.join()
        return self.wrong + len(self._asked)

    def _work(self) -> None:
        with self._asker as asker:
            due = time.monotonic()
            while not self._stop.is_set():
                self._asked.add(asker.ask(self._name))
                self.asked += 1
                due += self._interval
                while (left := due - time.monotonic()) > 0:
                    self._take(asker, left)
            deadline = time.monotonic() + ANSWER_TIMEOUT
            while self._asked and (left := deadline - time.monotonic()) > 0:
                self._take(asker, left)

    def _take(self, asker: Asker, seconds: float) -> None:
        for answer in asker.answers(seconds):
            if answer.id in self._asked:
                self._asked.discard(answer.id)
                self.wrong += answer.address != self._address


class Nowhere:
    """The name server of the world outside: it knows no name, and says so at once.

    Docker's resolver asks it for what it does not know itself, and is silent if nobody answers.
    """

    def __init__(self, netns: str) -> None:
        """Listen at port 53 of every address in that namespace."""
        self._socket = socket_in(netns, socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", PORT))
        self._socket.settimeout(0.2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="nowhere", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, struct.error):
                data, asker = self._socket.recvfrom(4096)
                id, flags, questions, _, _, _ = _HEADER.unpack_from(data)
                end = _skip_name(data, _HEADER.size) + 4
                head = _HEADER.pack(id, flags | RESPONSE | 0x80 | NXDOMAIN, questions, 0, 0, 0)
                self._socket.sendto(head + data[_HEADER.size : end], asker)
