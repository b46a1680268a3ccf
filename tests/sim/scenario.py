"""One random run: a load of creates and removes under bad weather, then calm, then the checks."""

from __future__ import annotations

import random
from collections.abc import Callable

from agent.errors import VxmeshError
from agent.requests import parse_endpoint, parse_network
from tests.sim.cluster import Cluster, SimNode
from tests.sim.network import Weather

STORM = 20.0  # virtual seconds of load
CALM = 15.0  # and of peace after it, in which everything must become equal
STEPS = 60  # operations a run


class Run:
    """The load of one seed. `log` takes a line for everything that happens."""

    def __init__(
        self, seed: int, log: Callable[[str], None] | None = None, bounded: bool = False
    ) -> None:
        """With `bounded`, more nodes than have streams to each other: records are relayed."""
        rng = random.Random(seed * 7919 + 1)
        self.rng = rng
        low = rng.uniform(0.0001, 0.05)
        weather = Weather(
            loss=rng.choice([0.0, 0.05, 0.2, 0.4]),
            duplication=rng.choice([0.0, 0.1, 0.3]),
            delay=(low, low + rng.choice([0.001, 0.2, 1.5])),
            partitions=rng.randint(0, 3),
        )
        if bounded:
            self.cluster = Cluster(seed, rng.randint(8, 14), weather, everybody=3)
        else:
            self.cluster = Cluster(seed, rng.randint(2, 6), weather)
        self.log = log or (lambda line: None)
        self.done = 0
        self.refused = 0

    def play(self) -> Run:
        """Run it to the end; AssertionError names the seed."""
        clock = self.cluster.clock
        start = clock.now
        for _ in range(self.cluster.wire.weather.partitions):
            begin = self.rng.uniform(0, STORM)
            clock.at(start + begin, self._split)
            clock.at(start + begin + self.rng.uniform(0.1, 8.0), self.cluster.heal)
        for _ in range(STEPS):
            clock.at(start + self.rng.uniform(0, STORM), self._step)
        clock.run_until(start + STORM)
        self.cluster.heal()
        self.cluster.wire.weather = Weather(0.0, 0.0, (0.0001, 0.01), 0)
        clock.run_until(clock.now + CALM)
        self.cluster.check_always()
        self.cluster.check_equal()
        return self

    def _split(self) -> None:
        ids = list(self.cluster.nodes)
        group = set(self.rng.sample(ids, self.rng.randint(1, len(ids) - 1)))
        self.log(f"{self.cluster.clock.now:.3f} split {sorted(group)}")
        self.cluster.partition(group, one_way=self.rng.random() < 0.3)

    def _step(self) -> None:
        node = self.cluster.nodes[self.rng.choice(list(self.cluster.nodes))]
        action = self.rng.choices(
            [self._network, self._endpoint, self._static, self._remove, self._bulk, self._drop],
            [2, 8, 3, 5, 1, 1],
        )[0]
        try:
            action(node)
            self.done += 1
            self.log(f"{self.cluster.clock.now:.3f} {node.id[-2:]} {action.__name__}")
        except VxmeshError as error:
            self.refused += 1
            self.log(f"{self.cluster.clock.now:.3f} {node.id[-2:]} {action.__name__}: {error}")
        self.cluster.check_always()

    def _network(self, node: SimNode) -> None:
        name = f"net{self.rng.randint(0, 5)}"
        prefix = self.rng.choice([24, 28, 29])
        subnet = f"10.{self.rng.randint(0, 3)}.{self.rng.randint(0, 255)}.0/{prefix}"
        node.state.create_network(parse_network(name, subnets=[subnet]))

    def _pick(self, node: SimNode) -> str:
        known = sorted(n.id for n in node.state.catalogue.all())
        if not known:
            node.state.create_network(parse_network(f"first-{node.id[-2:]}"))
            known = sorted(n.id for n in node.state.catalogue.all())
        return self.rng.choice(known)

    def _endpoint(self, node: SimNode) -> None:
        network = self._pick(node)
        spec = parse_endpoint(f"e{self.rng.randint(0, 10**6)}")
        node.allocate(lambda: node.state.create_endpoint(network, spec))

    def _static(self, node: SimNode) -> None:
        network = node.state.find_network(self._pick(node))
        base = network.subnets[0].rsplit(".", 1)[0]
        address = f"{base}.{self.rng.randint(0, 16)}"
        spec = parse_endpoint(f"s{self.rng.randint(0, 10**6)}", addresses=[address])
        node.allocate(lambda: node.state.create_endpoint(network.id, spec))

    def _bulk(self, node: SimNode) -> None:
        network = node.state.find_network(self._pick(node))
        base = network.subnets[0].rsplit(".", 1)[0]
        specs = [
            parse_endpoint(
                f"b{self.rng.randint(0, 10**9)}",
                addresses=[f"{base}.{n}"],
                mac=f"02:00:00:{self.rng.randbytes(2).hex(':')}:{n:02x}",
            )
            for n in range(20, 30)
        ]
        node.state.commit(node.allocate(lambda: node.state.reserve(network.id, specs)))

    def _remove(self, node: SimNode) -> None:
        local = sorted(id for m in node.state.members.values() for id in m.local)
        if local:
            node.state.remove_endpoints([self.rng.choice(local)])

    def _drop(self, node: SimNode) -> None:
        node.state.remove_network(self._pick(node))
