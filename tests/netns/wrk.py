"""wrk(1) for tests: load that goes on until it is told to end, and what became of the requests.

What stands opposite: test_harm.py.
"""

from __future__ import annotations

import re
import signal
import subprocess
from types import TracebackType
from typing import NamedTuple

from agent.testbed import Host

LONGEST = 120  # s; it is ended long before
ENDS_WITHIN = 60.0  # s: of wrk's own timeout and some more
_REQUESTS = re.compile(r"(\d+) requests in ")
_ERRORS = re.compile(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)")
_STATUS = re.compile(r"Non-2xx or 3xx responses: (\d+)")


class Result(NamedTuple):
    """What wrk says at its end."""

    requests: int
    failed: int  # connections refused or broken, requests without an answer in time, bad statuses
    text: str


def parse(text: str) -> Result:
    """What wrk printed; ValueError if it is not all there."""
    requests = _REQUESTS.search(text)
    if requests is None:
        raise ValueError(f"wrk says nothing of requests: {text!r}")
    errors, status = _ERRORS.search(text), _STATUS.search(text)
    failed = sum(map(int, errors.groups())) if errors else 0
    failed += int(status[1]) if status else 0
    if ("Socket errors" in text) != bool(errors) or ("Non-2xx" in text) != bool(status):
        raise ValueError(f"wrk says it in other words: {text!r}")
    return Result(int(requests[1]), failed, text)


class Load:
    """Requests from a host to a URL, on so many connections."""

    def __init__(self, host: Host, url: str, *, keep_alive: bool, connections: int = 16) -> None:
        how = "keep-alive" if keep_alive else "close"
        self._process = host.popen(
            ["wrk", "-t1", f"-c{connections}", f"-d{LONGEST}", "--timeout", "20",
             "-H", f"Connection: {how}", url],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def end(self) -> Result:
        """End it, as by ^C: it finishes its figures."""
        assert self._process.poll() is None, self._process.communicate()[0]
        self._process.send_signal(signal.SIGINT)
        return parse(self._process.communicate(timeout=ENDS_WITHIN)[0])
