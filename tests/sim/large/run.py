"""One run of many nodes: what happens in it, what must hold, and what is reported."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.core.membership import PRESETS, State, Transition
from tests.sim.large.host import Host, Protocol, connect
from tests.sim.large.membership import Member
from tests.sim.large.world import World

WARM = 5.0  # virtual s before anything happens and anything is counted
CALM = 15.0  # and at the end, without loss, in which all must come to the same


@dataclass(frozen=True)
class Options:
    """What to simulate. Shares in 0..1, times in virtual s."""

    nodes: int
    seed: int = 1
    loss: float = 0.0
    slow: float = 0.0
    noise: float = 0.0
    minutes: float = 0.5
    kill: bool = False
    refuse: bool = False
    split: float = 0.0
    preset: str = "lan"
    endpoints: int = 0  # of each host; with some, the whole core runs (whole.py)
    writes: int = 60  # new endpoints in the course of it, then

    def command(self) -> str:
        """What replays it."""
        words = [f"--nodes {self.nodes} --seed {self.seed} --loss {self.loss:g}"]
        words += [f"--slow {self.slow:g}"] if self.slow else []
        words += [f"--noise {self.noise:g}"] if self.noise else []
        words += [f"--minutes {self.minutes:g}", f"--preset {self.preset}"]
        words += ["--kill"] if self.kill else []
        words += ["--refuse"] if self.refuse else []
        words += [f"--split {self.split:g}"] if self.split else []
        if self.endpoints:
            words += [f"--endpoints {self.endpoints} --writes {self.writes}"]
        return "python -m tests.sim " + " ".join(words)


@dataclass
class Figures:
    """What was seen."""

    detected: list[float] = field(default_factory=list)  # s from the kill, a node each
    refused: list[float] = field(default_factory=list)  # s from the agent's end, a node each
    healed: float = math.nan  # s from the heal until nobody believes anybody dead
    false_positives: list[str] = field(default_factory=list)
    suspicions: int = 0  # (node, incarnation) that somebody accused
    accusations: int = 0  # first-hand
    messages: float = 0.0  # a node a s
    bytes: float = 0.0  # a node a s
    events: int = 0
    took: float = 0.0  # s of one processor
    memory: float = 0.0  # bytes a node
    digest: int = 0  # of everything that happened: equal for equal runs


class Run:
    """A run of `options`. `play` raises AssertionError where something does not hold.

    `more`: what each host runs beside membership.
    """

    host_type: type[Host] = Host

    def __init__(self, options: Options, more: Sequence[Callable[[Host], Protocol]] = ()) -> None:
        self.options = options
        self.figures = Figures()
        before = resident()
        self.world = World(options.seed, options.loss, options.preset, options.noise)
        self.hosts = [self.host_type(self.world, f"{i + 1:016x}") for i in range(options.nodes)]
        self.members = self._equip()
        for protocol in more:
            for host in self.hosts:
                protocol(host)
        count = round(options.slow * options.nodes)
        for host in self.world.rng.sample(self.hosts, count):
            host.slow = True
        well = [host for host in self.hosts if not host.slow]
        self.victim, self.orphan = self.world.rng.sample(well, 2)
        for host in self.hosts:
            for each in host.protocols:
                each.start()
        self.figures.memory = (resident() - before) / options.nodes
        self._killed = self._orphaned = self._cut = math.inf
        self._accused: set[tuple[str, int]] = set()
        self._dead: set[tuple[str, str]] = set()  # (who believes it, of whom)

    def _equip(self) -> list[Member]:
        """Give each host its protocols, membership first, and its streams."""
        members = [Member(host, PRESETS[self.options.preset], self) for host in self.hosts]
        connect(self.hosts, self.world.rng)
        return members

    # -- what happens --

    def play(self) -> Figures:
        """Run it to the end."""
        options, world, figures = self.options, self.world, self.figures
        gc.disable()  # nothing here is in cycles, and a million members are many to look through
        begin = time.process_time()
        world.run_until(WARM)
        for host in self.hosts:
            host.messages = host.bytes = 0
        start = WARM + world.rng.random()
        if options.kill:
            world.at(start, self._kill)
        if options.refuse:
            world.at(start, self._refuse)
        if options.split:
            world.at(start, self._split)
            world.at(start + options.split, self._heal)
        end = max(WARM + 1.0, options.minutes * 60)
        world.run_until(end)
        figures.messages = sum(h.messages for h in self.hosts) / options.nodes / (end - WARM)
        figures.bytes = sum(h.bytes for h in self.hosts) / options.nodes / (end - WARM)
        figures.took, figures.events = time.process_time() - begin, world.events
        world.loss = 0.0
        for host in self.hosts:
            host.slow = False
        world.run_until(end + CALM)
        gc.enable()
        figures.suspicions = len(self._accused)
        seen = (tuple(figures.detected), tuple(figures.refused), figures.accusations, world.events)
        figures.digest = hash((seen, self.members[0].core.digest())) % (1 << 64)
        self.check()
        return figures

    def _kill(self, _: None, __: None) -> None:
        self._killed = self.world.now
        self.victim.up = False

    def _refuse(self, _: None, __: None) -> None:
        self._orphaned = self.world.now
        self.orphan.agent = False

    def _split(self, _: None, __: None) -> None:
        for host in self.world.rng.sample(self.hosts, len(self.hosts) // 2):
            host.side = 1

    def _heal(self, _: None, __: None) -> None:
        self._cut = self.world.now
        for host in self.hosts:
            host.side = 0

    def transition(self, host: Host, transition: Transition) -> None:
        """A host has come to believe something."""
        figures, world = self.figures, self.world
        node, before, after, incarnation, reason, by = transition
        of = world.hosts[node]
        if after is State.SUSPECT and by == host.id:
            figures.accusations += 1
            self._accused.add((node, incarnation))
        elif after is State.REFUSED and of is self.orphan:
            figures.refused.append(world.now - self._orphaned)
        if after is State.DEAD:
            self._dead.add((host.id, node))
            if of is self.victim and not of.up:
                figures.detected.append(world.now - self._killed)
            elif of.side == host.side and of is not self.orphan:
                figures.false_positives.append(
                    f"at {world.now:.3f} s {host.id} believed {node} dead: {reason}"
                )
        elif before is State.DEAD:
            self._dead.discard((host.id, node))
            if world.now > self._cut and not self._dead and math.isnan(figures.healed):
                figures.healed = world.now - self._cut

    # -- what must hold --

    def check(self) -> None:
        """All that runs has come to the same, and nobody was buried alive."""
        figures, replay = self.figures, f"\n  replay: {self.options.command()}"
        false = figures.false_positives
        assert not false, f"{len(false)} times a live node was believed dead; {false[0]}{replay}"
        running = [member for member in self.members if member.host.runs]
        digests = {member.core.digest() for member in running}
        assert len(digests) == 1, f"{len(digests)} different tables after the calm{replay}"
        if self.options.kill:
            unaware = [m for m in running if (m.host.id, self.victim.id) not in self._dead]
            assert not unaware, f"{len(unaware)} nodes do not know of the silent one{replay}"
        if self.options.refuse:
            states = {m.core.state(self.orphan.id) for m in running}
            wanted = {State.REFUSED, State.DEAD}  # dead once the grace time is over
            assert states <= wanted, f"the node without agent is {states}{replay}"
        if self.options.split:
            assert not self._dead - {(m.host.id, self.victim.id) for m in running}, (
                f"some are believed dead long after the heal{replay}"
            )

    # -- what is told --

    def report(self) -> str:
        """The figures, for people."""
        figures, options = self.figures, self.options
        n = options.nodes
        lines = [
            f"{n} nodes, preset {options.preset}, packet loss {options.loss:.0%}, "
            f"{options.slow:.0%} slow, {options.minutes:g} virtual minutes, seed {options.seed}",
            *([spread("silent node believed dead", figures.detected)] if options.kill else []),
            *([spread("dead agent believed refused", figures.refused)] if options.refuse else []),
            *([f"healed after {figures.healed:.2f} s"] if options.split else []),
            f"false positives: {len(figures.false_positives)}",
            f"suspicions: {figures.suspicions} ({figures.accusations} accusations)",
            f"a node sends {figures.messages:.1f} messages/s, {figures.bytes / 1000:.2f} kB/s",
            f"a node takes {figures.memory / 1000:.0f} kB of memory",
            f"run {figures.digest:016x}",
            f"{figures.events:,} events in {figures.took:.1f} s of one processor: "
            f"{figures.events / figures.took:,.0f} events/s",
        ]
        return "\n".join(lines)


def spread(what: str, times: list[float]) -> str:
    if not times:
        return f"{what}: by nobody"
    times = sorted(times)
    most = times[min(len(times) - 1, math.ceil(0.99 * len(times)) - 1)]
    return f"{what}: first {times[0]:.2f} s, 99 % {most:.2f} s, all {len(times)} {times[-1]:.2f} s"


def resident() -> int:
    """Bytes of memory that this process holds (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
