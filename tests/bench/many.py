"""500 workloads on one node in one network, of bridge and of overlay: made, then all gone.

Two hosts with an agent each. The workloads are processes in stacks of their own on h1 that sleep;
what is measured is how long a connected client waits for each to have its place in the network,
one after the other, and how long for each to be taken out again. Then all are put in at once, and
all end at once: how long until nothing of them is left, no process, stack, device, endpoint or
sandbox. Whatever is left is an error, not a figure. Nothing stands beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.client import Client
from agent.testbed import Host, Testbed
from tests.bench import world
from tests.bench.observe import Late
from tests.bench.report import Line, Progress, Target
from tests.bench.world import run

PREFIX = "vxb-crowd"
NETWORK = "crowd"
DRIVERS = ("bridge", "overlay")
COUNT, EDGE = 500, 100  # how many; how many of the first and of the last are held together
SUBNET = "10.64.0.0/16"
NETNS = "/run/vxmesh/netns"  # where an agent keeps its devices, as its host sees it
GONE_WITHIN = 60.0  # s
AT_ONCE = 50  # calls on their way at one time, when all are put in at once
FLAT = 1.5  # those among many against those among few
SLEEP = ["unshare", "-n", "sh", "-c", "echo; exec sleep infinity"]


class Took(NamedTuple):
    """Seconds of one round."""

    made: list[float]  # each, in their order
    removed: list[float]
    together: float  # until all were in
    gone: float  # until nothing was left of all


class Crowd:
    """What is measured, and the figures so far."""

    def __init__(self, rounds: int, say: Progress) -> None:
        self._rounds, self._say = rounds, say
        self._of: dict[str, list[Line]] = {}
        self.lines: list[Line] = []
        self.targets: list[Target] = []
        for driver in DRIVERS:
            lines = self._of[driver] = [
                Line(f"{driver}: a workload of {COUNT}, median", "ms"),
                Line(f"{driver}: of the last {EDGE}, beside the first", "ms", f"first {EDGE}"),
                Line(f"{driver}: one taken out, median", "ms"),
                Line(f"{driver}: of the first {EDGE}, beside the last", "ms", f"last {EDGE}"),
                Line(f"{driver}: {COUNT} put in at once", "s"),
                Line(f"{driver}: {COUNT} end, nothing is left", "s"),
            ]
            self.lines += lines
            self.targets += [Target(lines[i], FLAT, of_ratio=True) for i in (1, 3)]

    def run(self) -> None:
        """Measure; everything goes at the end."""
        with world.temporary_bed(PREFIX, with_agents=True) as bed, asyncio.Runner() as runner:
            for number in range(1, self._rounds + 1):
                for driver in DRIVERS:
                    self._say(f"{COUNT} in {driver}, round {number} of {self._rounds}")
                    took = runner.run(_round(bed, driver))
                    made, last, removed, first, together, gone = self._of[driver]
                    made.ours.append(1000 * statistics.median(took.made))
                    last.theirs.append(1000 * statistics.median(took.made[:EDGE]))
                    last.ours.append(1000 * statistics.median(took.made[-EDGE:]))
                    removed.ours.append(1000 * statistics.median(took.removed))
                    first.theirs.append(1000 * statistics.median(took.removed[-EDGE:]))
                    first.ours.append(1000 * statistics.median(took.removed[:EDGE]))
                    together.ours.append(took.together)
                    gone.ours.append(took.gone)


async def _round(bed: Testbed, driver: str) -> Took:
    h1 = bed.hosts[0]
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(h1.target))
        before = _look(h1)
        network = await client.create_network(NETWORK, driver=driver, subnets=[SUBNET], wait=10)
        sleepers = stack.enter_context(_sleepers(h1))
        made, ids = [], []
        for process in sleepers:
            began = time.monotonic()
            sandbox = await client.create_sandbox(process.pid, [NETWORK])
            made.append(time.monotonic() - began)
            ids.append(sandbox.id)
        await _check_all(h1, client, sleepers, network.vni)
        removed = []
        for id in ids:
            began = time.monotonic()
            await client.remove_sandboxes([id])
            removed.append(time.monotonic() - began)
        assert not await client.sandboxes()
        together = await _put_in(client, sleepers)
        await _check_all(h1, client, sleepers, network.vni)
        world.settle([host.pid for host in bed.hosts])
        stacks = {_stack(process.pid) for process in sleepers}
        began = time.monotonic()
        for process in sleepers:
            os.kill(process.pid, signal.SIGKILL)
        for process in sleepers:
            process.wait()
        await _gone(bed, before, stacks)
        gone = time.monotonic() - began
        await client.remove_networks([NETWORK], wait=10)
        left = _look(h1) ^ before
        if left:
            raise Late(f"with the network these differ from before: {sorted(left)[:10]}")
    return Took(made, removed, together, gone)


async def _put_in(client: Client, sleepers: Sequence[subprocess.Popen[bytes]]) -> float:
    """Seconds until all are in, of whom many ask at one time."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def put(pid: int) -> None:
        async with turns:
            await client.create_sandbox(pid, [NETWORK])

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for process in sleepers:
            group.create_task(put(process.pid))
    return time.monotonic() - began


@contextlib.contextmanager
def _sleepers(h1: Host) -> Iterator[list[subprocess.Popen[bytes]]]:
    """As many processes in network namespaces of their own on h1."""
    made: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(COUNT):
            made.append(h1.popen(SLEEP, stdout=subprocess.PIPE))
            out = made[-1].stdout
            assert out is not None and out.readline()
        yield made
    finally:
        for process in made:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


async def _check_all(
    h1: Host, client: Client, sleepers: list[subprocess.Popen[bytes]], vni: int
) -> None:
    """All are there, and the last one reaches the first one."""
    sandboxes = {sandbox.pid: sandbox for sandbox in await client.sandboxes()}
    assert sandboxes.keys() == {process.pid for process in sleepers}
    endpoints = {endpoint.sandbox: endpoint for endpoint in await client.endpoints()}
    assert len(endpoints) == COUNT
    ports = [link for link in _links(h1, NETNS) if link.startswith("vxp")]
    assert len(ports) == COUNT and f"vxb{vni}" in _links(h1, NETNS)
    first = endpoints[sandboxes[sleepers[0].pid].id].addresses[0]
    enter = ["nsenter", "-n", "-t", str(sleepers[-1].pid)]
    run(h1, [*enter, "ping", "-c", "3", "-i", "0.2", "-W", "1", first])


async def _gone(bed: Testbed, before: set[str], stacks: set[str]) -> None:
    """Return when nothing is left, on h1 nor of what h2 knows; Late after GONE_WITHIN."""
    h1 = bed.hosts[0]
    deadline = time.monotonic() + GONE_WITHIN
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(host.target)) for host in bed.hosts]
        while True:
            left = [*sorted(_look(h1) - before), *(_held(h1.pid) & stacks)]
            for client in clients:
                left += [endpoint.name for endpoint in await client.endpoints()]
                left += [sandbox.name for sandbox in await client.sandboxes()]
            if not left:
                return
            if time.monotonic() > deadline:
                raise Late(f"{len(left)} things are left after {GONE_WITHIN:.0f} s: {left[:10]}")
            await asyncio.sleep(0.05)


def _look(host: Host) -> set[str]:
    """Devices of a host and of what its agent made there, and names of namespaces."""
    names = {f"{netns or 'host'}:{link}" for netns in ("", NETNS) for link in _links(host, netns)}
    return names | set(run(host, ["ip", "netns", "list"]).split())


def _links(host: Host, netns: str) -> set[str]:
    enter = ["nsenter", f"--net={netns}"] if netns else []
    return {link["ifname"] for link in json.loads(run(host, [*enter, "ip", "-j", "link"]))}


def _stack(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def _held(pid: int) -> set[str]:
    """The namespaces that an agent and the processes that it started hold open."""
    found = set()
    for each in (pid, *world.children(pid)):
        with contextlib.suppress(OSError):  # it has just ended
            for file in Path(f"/proc/{each}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(str(file.readlink()))
    return found
