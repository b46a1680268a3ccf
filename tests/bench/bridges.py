"""A bridge's published port beside Docker's own, and how soon a workload is there.

Two hosts on one wire and a client that is no node: an agent on h1, a Docker engine on h2 with its
bridge and its own rules. Neither host has the other one's rules in the way of its packets. What
serves and what asks are the same programs, asked by the client; each round takes both in turn.
Opposite: dockers.py, which has our networks in Docker's own containers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.syscalls import in_netns
from agent.testbed import Host
from tests.bench import swarm, throughput, world
from tests.bench.balancing import read_requests
from tests.bench.observe import Late
from tests.bench.report import Line, Progress, Target
from tests.bench.throughput import Lane
from tests.bench.world import Missing, run

PREFIX = "vxb-bridge"
NETWORK = "bench"
BUSYBOX = "/bin/busybox"  # of this machine, and of the image
TCP_PORT, WEB_PORT = 5201, 80  # of iperf3 and of nginx, where they are
PUBLISHED = {15201: TCP_PORT, 18080: WEB_PORT}  # port of the host -> of the workload
SOON_PORT = 18090  # published by what has just been started
SECONDS, CONNECTIONS = 3, 32  # of wrk a figure
FIRST_WITHIN = 30.0  # s
CONNECT_WITHIN = 0.05  # s; a SYN that was dropped would be sent again after a second only
ASK_EVERY = 0.001  # s
NGINX = """\
daemon off; master_process off; pid {folder}/{name}.pid; error_log {folder}/{name}.log;
events {{ worker_connections 4096; }}
http {{ access_log off; server {{ listen 80 reuseport; return 200 ok; }} }}
"""
ABOUT = "{{.State.Pid}}"


class Side:
    """A host on which workloads run, in a bridge of its own; `sleeper` is one that stays."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def start(self, command: Sequence[str], ports: dict[int, int], name: str = "") -> Sequence[str]:
        """What starts a workload with published ports: in the background if it has a name."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """End a workload and have it gone."""
        raise NotImplementedError

    def pid(self, name: str) -> int:
        """A process in the network stack of a workload."""
        raise NotImplementedError

    def run(self, command: Sequence[str]) -> str:
        """Run a command on the host; its stdout."""
        return run(self.host, command)

    def serve(self, name: str, command: Sequence[str]) -> subprocess.Popen[Any]:
        """Start a server of this machine in the network stack of a workload."""
        inside = ["nsenter", f"--net=/proc/{self.pid(name)}/ns/net", *command]
        return subprocess.Popen(inside, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Ours(Side):
    """By `vxmesh run` in a network of driver bridge."""

    def start(self, command: Sequence[str], ports: dict[int, int], name: str = "") -> list[str]:
        flags = [f"--publish={outer}:{inner}" for outer, inner in ports.items()]
        flags += ["-d", "--name", name] if name else []
        return ["vxmesh", "run", "--network", NETWORK, *flags, "--", *command]

    def remove(self, name: str) -> None:
        # It is this command's own, so that it ends with its process alone.
        self.run(["kill", "-9", str(self.pid(name))])
        deadline = time.monotonic() + FIRST_WITHIN
        while name in self.run(["vxmesh", "sandbox", "ls"]):
            if time.monotonic() > deadline:
                raise Late(f"{name} is still there after {FIRST_WITHIN:.0f} s")

    def pid(self, name: str) -> int:
        return int(
            json.loads(self.run(["vxmesh", "sandbox", "inspect", name, "-o", "json"]))["pid"]
        )


class Dockers(Side):
    """By `docker run` in the engine's own bridge."""

    def start(self, command: Sequence[str], ports: dict[int, int], name: str = "") -> list[str]:
        flags = [f"--publish={outer}:{inner}" for outer, inner in ports.items()]
        flags += ["-d", "--name", name, "--stop-timeout", "0"] if name else ["--rm"]
        return ["docker", "run", *flags, swarm.IMAGE, *command]

    def remove(self, name: str) -> None:
        self.run(["docker", "rm", "-f", name])

    def pid(self, name: str) -> int:
        return int(self.run(["docker", "inspect", "-f", ABOUT, name]))

    def run(self, command: Sequence[str]) -> str:
        done = self.host.run(command, check=True, timeout=world.TIMEOUT, env={"PATH": swarm.PATH})
        return done.stdout


class Bridges:
    """The figures so far."""

    def __init__(self, rounds: int, say: Progress) -> None:
        self._rounds, self._say = rounds, say
        self.lines: list[Line] = []
        self.targets: list[Target] = []

    def run(self, directory: Path) -> None:
        """Measure everything; Missing if there is no Docker here."""
        tcp = Line("published port, TCP", "Gbit/s", "Docker")
        requests = Line("published port, requests, a connection each", "1/s", "Docker")
        packet = Line("run to first packet", "ms", "Docker")
        answer = Line("run --publish to first answer", "ms", "Docker")
        self.lines += [tcp, requests, packet, answer]
        self.targets += [
            Target(tcp, 0.9, of_ratio=True, at_least=True),
            Target(requests, 0.9, of_ratio=True, at_least=True),
            Target(packet, 1.0, of_ratio=True),
            Target(answer, 1.0, of_ratio=True),
        ]
        with _sides(directory, self._say) as (client, ours, theirs):
            sides = [(ours, "ours"), (theirs, "theirs")]
            for side, _ in sides:
                first_packet(client, side)  # the first one is slower, whatever it is
            for number in range(1, self._rounds + 1):
                for side, name in sides:
                    self._say(f"{name}: until a workload is there, {number} of {self._rounds}")
                    getattr(packet, name).append(1000 * first_packet(client, side))
                    getattr(answer, name).append(1000 * first_answer(client, side))
                sides.reverse()
            with contextlib.ExitStack() as stack:
                for side, name in sides:
                    stack.enter_context(_served(side, name, directory))
                for number in range(1, self._rounds + 1):
                    for side, name in sides:
                        self._say(f"{name}: published port, {number} of {self._rounds}")
                        if shutil.which("iperf3"):
                            getattr(tcp, name).append(_lane(client, side).measure())
                        if shutil.which("wrk") and shutil.which("nginx", path=swarm.PATH):
                            getattr(requests, name).append(_requests(client, side))
                    sides.reverse()


def first_packet(client: Host, side: Side) -> float:
    """Seconds from the start of a command that runs a workload until the workload's first packet
    is at the client."""
    command = side.start([BUSYBOX, "ping", "-c", "1", "-W", "5", client.address], {})
    with _heard(client) as heard:
        begin = time.monotonic()
        with _started(side, command):
            while True:
                packet, (source, _) = heard.recvfrom(2048)
                took = time.monotonic() - begin
                # An echo request (RFC 792) behind an IP header without options.
                if source == side.host.address and packet[20] == 8:
                    return took


def first_answer(client: Host, side: Side) -> float:
    """Seconds from the start of a command that runs a workload which serves, until it has
    answered the client at a published port."""
    name = "soon"
    serve = [BUSYBOX, "httpd", "-f", "-p", str(WEB_PORT), "-h", "/bin"]
    command = side.start(serve, {SOON_PORT: WEB_PORT}, name)
    where = side.host.address, SOON_PORT
    begin = time.monotonic()
    with _started(side, command):
        while not in_netns(client.netns, lambda: _is_answered(where)):
            if time.monotonic() - begin > FIRST_WITHIN:
                raise Late(f"no answer at {where} within {FIRST_WITHIN:.0f} s")
            time.sleep(ASK_EVERY)
        took = time.monotonic() - begin
    side.remove(name)
    return took


def _is_answered(where: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(where, CONNECT_WITHIN) as sock:
            sock.settimeout(CONNECT_WITHIN)
            sock.sendall(b"GET /none HTTP/1.0\r\n\r\n")
            return sock.recv(64).startswith(b"HTTP/1.")
    except OSError:
        return False


@contextlib.contextmanager
def _heard(client: Host) -> Iterator[socket.socket]:
    """All ICMP that comes to the client from now on."""
    raw = socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP
    with in_netns(client.netns, lambda: socket.socket(*raw)) as sock:
        sock.settimeout(FIRST_WITHIN)
        yield sock


@contextlib.contextmanager
def _started(side: Side, command: Sequence[str]) -> Iterator[None]:
    """A command on a side's host, which has ended at the end. Late if it failed."""
    env = {"PATH": swarm.PATH} if isinstance(side, Dockers) else None
    with side.host.popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            yield
            _, said = process.communicate(timeout=FIRST_WITHIN)
        finally:
            process.kill()
        if process.returncode:
            raise Late(f"{' '.join(command[:2])} failed: {said.decode(errors='replace').strip()}")


@contextlib.contextmanager
def _served(side: Side, name: str, directory: Path) -> Iterator[None]:
    """A workload with iperf3 and nginx behind published ports."""
    config = directory / f"{name}.conf"
    config.write_text(NGINX.format(folder=directory, name=name))
    side.run(side.start([BUSYBOX, "sleep", "86400"], PUBLISHED, "sleeper"))
    servers: list[subprocess.Popen[Any]] = []
    try:
        for program, command in (
            ("iperf3", throughput.SERVER),
            ("nginx", ["nginx", "-c", str(config)]),
        ):
            path = shutil.which(program, path=swarm.PATH)
            if path:
                servers.append(side.serve("sleeper", [path, *command[1:]]))
        yield
    finally:
        for server in servers:
            world.end(server)
        side.remove("sleeper")


def _lane(client: Host, side: Side) -> Lane:
    """From the client to iperf3 in the workload, by the published port."""
    outer = next(outer for outer, inner in PUBLISHED.items() if inner == TCP_PORT)
    address = side.host.address
    return Lane(address, lambda given: run(client, [*given, "-p", str(outer)]))


def _requests(client: Host, side: Side) -> float:
    outer = next(outer for outer, inner in PUBLISHED.items() if inner == WEB_PORT)
    where = f"http://{side.host.address}:{outer}/"
    wrk = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}", "-H", "Connection: close", where]
    return read_requests(run(client, wrk))[0]


@contextlib.contextmanager
def _sides(directory: Path, say: Progress) -> Iterator[tuple[Host, Side, Side]]:
    """The client, our host and Docker's. It all goes at the end."""
    dockerd, busybox = (shutil.which(name, path=swarm.PATH) for name in ("dockerd", "busybox"))
    if dockerd is None or busybox is None or Path(busybox).resolve() != Path(BUSYBOX).resolve():
        raise Missing(
            "Docker and busybox are not here. Install them with "
            "'apt-get install docker.io busybox-static'"
        )
    image = swarm.make_image(Path(busybox), directory)
    say("starting an agent and an engine")
    with contextlib.ExitStack() as stack:
        stack.callback(swarm.remove_cgroups)
        bed = stack.enter_context(world.temporary_bed(PREFIX, with_agents=False))
        bed.start("h1")
        one, two = bed.hosts
        try:
            engine = swarm.Engine(two, dockerd)
            stack.callback(swarm.end, engine)
            engine.docker("import", str(image), swarm.IMAGE)
        except (Late, subprocess.SubprocessError) as error:
            raise Missing(f"Docker does not work here: {error}") from error
        run(one, ["vxmesh", "network", "create", NETWORK, "--driver", "bridge", "--wait=10"])
        yield bed.client, Ours(one), Dockers(two)
