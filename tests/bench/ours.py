"""Our side: two hosts of a testbed with an agent each, a network, and a workload in it on h2.

h1 made the network, so it owns the addresses. h2 has a workload, since rows are written only
where a network has a local endpoint. h1 has an endpoint too before anything is measured, as
the anchor has its bridge.
Opposite: frr.py and handmade.py, the anchors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.client import Client
from agent.errors import Conflict
from agent.syscalls import in_netns
from agent.testbed import Testbed
from tests.bench import throughput, world
from tests.bench.observe import Observer, T
from tests.bench.throughput import Lane
from tests.bench.world import mac_of, run

PREFIX = "vxb"
NETWORK, SUBNET, VNI = "bench", "10.64.0.0/12", 4100
FIRST = "10.65.0.0"  # address of the first endpoint that is announced
FAR = "10.79.0.2"  # of the workload on h2; beyond what is announced
NETNS = "/run/vxmesh/netns"  # where an agent keeps its devices, as its host sees it
DEVICE = f"vxl{VNI}"
PIECE = 1 << 20  # bytes


class Ours:
    """Two agents that know each other, and a client that is connected to h1's."""

    def __init__(self, bed: Testbed, directory: Path, runner: asyncio.Runner) -> None:
        """`directory` is for files; what is asynchronous runs in `runner`."""
        self._h1, self._h2 = bed.hosts
        self._directory = directory
        self._runner = runner
        self._client = runner.run(_connect(self._h1.target))
        self._observer = Observer(self._enter, DEVICE)

    def prepare(self) -> None:
        """Have the network on h1 too, which a withdrawal of everything takes away; then wait
        until the agents have nothing more to do."""
        with contextlib.suppress(Conflict):
            self._runner.run(self._client.create_endpoint(NETWORK, "here", wait=10))
        world.settle(self.agents)

    def announce(self, count: int) -> float:
        """Seconds from the start of `vxmesh endpoint announce` on h1 until the FDB and neighbour
        rows are all in h2's kernel."""
        file = self._file(count)
        self.prepare()
        with self._observer.watch(count, count) as watch:
            begin = time.monotonic()
            run(self._h1, ["vxmesh", "endpoint", "announce", "--network", NETWORK, "--file", file])
            return watch.result() - begin

    def announce_connected(self, count: int) -> float:
        """The same from when a connected client begins to send."""
        data = Path(self._file(count)).read_bytes()
        pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
        self.prepare()
        with self._observer.watch(count, count) as watch:
            begin = time.monotonic()
            self._runner.run(self._client.announce(NETWORK, pieces))
            return watch.result() - begin

    def withdraw(self) -> float:
        """Seconds from the start of `vxmesh endpoint rm --all` on h1 until all rows are gone."""
        world.settle(self.agents)
        with self._observer.watch(0, 0) as watch:
            begin = time.monotonic()
            run(self._h1, ["vxmesh", "endpoint", "rm", "--network", NETWORK, "--all"])
            return watch.result() - begin

    def withdraw_connected(self) -> float:
        """The same from when a connected client asks for it."""
        world.settle(self.agents)
        with self._observer.watch(0, 0) as watch:
            begin = time.monotonic()
            self._runner.run(self._client.remove_endpoints(network=NETWORK, all=True))
            return watch.result() - begin

    def one(self, number: int) -> float:
        """Seconds from when a connected client asks for an endpoint on h1 until its FDB row and
        its neighbour row are in h2's kernel."""
        with self._observer.watch(1, 1, at_once=True) as watch:
            begin = time.monotonic()
            made = self._runner.run(
                self._client.create_endpoint(NETWORK, f"one-{number}", mac=mac_of(number))
            )
            took = watch.result() - begin
        self._remove(made.id)
        return took

    def one_by_command(self, number: int) -> float:
        """The same from the start of `vxmesh endpoint create`."""
        command = ["vxmesh", "endpoint", "create", "--network", NETWORK]
        with self._observer.watch(1, 1, at_once=True) as watch:
            begin = time.monotonic()
            made = run(self._h1, [*command, "--name", f"one-{number}", "--mac", mac_of(number)])
            took = watch.result() - begin
        self._remove(made.strip())
        return took

    def memory(self) -> list[float]:
        """Resident MiB of the agent, on h1 and on h2."""
        return [world.memory([pid]) for pid in self.agents]

    def name_server_memory(self) -> list[float]:
        """Resident MiB of the agent's name server, a process of its own, on h1 and on h2."""
        return [world.memory(world.children(pid)) for pid in self.agents]

    @property
    def agents(self) -> list[int]:
        """The processes on h1 and h2."""
        return [self._h1.pid, self._h2.pid]

    @property
    def lane(self) -> Lane:
        """From a workload on h1 to the one on h2, over the overlay."""
        command = ["vxmesh", "run", "--network", NETWORK, "--"]
        return Lane(FAR, lambda given: run(self._h1, [*command, *given]))

    def wall(self, *command: str) -> float:
        """Seconds that a command takes on h1, start and end included."""
        begin = time.monotonic()
        run(self._h1, command)
        return time.monotonic() - begin

    def close(self) -> None:
        """Stop observing, and disconnect."""
        self._observer.close()
        self._runner.run(self._client.close())

    def _enter(self, function: Callable[[], T]) -> T:
        return self._h2.call(lambda: in_netns(NETNS, function))

    def _file(self, count: int) -> str:
        file = self._directory / f"endpoints-{count}.jsonl"
        if not file.exists():
            with file.open("w") as out:
                for i, address in enumerate(world.addresses(FIRST, count)):
                    line = {"name": f"w{i}", "mac": mac_of(i), "addresses": [address]}
                    out.write(json.dumps(line) + "\n")
        return str(file)

    def _remove(self, id: str) -> None:
        with self._observer.watch(0, 0) as watch:
            self._runner.run(self._client.remove_endpoints([id]))
            watch.result()


async def _connect(target: str) -> Client:
    """A client that has had an answer, so that connecting is no part of any figure."""
    client = Client(target)
    await client.info()
    return client


@contextlib.contextmanager
def start(directory: Path) -> Iterator[Ours]:
    """Two hosts with an agent each, ready to announce; it all goes at the end."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        bed = stack.enter_context(world.temporary_bed(PREFIX, with_agents=True))
        h1, h2 = bed.hosts
        create = ["vxmesh", "network", "create", NETWORK, "--subnet", SUBNET, "--vni", str(VNI)]
        run(h1, [*create, "--wait=10"])
        command = throughput.SERVER if shutil.which(throughput.SERVER[0]) else ["sleep", "infinity"]
        far = ["vxmesh", "run", "--network", NETWORK, "--name", "far", "--ip", FAR, "-d", "--"]
        run(h2, [*far, *command])
        ours = Ours(bed, directory, runner)
        stack.callback(ours.close)
        yield ours
