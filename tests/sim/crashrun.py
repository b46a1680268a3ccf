"""One random run with crashes: a load, bad weather, kills, power cuts, clocks set; then calm.

Everything is chosen so that it meets: few names, VNIs and subnets, crashes right after a
write or in the middle of a donation, hosts that stay away for long.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from agent.errors import VxmeshError
from agent.requests import parse_endpoint, parse_network
from tests.sim.crashes import CrashCluster, CrashNode
from tests.sim.network import Weather

STORM = 25.0  # virtual seconds of load
CALM = 15.0  # and of peace after it, with all up, in which everything must become equal
STEPS = 70  # operations a run
AWAY = (0.01, 0.2, 8.0)  # s that an agent may be away: at once, by a supervisor, by a person


class CrashRun:
    """The load of one seed. `log` takes a line for everything that happens."""

    def __init__(self, seed: int, log: Callable[[str], None] | None = None) -> None:
        rng = self.rng = random.Random(seed * 104_729 + 5)
        low = rng.uniform(0.0001, 0.02)
        weather = Weather(
            loss=rng.choice([0.0, 0.05, 0.2]),
            duplication=rng.choice([0.0, 0.2]),
            delay=(low, low + rng.choice([0.001, 0.1, 0.8])),
            partitions=rng.randint(0, 3),
        )
        slow = rng.choice([0.002, 0.02, 0.3])
        failing = rng.choice([0.0, 0.0, 0.03])
        self.cluster = CrashCluster(seed, rng.randint(2, 5), weather, (0.0005, slow), failing)
        for host in self.cluster.hosts():
            host.skew = rng.choice([0.0, rng.uniform(-300, 300)])
        self.log = log or (lambda line: None)
        self.done = 0
        self.refused = 0
        self.crashes = 0

    def play(self) -> CrashRun:
        """Run it to the end; AssertionError names the seed."""
        clock = self.cluster.clock
        start = clock.now
        for _ in range(self.cluster.wire.weather.partitions):
            begin = self.rng.uniform(0, STORM)
            clock.at(start + begin, self._split)
            clock.at(start + begin + self.rng.uniform(0.1, 8.0), self.cluster.heal)
        for _ in range(STEPS):
            clock.at(start + self.rng.uniform(0, STORM), self._step)
        for _ in range(self.rng.randint(1, 6)):
            clock.at(start + self.rng.uniform(0, STORM), lambda: self._crash(self._host()))
        clock.run_until(start + STORM)
        self.cluster.heal()
        self.cluster.wire.weather = Weather(0.0, 0.0, (0.0001, 0.01), 0)
        for host in self.cluster.hosts():
            host.disk.failing = 0.0
            if not host.is_up:
                self._start(host)
        clock.run_until(clock.now + CALM)
        self.cluster.check_always()
        self.cluster.check_equal()
        self.cluster.check_promises()
        self.cluster.check_conflicts()
        return self

    def _say(self, text: str) -> None:
        self.log(f"{self.cluster.clock.now:.4f} {text}")

    def _host(self) -> CrashNode:
        return self.rng.choice(self.cluster.hosts())

    # -- what happens to hosts --

    def _split(self) -> None:
        ids = list(self.cluster.nodes)
        group = set(self.rng.sample(ids, self.rng.randint(1, len(ids) - 1)))
        one_way = self.rng.random() < 0.3
        self._say(f"split {sorted(group)}{' one way' if one_way else ''}")
        self.cluster.partition(group, one_way)

    def _crash(self, host: CrashNode) -> None:
        if not host.is_up:
            return
        self.crashes += 1
        if self.rng.random() < 0.6:
            self._say(f"{host.id[-2:]} killed")
            host.kill()
        else:
            self._say(f"{host.id[-2:]} power cut")
            host.cut_power()
        self.cluster.check_always()
        away = self.rng.uniform(0.0, self.rng.choice(AWAY))
        self.cluster.clock.after(away, lambda: self._start(host))

    def _start(self, host: CrashNode) -> None:
        if host.is_up:
            return
        if self.rng.random() < 0.3:
            host.skew += self.rng.uniform(-240, 60)
        self._say(f"{host.id[-2:]} started, clock {host.skew:+.0f} s")
        host.start()
        self.cluster.check_always()

    # -- what callers do --

    def _step(self) -> None:
        host = self._host()
        if not host.is_up:
            return
        if self.rng.random() < 0.15:  # in the midst of what is now begun
            self.cluster.clock.after(self.rng.uniform(0, 0.05), lambda: self._crash(host))
        action = self.rng.choices(
            [self._network, self._announce, self._box, self._end, self._remove, self._drop],
            [4, 5, 6, 3, 4, 1],
        )[0]
        try:
            action(host)
        except VxmeshError as error:
            self._refused(host, action.__name__, error)
        self.cluster.check_always()

    def _done(self, host: CrashNode, what: str) -> None:
        self.done += 1
        self._say(f"{host.id[-2:]} {what}")
        self.cluster.check_always()

    def _refused(self, host: CrashNode, what: str, error: VxmeshError) -> None:
        self.refused += 1
        self._say(f"{host.id[-2:]} {what}: {error}")

    def _network(self, host: CrashNode) -> None:
        name = f"net{self.rng.randint(0, 3)}"
        subnets = self.rng.choice([[], ["10.1.0.0/24"], ["10.1.0.0/28"], ["10.2.0.0/29"]])
        vni = self.rng.choice([0, 501, 502])
        seen = [n.born for n in host.state.catalogue.all()]
        made = host.state.create_network(parse_network(name, subnets=subnets, vni=vni))
        assert made.born > max(seen, default=0), "younger than what its maker had seen"
        self._done(host, f"network {made.id} {name} {subnets} {made.vni}")

    def _pick(self, host: CrashNode) -> str:
        known = sorted(n.id for n in host.state.catalogue.all())
        if not known:
            host.state.create_network(parse_network(f"first-{host.id[-2:]}"))
            known = sorted(n.id for n in host.state.catalogue.all())
        return self.rng.choice(known)

    def _announce(self, host: CrashNode) -> None:
        network = host.state.find_network(self._pick(host))
        addresses = []
        if self.rng.random() < 0.3:
            base = network.subnets[0].rsplit(".", 1)[0]
            addresses = [f"{base}.{self.rng.randint(0, 16)}"]
        spec = parse_endpoint(f"a{self.rng.randint(0, 10**6)}", addresses=addresses)
        self._begin(
            host, f"announced {spec.name} in {network.id}", network.id, spec.name, addresses
        )

    def _box(self, host: CrashNode) -> None:
        network = self._pick(host)
        box = f"{self.rng.getrandbits(64):016x}"
        host.boxes.add(box)
        self._begin(host, f"ran {box} in {network}", network, f"b{box[:6]}", [], box)

    def _begin(
        self, host: CrashNode, what: str, network: str, name: str, addresses: list[str],
        box: str = "",
    ) -> None:  # fmt: skip
        def failed(error: VxmeshError) -> None:
            if box:
                host.end_box(box)
            self._refused(host, what, error)

        job = host.run(network, parse_endpoint(name, addresses=addresses), box)
        host.loop.run(job, lambda _: self._done(host, what), failed)

    def _end(self, host: CrashNode) -> None:
        if host.boxes:
            box = self.rng.choice(sorted(host.boxes))
            host.end_box(box)
            self._done(host, f"ended {box}")

    def _remove(self, host: CrashNode) -> None:
        local = sorted(
            id for m in host.state.members.values() for id, e in m.local.items() if not e.sandbox
        )
        if local:
            id = self.rng.choice(local)
            host.loop.run(
                host.remove(id),
                lambda _: self._done(host, f"removed {id}"),
                lambda error: self._refused(host, f"remove {id}", error),
            )

    def _drop(self, host: CrashNode) -> None:
        network = self._pick(host)
        host.state.remove_network(network)
        self._done(host, f"removed network {network}")
