"""`make bench`: vxmesh beside FRR's EVPN, a VXLAN by hand and Docker Swarm, in one run, in turn.

Prints a table, and below it what the figures are held against. Needs root. Exit status 0 unless
something broke: a missed target is a figure, no failure; what is not installed is said.
Parts, of which each can be run alone: `speed` is below, with frr.py and handmade.py (anchors),
ours.py, observe.py (when rows are in the kernel); `failures` is in failures.py, with swarm.py (the
anchor) and mesh.py; `names` is in names.py, with dnsmasq and dockernames.py; `flood` is in flood.py
(beside itself, idle); `balancing` is in balancing.py, with HAProxy; `serving` is in serving.py and
`many` in many.py, alone; `docker` is in dockers.py, with swarm.py again. What each line means:
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tests.bench import (
    balancing,
    bridges,
    dockers,
    failures,
    flood,
    frr,
    handmade,
    many,
    mesh,
    names,
    ours,
    report,
    serving,
    swarm,
    world,
)
from tests.bench.failures import Failures
from tests.bench.report import Line, Progress, Target
from tests.bench.throughput import Lane
from tests.bench.world import Missing

SIDES = ("frr", "handmade", "ours", "swarm", "dnsmasq", "docker", "haproxy")
PARTS = ("speed", "failures", "names", "flood", "balancing", "serving", "many", "docker", "bridge")
ROUNDS, FAILURE_ROUNDS, MANY_ROUNDS = 5, 10, 3  # of each part, if not said otherwise
MANY, MOST = 10_000, 100_000
SINGLES, SINGLES_BY_COMMAND = 25, 5
FIRST_SINGLE = 1_000_000  # its number: no MAC of the others
LOCK = "\0vxmesh-bench"  # abstract socket: unix(7)


class Part(Protocol):
    """What one has measured."""

    lines: list[Line]
    targets: list[Target]


class Bench:
    """What is measured of speed, and the figures so far."""

    def __init__(self, rounds: int, most_rounds: int, say: Progress) -> None:
        self.frr: frr.Frr | None = None
        self.ours: ours.Ours | None = None
        self.handmade: Lane | None = None
        self.hosts: Lane | None = None
        self._rounds = rounds
        self._most_rounds = most_rounds
        self._say = say
        self.lines: list[Line] = []
        self.targets: list[Target] = []

    def run(self) -> None:
        """Measure everything that the sides which are there allow."""
        if self.frr or self.ours:
            self._many(MANY, self._rounds)
            self._one()
            if self._most_rounds:
                self._many(MOST, self._most_rounds)
        if self.handmade or self.ours:
            self._throughput()
        if self.ours:
            self._commands(self.ours)

    def _line(self, what: str, unit: str, anchor: str = "") -> Line:
        line = Line(what, unit, anchor)
        self.lines.append(line)
        return line

    def _many(self, count: int, rounds: int) -> None:
        announced = self._line(f"{count:,} announced, by command", "s", "FRR")
        announced_connected = self._line(f"{count:,} announced, client connected", "s", "FRR")
        withdrawn = self._line(f"{count:,} withdrawn, by command", "s", "FRR")
        withdrawn_connected = self._line(f"{count:,} withdrawn, client connected", "s", "FRR")
        sizes = [
            self._line(f"memory of {host} with {count:,}", "MiB", "bgpd+zebra")
            for host in ("h1", "h2")
        ]
        name_servers = [
            self._line(f"name server of {host} with {count:,}", "MiB") for host in ("h1", "h2")
        ]
        for line in (announced, announced_connected):
            limit, of_ratio = (1.0, True) if count == MANY else (3.0, False)
            self.targets.append(Target(line, limit, of_ratio))
        for number in range(1, rounds + 1):
            where = f"{count:,} endpoints, round {number} of {rounds}"
            if self.frr:
                self._say(f"{where}: FRR")
                seconds = self.frr.announce(count)
                for line in (announced, announced_connected):
                    line.theirs.append(seconds)
                for line, size in zip(sizes, self.frr.memory(), strict=True):
                    line.theirs.append(size)
                seconds = self.frr.withdraw(count)
                for line in (withdrawn, withdrawn_connected):
                    line.theirs.append(seconds)
            if self.ours:
                self._say(f"{where}: vxmesh, by command")
                announced.ours.append(self.ours.announce(count))
                for line, size in zip(sizes, self.ours.memory(), strict=True):
                    line.ours.append(size)
                for line, size in zip(name_servers, self.ours.name_server_memory(), strict=True):
                    line.ours.append(size)
                withdrawn.ours.append(self.ours.withdraw())
                self._say(f"{where}: vxmesh, client connected")
                announced_connected.ours.append(self.ours.announce_connected(count))
                withdrawn_connected.ours.append(self.ours.withdraw_connected())

    def _one(self) -> None:
        connected = self._line("1 endpoint, client connected", "ms", "FRR")
        by_command = self._line("1 endpoint, by command", "ms", "FRR")
        self.targets.append(Target(connected, 10.0, of_ratio=False))
        if self.ours:
            self.ours.prepare()
        for number in range(SINGLES):
            self._say(f"1 endpoint, round {number + 1} of {SINGLES}")
            if self.frr:
                took = 1000 * self.frr.one(FIRST_SINGLE + number)
                for line in (connected, by_command):
                    line.theirs.append(took)
            if self.ours:
                connected.ours.append(1000 * self.ours.one(FIRST_SINGLE + number))
                if number < SINGLES_BY_COMMAND:
                    took = 1000 * self.ours.one_by_command(FIRST_SINGLE + number)
                    by_command.ours.append(took)

    def _throughput(self) -> None:
        overlay = self._line("TCP, workload to workload", "Gbit/s", "by hand")
        wire = self._line("TCP, against host to host", "Gbit/s", "hosts")
        self.targets.append(Target(overlay, 0.95, of_ratio=True, at_least=True))
        for number in range(1, self._rounds + 1):
            where = f"TCP, round {number} of {self._rounds}"
            if self.handmade:
                self._say(f"{where}: VXLAN by hand")
                overlay.theirs.append(self.handmade.measure())
            if self.ours and shutil.which("iperf3"):
                self._say(f"{where}: vxmesh")
                overlay.ours.append(self.ours.lane.measure())
                wire.ours.append(overlay.ours[-1])
            if self.hosts:
                self._say(f"{where}: host to host")
                wire.theirs.append(self.hosts.measure())

    def _commands(self, side: ours.Ours) -> None:
        run = ["vxmesh", "run", "--network", ours.NETWORK, "--", "true"]
        for command in (run, ["vxmesh", "--help"]):
            text = " ".join(command)
            line = self._line(text, "s")
            for number in range(1, self._rounds + 1):
                self._say(f"{text}, round {number} of {self._rounds}")
                line.ours.append(side.wall(*command))


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Benchmarks.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{' or '.join(PARTS)} [all]")
    parser.add_argument("--only", action="append", choices=SIDES, help="just that side; repeats")
    parser.add_argument(
        "--rounds", type=int, help=f"[{FAILURE_ROUNDS} of failures, {ROUNDS} of the rest]"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one round, without {MOST:,} and long cuts"
    )
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}. Use {' or '.join(PARTS)}")
    if os.geteuid() != 0:
        sys.exit("bench: it changes the kernel's namespaces. Run it as root")
    signal.signal(signal.SIGTERM, _terminated)
    say = Progress()
    sides = options.only or SIDES
    bench, broken, named = _make(options.quick, options.rounds, say)
    rounds = 1 if options.quick else max(1, options.rounds or ROUNDS)
    flooded = flood.Flood(rounds, flood.QUICK_SECONDS if options.quick else flood.SECONDS, say)
    balances, serves = balancing.Balancing(rounds, say), serving.Serving(rounds, say)
    crowd = many.Crowd(1 if options.quick else max(1, options.rounds or MANY_ROUNDS), say)
    count = 1 if options.quick else max(1, options.rounds or FAILURE_ROUNDS)
    contained = dockers.Dockers(count, 1 if options.quick else max(1, count // 2), say)
    bridged = bridges.Bridges(rounds, say)
    status = 0
    print(_machine(), flush=True)
    before = world.processor_time()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vxb-")))
        directory.chmod(0o755)  # FRR's own user reads there
        for part in options.parts or PARTS:
            try:
                with _removed(say) as things:
                    if part == "speed":
                        _start(bench, sides, directory, things, say)
                        bench.run()
                    elif part == "names":
                        if "ours" in sides:
                            with _said(say):
                                named.run(directory, "dnsmasq" in sides, "docker" in sides)
                    elif part == "flood":
                        if "ours" in sides:
                            flooded.run()
                    elif part == "balancing":
                        if "ours" in sides:
                            balances.run(directory, "haproxy" in sides)
                    elif part == "serving":
                        if "ours" in sides:
                            serves.run()
                    elif part == "many":
                        if "ours" in sides:
                            crowd.run()
                    elif part == "bridge":
                        if {"ours", "docker"} <= set(sides):
                            with _said(say):
                                bridged.run(directory)
                    elif part == "docker":
                        with _said(say):
                            _run_docker(contained, sides, directory, things, say)
                    else:
                        _start_failures(broken, sides, directory, things, say)
                        broken.run()
            except KeyboardInterrupt:
                status = 130
                break
            except Exception as error:
                status = 1
                say.clear()
                for text in (error, *getattr(error, "__notes__", ())):
                    print(f"bench: {part}: {type(error).__name__}: {text}", file=sys.stderr)
    say.clear()
    print(_load(before))
    every: list[Part] = [bench, broken]
    others: dict[str, Part] = {"names": named, "flood": flooded}
    others |= {"balancing": balances, "serving": serves, "many": crowd, "docker": contained}
    others["bridge"] = bridged
    every += [part for name, part in others.items() if name in (options.parts or PARTS)]
    lines = [line for part in every for line in part.lines]
    print(report.render(lines, [target for part in every for target in part.targets]))
    return status


def _make(
    quick: bool, rounds: int | None, say: Progress
) -> tuple[Bench, Failures, names.NamesPart]:
    """The parts, with as many rounds as asked for."""
    if quick:
        return Bench(1, 0, say), Failures(failures.QUICK, say), names.NamesPart(1, 1 / 6, say)
    count = FAILURE_ROUNDS if rounds is None else max(1, rounds)
    return (
        Bench(ROUNDS if rounds is None else max(1, rounds), 2, say),
        Failures(failures.rounds(count), say),
        names.NamesPart(ROUNDS if rounds is None else max(1, rounds), 1.0, say),
    )


def _start(
    bench: Bench, sides: Sequence[str], directory: Path, stack: contextlib.ExitStack, say: Progress
) -> None:
    if "frr" in sides:
        say("starting FRR on two hosts")
        with _said(say):
            bench.frr = stack.enter_context(frr.start(directory))
    if "handmade" in sides:
        say("making a VXLAN by hand")
        with _said(say):
            bench.handmade, bench.hosts = stack.enter_context(handmade.start())
    if "ours" in sides:
        say("starting vxmesh on two hosts")
        bench.ours = stack.enter_context(ours.start(directory))


def _start_failures(
    broken: Failures,
    sides: Sequence[str],
    directory: Path,
    stack: contextlib.ExitStack,
    say: Progress,
) -> None:
    if "swarm" in sides:
        say("starting Docker Swarm on two hosts")
        with _said(say):
            broken.swarm = stack.enter_context(swarm.start(directory))
    if "ours" in sides:
        say("starting vxmesh on two hosts")
        broken.ours = stack.enter_context(mesh.start())


def _run_docker(
    contained: dockers.Dockers,
    sides: Sequence[str],
    directory: Path,
    stack: contextlib.ExitStack,
    say: Progress,
) -> None:
    if "ours" not in sides:
        return
    own, theirs = stack.enter_context(dockers.start(say)), None
    if "swarm" in sides:
        with _said(say):
            theirs = stack.enter_context(dockers.start_swarm(directory, say))
    contained.run(own, theirs)


@contextlib.contextmanager
def _removed(say: Progress) -> Iterator[contextlib.ExitStack]:
    """What is entered goes at the end, and whole: no signal stops that."""
    handlers: dict[int, Any] = {}
    with contextlib.ExitStack() as outer:
        outer.callback(lambda: [signal.signal(n, h) for n, h in handlers.items()])
        things = outer.enter_context(contextlib.ExitStack())
        try:
            yield things
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, signal.SIG_IGN)
            say("removing what was made")


@contextlib.contextmanager
def _said(say: Progress) -> Iterator[None]:
    """What is missing is said, and the rest runs."""
    try:
        yield
    except Missing as error:
        say.clear()
        print(f"not measured: {error}", flush=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Two at once would measure each other."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(LOCK)
        except OSError:
            sys.exit("bench: another one runs on this machine. Wait until it has ended")
        yield


def _terminated(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _machine() -> str:
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = [
        _first_line([path, "--version"])
        for path in (
            shutil.which("bgpd", path=frr.DAEMONS),
            shutil.which("iperf3"),
            shutil.which("dockerd", path=swarm.PATH),
        )
        if path
    ]
    about = [f"{os.cpu_count()} processors", f"Linux {platform.release()}", *versions]
    return ", ".join([*about, f"load before {load}"])


def _load(before: world.ProcessorTime) -> str:
    """What else than the benchmark may have been in the figures."""
    now = world.processor_time()
    total = now.total - before.total
    return f"meanwhile the hypervisor took {(now.stolen - before.stolen) / total:.1%} away\n"


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.stdout else command[0]


if __name__ == "__main__":
    sys.exit(main())
