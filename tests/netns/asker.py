"""Clients that ask an HTTP server without pause, and keep account of what failed, and when.

`python asker.py ADDRESS PORT TIMEOUT LEAST` asks on 16 connections that are kept alive, which are
made anew only when they fail, and in 16 more ways with a connection for each request, until its
standard input has ended and it has made LEAST requests. Then those under way are waited for, and
one line of JSON says it all:
see Account. Times are time.monotonic()'s, which is one clock for all processes of a machine.
What stands opposite: test_harm.py and tests/bench/serving.py. Only the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

EACH = 16
PAUSE = 0.005  # s after each request: so many clients are not to fill the machine
REFUSED = 0.01  # s after one that failed
KEPT, NEW = "kept", "new"
BEGINS_WITHIN = ENDS_WITHIN = 60.0  # s


class Failure(NamedTuple):
    """A request that got no answer, or not the one it should."""

    kind: str  # KEPT or NEW
    began: float
    ended: float
    why: str


class Account(NamedTuple):
    """What became of all requests."""

    requests: int
    failures: list[Failure]
    answers: dict[str, int]  # by who answered
    slowest: float  # s, of those that were answered

    def last(self, kind: str) -> float:
        """When the last failure of that kind was over; 0 if there was none."""
        return max((f.ended for f in self.failures if f.kind == kind), default=0.0)


class Asker:
    """It all in a process of its own on a host, from when this is made until `end`."""

    def __init__(
        self,
        popen: Callable[..., subprocess.Popen[str]],
        url: str,
        timeout: float,
        least: int = 0,
    ) -> None:
        address, _, port = url.removeprefix("http://").strip("/").rpartition(":")
        command = ["python", str(Path(__file__)), address, port, str(timeout), str(least)]
        pipe = subprocess.PIPE
        self._process = popen(command, stdin=pipe, stdout=pipe, text=True)
        out = self._process.stdout
        assert out
        if not (select.select([out], [], [], BEGINS_WITHIN)[0] and out.readline() == "asks\n"):
            self.kill()
            raise AssertionError("it does not begin to ask")

    def end(self) -> Account:
        """Ask no more; what became of it."""
        out, _ = self._process.communicate(timeout=ENDS_WITHIN)
        found = json.loads(out)
        failures = [Failure(*each) for each in found["failures"]]
        return Account(found["requests"], failures, found["answers"], found["slowest"])

    def kill(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.communicate()


class _Asking:
    def __init__(self, address: str, port: int, timeout: float) -> None:
        self._where, self._timeout = (address, port), timeout
        self._loop = asyncio.get_running_loop()
        self.is_over = False
        self.requests, self.slowest = 0, 0.0
        self.failures: list[Failure] = []
        self.answers: dict[str, int] = {}

    async def go_on(self, kind: str) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self.is_over:
            began = self._loop.time()
            self.requests += 1
            try:
                async with asyncio.timeout(self._timeout):
                    if connection is None:
                        connection = await asyncio.open_connection(*self._where)
                    ends = await self._ask(*connection, kind == NEW)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                why = type(error).__name__
                self.failures.append(Failure(kind, began, self._loop.time(), why))
                ends = True
            else:
                self.slowest = max(self.slowest, self._loop.time() - began)
            failed = bool(self.failures) and self.failures[-1].began == began
            if ends and connection:
                connection[1].close()
                with contextlib.suppress(OSError):
                    await connection[1].wait_closed()
                connection = None
            await asyncio.sleep(REFUSED if failed else PAUSE)

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_last: bool
    ) -> bool:
        """One request; whether the connection ends with it."""
        how = b"close" if is_last else b"keep-alive"
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: " + how + b"\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200 "):
            raise ValueError(head)
        length = int(head.partition(b"content-length:")[2].split()[0])
        name = (await reader.readexactly(length)).decode()
        self.answers[name] = self.answers.get(name, 0) + 1
        return is_last or b"connection: close" in head


async def _main(address: str, port: int, timeout: float, least: int) -> None:
    asking = _Asking(address, port, timeout)
    tasks = [asyncio.create_task(asking.go_on(kind)) for kind in (KEPT, NEW) for _ in range(EACH)]
    print("asks", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    while asking.requests < least:
        await asyncio.sleep(PAUSE)
    asking.is_over = True
    await asyncio.gather(*tasks)
    found = {name: getattr(asking, name) for name in Account._fields}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
