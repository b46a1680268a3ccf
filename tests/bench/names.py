"""The name server beside dnsmasq and Docker's: answers a second, a change, memory under load.

Ours and dnsmasq listen on loopback, know the same names and are asked by dnsperf (DNS-OARC) in
turn, with ten sockets; Docker's resolver (dockernames.py) is asked by it inside a container, where
it listens on loopback too. None has a log of questions; dnsmasq has a cache for all names. Every
name was asked once before anything is measured. Ours is the process that an agent starts, fed as
an agent does. What bounds a sandbox in the kernel (datapath/guardrules.py, GATEWAY_RATE) is not on
that way and need not be lifted: what sandboxes see through it is in flood.py.
Opposite: agent/resolver. What each line means: docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.model import Endpoint, Network
from agent.resolver.client import ResolverClient
from agent.resolver.feed import Batch, State, View
from tests.bench import dockernames, lookups, swarm
from tests.bench.dockernames import DockerNames
from tests.bench.lookups import question, read_answer
from tests.bench.report import Line, Progress, Target
from tests.bench.world import Missing

FEW, MANY = 1_000, 100_000
SECONDS = 4  # of each measurement
CHANGES = 25
HERE, PORT = "127.0.0.1", 5454  # the first of those that are used
START_SECONDS = 20.0
_NET = "d" * 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Load:
    """What dnsperf saw."""

    rate: float  # answers a second
    lost: int


def _address(number: int) -> bytes:
    return bytes((10, 1 + (number >> 16), number >> 8 & 255, number & 255))


def _endpoint(number: int, address: bytes) -> Endpoint:
    return Endpoint(f"{number:016x}", _NET, f"n{number}", bytes(6), (address,))


def state(count: int) -> State:
    """What an agent with a network of `count` endpoints feeds; who asks from loopback is in it."""
    network = Network(
        _NET, "demo", "overlay", ("10.0.0.0/8",), (), "", 1, 0, False, False, {}, {},
        created=0.0, creator="",
    )  # fmt: skip
    endpoints = [_endpoint(number, _address(number)) for number in range(count)]
    return State([network], endpoints, [View(socket.inet_aton(HERE), (_NET,))])


def read_load(text: str) -> Load:
    """dnsperf's report. ValueError if it is none."""
    rate = re.search(r"Queries per second:\s+([\d.]+)", text)
    lost = re.search(r"Queries lost:\s+(\d+)", text)
    if rate is None or lost is None:
        raise ValueError(f"dnsperf: {text[-300:]}")
    return Load(float(rate[1]), int(lost[1]))


def load(
    port: int,
    questions: Path,
    seconds: float = SECONDS,
    server: str = HERE,
    prefix: Sequence[str] = (),
) -> Load:
    """Ask what is in the file, again and again, for so long; `prefix` runs dnsperf elsewhere."""
    command = [*prefix, "dnsperf", "-s", server, "-p", str(port), "-d", str(questions)]
    command += ["-c", "10"]
    done = subprocess.run(
        [*command, "-l", f"{seconds:g}"], capture_output=True, text=True, timeout=seconds + 60
    )
    return read_load(done.stdout)


def measured(pid: int, port: int, questions: Path) -> tuple[float, float]:
    """Answers a second under load, and microseconds of a processor that each cost the process."""
    before = processor_seconds(pid)
    found = load(port, questions)
    return found.rate, (processor_seconds(pid) - before) / (found.rate * SECONDS) * 1e6


def warm(port: int, questions: Path, server: str = HERE, prefix: Sequence[str] = ()) -> None:
    """Ask all of them once."""
    command = [*prefix, "dnsperf", "-s", server, "-p", str(port), "-d", str(questions), "-n", "1"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)


def ask(sock: socket.socket, name: str) -> str:
    """The address of the name by one question; "" if it has none."""
    sock.send(question(1, name))
    answer = read_answer(sock.recv(4096))
    return answer.address if answer else ""


def client(port: int) -> socket.socket:
    """Asks the one that listens there."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(3)
    sock.connect((HERE, port))
    return sock


def processor_seconds(pid: int) -> float:
    """What a process has taken so far, user and system; proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def dnsmasq(directory: Path, count: int, port: int) -> Iterator[int]:
    """dnsmasq with so many names: its pid; Missing if it is not installed."""
    path = shutil.which("dnsmasq", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if path is None:
        raise Missing("dnsmasq is not installed. Install it with apt install dnsmasq-base")
    hosts = directory / f"hosts-{count}"
    lines = (f"{socket.inet_ntoa(_address(n))} n{n}.demo\n" for n in range(count))
    hosts.write_text("".join(lines))
    command = [path, "--keep-in-foreground", f"--port={port}", f"--listen-address={HERE}"]
    command += ["--bind-interfaces", "--no-hosts", f"--addn-hosts={hosts}", "--no-resolv"]
    command += ["--cache-size=150000", "--user=root", "--pid-file=", "--conf-file=/dev/null"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with client(port) as sock:
            for _ in range(int(START_SECONDS / 0.05)):
                with contextlib.suppress(OSError):
                    if ask(sock, f"n{count - 1}.demo"):
                        break
                time.sleep(0.05)  # a refusal comes at once
                process.poll()
                if process.returncode is not None:
                    raise Missing(f"dnsmasq ended with status {process.returncode}")
            else:
                raise TimeoutError("dnsmasq does not answer")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


class Ours:
    """The name server with so many names and processes."""

    def __init__(self, directory: Path, count: int, workers: int, port: int) -> None:
        self._directory = directory / f"ours-{count}-{workers}"
        self._directory.mkdir()
        self._state = state(count)
        self._workers = workers
        self.port = port

    async def __aenter__(self) -> Ours:
        listen = (f"{HERE}:{self.port}",)
        self.client = ResolverClient(
            self._directory, None, lambda: self._state, listen, "/dev/null", self._workers
        )
        await self.client.connect_or_spawn()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.stop()

    def memory(self) -> float:
        """MiB, resident, of the first process."""
        pages = int(Path(f"/proc/{self.client.pid}/statm").read_text().split()[1])
        return pages * _PAGE / (1 << 20)

    async def change(self, number: int, turn: int) -> float:
        """Seconds from a change of the agent's until the name is answered with it."""
        address = bytes((10, 200, turn, number & 255))
        text = socket.inet_ntoa(address)
        loop = asyncio.get_running_loop()
        with client(self.port) as sock:
            ask(sock, f"n{number}.demo")  # so that the old answer is ready
            batch = Batch()
            batch.put(_endpoint(number, address))
            started = loop.time()
            self.client.send(batch)
            while await asyncio.to_thread(ask, sock, f"n{number}.demo") != text:
                if loop.time() - started > START_SECONDS:
                    raise TimeoutError("a changed name is not answered anew")
            return loop.time() - started


class NamesPart:
    """What is measured, and the figures so far."""

    def __init__(self, rounds: int, minutes: float, say: Progress) -> None:
        """`minutes` of load for the line of memory."""
        self._rounds, self._minutes, self._say = rounds, minutes, say
        several = max(2, os.cpu_count() or 2)
        self._several = several
        self.few = Line(f"name server, {FEW:,} names", "/s", "dnsmasq")
        self.docker = Line(f"name server, {FEW:,} names", "/s", "Docker's")
        self.spread = Line(f"name server of {several} processes, {FEW:,} names", "/s", "dnsmasq")
        self.many = Line(f"name server, {MANY:,} names", "/s", "dnsmasq")
        self.few_work = Line(f"… processor time an answer, {FEW:,} names", "µs", "dnsmasq")
        self.many_work = Line(f"… processor time an answer, {MANY:,} names", "µs", "dnsmasq")
        self.growth = Line(f"name server, {MANY:,} names against {FEW:,}", "/s", "of 1,000")
        self.changed = Line(f"a changed name of {MANY:,} answered anew", "ms")
        self.memory = Line(f"name server's memory after {minutes * 60:.0f} s", "MiB", "before")
        self.lines = [self.few, self.docker, self.few_work, self.spread, self.many, self.many_work]
        self.lines += [self.growth, self.changed, self.memory]
        self.targets = [
            Target(self.few, 1.0, of_ratio=True, at_least=True),
            Target(self.docker, 1.4, of_ratio=True, at_least=True),
            Target(self.growth, 1.0, of_ratio=True, at_least=True),
            Target(self.changed, 10.0, of_ratio=False),
            Target(self.memory, 1.02, of_ratio=True),
        ]

    def run(self, directory: Path, with_anchor: bool, with_docker: bool) -> None:
        """Measure. Missing if dnsperf is not installed."""
        if shutil.which("dnsperf") is None:
            raise Missing("dnsperf is not installed. Install it with apt install dnsperf")
        with contextlib.ExitStack() as stack:
            docker = None
            if with_docker:
                self._say("starting Docker on a host")
                try:
                    docker = stack.enter_context(dockernames.start(directory, FEW))
                    warm(lookups.PORT, docker.questions, swarm.RESOLVER, docker.command())
                except Missing as error:
                    self._say.clear()
                    print(f"not measured: {error}", flush=True)
            asyncio.run(self._run(directory, with_anchor, docker))

    async def _run(self, directory: Path, with_anchor: bool, docker: DockerNames | None) -> None:
        files = {}
        for count in (FEW, MANY):
            files[count] = directory / f"questions-{count}"
            files[count].write_text("".join(f"n{n}.demo A\n" for n in range(count)))
        anchors = {FEW: PORT, MANY: PORT + 1} if with_anchor else {}
        pids = {}
        async with contextlib.AsyncExitStack() as stack:
            try:
                for count, port in anchors.items():
                    pids[count] = stack.enter_context(dnsmasq(directory, count, port))
                    await asyncio.to_thread(warm, port, files[count])
            except Missing as error:
                anchors = {}
                self._say.clear()
                print(f"not measured: {error}", flush=True)
            sides = []
            asked = ((self.few, FEW, 1), (self.spread, FEW, self._several), (self.many, MANY, 1))
            for number, (line, count, workers) in enumerate(asked):
                side = Ours(directory, count, workers, PORT + 2 + number)
                await stack.enter_async_context(side)
                await asyncio.to_thread(warm, side.port, files[count])
                sides.append((line, count, side))
            for number in range(1, self._rounds + 1):
                for line, count, side in sides:
                    self._say(f"{line.what}, round {number} of {self._rounds}")
                    work = None
                    if line is not self.spread:
                        work = self.few_work if count == FEW else self.many_work
                    if port := anchors.get(count, 0):
                        rate, spent = await asyncio.to_thread(
                            measured, pids[count], port, files[count]
                        )
                        line.theirs.append(rate)
                        if work:
                            work.theirs.append(spent)
                    rate, spent = await asyncio.to_thread(
                        measured, side.client.pid, side.port, files[count]
                    )
                    line.ours.append(rate)
                    if docker and line is self.few:
                        where = (swarm.RESOLVER, docker.command())
                        asked_docker = await asyncio.to_thread(
                            load, lookups.PORT, docker.questions, SECONDS, *where
                        )
                        self.docker.theirs.append(asked_docker.rate)
                        self.docker.ours.append(rate)
                    if work:
                        work.ours.append(spent)
            self.growth.ours, self.growth.theirs = self.many.ours, self.few.ours
            for turn in range(CHANGES):
                self._say(f"a changed name, round {turn + 1} of {CHANGES}")
                self.changed.ours.append(1000 * await sides[2][2].change(turn * 997, turn))
            if self._minutes:
                self._say(f"{self._minutes * 60:.0f} s of load")
                side = sides[0][2]
                self.memory.theirs.append(side.memory())
                await asyncio.to_thread(load, side.port, files[FEW], self._minutes * 60)
                self.memory.ours.append(side.memory())
