"""What failures cost, ours and Docker Swarm's in turn: a host cut off, an agent killed, rows gone.

Opposite: mesh.py and swarm.py (who is measured), lookups.py, echo.py and drift.py (how).
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from agent.testbed import Testbed
from tests.bench import echo, lookups
from tests.bench.echo import Server, Stream
from tests.bench.lookups import Lookups, Workload
from tests.bench.mesh import Mesh
from tests.bench.report import Line, Progress, Target

LIMIT = 20.0  # seconds that a withdrawal is waited for
HEAL_LIMIT = 60.0  # seconds that a cable which is back may be of no use
REST = 15.0  # seconds from a heal to the next cut: failure detectors are patient for a while
HOLD, HOLD_LONG = 5.0, 30.0  # seconds that a cut lasts on when names are withdrawn
PACKETS, PACKET_RATE, LOOKUP_RATE = 10_000, 1_000.0, 50.0
LOOKUPS = round(2 * LOOKUP_RATE * PACKETS / PACKET_RATE)  # from both workloads
LEAD = 1.0  # seconds of traffic before an agent is ended
ROWS = (10_000, 20_000)
COUNTED_WITHIN = 5.0  # seconds until what has been repaired must have been counted
WITHDRAWN, BACK, DRIFT = 2.0, 0.5, 2.0  # seconds: the targets


class Side(Protocol):
    """Two hosts, with the workload `near` on h1 and `far` on h2."""

    bed: Testbed
    near: Workload
    far: Workload

    @property
    def runs(self) -> bool:
        """Whether `far` still is the workload that it was."""

    def prepare(self) -> None:
        """Wait until the workloads reach each other by name; make anew what has ended."""

    def restart(self, number: signal.Signals) -> None:
        """End the agent of h2 by that signal, and start it again."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """How many of each."""

    cuts: int
    long_cuts: int
    restarts: int
    drifts: int


QUICK = Rounds(cuts=1, long_cuts=0, restarts=1, drifts=1)


def rounds(count: int) -> Rounds:
    """With so many cuts; of what takes longer, three at most."""
    few = min(3, count)
    return Rounds(cuts=count, long_cuts=few, restarts=few, drifts=few)


class Failures:
    """What is measured, and the figures so far."""

    def __init__(self, rounds: Rounds, say: Progress) -> None:
        self.swarm: Side | None = None
        self.ours: Mesh | None = None
        self._rounds = rounds
        self._say = say
        self._healed: dict[str, float] = {}  # when (time.monotonic), by side
        self.lines: list[Line] = []
        self.targets: list[Target] = []

    def run(self) -> None:
        """Measure everything that the sides which are there allow."""
        withdrawn = self._line("cable cut: name withdrawn", "s", limit=LIMIT)
        self.targets.append(Target(withdrawn, WITHDRAWN, of_ratio=False))
        self._cuts(self._rounds.cuts, HOLD, withdrawn)
        if self._rounds.long_cuts:
            self._cuts(self._rounds.long_cuts, HOLD_LONG, withdrawn)
        self._restarts("killed", signal.SIGKILL)
        self._restarts("upgraded", signal.SIGTERM)
        if self.ours:
            for rows in ROWS:
                self._drift(self.ours, rows)

    @property
    def _sides(self) -> list[tuple[str, Side]]:
        """Those there are, the anchor first."""
        found: list[tuple[str, Side]] = []
        if self.swarm:
            found.append(("Docker Swarm", self.swarm))
        if self.ours:
            found.append(("vxmesh", self.ours))
        return found

    def _samples(self, line: Line, side: Side) -> list[float]:
        return line.ours if side is self.ours else line.theirs

    def _line(self, what: str, unit: str, anchor: str = "Swarm", limit: float = 0.0) -> Line:
        line = Line(what, unit, anchor, limit=limit)
        self.lines.append(line)
        return line

    def _cuts(self, count: int, hold: float, withdrawn: Line) -> None:
        what = f"cable back after {hold:.0f} s more"
        named = self._line(f"{what}: name resolves", "s", limit=HEAL_LIMIT)
        back = self._line(f"{what}: and traffic goes", "s", limit=HEAL_LIMIT)
        self.targets.append(Target(back, BACK, of_ratio=False))
        for number in range(1, count + 1):
            for name, side in self._sides:
                where = f"cable, round {number} of {count}: {name}"
                side.prepare()
                self._say(f"{where}, rests")
                time.sleep(max(0.0, self._healed.get(name, 0.0) + REST - time.monotonic()))
                self._say(f"{where}, cut")
                self._samples(withdrawn, side).append(_cut(side))
                self._say(f"{where}, stays cut for {hold:.0f} s")
                time.sleep(hold)
                self._say(f"{where}, back")
                resolved, carried = _heal(side)
                self._healed[name] = time.monotonic()
                self._samples(named, side).append(resolved)
                self._samples(back, side).append(carried)

    def _restarts(self, verb: str, number: signal.Signals) -> None:
        lost = self._line(f"agent {verb}: lost of {PACKETS:,}", "packets")
        failed = self._line(f"agent {verb}: failed of {LOOKUPS:,}", "lookups")
        lines = (lost, failed)
        for line in lines:
            self.targets.append(Target(line, 0.0, of_ratio=False))
        for count in range(1, self._rounds.restarts + 1):
            for name, side in self._sides:
                if side is not self.ours and lost.remark:
                    continue  # once is enough to know that
                self._say(f"agent {verb}, round {count} of {self._rounds.restarts}: {name}")
                side.prepare()
                found = _restart(side, number)
                if side.runs:
                    for line, figure in zip(lines, found, strict=True):
                        self._samples(line, side).append(float(figure))
                    continue
                for line in lines:
                    if side is self.ours:
                        line.own_remark = "workloads end"
                    else:
                        line.remark = "containers end"

    def _drift(self, side: Mesh, rows: int) -> None:
        took = self._line(f"{rows:,} rows deleted: all back", "s", "")
        counted = self._line(f"{rows:,} rows deleted: repairs counted", "rows", "")
        if rows == ROWS[0]:
            self.targets.append(Target(took, DRIFT, of_ratio=False))
            self.targets.append(Target(counted, float(rows), of_ratio=False, at_least=True))
        each = rows // 2  # as many FDB rows as neighbour rows
        with side.announced(each) as damage:
            for number in range(1, self._rounds.drifts + 1):
                self._say(f"{rows:,} rows deleted, round {number} of {self._rounds.drifts}")
                before = side.repaired()
                took.ours.append(damage.mend(each))
                if before is None:
                    counted.own_remark = "no 'vxmesh metrics'"
                else:
                    counted.ours.append(_counted(side, before, rows))


def _cut(side: Side) -> float:
    """Seconds from when h2's cable is pulled until `near` is told that there is no `far`."""
    begin = time.monotonic()
    side.bed.cut("h2")
    found = lookups.wait(side.near, side.far.name, LIMIT, resolves=False)
    return found[0] - begin if found else math.inf


def _heal(side: Side) -> tuple[float, float]:
    """Seconds from when h2's cable is put in until `near` is told an address of `far`, and until
    a datagram has gone there and back; the first is sent when the name resolves."""
    with contextlib.closing(Server(side.far)):
        begin = time.monotonic()
        with _meanwhile(lambda: side.bed.heal("h2")):
            named = lookups.wait(side.near, side.far.name, HEAL_LIMIT, resolves=True)
            if named is None:
                return math.inf, math.inf
            resolved, address = named
            carried = echo.wait(side.near, address, HEAL_LIMIT)
    return resolved - begin, (math.inf if carried is None else carried - begin)


def _restart(side: Side, number: signal.Signals) -> tuple[int, int]:
    """Packets lost between the workloads, there or back, while the agent of h2 is ended and
    started again; and lookups of each other's name that failed."""
    near, far = side.near, side.far
    with contextlib.closing(Server(far)):
        stream = Stream(near, far.address, PACKETS, PACKET_RATE)
        asking = [
            Lookups(asker, other.name, other.address, LOOKUP_RATE)
            for asker, other in ((near, far), (far, near))
        ]
        try:
            time.sleep(LEAD)
            side.restart(number)
        finally:
            lost = stream.result()
            failed = sum(lookup.stop() for lookup in asking)
    return lost, failed


def _counted(side: Mesh, before: float, rows: int) -> float:
    """How many repairs were counted since there were `before`; waits a little for all of them."""
    deadline = time.monotonic() + COUNTED_WITHIN
    while True:
        counted = (side.repaired() or 0.0) - before
        if counted >= rows or time.monotonic() > deadline:
            return counted
        time.sleep(0.1)


@contextlib.contextmanager
def _meanwhile(function: Callable[[], None]) -> Iterator[None]:
    """Run it in a thread; at the end it is over, and raises what it raised."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="meanwhile")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failure:
        raise failure[0]
