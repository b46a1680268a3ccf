"""Nodes that crash and come back from their disk, and what must then still hold.

A node here is what agent/daemon.py makes of the parts: the real restart, listener and
`adopt`, over the disk of disk.py. Its sandboxes are processes of the host: they outlive the
agent and end with the power. What stands opposite: crashrun.py, a random load; scenarios/,
steps that once went wrong.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from agent.allocator import with_space
from agent.core.addresses import Range
from agent.core.plumtree import Mesh
from agent.core.replica import Delta, Record
from agent.errors import Conflict, Unavailable
from agent.listeners import ToStore
from agent.model import Endpoint, Network, Node, Sandbox
from agent.node import NodeState
from agent.operations import Operations
from agent.requests import EndpointSpec
from agent.restart import begin, recall
from agent.store import LASTING
from agent.views import Change
from tests.sim.cluster import Cluster, SimNode
from tests.sim.disk import Disk, VirtualLoop
from tests.sim.keys import sealer_of
from tests.sim.network import Weather

T = TypeVar("T")

FAIR = Weather(loss=0.0, duplication=0.0, delay=(0.0001, 0.001), partitions=0)
ANSWER_WITHIN = 2.0  # s; as cluster/peers.py: SPACE_WITHIN


class CrashNode(SimNode):
    """A host: its disk, its sandboxes, and its agent while there is one."""

    cluster: CrashCluster

    def __init__(self, cluster: Cluster, index: int) -> None:
        assert isinstance(cluster, CrashCluster)
        self.cluster = cluster
        self.id = f"{index + 1:016x}"
        self.index = index
        rng = random.Random(cluster.rng.random())
        self.disk = Disk(cluster.clock, rng, cluster.latency, cluster.failing)
        self.skew = 0.0  # s that its wall clock is ahead
        self.boots = 1
        self.lives = 0
        self.is_up = False
        self.boxes: set[str] = set()  # ids of the sandboxes that live
        # What callers were told that it is done, and nothing may undo:
        self.made: dict[str, Endpoint] = {}
        self.gone: set[str] = set()  # ids of endpoints that were removed
        self.start()

    def start(self) -> None:
        """An agent starts on this host's state, as agent/daemon.py does it."""
        assert not self.is_up
        clock = self.cluster.clock
        self.loop = self.disk.loop = VirtualLoop(clock)
        life = begin(self.disk, f"boot {self.boots}", lambda: self.id)
        self.lives += 1
        assert (life.node, life.incarnation) == (self.id, self.lives)
        address = f"10.99.0.{self.index + 1}"
        name = f"n{self.index + 1}"
        me = Node(self.id, name, address, 7946, address, 4789, "sim", 0.0, 1500,
                  incarnation=life.incarnation)  # fmt: skip
        rng = random.Random(self.cluster.rng.random())
        self.state = NodeState(me, lambda: clock.now + self.skew, rng)
        self.state.replica.sealer = sealer_of(self.id, self.state.nodes.__contains__)
        self.state.collect_after = 1.0
        recall(self.state, self.disk, life)
        self.sessions = {}
        self.timers = {}
        self.mesh = Mesh(self.id, lambda: self.cluster.is_bounded, lambda: self.cluster.nodes)
        self.storing = ToStore(self.state, self.disk, self.flush_all, self.loop.as_loop)
        self.state.settle_conflicts(quietly=True)
        operations = Operations(self.state, self, self, self.storing.durable)
        operations.adopt(lambda sandbox: sandbox.id in self.boxes)
        self.state.listeners.append(self._changed)
        self.state.describe(me)
        self.is_up = True
        self.loop.run(self._join(), failed=lambda error: self.loop.run(self._join()))

    async def _join(self) -> None:
        """Talk to the others once what was done at the start is on disk."""
        while True:
            try:
                await self.storing.durable()
                break
            except Unavailable:
                await self.sleep(1.0)
        for other in self.cluster.hosts():
            if other is not self and other.is_up:
                self.cluster.reconnect(self.id, other.id)

    # -- ends --

    def kill(self, committed: bool | None = None) -> None:
        """kill -9 of the agent. What its disk was at may be `committed` (None: by chance)."""
        told = self._end()
        self.disk.kill(committed)
        self._check_kept(told)

    def cut_power(self, kept: int | None = None) -> None:
        """The host goes dark, its workloads with it; `kept` as for Disk.cut_power."""
        told = self._end()
        self.disk.cut_power(kept)
        self._check_kept([r for r in told if r.key[:2] in LASTING])
        self.boots += 1
        self.boxes.clear()
        self.made.clear()  # an endpoint that was made or removed may come undone
        self.gone.clear()

    def _end(self) -> list[Record]:
        """The agent is gone; the records that it had published."""
        assert self.is_up
        self.is_up = False
        self.sessions = {}
        return self.state.since(self.id, 0)

    def _check_kept(self, told: list[Record]) -> None:
        """What peers may have heard of is there after the crash, or something newer is."""
        meta, records, _ = self.disk.load()
        there = {record.key: record.version for record in records}
        for record in told:
            collected = not record.value and record.version <= int(meta.get("floor", 0))
            kept = there.get(record.key, -1) >= record.version
            assert kept or collected, f"seed {self.cluster.seed}: {self.id} forgot {record}"

    # -- how it talks --

    def _changed(self, change: Change) -> None:
        self.state.kernel_has(self.state.versions())
        self.loop.call_soon(self.flush_all)

    def flush(self, peer: str) -> None:
        if peer in self.sessions:
            super().flush(peer)

    def settle(self, endpoint: str | None = None) -> Any:
        """Kernel, for Operations: not used by what is called here."""
        raise NotImplementedError

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        """Cluster, for Operations: not used by what is called here."""
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        future = self.loop.create_future()
        self.loop.call_later(seconds, future.set_result, None)
        await future

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        """As cluster/peers.py asks: the request or the answer may be lost, the owner die."""
        donor = self.cluster.host(owner)
        known = self.state.version(owner)
        answer: asyncio.Future[str | Delta] = self.loop.create_future()
        self.loop.call_later(ANSWER_WITHIN, _set, answer, "")

        def back(reply: str | Delta) -> None:
            def come() -> None:
                self.loop.call_soon(_set, answer, reply)

            self.cluster.post(owner, self.id, come)

        def arrive() -> None:
            if donor.is_up:
                donor.loop.run(donor.answer(self.id, network.id, family, ranges, known), back)

        self.cluster.post(self.id, owner, arrive)
        reply = await answer
        if reply == "":
            raise Unavailable(owner, "does not answer")
        if isinstance(reply, str):
            return reply
        self.state.merge(reply, owner)
        return ""

    async def answer(
        self, asker: str, network: str, family: int, ranges: list[Range], known: int
    ) -> str | Delta:
        """As cluster/server.py answers: only once the donation is on disk."""
        me, state = self.id, self.state
        refused = state.donate(network, asker, family, ranges)
        if refused:
            return refused
        await self.storing.durable()
        return state.delta(me, known)

    # -- what callers ask for --

    async def run(self, network: str, spec: EndpointSpec, box: str = "") -> None:
        """An endpoint, in a sandbox that has just been started if `box` is one's id."""
        endpoint = await with_space(
            self.state, self, lambda: self.state.create_endpoint(network, spec, box)
        )
        if box:
            self.state.put_sandbox(Sandbox(box, box, "/", 1, 1, 1, 0.0, (endpoint.id,), ("eth0",)))
        await self.storing.durable()
        if box and box not in self.boxes:
            self.state.drop_sandbox(box)
            raise Conflict(f"process of {box}", "ended while its sandbox was made")
        if self.state.local_endpoint(endpoint.id):  # and not removed meanwhile
            self.made[endpoint.id] = endpoint

    async def remove(self, id: str) -> None:
        """Remove an endpoint."""
        self.state.remove_endpoints([id])
        self.made.pop(id, None)
        await self.storing.durable()
        self.gone.add(id)

    def end_box(self, id: str) -> None:
        """A workload ends; an agent that runs is told so, one that does not finds out."""
        self.boxes.discard(id)
        for endpoint in [e for e in self.made.values() if e.sandbox == id]:
            del self.made[endpoint.id]
        if self.is_up:
            self.state.drop_sandbox(id)


def _set(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


class CrashCluster(Cluster):
    """A cluster of such hosts."""

    node_type = CrashNode

    def __init__(
        self,
        seed: int,
        count: int,
        weather: Weather = FAIR,
        latency: tuple[float, float] = (0.001, 0.001),
        failing: float = 0.0,
    ) -> None:
        """`latency` of a commit in s, `failing` how many commits fail (0..1)."""
        self.latency, self.failing = latency, failing
        super().__init__(seed, count, weather)

    def hosts(self) -> list[CrashNode]:
        return [node for node in self.nodes.values() if isinstance(node, CrashNode)]

    def host(self, id: str) -> CrashNode:
        node = self.nodes[id]
        assert isinstance(node, CrashNode)
        return node

    def post(self, a: str, b: str, deliver: Callable[[], None]) -> None:
        """One packet outside of the streams; it may be lost, but does not come twice."""
        if self.wire.passes(a, b):
            self.clock.after(self.rng.uniform(*self.wire.weather.delay), deliver)

    def reconnect(self, a: str, b: str) -> None:
        self.open(a, b)

    def open(self, a: str, b: str) -> None:
        """New streams between two nodes; one that is down dials when it starts."""
        if self.host(a).is_up and self.host(b).is_up:
            self.host(a).connect(b)
            self.host(b).connect(a)

    # -- what must hold --

    def living(self) -> list[tuple[str, Endpoint]]:
        """What runs now, whether its agent does or not."""
        return [
            (host.id, endpoint)
            for host in self.hosts()
            for members in host.state.members.values()
            for endpoint in members.local.values()
            if host.is_up or not endpoint.sandbox or endpoint.sandbox in host.boxes
        ]

    def check_promises(self) -> None:
        """At the end, with all up: nothing that was told to be done has come undone."""
        for host in self.hosts():
            local = {id: e for m in host.state.members.values() for id, e in m.local.items()}
            for id, endpoint in host.made.items():
                if host.state.catalogue.get(endpoint.network):
                    assert local.get(id) == endpoint, f"seed {self.seed}: {id} was made, and is not"
            back = host.gone & local.keys()
            assert not back, f"seed {self.seed}: {back} were removed, and are back"
            boxes = {e.sandbox for e in local.values() if e.sandbox}
            assert boxes <= host.boxes, f"seed {self.seed}: endpoints of sandboxes that ended"
            held = {e for s in host.state.sandboxes.values() for e in s.endpoints}
            strays = {e.id for e in local.values() if e.sandbox} - held
            assert not strays, f"seed {self.seed}: endpoints without their sandbox: {strays}"

    def check_conflicts(self) -> None:
        """At the end: each name and VNI is one network's, and the records say so themselves."""
        for host in self.hosts():
            catalogue = host.state.catalogue
            all = list(catalogue.all())
            assert len({n.name for n in all}) == len({n.vni for n in all}) == len(all)
            unsettled = list(catalogue.unsettled())
            assert not unsettled, f"seed {self.seed}: {host.id} sees unsettled {unsettled}"
