"""Echo requests that go on while a test changes something, and which of them were answered.

What is lost is told by the numbers of the answers, not by ping's own count: of that, what is on its
way when ping ends is lost as well. What stands opposite: ping(8).
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

WITHIN = 60.0  # s, for an answer that comes at once when it works


class Echoes:
    """A ping that was started with a pipe as its stdout, from when its first echo came back until
    `end`, or else the end of the `with` that it is in.

    Before that its question for a MAC may have met a port that was off its bridge, and is sent
    again only after a second. Its output is read all the time: a ping whose pipe is full sends
    nothing.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.answered: list[int] = []  # numbers, in the order in which the answers came
        self._reader = threading.Thread(target=self._read, name="echoes", daemon=True)
        self._reader.start()
        try:
            self._wait(0)
        except AssertionError:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def end(self) -> list[int]:
        """See that it goes on after all that was changed, and end it; the numbers of those that
        were not answered, from the first answered one to the last."""
        try:
            self._wait(max(self.answered) + 1)  # one may have been on its way before
        finally:
            self._stop()
        return sorted(set(range(min(self.answered), max(self.answered))) - set(self.answered))

    def _wait(self, beyond: int) -> None:
        """Return when one with a greater number was answered."""
        deadline = time.monotonic() + WITHIN
        while not self.answered or max(self.answered) <= beyond:
            assert self.process.poll() is None, f"ping ended with status {self.process.poll()}"
            assert time.monotonic() < deadline, f"no echo after number {beyond} came back"
            time.sleep(0.005)

    def _stop(self) -> None:
        self.process.terminate()
        self.process.wait(WITHIN)
        self._reader.join(WITHIN)

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as out:
            for line in out:
                if found := re.search(r"icmp_seq=(\d+) ttl", line):
                    self.answered.append(int(found[1]))


def pinging_from(netns: Path, address: str) -> Echoes:
    """An echo every 5 ms, from a namespace."""
    command = ["nsenter", f"--net={netns}", "ping", "-n", "-w", "300", "-i", "0.005", address]
    return Echoes(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
