"""500 workloads on one node in one network, of bridge and of overlay: made, then all gone.

Two hosts with an agent each. The workloads are processes in stacks of their own on h1 that sleep;
what is measured is how long a connected client waits for each to have its place in the network,
one after the other, and then, when they all end at once, how long until nothing of them is left:
no process, stack, device, endpoint or sandbox. Whatever is left is an error, not a figure.
Nothing stands beside it.
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
from collections.abc import Iterator
from pathlib import Path

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
FLAT = 1.5  # the last ones against the first ones
SLEEP = ["unshare", "-n", "sh", "-c", "echo; exec sleep infinity"]


class Crowd:
    """What is measured, and the figures so far."""

    def __init__(self, rounds: int, say: Progress) -> None:
        self._rounds, self._say = rounds, say
        self._each: dict[str, tuple[Line, Line]] = {}
        self._gone: dict[str, Line] = {}
        self.lines: list[Line] = []
        self.targets: list[Target] = []
        for driver in DRIVERS:
            each = Line(f"{driver}: a workload of {COUNT}, median", "ms")
            edges = Line(f"{driver}: of the last {EDGE}, beside the first", "ms", f"first {EDGE}")
            gone = Line(f"{driver}: {COUNT} end, nothing is left", "s")
            self._each[driver], self._gone[driver] = (each, edges), gone
            self.lines += [each, edges, gone]
            self.targets.append(Target(edges, FLAT, of_ratio=True))

    def run(self) -> None:
        """Measure; everything goes at the end."""
        with world.temporary_bed(PREFIX, with_agents=True) as bed, asyncio.Runner() as runner:
            for number in range(1, self._rounds + 1):
                for driver in DRIVERS:
                    self._say(f"{COUNT} in {driver}, round {number} of {self._rounds}")
                    took, gone = runner.run(_round(bed, driver))
                    each, edges = self._each[driver]
                    each.ours.append(1000 * statistics.median(took))
                    edges.theirs.append(1000 * statistics.median(took[:EDGE]))
                    edges.ours.append(1000 * statistics.median(took[-EDGE:]))
                    self._gone[driver].ours.append(gone)


async def _round(bed: Testbed, driver: str) -> tuple[list[float], float]:
    """Seconds of each workload, in their order, and until nothing was left of all."""
    h1 = bed.hosts[0]
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(h1.target))
        before = _look(h1)
        network = await client.create_network(NETWORK, driver=driver, subnets=[SUBNET], wait=10)
        sleepers = stack.enter_context(_sleepers(h1))
        took = []
        for process in sleepers:
            began = time.monotonic()
            await client.create_sandbox(process.pid, [NETWORK])
            took.append(time.monotonic() - began)
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
    return took, gone


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
