"""What a container costs: `docker run` in a network of ours beside Swarm's overlay, `bridge` and
`none`, and TCP between containers of two hosts. Two engines each, in the same run, in turn.

Opposite: swarm.py, the anchor; our side is a testbed with engines.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.testbed import Host, Testbed, engines, take_down
from tests.bench import swarm, throughput, world
from tests.bench.report import Line, Progress, Target
from tests.bench.throughput import Lane
from tests.bench.world import Missing, Say

PREFIX = "vxb-docker"
NETWORK = "web"
BRIDGE = "made"  # a bridge network of a user's: those have names, and the engine's own has none
LIST, SLEEP = ["/bin/busybox", "ls"], ["/bin/busybox", "sleep", "86400"]
SEEN_WITHIN = 20.0  # s; until what one engine made is in the other
ENV = {"PATH": engines.PATH}
_ABOUT = '{{.State.Pid}} {{(index .NetworkSettings.Networks "%s").IPAddress}}'


class Side:
    """Two hosts with engines, and a container in each, in one network."""

    def __init__(self, hosts: Sequence[Host], network: str, image: str) -> None:
        self._hosts, self.network, self._image = hosts, network, image

    def docker(self, number: int, *words: str) -> str:
        """A command to an engine; its stdout."""
        done = self._hosts[number].run(
            ["docker", *words], check=True, timeout=world.TIMEOUT, env=ENV
        )
        return done.stdout.strip()

    def run(self, network: str) -> float:
        """Seconds that a container takes from `docker run` to its end."""
        begin = time.monotonic()
        self.docker(0, "run", "--rm", "--network", network, self._image, *LIST)
        return time.monotonic() - begin

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """From a container on the first host to one on the second."""
        for number, name in enumerate(("lane-near", "lane-far")):
            options = ["--name", name, "--network", self.network, "--stop-timeout", "0"]
            self.docker(number, "run", "-d", *options, self._image, *SLEEP)
        near, _ = self.docker(0, "inspect", "-f", _ABOUT % self.network, "lane-near").split()
        far, address = self.docker(1, "inspect", "-f", _ABOUT % self.network, "lane-far").split()
        inside = ["nsenter", f"--net=/proc/{far}/ns/net", *throughput.SERVER]
        server = subprocess.Popen(inside, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Lane(address, lambda given: _inside(near, given))
        finally:
            world.end(server)
            for number, name in enumerate(("lane-near", "lane-far")):
                self.docker(number, "rm", "-f", name)


class Dockers:
    """The figures so far."""

    def __init__(self, rounds: int, tcp_rounds: int, say: Progress) -> None:
        self._rounds, self._tcp_rounds, self._say = rounds, tcp_rounds, say
        self.lines: list[Line] = []
        self.targets: list[Target] = []

    def run(self, ours: Side, theirs: Side | None) -> None:
        """Measure everything; without `theirs` only ours."""
        what = "docker run --rm IMAGE ls"
        beside_swarm = Line(what, "s", "Swarm")
        beside_bridge = Line(what, "s", "bridge")
        # As in ours, there is a resolver in the container, which the engine sets up.
        beside_own = Line(what, "s", "bridge made")
        beside_none = Line(what, "s", "none")
        over = Line("docker run, over that of none", "s", "Swarm")
        tcp = Line("TCP, container to container", "Gbit/s", "Swarm")
        self.lines += [beside_swarm, beside_bridge, beside_own, beside_none, over, tcp]
        self.targets += [
            Target(beside_swarm, 0.75, of_ratio=True),
            Target(over, 0.15, of_ratio=False),
            Target(tcp, 1.0, of_ratio=True, at_least=True),
        ]
        for side in (ours, theirs):
            if side:
                side.run(side.network)  # the first one is slower, whatever the network
        for number in range(1, self._rounds + 1):
            self._say(f"docker run, round {number} of {self._rounds}")
            none, bridge, own = ours.run("none"), ours.run("bridge"), ours.run(ours.network)
            made = ours.run(BRIDGE)
            for line, value in ((beside_bridge, bridge), (beside_own, made), (beside_none, none)):
                line.theirs.append(value)
            for line in (beside_swarm, beside_bridge, beside_own, beside_none):
                line.ours.append(own)
            over.ours.append(own - none)
            if theirs:
                took = theirs.run(theirs.network)
                beside_swarm.theirs.append(took)
                over.theirs.append(took - none)
        if shutil.which("iperf3"):
            self._tcp(tcp, ours, theirs)

    def _tcp(self, line: Line, ours: Side, theirs: Side | None) -> None:
        with contextlib.ExitStack() as stack:
            lanes = [(line.ours, stack.enter_context(ours.lane()))]
            if theirs:
                lanes.append((line.theirs, stack.enter_context(theirs.lane())))
            for number in range(1, self._tcp_rounds + 1):
                self._say(f"TCP between containers, round {number} of {self._tcp_rounds}")
                for figures, lane in lanes:
                    figures.append(lane.measure())


@contextlib.contextmanager
def start(say: Say) -> Iterator[Side]:
    """Our side; it goes at the end. Missing if there is no engine here, or no image."""
    if any(shutil.which(name, path=engines.PATH) is None for name in ("dockerd", "busybox")):
        raise Missing(
            "Docker and busybox are not here. Install them with "
            "'apt-get install docker.io busybox-static'"
        )
    say("starting two agents with engines")
    take_down(PREFIX)
    try:
        bed = Testbed.up(2, prefix=PREFIX, docker=True)
        side = Side(bed.hosts, NETWORK, engines.IMAGE)
        side.docker(0, "network", "create", "-d", "bridge", BRIDGE)
        side.docker(0, "network", "create", "-d", "vxmesh", NETWORK)
        deadline = time.monotonic() + SEEN_WITHIN
        listed = ("network", "ls", "-q", "--filter", f"name=^{NETWORK}$")
        while not side.docker(1, *listed):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the network is not in the other engine in {SEEN_WITHIN:.0f} s")
            time.sleep(0.05)
        yield side
    finally:
        take_down(PREFIX)


@contextlib.contextmanager
def start_swarm(directory: Path, say: Say) -> Iterator[Side]:
    """The anchor's side; Missing if it does not work here."""
    say("starting Docker Swarm on two hosts")
    with swarm.start(directory) as made:
        yield Side(made.bed.hosts, swarm.NETWORK, swarm.IMAGE)


def _inside(pid: str, command: Sequence[str]) -> str:
    """A command in the network of a process; its stdout."""
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net", *command]
    done = subprocess.run(inside, check=True, capture_output=True, text=True, timeout=world.TIMEOUT)
    return done.stdout
