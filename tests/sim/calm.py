"""Many replicas and their sessions on a virtual clock: how a record travels when all is well.

`python -m tests.sim.calm --nodes 1000` prints hops, messages and bytes. Only what a session needs
of a node is here (`Store`), so that a thousand fit; tests/sim/cluster.py has whole nodes.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

from agent.cluster.codec import Encoder
from agent.core.plumtree import Mesh
from agent.core.replica import Delta, Record, Replica
from agent.core.session import Hello, Message, Session
from agent.core.topology import EVERYBODY, Topology
from tests.sim.keys import sealer_of
from tests.sim.network import Clock, Weather, Wire

CALM = Weather(loss=0.0, duplication=0.0, delay=(0.0005, 0.001), partitions=0)
MEAN_DELAY = 0.00075


class Store:
    """A replica as a session sees it."""

    def __init__(self, me: str) -> None:
        self.me = me
        self.replica = Replica(me, sealer_of(me))
        self.kernel: dict[str, int] = {}
        self.removed: set[str] = set()

    def write(self, count: int, start: int = 0) -> None:
        for number in range(start, start + count):
            self.replica.put(f"e/{number}", b"v")
        self.replica.publish(self.replica.written())

    def digest(self) -> dict[str, tuple[int, int]]:
        return self.replica.digest()

    def version(self, origin: str) -> int:
        return self.replica.version(origin)

    def floor(self, origin: str) -> int:
        return self.replica.floor(origin)

    def since(self, origin: str, version: int) -> list[Record]:
        return self.replica.since(origin, version)

    def merge(self, delta: Delta, sender: str = "") -> bool:
        return self.replica.merge(delta, sender) is not None

    def is_doubted(self, origin: str) -> bool:
        return origin in self.replica.doubted

    def prove(self, delta: Delta, introduce: bool) -> bool:
        return self.replica.prove(delta, introduce)

    def seen(self, peer: str, entries: dict[str, tuple[int, int]]) -> None:
        pass

    def stable(self, version: int) -> None:
        self.replica.collect(self.me, version)

    def applied(self, origin: str) -> int:
        return self.kernel.get(origin, 0)

    def withholds(self) -> bool:
        return False

    def is_heard(self, origin: str) -> bool:
        return origin not in self.removed


class Net:
    """`nodes` stores with the streams that topology.py says, and what went over them."""

    def __init__(
        self, nodes: list[str], seed: int, weather: Weather = CALM, everybody: int = EVERYBODY
    ) -> None:
        self.clock = Clock()
        self.rng = random.Random(seed)
        self.wire = Wire(self.clock, self.rng, weather)
        self.stores = {node: Store(node) for node in nodes}
        self.everybody = everybody
        self.topology = Topology(nodes, everybody)
        self.live = set(nodes)
        self.meshes = {
            node: Mesh(node, lambda: self.topology.is_bounded, lambda: sorted(self.live))
            for node in nodes
        }
        self.sessions: dict[tuple[str, str], Session] = {}
        self.timers: dict[tuple[str, str], float] = {}
        self._last: dict[tuple[str, str], float] = {}  # when the last message arrives
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.weigh = False  # count bytes as well
        self._encoder = Encoder()
        self.crossed: Counter[tuple[frozenset[str], str, int]] = Counter()  # stream and record
        self.carried: Counter[tuple[str, int]] = Counter()  # record -> how often it was sent
        self.came: dict[tuple[str, int], dict[str, float]] = {}  # record -> node -> when
        for a in nodes:
            for b in sorted(self.topology.neighbours(a)):
                if (a, b) not in self.sessions:
                    self.open(a, b)

    def open(self, a: str, b: str) -> None:
        """A new stream between two nodes, in place of one that there was."""
        for one, other in ((a, b), (b, a)):
            rng = random.Random(self.rng.random())
            hello = Hello(one, "boot", "sim", one)
            session = Session(self.stores[one], hello, rng, self.clock.now, self.meshes[one])
            session.peer = Hello(other, "boot", "sim", other)
            self.sessions[one, other] = session
            self.meshes[one].up(session)
        self.flush((a, b))
        self.flush((b, a))

    def close(self, a: str, b: str) -> None:
        for pair in ((a, b), (b, a)):
            self.meshes[pair[0]].down(self.sessions.pop(pair))

    def kill(self, node: str) -> None:
        """End all streams of a node, and tell all that it is dead."""
        for a, b in [pair for pair in self.sessions if pair[0] == node]:
            self.close(a, b)
        self.live.discard(node)

    def write(self, node: str, count: int = 1) -> int:
        """Write records at a node; the version of the last."""
        store = self.stores[node]
        store.write(count, start=store.replica.written())
        self._flush_node(node)
        return store.replica.written()

    def run(self, seconds: float) -> None:
        self.clock.run_until(self.clock.now + seconds)

    def _flush_node(self, node: str) -> None:
        for peer in list(self.meshes[node].peers()):
            self.flush((node, peer))

    def flush(self, pair: tuple[str, str]) -> None:
        session = self.sessions.get(pair)
        if session is None:
            return
        for message in session.to_send(self.clock.now):
            self._carry(pair, session, message)
        due = session.next_timer()
        if due < self.timers.get(pair, float("inf")):
            self.timers[pair] = due
            self.clock.at(due, lambda: self._timer(pair, due))

    def _timer(self, pair: tuple[str, str], due: float) -> None:
        if self.timers.get(pair) == due:
            del self.timers[pair]
            self.flush(pair)

    def _carry(self, pair: tuple[str, str], session: Session, message: Message) -> None:
        kind = type(message).__name__
        self.messages[kind] += 1
        if self.weigh:
            self.bytes[kind] += len(self._encoder.encode(message))
        if isinstance(message, Delta):
            for record in message.records:
                self.crossed[frozenset(pair), message.origin, record.version] += 1
                self.carried[message.origin, record.version] += 1
        a, b = pair

        def deliver() -> None:
            if self.sessions.get(pair) is session and (b, a) in self.sessions:
                self._receive(b, a, message)

        if self.wire.weather.loss:
            self.wire.carry(a, b, deliver)
            return
        # A stream that loses nothing keeps the order, as gRPC's do.
        when = self.clock.now + self.rng.uniform(*self.wire.weather.delay)
        when = self._last[pair] = max(when, self._last.get(pair, 0.0))
        self.clock.at(when, deliver)

    def _receive(self, node: str, peer: str, message: Message) -> None:
        session = self.sessions[node, peer]
        before = self.stores[node].version(message.origin) if isinstance(message, Delta) else 0
        session.receive(message, self.clock.now)
        if isinstance(message, Delta):
            for version in range(before + 1, self.stores[node].version(message.origin) + 1):
                self.came.setdefault((message.origin, version), {})[node] = self.clock.now
        self.flush((node, peer))
        for other, beside in self.meshes[node].peers().items():
            if beside.pending:
                self.flush((node, other))

    def equal(self) -> bool:
        """Whether all living nodes have the same."""
        digests = [
            {o: self.stores[node].version(o) for o in self.stores} for node in sorted(self.live)
        ]
        return all(digest == digests[0] for digest in digests)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.calm", description=__doc__)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--writers", type=int, default=10, help="nodes that write")
    parser.add_argument("--records", type=int, default=20, help="each, after the first")
    parser.add_argument("--loss", type=float, default=0.0, help="of messages, in 0..1")
    parser.add_argument("--everybody", type=int, default=EVERYBODY)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    nodes = [rng.randbytes(8).hex() for _ in range(options.nodes)]
    weather = Weather(options.loss, 0.0, CALM.delay, 0)
    net = Net(nodes, options.seed, weather, options.everybody)
    net.weigh = True
    net.run(3.0)
    writers = rng.sample(nodes, options.writers)
    for round in range(options.records + 1):
        start, before = net.clock.now, Counter(net.messages)
        marks = [(node, net.write(node)) for node in writers]
        net.run(3.0)
        if round not in (0, 1, 2, options.records):
            continue
        times = sorted(t - start for mark in marks for t in net.came[mark].values())
        lacking = len(marks) * (len(nodes) - 1) - len(times)
        sent = sum(net.carried[mark] for mark in marks) / len(marks)
        crossings = [net.crossed[key] for key in net.crossed if key[1:] in set(marks)]
        spent = {k: round_(v - before[k], len(marks)) for k, v in net.messages.items()}
        print(
            f"record {round}: hops {times[len(times) // 2] / MEAN_DELAY:.1f} at the median, "
            f"{times[-1] / MEAN_DELAY:.1f} at most; times {times[len(times) // 2]:.3f} s, "
            f"99 % {times[len(times) * 99 // 100]:.3f} s, all {times[-1]:.3f} s; "
            f"lacking {lacking}; deltas a record {sent:.1f} "
            f"({sent / (len(nodes) - 1):.3f} a node), a crossed stream "
            f"{sum(crossings) / len(crossings):.3f}; messages a record {spent}"
        )
    quiet_m, quiet_b = sum(net.messages.values()), sum(net.bytes.values())
    net.run(20.0)
    each = len(nodes) * 20.0
    print(
        f"quiet: {(sum(net.messages.values()) - quiet_m) / each:.1f} messages and "
        f"{(sum(net.bytes.values()) - quiet_b) / each:.0f} bytes a node a second"
    )


def round_(count: int, records: int) -> float:
    return round(count / records, 1)


if __name__ == "__main__":
    main()
