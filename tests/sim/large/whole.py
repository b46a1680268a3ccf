"""A run of the whole core: membership, records, networks and addresses on each host.

It has four parts, of which the first is not measured: streams open; then it is quiet; then new
endpoints are made here and there; in the midst of that one host falls silent. Afterwards nothing
is lost any more, and all must come to the same. What stands opposite: run.py has membership alone.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from statistics import median

from agent.core.membership import PRESETS, Transition
from agent.core.membership import State as Belief
from agent.core.topology import EVERYBODY
from agent.views import Status
from tests.sim.large.host import Host
from tests.sim.large.load import Load, Write
from tests.sim.large.membership import Member
from tests.sim.large.nodes import EPOCH, EXACT, SlimState, State, alone, describe, furnish
from tests.sim.large.peers import LinkedHost, LinkedMember, Peers, Topologies
from tests.sim.large.run import CALM, Figures, Options, Run, resident, spread

WARM = 8.0  # virtual s until streams are open and what all have has been added up
QUIET = 0.25  # of the rest: nothing is written
SILENT = 0.5  # of the rest: then one host falls silent, so that a half of the writes see that
TAIL = 2.0  # s at the end without writes
FROM_EACH = 3  # writes of one host: the first grows its tree, the others follow it


@dataclass
class Traffic:
    """What a host sent, at the mean."""

    messages: float  # a s
    bytes: float  # a s


@dataclass
class WholeFigures(Figures):
    """What was seen, beyond membership."""

    writes: list[Write] = field(default_factory=list)
    known: list[tuple[float, float, float]] = field(default_factory=list)  # s, of each write:
    # until 50, 99 and 100 % of the hosts had it
    quiet: Traffic = field(default_factory=lambda: Traffic(0, 0))
    busy: Traffic = field(default_factory=lambda: Traffic(0, 0))
    streams: tuple[float, int] = (0.0, 0)  # of a host: mean, most
    alone: int = 0  # bytes that one node's records and views take by themselves


class WholeRun(Run):
    """A run of `options`, with `endpoints`. `play` raises AssertionError where something does
    not hold. `everybody`: up to so many hosts each has a stream with each."""

    host_type = LinkedHost

    figures: WholeFigures

    def __init__(self, options: Options, everybody: int = EVERYBODY) -> None:
        self.everybody = everybody
        everything = options.nodes**2 * options.endpoints
        self.is_exact = everything <= EXACT
        self.peers: dict[str, Peers] = {}
        super().__init__(replace(options, kill=not options.split))
        bad = {self.victim} | ({self.orphan} if options.refuse else set())
        writers = [host for host in self.hosts if host not in bad and not host.slow]
        count = math.ceil(options.writes / FROM_EACH)
        self._writers = self.world.rng.sample(writers, min(count, len(writers)))

    def _equip(self) -> list[Member]:
        options, world = self.options, self.world
        kind = State if self.is_exact else SlimState
        states = [
            kind(
                describe(number, host.id),
                lambda: EPOCH + world.now,
                random.Random(world.rng.getrandbits(64)),
                self._arrived,
            )
            for number, host in enumerate(self.hosts)
        ]
        self.load = Load(furnish(states, options.endpoints))
        topologies = Topologies(self.everybody)
        members: list[Member] = []
        for host, state in zip(self.hosts, states, strict=True):
            assert isinstance(host, LinkedHost)
            member = LinkedMember(host, PRESETS[options.preset], self)
            members.append(member)
            self.peers[host.id] = Peers(host, state, member, topologies)
        self.figures = WholeFigures(alone=alone(states))
        return members

    # -- what happens --

    def play(self) -> WholeFigures:
        """Run it to the end."""
        options, world, figures = self.options, self.world, self.figures
        gc.disable()  # hardly anything here is in cycles, and there are millions to look through
        begin = time.process_time()
        world.run_until(WARM)
        end = max(options.minutes * 60, WARM + 8.0)
        span = end - WARM
        figures.quiet = self._measure(WARM + QUIET * span)
        start = world.now
        for number in range(options.writes):
            when = start + (end - TAIL - start) * (number + world.rng.random()) / options.writes
            world.at(when, self._write, self._writers[number % len(self._writers)])
        silent = WARM + SILENT * span
        if options.split:
            world.at(start, self._split)
            world.at(start + options.split, self._heal)
        if options.refuse:
            world.at(start, self._refuse)
        figures.busy = self._measure(silent)
        if self.options.kill:
            self._kill(None, None)
        world.run_until(end)
        counts = [len(p.links) for p in self.peers.values() if p.host.runs]
        figures.streams = (sum(counts) / len(counts), max(counts))
        figures.took, figures.events = time.process_time() - begin, world.events
        figures.memory = resident() / options.nodes
        world.loss = 0.0
        for host in self.hosts:
            host.slow = False
        while world.now < end + CALM and not self._is_settled():
            world.run_until(world.now + 1.0)
        gc.enable()
        self._conclude()
        self.check()
        return figures

    def _is_settled(self) -> bool:
        """Whether all that runs knows the same."""
        running = [peers for peers in self.peers.values() if peers.host.runs]
        tables = {peers.member.core.digest() for peers in running}
        versions = versions_of(running[0].state)
        return len(tables) == 1 and all(versions_of(p.state) == versions for p in running)

    def _measure(self, until: float) -> Traffic:
        world, count = self.world, len(self.hosts)
        for host in self.hosts:
            host.messages = host.bytes = 0
        seconds = until - world.now
        world.run_until(until)
        messages = sum(host.messages for host in self.hosts) / count / seconds
        return Traffic(messages, sum(host.bytes for host in self.hosts) / count / seconds)

    def _conclude(self) -> None:
        figures = self.figures
        figures.suspicions = len(self._accused)
        figures.writes = self.load.writes
        running = [host.id for host in self.hosts if host.runs]
        for write in figures.writes:
            others = [id for id in running if id != write.origin]
            times = sorted(write.known.get(id, math.inf) for id in others) or [0.0]
            figures.known.append((share_of(times, 0.5), share_of(times, 0.99), times[-1]))
        seen = (
            figures.detected,
            figures.refused,
            figures.known,
            self.world.events,
            [(host.messages, host.bytes) for host in self.hosts],
        )
        figures.digest = int.from_bytes(blake2b(repr(seen).encode(), digest_size=8).digest())

    def _write(self, host: Host, _: None) -> None:
        self.load.write(self.peers[host.id])

    def _arrived(self, state: State, origin: str, before: int, after: int) -> None:
        if self.peers:
            self.load.arrived(state.me, origin, before, after, self.world.now)

    def _refuse(self, _: None, __: None) -> None:
        super()._refuse(None, None)
        self.peers[self.orphan.id].stop()

    def transition(self, host: Host, transition: Transition) -> None:
        """What membership believes moves streams, and withdraws endpoints."""
        super().transition(host, transition)
        peers = self.peers[host.id]
        peers.membership_changed()
        gone = transition.after in (Belief.DEAD, Belief.LEFT)
        status = Status(transition.after.name.lower(), transition.reason, self.world.now, gone)
        peers.state.set_status(transition.node, status)

    # -- what must hold --

    def check(self) -> None:
        """All that runs knows the same, and nobody was buried alive."""
        replay = f"\n  replay: {self.options.command()}"
        failed = self.load.failed  # who is cut off from the owners of addresses may get none
        assert self.options.split or not failed, f"a write failed: {failed[0]}{replay}"
        lacking = [w for w, (_, _, last) in zip(self.load.writes, self.figures.known, strict=True)
                   if last == math.inf]  # fmt: skip
        assert not lacking, f"{len(lacking)} records are not everywhere{replay}"
        running = [peers.state for peers in self.peers.values() if peers.host.runs]
        first = running[0]
        wanted = view(first, self.is_exact)
        for state in running:
            found = view(state, self.is_exact)
            for part, mine in found.items():
                assert mine == wanted[part], f"{state.me} differs in its {part}{replay}"
        if self.is_exact:
            truth = {id for s in running for m in s.members.values() for id in m.local}
            away = {id for m in first.members.values() for id, e in m.all.items()
                    if not self.world.hosts[e.node].runs}  # fmt: skip
            assert truth | away == wanted["endpoints"], f"endpoints are not those that live{replay}"
        super().check()

    # -- what is told --

    def report(self) -> str:
        """The figures, for people: those of the run, then those of this machine."""
        figures, options = self.figures, self.options
        quiet, busy = figures.quiet, figures.busy
        views = (
            "each host has its own node with every view"
            if self.is_exact
            else "what all know at the start is shared, and others' endpoints are not indexed"
        )
        first = [k for w, k in zip(figures.writes, figures.known, strict=False) if w.first]
        later = [k for w, k in zip(figures.writes, figures.known, strict=False) if not w.first]
        lines = [
            f"{options.nodes} nodes of {options.endpoints} endpoints, preset {options.preset}, "
            f"packet loss {options.loss:.0%}, {options.slow:.0%} slow, "
            f"{options.minutes:g} virtual minutes, seed {options.seed}",
            f"({views})",
            *known_lines("new endpoints", figures.known),
            *known_lines("  the first of a host", first),
            *known_lines("  later ones", later),
            *([spread("silent node believed dead", figures.detected)] if options.kill else []),
            *([spread("dead agent believed refused", figures.refused)] if options.refuse else []),
            *([healed_line(figures.healed)] if options.split else []),
            f"false positives: {len(figures.false_positives)}",
            f"suspicions: {figures.suspicions} ({figures.accusations} accusations)",
            f"a node has {figures.streams[0]:.1f} streams, {figures.streams[1]} at most",
            f"a quiet node sends {quiet.messages:.1f} messages/s, {quiet.bytes / 1000:.2f} kB/s",
            f"while new endpoints are made {busy.messages:.1f} messages/s, "
            f"{busy.bytes / 1000:.2f} kB/s",
            f"run {figures.digest:016x}",
            f"one node's records and views take {figures.alone / 1e6:.1f} MB; of this process a "
            f"node takes {figures.memory / 1e6:.2f} MB",
            f"{figures.events:,} events in {figures.took:.1f} s of one processor: "
            f"{figures.events / max(figures.took, 1e-9):,.0f} events/s",
        ]
        return "\n".join(lines)


def versions_of(state: State) -> dict[str, int]:
    """What a node has of each origin."""
    return {origin: version for origin, (version, _) in state.digest().items()}


def view(state: State, exact: bool) -> dict[str, object]:
    """What a node knows, to be compared with what others know."""
    found: dict[str, object] = {
        "versions": versions_of(state),
        "networks": {n.id: n.name for n in state.catalogue.all()},
        "rings": {id: a.ring.segments() for id, a in state.addresses.items()},
        "withdrawn nodes": state.withdrawn,
    }
    if exact:
        found["endpoints"] = {id for members in state.members.values() for id in members.all}
    return found


def share_of(times: Sequence[float], share: float) -> float:
    """The time by which this share of them was reached; they are sorted."""
    return times[max(0, math.ceil(share * len(times)) - 1)]


def known_lines(what: str, known: Sequence[tuple[float, float, float]]) -> list[str]:
    """How long until 50, 99 and 100 % have it: the median of the writes, and the worst."""
    if not known:
        return []
    parts = [
        f"{name} {median(times):.3f} s ({max(times):.3f} s)"
        for name, times in zip(("50 %", "99 %", "all"), zip(*known, strict=True), strict=True)
    ]
    return [f"{what} ({len(known)}) known to {', '.join(parts)}: the median of them (the worst)"]


def healed_line(seconds: float) -> str:
    """How long after a heal somebody was still believed dead."""
    if math.isnan(seconds):
        return "healed, and nobody had been believed dead"
    return f"nobody is believed dead {seconds:.2f} s after the heal"
