"""How long clients of a published port see failures: a backend's host cut off, a backend killed.

Three hosts with an agent each; a client that is no node asks by h1's port, kept alive and with a
connection each (asker.py), and the two backends are on h2 and h3. A request without an answer
within wrk's own time-out has failed; what counts is when the last one had. Nothing stands beside
it. What stands opposite: tests/netns/test_harm.py, which asserts that failures end at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from agent.testbed import Testbed
from tests.bench import world
from tests.bench.observe import Late
from tests.bench.report import Line, Progress, Target
from tests.bench.world import run
from tests.netns import keepalive
from tests.netns.asker import KEPT, NEW, Account, Asker

PREFIX = "vxb-serve"
NETWORK, SERVICE, PORT = "bench", "web", 8480
INTERVAL = 1.0  # s between two looks at a backend
TIMEOUT = 2.0  # s: wrk's
LEAD, HOLD = 1.0, 6.0  # s of requests before and after what happens
QUIET = 2.0  # s at the end without a failure, or they have not ended
REST = 15.0  # s from a heal to the next cut: failure detectors are patient for a while
READY_WITHIN = 30.0  # s
CUT_TARGET = 2.5  # s


class Serving:
    """What is measured, and the figures so far."""

    def __init__(self, rounds: int, say: Progress) -> None:
        self._rounds, self._say = rounds, say
        what = {KEPT: "kept alive", NEW: "a connection each"}
        self._cut = {k: Line(f"host cut off: requests fail for, {what[k]}", "s") for k in what}
        self._kill = Line(f"backend killed: requests fail for, {what[NEW]}", "s")
        for line in (*self._cut.values(), self._kill):
            line.limit = HOLD
        self.lines = [*self._cut.values(), self._kill]
        self.targets = [Target(line, CUT_TARGET, of_ratio=False) for line in self._cut.values()]
        self.targets.append(Target(self._kill, INTERVAL, of_ratio=False))

    def run(self) -> None:
        """Measure; everything goes at the end."""
        with world.temporary_bed(PREFIX, with_agents=True, hosts=3) as bed:
            service = _Service(bed)
            healed = -math.inf
            for number in range(1, self._rounds + 1):
                where = f"round {number} of {self._rounds}"
                self._say(f"host cut off, {where}: rests")
                service.prepare()
                time.sleep(max(0.0, healed + REST - time.monotonic()))
                self._say(f"host cut off, {where}")
                with service.asked() as account:
                    began = time.monotonic()
                    bed.cut("h3")
                    time.sleep(HOLD)
                bed.heal("h3")
                healed = time.monotonic()
                for kind, line in self._cut.items():
                    line.ours.append(_lasted(account[0], kind, began))
                self._say(f"backend killed, {where}")
                service.prepare()
                with service.asked() as account:
                    time.sleep(random.uniform(0, INTERVAL))  # whenever it was looked at last
                    began = time.monotonic()
                    service.kill("h3")
                    time.sleep(HOLD)
                self._kill.ours.append(_lasted(account[0], NEW, began))


def _lasted(account: Account, kind: str, began: float) -> float:
    """For how long requests of that kind failed; infinity if they do not stop."""
    last = account.last(kind)
    if not last:
        return 0.0
    return math.inf if last > began + HOLD - QUIET else last - began


class _Service:
    """The service, and its backends on h2 and h3."""

    def __init__(self, bed: Testbed) -> None:
        self._bed = bed
        self._h1 = bed.hosts[0]
        self._servers: dict[str, tuple[subprocess.Popen[str], int]] = {}
        run(self._h1, ["vxmesh", "network", "create", NETWORK, "--wait=10"])
        for host in bed.hosts[1:]:
            words = ["vxmesh", "run", "--network", NETWORK, "--name", host.name, "-d", "--wait=10"]
            run(host, [*words, "--label", "app=web", "--", "sleep", "infinity"])
        words = ["vxmesh", "service", "create", SERVICE, "--network", NETWORK, "--wait=10"]
        words += ["--port", "80:8000", "--publish", f"{PORT}:80", "--selector", "app=web"]
        run(self._h1, [*words, "--health", "tcp", "--health-interval", str(INTERVAL)])

    def prepare(self) -> None:
        """Wait until both take connections; start what was killed."""
        for host in self._bed.hosts[1:]:
            if host.name in self._servers:
                continue
            path = str(Path(keepalive.__file__))
            words = ["vxmesh", "exec", host.name, "--", "python", path, host.name]
            process = host.popen(words, stdout=subprocess.PIPE, text=True)
            assert process.stdout
            self._servers[host.name] = process, int(process.stdout.readline())
        deadline = time.monotonic() + READY_WITHIN
        while not self._are_ready():
            if time.monotonic() > deadline:
                raise Late(f"the backends are not ready after {READY_WITHIN:.0f} s")
            time.sleep(0.1)
        world.settle([host.pid for host in self._bed.hosts])

    def _are_ready(self) -> bool:
        shown = run(self._h1, ["vxmesh", "service", "inspect", SERVICE, "-o", "json"])
        return all(backend["takes"] for backend in json.loads(shown)["backends"])

    @contextlib.contextmanager
    def asked(self) -> Iterator[list[Account]]:
        """Meanwhile clients ask, for a while before too; at the end, what became of it."""
        url = f"http://{self._h1.address}:{PORT}/"
        asking, accounts = Asker(self._bed.client.popen, url, TIMEOUT), list[Account]()
        try:
            time.sleep(LEAD)
            yield accounts
            accounts.append(asking.end())
        except BaseException:
            asking.kill()
            raise
        answers = accounts[0].answers
        assert set(answers) == {host.name for host in self._bed.hosts[1:]}, f"answered: {answers}"

    def kill(self, name: str) -> None:
        """End a backend at once."""
        process, pid = self._servers.pop(name)
        os.kill(pid, signal.SIGKILL)
        process.wait()
