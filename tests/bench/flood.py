"""What a flood of questions from sandboxes does to the agents' probes, and to another's answers.

Two hosts with an agent each; on h1 some sandboxes that send questions at a steady rate whatever
becomes of them (tests/netns/flood.py: dnsperf waits for answers, and a flood does not), and one
that asks 50 times a second. The same is measured before, idle. Probes are the agents' own, of
both, as their histograms say (vxmesh_probe_seconds). Nothing is lifted: the kernel's bound for
each port (datapath/guardrules.py, GATEWAY_RATE) is in force, as it is wherever vxmesh runs.
Opposite: names.py, which asks the name server alone. What each line means: docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

from agent.cli.metrics import parse
from agent.testbed import Host
from tests.bench import lookups, mesh, world
from tests.bench.lookups import ANSWER_TIMEOUT, Asker, Workload
from tests.bench.report import Line, Progress, Target
from tests.bench.world import run

PREFIX = "vxb-flood"
NETWORK = "bench"
FLOODERS = 3
SECONDS, QUICK_SECONDS = 20.0, 8.0  # of a measurement; some three probes a second and agent
RATE = 50  # questions a second of the one that is no flooder
OFFERED = 20_000  # questions a second of each flooder
HELP = 120.0  # ms: after that a probe has others asked for help, tuning.py, "local"
BUCKET = "vxmesh_probe_seconds_bucket"
QUESTIONS = "vxmesh_resolver_questions_total"

Buckets = Mapping[float, float]  # bound in s -> how many values up to it, in all


def quantile(before: Buckets, after: Buckets, which: float) -> float:
    """What so much of the values between two readings of a histogram do not exceed; infinity
    without any. Within a bucket they count as spread evenly (as Prometheus has it)."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    total = counts.get(math.inf, 0.0)
    if not total:
        return math.inf
    low, under = 0.0, 0.0
    for bound, count in counts.items():
        if count >= which * total:
            share = (which * total - under) / (count - under)
            return low if math.isinf(bound) else low + (bound - low) * share
        low, under = bound, count
    return low


def percentile(values: list[float], which: float) -> float:
    """The value that so much of them do not exceed; infinity without any."""
    if not values:
        return math.inf
    return sorted(values)[max(0, math.ceil(which * len(values)) - 1)]


class Flood:
    """What is measured, and the figures so far."""

    def __init__(
        self, rounds: int, seconds: float, say: Progress, flooders: int = FLOODERS
    ) -> None:
        self._rounds, self._seconds, self._say = rounds, seconds, say
        self._flooders = flooders
        what = f"{flooders * OFFERED:,} questions/s from {flooders} sandboxes"
        self.probes = Line(f"{what}: p99 of agents' probes", "ms", "idle")
        self.other = Line("… p99 of another sandbox's answers", "ms", "idle")
        self.lost = Line("… of its questions without an answer", "%", "idle")
        self.rate = Line("… questions that reach the name server", "/s")
        self.probes.limit, self.other.limit = 1000 * seconds, 1000 * ANSWER_TIMEOUT
        self.lines = [self.probes, self.other, self.lost, self.rate]
        self.targets = [
            Target(self.probes, HELP, of_ratio=False),
            Target(self.lost, 0, of_ratio=False),
        ]

    def run(self) -> None:
        """Measure; everything goes at the end."""
        with world.temporary_bed(PREFIX, with_agents=True) as bed:
            h1, h2 = bed.hosts
            run(h1, ["vxmesh", "network", "create", NETWORK, "--wait=10"])
            flooders = [_sandbox(h1, f"flood{n}") for n in range(self._flooders)]
            quiet = _sandbox(h1, "quiet")
            _sandbox(h2, "far")
            if lookups.wait(quiet, "far", mesh.READY_TIMEOUT, resolves=True) is None:
                raise TimeoutError("far does not resolve on h1")
            for number in range(1, self._rounds + 1):
                world.settle([host.pid for host in bed.hosts])
                self._say(f"names under a flood, round {number} of {self._rounds}: idle")
                self._measure(bed.hosts, quiet, idle=True)
                self._say(f"names under a flood, round {number} of {self._rounds}")
                with _flooding(flooders, "quiet", self._seconds + 2):
                    time.sleep(1)  # so that the burst that is free is over
                    began, passed = time.monotonic(), _questions(h1)
                    self._measure(bed.hosts, quiet, idle=False)
                    passed = _questions(h1) - passed
                    self.rate.ours.append(passed / (time.monotonic() - began))

    def _measure(self, hosts: list[Host], quiet: Workload, *, idle: bool) -> None:
        before = _probes(hosts)
        times, lost = _ask(quiet, "quiet", self._seconds)
        probes = quantile(before, _probes(hosts), 0.99)
        for line, figure in (
            (self.probes, 1000 * probes),
            (self.other, 1000 * percentile(times, 0.99)),
            (self.lost, 100 * lost),
        ):
            (line.theirs if idle else line.ours).append(figure)


def _sandbox(host: Host, name: str) -> Workload:
    command = ["vxmesh", "run", "--network", NETWORK, "--name", name, "-d", "--wait=10"]
    run(host, [*command, "--", "sleep", "infinity"])
    return mesh.workload(host, name)


def _probes(hosts: list[Host]) -> dict[float, float]:
    """The agents' histograms of probes, added."""
    found: dict[float, float] = {}
    for host in hosts:
        for series in parse(run(host, ["vxmesh", "metrics"])):
            if series["name"] == BUCKET:
                bound = float(series["labels"]["le"])
                found[bound] = found.get(bound, 0.0) + series["value"]
    return found


def _questions(host: Host) -> float:
    """How many came to the name server of a host so far."""
    shown = parse(run(host, ["vxmesh", "metrics"]))
    found = [m["value"] for m in shown if m["name"] == QUESTIONS]
    return float(sum(found))


def _ask(workload: Workload, name: str, seconds: float) -> tuple[list[float], float]:
    """Ask steadily for so long: the seconds that each answer took, the share without one."""
    sent: dict[int, float] = {}
    times: list[float] = []
    asked = 0
    with Asker(workload) as asker:

        def take(wait: float) -> None:
            found = asker.answers(wait)
            now = time.monotonic()
            times.extend(now - sent.pop(a.id) for a in found if a.id in sent and a.address)

        end = due = time.monotonic()
        end += seconds
        while due < end:
            sent[asker.ask(name)] = time.monotonic()
            asked += 1
            due += 1 / RATE
            while (left := due - time.monotonic()) > 0:
                take(left)
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while sent and (left := deadline - time.monotonic()) > 0:
            take(left)
    return times, 1 - len(times) / asked


@contextlib.contextmanager
def _flooding(workloads: list[Workload], name: str, seconds: float) -> Iterator[None]:
    """Questions for that name from each of them meanwhile."""
    processes = []
    try:
        for workload in workloads:
            command = ["nsenter", f"--net={workload.netns}", sys.executable, "-m"]
            command += ["tests.netns.flood", workload.name_server, str(OFFERED), f"{seconds:g}"]
            processes.append(subprocess.Popen([*command, name], stdout=subprocess.DEVNULL))
        yield
        for process in processes:
            process.wait(seconds + 60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
