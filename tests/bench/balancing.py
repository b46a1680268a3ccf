"""Services beside HAProxy and beside the direct way; how long a change of them takes.

Two hosts on one wire and a client behind the first; the backends are nginx in two sandboxes on
the second host. From a sandbox one of them is asked, by a VIP and directly. HAProxy, in TCP mode
with two threads on the first host, leads to the same two as the published port, and once more to
two in the second host itself, where it is spared the overlay. Without agents: what is measured is
the kernel state. wrk asks, 32 connections at once. By our way nginx is asked at a port of its own
where it refuses (403) every request that comes from another address than the client's, so whether
that is kept is counted over all requests. At the other port, where HAProxy and the direct way
lead, nginx looks as much and refuses nobody.
What stands opposite: agent/datapath/balancer.py; tests/netns/balancing_hosts.py. What each line
means: docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from agent.daemon import GC_THRESHOLDS
from agent.drivers.balancing import Backend, Frontend, FrontendKey
from agent.syscalls import socket_in
from tests.bench.report import Line, Progress, Target
from tests.bench.world import Missing
from tests.netns.balancing_hosts import backend, frontend, network, serve
from tests.netns.datapath_hosts import Fabric, opened, run

SECONDS = 3  # of traffic a figure
CONNECTIONS = 32
SERVICES, BACKENDS = 1000, 10
CHANGES = 20
MODES = {"kept alive": "keep-alive", "a connection each": "close"}
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PLAIN, STRICT = 8081, 8082  # ports of a backend: the second one refuses strangers
OUTSIDER, SANDBOX = "10.98.0.9", "10.7.0.5"  # who is no stranger
DIRECT, HAPROXY_SIDE = "direct", "HAProxy"

NGINX = """\
worker_processes 1; pid {folder}/{name}.pid; error_log {folder}/{name}.err;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  geo $strange {{ default 1; {known} }}
  geo $never {{ default 0; {known} }}
  server {{ listen {port}; if ($never) {{ return 403; }}
    location / {{ return 200 "{name}\\n"; }} }}
  server {{ listen {strict}; if ($strange) {{ return 403; }}
    location / {{ return 200 "{name}\\n"; }} }}
}}
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
    folder: Path, netns: Path, name: str, port: int = PLAIN, strict: int = STRICT
) -> contextlib.AbstractContextManager[None]:
    """nginx with one worker."""
    known = " ".join(f"{address} 0;" for address in (OUTSIDER, SANDBOX))
    config = folder / f"{name}.conf"
    config.write_text(NGINX.format(folder=folder, name=name, port=port, strict=strict, known=known))
    return started(folder, netns, name, _path("nginx"), "-c", str(config))


def haproxy(
    folder: Path, netns: Path, port: int, one: str, two: str
) -> contextlib.AbstractContextManager[None]:
    """HAProxy in TCP mode, from `port` to two servers."""
    name = f"haproxy-{port}"
    config = folder / f"{name}.cfg"
    config.write_text(HAPROXY.format(port=port, one=one, two=two))
    command = (_path("haproxy"), "-f", str(config), "-D", "-p", str(folder / f"{name}.pid"))
    return started(folder, netns, name, *command)


def _path(command: str) -> str:
    """Where it is; Missing if it is not installed."""
    path = shutil.which(command, path=PATH)
    if path is None:
        raise Missing(f"{command} is not installed. Install it with apt install {command}")
    return path


def requests(netns: Path, where: str, connection: str) -> tuple[float, int]:
    """HTTP requests a second, and how many in all were refused (403).

    AssertionError if one failed otherwise.
    """
    command = [_path("wrk"), "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}"]
    output = run(*command, "-H", f"Connection: {connection}", f"http://{where}/", netns=netns)
    return read_requests(output)


def read_requests(output: str) -> tuple[float, int]:
    """wrk's report: requests a second, answers that are no success."""
    assert "Socket errors" not in output, output
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    rate = float(output.split("Requests/sec:")[1].split()[0])
    return rate, int(refused[1]) if refused else 0


def is_refused(netns: Path, host: str, port: int) -> bool:
    """Whether one request from that namespace is."""
    with socket_in(netns, socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect((host, port))
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b" 403 " in sock.recv(4096).partition(b"\r\n")[0]


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


class Balancing:
    """What is measured, and the figures so far."""

    def __init__(self, rounds: int, say: Progress) -> None:
        self._rounds, self._say = rounds, say
        self._vip = {
            mode: Line(f"HTTP from a sandbox through a VIP, {mode}", "/s", DIRECT) for mode in MODES
        }
        self._port = {
            mode: Line(f"HTTP from outside, published port, {mode}", "/s", HAPROXY_SIDE)
            for mode in MODES
        }
        self._spared = {
            mode: Line(f"… HAProxy without an overlay, {mode}", "/s", HAPROXY_SIDE)
            for mode in MODES
        }
        self._strange = Line("… seen by a backend from another address", "requests")
        self._load = Line(f"{SERVICES:,} services of {BACKENDS} backends are in the kernel", "s")
        self._one = Line("… one backend of them changed", "ms")
        by_mode = [(self._vip[m], self._port[m], self._spared[m]) for m in MODES]
        self.lines = [line for three in by_mode for line in three]
        self.targets = [
            Target(line, 0.85 if line.anchor == DIRECT else 1.2, of_ratio=True, at_least=True)
            for line in self.lines
        ]
        self.lines += [self._strange, self._load, self._one]
        self.targets += [
            Target(self._strange, 0, of_ratio=False),
            Target(self._load, 0.5, of_ratio=False),
            Target(self._one, 5, of_ratio=False),
        ]

    def run(self, directory: Path, with_anchor: bool) -> None:
        """Measure; everything goes at the end. What is not installed is said."""
        asyncio.run(self._run(directory, with_anchor))

    async def _run(self, directory: Path, with_anchor: bool) -> None:
        async with opened(directory) as fabric:
            try:
                for command in ("nginx", "wrk"):
                    _path(command)
                await self._traffic(fabric, directory, with_anchor)
            except Missing as error:
                self._missing(error)
            await self._changes(fabric)

    def _missing(self, error: Missing) -> None:
        self._say.clear()
        print(f"not measured: {error}", flush=True)

    async def _traffic(self, fabric: Fabric, folder: Path, with_anchor: bool) -> None:
        """Through a VIP beside the direct way, and through a published port beside HAProxy."""
        # Two clients: to a backend, connections by the VIP and past it would look the same, and
        # what it remembers of one would be in the way of the other.
        one, two = await network(fabric, fabric.b, fabric.b)
        past, through = await network(fabric, fabric.a, fabric.a, first=4)  # SANDBOX is the second
        backends = [backend(fabric.b, n, port=STRICT) for n in (2, 3)]
        # Beside a backend's own address stands the VIP of that one backend: with another one there
        # would be one process more for the same processors.
        alone = frontend(backends[0], name="alone", vip="10.7.0.101")
        serve(fabric.hosts, frontend(*backends, published=((b"", 8080),)), alone)
        await fabric.settle()
        with contextlib.ExitStack() as stack:
            stack.enter_context(nginx(folder, one.path, "one"))
            stack.enter_context(nginx(folder, two.path, "two"))
            stack.enter_context(nginx(folder, fabric.b.path, "three", 8081, 8181))
            stack.enter_context(nginx(folder, fabric.b.path, "four", 8082, 8182))
            # The look itself works: who is neither of the two clients is refused.
            for number in (2, 3):
                assert is_refused(past.path, f"10.7.0.{number}", STRICT)
            if with_anchor:
                try:
                    servers = (f"10.7.0.2:{PLAIN}", f"10.7.0.3:{PLAIN}")
                    stack.enter_context(haproxy(folder, fabric.a.path, 8090, *servers))
                    bare = ("10.99.0.2:8081", "10.99.0.2:8082")
                    stack.enter_context(haproxy(folder, fabric.a.path, 8091, *bare))
                except Missing as error:
                    self._missing(error)
                    with_anchor = False
            for mode, header in MODES.items():
                vip, port, spared = self._vip[mode], self._port[mode], self._spared[mode]
                asked = [
                    (vip.theirs, past.path, f"10.7.0.2:{PLAIN}"),
                    (vip.ours, through.path, "10.7.0.101:80"),
                    (port.theirs, fabric.outsider, "10.98.0.1:8090"),
                    (port.ours, fabric.outsider, "10.98.0.1:8080"),
                    (spared.theirs, fabric.outsider, "10.98.0.1:8091"),
                ]
                if not with_anchor:
                    asked = [asked[n] for n in (0, 1, 3)]
                for number in range(self._rounds):
                    self._say(f"services, {mode}, round {number + 1} of {self._rounds}")
                    for samples, netns, where in asked:
                        rate, refused = await asyncio.to_thread(requests, netns, where, header)
                        samples.append(rate)
                        if samples is vip.ours or samples is port.ours:
                            self._strange.ours.append(refused)
                        else:
                            assert not refused, f"{where} refuses"
                    spared.ours.append(port.ours[-1])

    async def _changes(self, fabric: Fabric) -> None:
        """Until the kernel has many services; until it has one that changed."""
        gc.set_threshold(*GC_THRESHOLDS)  # as an agent has them
        host = fabric.a
        if 7 not in host.desired.networks:
            host.add_network(7)
        # All in one subnet, as what is balanced at the socket has to be.
        host.desired.networks[7] = replace(host.desired.networks[7], subnets=("10.7.0.0/16",))
        host.reconciler.touch_bridge(7)
        host.desired.services.clear()
        host.desired.neighbours.get(7, {}).clear()
        many = services()
        for number in range(self._rounds):
            self._say(f"many services, round {number + 1} of {self._rounds}")
            host.desired.services = {}
            host.reconciler.touch_all()
            await host.reconciler.settle()
            host.desired.services = dict(many)
            host.reconciler.touch_services(many)
            begin = time.perf_counter()
            await host.reconciler.settle()
            self._load.ours.append(time.perf_counter() - begin)
            for index in range(CHANGES):
                key = list(many)[index * 7]
                changed = many[key]
                backends = (replace(changed.backends[0], draining=True), *changed.backends[1:])
                host.desired.services[key] = replace(changed, backends=backends)
                host.reconciler.touch_services([key])
                begin = time.perf_counter()
                await host.reconciler.settle()
                self._one.ours.append((time.perf_counter() - begin) * 1000)
