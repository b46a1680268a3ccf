"""Agents killed with -9 at random moments, under a load of creates and removes: nothing leaks.

VXMESH_KILLS sets how many kills; the seed is printed, and VXMESH_SEED sets it. The moments
differ from run to run all the same, so what is checked holds for any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.client import Client
from agent.errors import VxmeshError
from agent.testbed import Testbed, processes, temporary
from tests.netns.agreement import Agreement
from tests.netns.world import World

KILLS = int(os.environ.get("VXMESH_KILLS", "12"))
HOSTS = ("h1", "h2", "h3")
OWN_LINKS = {"lo", "uplink"}


@pytest.fixture(scope="module")
def killed() -> Iterator[Testbed]:
    with temporary(hosts=3) as made:
        yield made


@pytest.fixture
def world(killed: Testbed) -> Iterator[World]:
    made = World(killed)
    yield made
    made.clean()


def is_bare(world: World, host: str) -> bool:
    return world.links(host) == OWN_LINKS


def is_empty(world: World, host: str) -> bool:
    return bool(world.read(host, "endpoint", "ls") == world.read(host, "sandbox", "ls") == [])


def command(pid: int) -> bytes:
    """What a process was started as; nothing of one that has just ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


class Load:
    """One host's share of creates and removes. What a dead agent refuses is no failure."""

    def __init__(self, world: World, host: str, network: str, seed: int) -> None:
        self._world, self._host, self._network = world, host, network
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"load-{host}")
        self.done: Counter[str] = Counter()
        self._number = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        steps: list[Callable[[], bool]] = [
            self._workload, self._workload, self._end, self._announce, self._withdraw,
            self._another_network,
        ]  # fmt: skip
        while not self._stop.is_set():
            step = self._rng.choice(steps)
            self.done[step.__name__.strip("_") + ("" if step() else " refused")] += 1

    def _try(self, *words: str, **options: str) -> bool:
        return self._world.try_vx(self._host, *words, **options).returncode == 0

    def _name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}-{self._host}-{self._number}"

    def _workload(self) -> bool:
        return self._try(
            "run", "--network", self._network, "--name", self._name("w"), "-d", "--",
            "sleep", "3600",
        )  # fmt: skip

    def _end(self) -> bool:
        async def pids() -> list[int]:
            async with Client(self._world.host(self._host).target) as client:
                return [s.pid for s in await client.sandboxes() if s.pid]

        try:
            found = asyncio.run(pids())
        except VxmeshError:
            return False
        if found:
            with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
                os.kill(self._rng.choice(found), signal.SIGKILL)
        return bool(found)

    def _announce(self) -> bool:
        first = self._number = self._number + 100
        lines = "\n".join(json.dumps({"name": f"a-{self._host}-{first + n}"}) for n in range(40))
        return self._try(
            "endpoint", "announce", "--network", self._network, "--file", "-", input=lines
        )

    def _withdraw(self) -> bool:
        return self._try("endpoint", "rm", "--network", self._network, "--all")

    def _another_network(self) -> bool:
        name = self._name("n")
        made = self._try("network", "create", name)
        return self._try("network", "rm", name) and made


def test_random_kills_leak_nothing(world: World) -> None:
    seed = int(os.environ.get("VXMESH_SEED", str(random.randrange(1 << 30))))
    print(f"\nVXMESH_SEED={seed}")
    rng = random.Random(seed)
    net = world.network("--subnet", "10.60.0.0/20")
    loads = [Load(world, host, net, rng.randrange(1 << 30)) for host in HOSTS]
    for load in loads:
        load.start()
    try:
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.0, 0.6))  # any moment of the load
            host = rng.choice(HOSTS)
            world.bed.kill(host)
            time.sleep(rng.uniform(0.0, 0.3))
            world.bed.start(host)
        # A load that never worked shows nothing: on a busy machine a command may take longer than
        # what is between two kills.
        world.wait(lambda: all(load.done["workload"] for load in loads), "each load has worked")
    finally:
        for load in loads:
            load.stop()
    print({load._host: dict(load.done) for load in loads})
    agreement = Agreement(world, net)
    for host in HOSTS:
        world.workload(host, net)  # so that each has a reason to hold rows; waits for all kernels
    agreement.wait()
    held = Counter(a for es in agreement.living().values() for e in es for a in e.addresses)
    assert [a for a, count in held.items() if count > 1] == [], "addresses handed out twice"
    names = Counter(e.name for es in agreement.living().values() for e in es)
    assert [n for n, count in names.items() if count > 1] == []
    asyncio.run(world._empty())
    for host in HOSTS:
        world.wait(functools.partial(is_bare, world, host), f"{host}'s devices are gone")
        world.wait(functools.partial(is_empty, world, host), f"{host} knows of nothing")
    token = world.host("h1").token  # of every process that was started in the testbed

    def workloads() -> list[int]:
        return [pid for pid in processes.find(token, []) if command(pid).startswith(b"sleep")]

    world.wait(lambda: not workloads(), "what was killed has ended")
