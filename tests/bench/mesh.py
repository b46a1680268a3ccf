"""Our side of failures: two hosts of a testbed with an agent each, a network, a workload on each.

Opposite: swarm.py, the anchor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator

from agent.client import Client
from agent.rpc.types_pb2 import Sandbox
from agent.syscalls import in_netns, start_time
from agent.testbed import Host, Testbed
from tests.bench import echo, lookups, world
from tests.bench.drift import Damage
from tests.bench.lookups import Workload
from tests.bench.observe import Late, T
from tests.bench.world import mac_of, run

PREFIX = "vxb-mesh"
NETWORK, SUBNET = "bench", "10.64.0.0/16"
MANY, MANY_SUBNET, MANY_VNI = "many", "10.80.0.0/12", 4101  # of what is announced
FIRST = "10.81.0.0"  # address of the first endpoint that is announced
NETNS = "/run/vxmesh/netns"  # where an agent keeps its devices, as its host sees it
NEAR, FAR = "near", "far"
READY_TIMEOUT = 30.0  # seconds until a workload is reached
STOP_TIMEOUT = 20.0  # seconds until an agent that was told to stop has
REPAIRED = re.compile(r"^vxmesh_drift_repaired_total(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)


class Mesh:
    """Two agents that know each other, `near` on h1 and `far` on h2."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        h1, h2 = bed.hosts
        run(h1, ["vxmesh", "network", "create", NETWORK, "--subnet", SUBNET, "--wait=10"])
        for host, name in ((h1, NEAR), (h2, FAR)):
            command = ["vxmesh", "run", "--network", NETWORK, "--name", name, "-d", "--wait=10"]
            run(host, [*command, "--", "sleep", "infinity"])
        self.near, self.far = workload(h1, NEAR), workload(h2, FAR)
        self.prepare()

    def prepare(self) -> None:
        """Wait until the workloads reach each other by name, and the agents are idle."""
        found = lookups.wait(self.near, FAR, READY_TIMEOUT, resolves=True)
        if found is None:
            raise Late(f"{FAR} does not resolve on h1 after {READY_TIMEOUT:.0f} s")
        with contextlib.closing(echo.Server(self.far)):
            if echo.wait(self.near, found[1], READY_TIMEOUT) is None:
                raise Late(f"{FAR} is not reached from h1 after {READY_TIMEOUT:.0f} s")
        world.settle([host.pid for host in self.bed.hosts])

    def restart(self, number: signal.Signals) -> None:
        """End the agent of h2, by SIGKILL or by SIGTERM as for an upgrade, and start it again."""
        if number is signal.SIGKILL:
            self.bed.kill("h2")
        else:
            self._stop()
        self.bed.start("h2")

    @property
    def runs(self) -> bool:
        """Whether the far workload still is the one that was started."""
        return start_time(self.far.pid) != 0

    @contextlib.contextmanager
    def announced(self, count: int) -> Iterator[Damage]:
        """Have that many endpoints on h1 meanwhile, in a network of their own, whose rows h2 has
        as it has an endpoint there too."""
        h1, h2 = self.bed.hosts
        create = ["vxmesh", "network", "create", MANY, "--subnet", MANY_SUBNET]
        run(h1, [*create, "--vni", str(MANY_VNI), "--wait=10"])
        run(h2, ["vxmesh", "endpoint", "create", "--network", MANY, "--name", "here", "--wait=10"])
        lines = "".join(
            json.dumps({"name": f"w{i}", "mac": mac_of(i), "addresses": [address]}) + "\n"
            for i, address in enumerate(world.addresses(FIRST, count))
        )
        announce = ["vxmesh", "endpoint", "announce", "--network", MANY, "--file", "-"]
        h1.run([*announce, "--wait=60"], input=lines, check=True, timeout=world.TIMEOUT)
        with contextlib.closing(Damage(lambda f: _enter(h2, f), f"vxl{MANY_VNI}")) as damage:
            damage.wait(count)
            world.settle([host.pid for host in self.bed.hosts])
            yield damage
        for host in (h1, h2):
            rm = ["vxmesh", "endpoint", "rm", "--network", MANY, "--all", "--wait=30"]
            run(host, rm)
        run(h1, ["vxmesh", "network", "rm", MANY, "--wait=10"])

    def repaired(self) -> float | None:
        """How many repairs h2's agent has counted since it started; None if it cannot tell."""
        done = self.bed.host("h2").run(["vxmesh", "metrics"])
        if done.returncode:
            return None
        return sum(float(value) for value in REPAIRED.findall(done.stdout))

    def _stop(self) -> None:
        host = self.bed.host("h2")
        os.kill(host.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        while host.is_running:
            if time.monotonic() > deadline:
                raise Late(f"the agent of h2 has not stopped after {STOP_TIMEOUT:.0f} s")
            time.sleep(0.02)


def _enter(host: Host, function: Callable[[], T]) -> T:
    return host.call(lambda: in_netns(NETNS, function))


def workload(host: Host, name: str) -> Workload:
    """A sandbox of a host that runs, as its agent shows it."""
    sandbox = asyncio.run(_sandbox(host, name))
    servers = re.findall(r"^nameserver\s+(\S+)", sandbox.resolv_conf, re.MULTILINE)
    address, _, _ = sandbox.endpoints[0].addresses[0].partition("/")
    return Workload(sandbox.pid, name, address, servers[0])


async def _sandbox(host: Host, name: str) -> Sandbox:
    async with Client(host.target) as client:
        return await client.sandbox(name)


@contextlib.contextmanager
def start() -> Iterator[Mesh]:
    """Two hosts with an agent and a workload each; it all goes at the end."""
    with world.temporary_bed(PREFIX, with_agents=True) as bed:
        yield Mesh(bed)
