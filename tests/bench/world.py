"""What all sides of the benchmark stand on: beds, names of things, processes and their memory."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.testbed import Host, Testbed, take_down
from tests.bench.observe import PREFIX

LOG_TAIL = 15  # lines of an agent's log, when something broke
TIMEOUT = 120.0  # seconds for any command
SETTLE_STEP = 0.3  # seconds
SETTLE_TIMEOUT = 20.0
IDLE = 0.05  # of one processor: what agents and daemons take that have nothing to do
TICKS = os.sysconf("SC_CLK_TCK")

Say = Callable[[str], None]


class Missing(Exception):
    """What cannot be measured on this machine, and what would help."""


def mac_of(number: int) -> str:
    """The MAC of the benchmark's endpoint with that number."""
    return (PREFIX + number.to_bytes(4, "big")).hex(":")


@contextlib.contextmanager
def temporary_bed(prefix: str, *, with_agents: bool, hosts: int = 2) -> Iterator[Testbed]:
    """Hosts of namespaces PREFIX-h1, PREFIX-h2 … What a killed run left goes first."""
    take_down(prefix)
    try:
        bed = Testbed.up(hosts, prefix=prefix, with_agents=with_agents)
        try:
            yield bed
        except Exception as error:
            for host in bed.hosts if with_agents else ():
                state = "runs" if host.is_running else "has ended"
                tail = host.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
                error.add_note("\n".join([f"the agent of {host.name} {state}; its log:", *tail]))
            raise
    finally:
        take_down(prefix)


def run(host: Host, command: Sequence[str]) -> str:
    """Run a command in a host to its end; its stdout. CalledProcessError if it fails."""
    return host.run(command, check=True, timeout=TIMEOUT).stdout


def configure(host: Host, lines: str) -> None:
    """Run lines of `ip -batch` in a host."""
    host.run(["ip", "-batch", "-"], input=lines, check=True)


def end(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds."""
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def memory(pids: Sequence[int]) -> float:
    """Resident MiB of processes together: VmRSS in proc(5)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total / 1024


def children(pid: int) -> list[int]:
    """The processes that `pid` started itself."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def settle(pids: Sequence[int]) -> None:
    """Return when processes have nothing more to do; the next figure is then not of this one.

    After 20 s it returns anyway.
    """
    deadline = time.monotonic() + SETTLE_TIMEOUT
    before = _seconds(pids)
    while time.monotonic() < deadline:
        time.sleep(SETTLE_STEP)
        now = _seconds(pids)
        if now - before <= IDLE * SETTLE_STEP * len(pids):
            return
        before = now


def _seconds(pids: Sequence[int]) -> float:
    """Processor time taken so far: utime and stime, fields 14 and 15 of /proc/PID/stat."""
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat[stat.rindex(")") + 2 :].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """Seconds since boot, of all processors together; `stolen` a hypervisor gave to others."""

    total: float
    stolen: float


def processor_time() -> ProcessorTime:
    """The line `cpu` of /proc/stat, see proc(5)."""
    line = Path("/proc/stat").read_text().split("\n", 1)[0]
    values = [int(v) / TICKS for v in line.split()[1:9]]
    return ProcessorTime(sum(values), values[7])


def addresses(first: str, count: int) -> list[str]:
    """That many addresses from `first` on."""
    start = int(ipaddress.ip_address(first))
    return [str(ipaddress.ip_address(start + i)) for i in range(count)]
