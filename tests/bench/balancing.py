"""`python -m tests.bench.balancing`: services beside HAProxy and beside the direct way.

Two hosts on one wire and a client behind the first; the backends are nginx in two sandboxes on
the second host. HAProxy, in TCP mode with two threads on the first host, leads to the same two,
and once more to two in the second host itself, where it is spared the overlay. Without agents:
what is measured is the kernel state. Needs root, haproxy, nginx and wrk.
What stands opposite: agent/datapath/balancer.py; tests/netns/balancing_hosts.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from agent.drivers.balancing import Backend, Frontend, FrontendKey
from tests.bench.report import Line, Target, render
from tests.bench.world import Missing
from tests.netns.balancing_hosts import backend, frontend, network, serve
from tests.netns.datapath_hosts import Fabric, opened, run

SECONDS = 3  # of traffic a figure
CONNECTIONS = 32
SERVICES, BACKENDS = 1000, 10
CHANGES = 20
MODES = {"kept alive": "keep-alive", "a connection each": "close"}

NGINX = """\
worker_processes 1; pid {folder}/{name}.pid; error_log {folder}/{name}.err;
events {{ worker_connections 4096; }}
http {{ access_log off; server {{ listen {port}; location / {{ return 200 "{name}\\n"; }} }} }}
"""
HAPROXY = """\
global
  nbthread 2
  maxconn 2000
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend f
  bind 10.98.0.1:{port}
  default_backend b
backend b
  balance roundrobin
  server one {one}
  server two {two}
"""


@contextlib.contextmanager
def started(folder: Path, netns: Path, name: str, *command: str) -> Iterator[None]:
    """A daemon in a namespace that writes its process id to {folder}/{name}.pid."""
    run(*command, netns=netns)
    pid = folder / f"{name}.pid"
    deadline = time.monotonic() + 10
    while not pid.exists() or not pid.read_text().strip():
        assert time.monotonic() < deadline, f"{name} did not start"
        time.sleep(0.05)
    try:
        yield
    finally:
        run("kill", *pid.read_text().split(), check=False)


def nginx(
    folder: Path, netns: Path, name: str, port: int
) -> contextlib.AbstractContextManager[None]:
    """nginx with one worker."""
    config = folder / f"{name}.conf"
    config.write_text(NGINX.format(folder=folder, name=name, port=port))
    return started(folder, netns, name, "nginx", "-c", str(config))


def haproxy(
    folder: Path, netns: Path, port: int, one: str, two: str
) -> contextlib.AbstractContextManager[None]:
    """HAProxy in TCP mode, from `port` to two servers."""
    name = f"haproxy-{port}"
    config = folder / f"{name}.cfg"
    config.write_text(HAPROXY.format(port=port, one=one, two=two))
    command = ("haproxy", "-f", str(config), "-D", "-p", str(folder / f"{name}.pid"))
    return started(folder, netns, name, *command)


def requests(netns: Path, where: str, connection: str) -> float:
    """HTTP requests a second; AssertionError if one failed."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}"]
    output = run(*command, "-H", f"Connection: {connection}", f"http://{where}/", netns=netns)
    assert "Non-2xx" not in output and "Socket errors" not in output, output
    return float(output.split("Requests/sec:")[1].split()[0])


async def traffic(
    fabric: Fabric, folder: Path, rounds: int, say: Callable[[str], None]
) -> list[Line]:
    """Through a VIP beside the direct way, and through a published port beside HAProxy."""
    # Two clients: to a backend, connections by the VIP and past it would look the same, and what
    # it remembers of one would be in the way of the other.
    one, two = await network(fabric, fabric.b, fabric.b)
    past, through = await network(fabric, fabric.a, fabric.a, first=4)
    backends = [backend(fabric.b, n, port=8081) for n in (2, 3)]
    serve(fabric.hosts, frontend(*backends, published=((b"", 8080),)))
    await fabric.settle()
    lines = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(nginx(folder, one.path, "one", 8081))
        stack.enter_context(nginx(folder, two.path, "two", 8081))
        stack.enter_context(nginx(folder, fabric.b.path, "three", 8081))
        stack.enter_context(nginx(folder, fabric.b.path, "four", 8082))
        stack.enter_context(haproxy(folder, fabric.a.path, 8090, "10.7.0.2:8081", "10.7.0.3:8081"))
        bare = ("10.99.0.2:8081", "10.99.0.2:8082")
        stack.enter_context(haproxy(folder, fabric.a.path, 8091, *bare))
        for mode, header in MODES.items():
            vip = Line(f"HTTP from a sandbox through a VIP, {mode}", "/s", "direct")
            port = Line(f"HTTP from outside, published port, {mode}", "/s", "HAProxy")
            spared = Line(f"the same, HAProxy without an overlay, {mode}", "/s", "HAProxy")
            lines += [vip, port, spared]
            for number in range(rounds):
                say(f"{mode}, round {number + 1} of {rounds}")
                for samples, netns, where in (
                    (vip.theirs, past.path, "10.7.0.2:8081"),
                    (vip.ours, through.path, "10.7.0.100:80"),
                    (port.theirs, fabric.outsider, "10.98.0.1:8090"),
                    (port.ours, fabric.outsider, "10.98.0.1:8080"),
                    (spared.theirs, fabric.outsider, "10.98.0.1:8091"),
                ):
                    samples.append(await asyncio.to_thread(requests, netns, where, header))
                spared.ours.append(port.ours[-1])
    return lines


def services() -> dict[FrontendKey, Frontend]:
    """Many services of ten backends each."""
    found = {}
    for number in range(SERVICES):
        high, low = number // 250, number % 250 + 1
        backends = tuple(
            Backend(bytes([10, 7, 100 + i, low]), 8080, 1, f"{number:08x}{i:08x}")
            for i in range(BACKENDS)
        )
        vip = bytes([10, 7, 50 + high, low])
        one = Frontend(f"{number:016x}", f"{7:016x}", 7, "tcp", vip, 80, backends)
        found[one.id] = one
    return found


async def changes(fabric: Fabric, rounds: int, say: Callable[[str], None]) -> list[Line]:
    """Until the kernel has many services; until it has one that changed."""
    fabric.a.desired.services.clear()
    fabric.a.desired.neighbours.get(7, {}).clear()
    load = Line(f"{SERVICES} services of {BACKENDS} backends are in the kernel", "s")
    one = Line("one backend of them changed", "ms")
    many = services()
    for number in range(rounds):
        say(f"many services, round {number + 1} of {rounds}")
        fabric.a.desired.services = {}
        fabric.a.reconciler.touch_all()
        await fabric.a.reconciler.settle()
        fabric.a.desired.services = dict(many)
        fabric.a.reconciler.touch_services(many)
        begin = time.perf_counter()
        await fabric.a.reconciler.settle()
        load.ours.append(time.perf_counter() - begin)
        for index in range(CHANGES):
            key = list(many)[index * 7]
            changed = many[key]
            backends = (replace(changed.backends[0], draining=True), *changed.backends[1:])
            fabric.a.desired.services[key] = replace(changed, backends=backends)
            fabric.a.reconciler.touch_services([key])
            begin = time.perf_counter()
            await fabric.a.reconciler.settle()
            one.ours.append((time.perf_counter() - begin) * 1000)
    return [load, one]


async def bench(rounds: int) -> None:
    """All of it, printed."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        async with opened(Path(folder)) as fabric:
            lines = await traffic(fabric, Path(folder), rounds, say)
            lines += await changes(fabric, rounds, say)
    targets = [
        Target(line, 0.85 if line.anchor == "direct" else 1.2, True, True) for line in lines[:6]
    ]
    targets += [Target(lines[6], 0.5, False), Target(lines[7], 5, False)]
    print(render(lines, targets))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for command in ("haproxy", "nginx", "wrk"):
        if shutil.which(command) is None:
            raise Missing(f"{command} is not here. Install it with 'apt-get install {command}'")
    asyncio.run(bench(arguments.rounds))


if __name__ == "__main__":
    main()
