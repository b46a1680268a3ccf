"""What tests do with a testbed, in their words: networks, workloads, pings, looks at the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from agent.cli import main as command_line
from agent.client import Client
from agent.errors import NotFound
from agent.testbed import Testbed
from agent.testbed.host import Host

VXMESH = str(Path(sys.executable).parent / "vxmesh")
COMMAND_WITHIN = 90.0  # s, for a command, which then hangs
PATIENCE = 25  # s, for what takes a second when it works; less than a command may take
_numbers = itertools.count(1)
_reading = threading.Lock()


class Failed(AssertionError):
    """A command that should have worked did not."""


def said(stream: IO[str] | None, seconds: float = 60.0) -> str:
    """The next line of what a process says; empty at its end. Failed if nothing comes in time."""
    lines: list[str] = []
    assert stream is not None
    reader = threading.Thread(target=lambda: lines.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(seconds)
    if not lines:
        raise Failed(f"nothing was said within {seconds:g} s")
    return lines[0]


def until_said(stream: IO[str] | None, text: str, seconds: float = 60.0) -> str:
    """The line in which a process says that, once it has."""
    deadline = time.monotonic() + seconds
    before: list[str] = []
    while text not in (line := said(stream, max(0.0, deadline - time.monotonic()))):
        if not line:
            raise Failed(f"it ended without {text!r}: {before}")
        before.append(line)
    return line


class World:
    """A testbed and what a test made on it."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        self._undo: list[Callable[[], object]] = []

    def clean(self) -> None:
        """Take away what was made, last first."""
        for host in self.bed.hosts:
            self.bed.heal(host.name)
        for undo in reversed(self._undo):
            undo()
        for host in self.bed.hosts:
            if not host.is_running:
                self.bed.start(host.name)
        asyncio.run(self._empty())

    async def _empty(self) -> None:
        """Take sandboxes, endpoints and networks away, by the API: the command line is slower."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(h.target)) for h in self.bed.hosts]
            for client in clients:
                for sandbox in await client.sandboxes():
                    if sandbox.pid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(sandbox.pid, signal.SIGKILL)
                    with contextlib.suppress(NotFound):
                        await client.remove_sandboxes([sandbox.id])
                with contextlib.suppress(NotFound):
                    await client.remove_services([s.id for s in await client.services()])
                for network in await client.networks():
                    with contextlib.suppress(NotFound):
                        await client.remove_endpoints(network=network.id, all=True)
            # What was made or removed on one host last, the others hear of a moment later.
            deadline = time.monotonic() + PATIENCE
            left = await self._left(clients)
            while left and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
                left = await self._left(clients)
            if left:
                raise Failed(f"{left} are left\n{self._picture()}")
            await clients[0].prune_networks(wait=PATIENCE)
            while networks := [n.name for c in clients for n in await c.networks()]:
                if time.monotonic() > deadline + PATIENCE:
                    raise Failed(f"networks are left: {networks}\n{self._picture()}")
                await asyncio.sleep(0.05)
                await clients[0].prune_networks(wait=PATIENCE)

    @staticmethod
    async def _left(clients: Sequence[Client]) -> list[str]:
        """The endpoints and services of which any of these agents knows, by name."""
        found = [e.name for client in clients for e in await client.endpoints()]
        return found + [s.name for client in clients for s in await client.services()]

    def later(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    # -- commands --

    def host(self, name: str) -> Host:
        return self.bed.host(name)

    def run(self, host: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.host(host).run(command, **{"timeout": COMMAND_WITHIN, **options})

    def try_vx(self, host: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(host, VXMESH, *words, **options)

    def vx(self, host: str, *words: str, **options: Any) -> str:
        done = self.try_vx(host, *words, **options)
        if done.returncode:
            raise Failed(f"{host}: vxmesh {' '.join(words)}: {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def read(self, host: str, *words: str) -> Any:
        """What a command says that asks the host's agent. It runs in this process, beside that
        agent: to start one takes ten times as long, and who waits for something looks often."""
        out, err = io.StringIO(), io.StringIO()
        target = self.host(host).target
        # One at a time: stdout is the process's, and some tests have threads.
        with _reading, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command_line.run(["--host", target, *words, "-o", "json"])
        if status:
            raise Failed(f"{host}: vxmesh {' '.join(words)}: {status}: {err.getvalue()}")
        return json.loads(out.getvalue())

    def wait(self, holds: Callable[[], object], text: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise Failed(f"not within {seconds:g} s: {text}\n{self._picture()}")
            time.sleep(0.02)

    def _picture(self) -> str:
        """What each host sees, for the message of a failure."""
        seen = []
        for host in self.bed.hosts:
            for noun in ("node", "network", "endpoint", "sandbox"):
                seen.append(f"{host.name}: {noun}\n{self.try_vx(host.name, noun, 'ls').stdout}")
            seen.append("\n".join(host.log.read_text().splitlines()[-15:]))
        return "\n".join(seen)

    # -- things --

    def network(self, *options: str, host: str = "h1") -> str:
        name = f"net{next(_numbers)}"
        self.vx(host, "network", "create", name, f"--wait={PATIENCE}", *options)
        return name

    def workload(self, host: str, network: str, name: str = "", *options: str) -> str:
        """A sandbox that sleeps; its name. On return all hosts have it in their kernels."""
        name = name or f"w{next(_numbers)}"
        self.vx(
            host, "run", "--network", network, "--name", name, "-d", f"--wait={PATIENCE}",
            *options, "--", "sleep", "3600",
        )  # fmt: skip
        return name

    def inside(
        self, host: str, sandbox: str, *command: str, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.try_vx(host, "exec", sandbox, "--", *command, **options)

    def names(self, host: str, of: str = "node") -> list[str]:
        """What a host knows of a kind: node, network, endpoint …"""
        return sorted(each["name"] for each in self.read(host, of, "ls"))

    def owners(self, host: str, network: str) -> set[str]:
        """Whose the addresses of a network are."""
        return {each["node"] for each in self.read(host, "network", "inspect", network)["ranges"]}

    def link(self, host: str, sandbox: str, name: str = "eth0") -> Any:
        """An interface of a sandbox, as `ip -j link` tells of it."""
        text = self.vx(host, "exec", sandbox, "--", "ip", "-j", "link", "show", name)
        return json.loads(text)[0]

    def address(self, host: str, name: str, network: str = "") -> str:
        more = ("--network", network) if network else ()
        return str(self.read(host, "endpoint", "inspect", name, *more)["addresses"][0])

    def pings(
        self, host: str, sandbox: str, target: str, count: int = 1, within: float = 1.0
    ) -> bool:
        """Whether an echo is answered `within` s, at a name or address."""
        often = ("-c", str(count), "-i", "0.2", "-W", f"{within:g}")
        return self.inside(host, sandbox, "ping", *often, target).returncode == 0

    def reaches(self, host: str, sandbox: str, target: str) -> bool:
        """Whether it does, where it should: the first echo to an address, however late it is
        answered; of a name, once it is known. What a command waits for is other hosts' kernels;
        their name servers are told at the same time, and nobody waits for them."""
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(target)
            return self.pings(host, sandbox, target, within=10)
        self.wait(
            lambda: self.pings(host, sandbox, target, within=10), f"{sandbox} reaches {target}"
        )
        return True

    # -- the kernel --

    def in_own(self, host: str, *command: str) -> str:
        """A command in the namespace that the host's agent made."""
        done = self.run(host, "nsenter", "--net=/run/vxmesh/netns", *command)
        if done.returncode:
            raise Failed(f"{host}: {command}: {done.stderr}")
        return done.stdout

    def fdb(self, host: str, vni: int) -> dict[str, str]:
        """MAC -> VTEP of a network's VXLAN device; empty if there is none."""
        done = self.run(
            host, "nsenter", "--net=/run/vxmesh/netns", "bridge", "-j", "fdb", "show", "dev",
            f"vxl{vni}",
        )  # fmt: skip
        if done.returncode:
            return {}
        return {row["mac"]: row["dst"] for row in json.loads(done.stdout) if "dst" in row}

    def neighbours(self, host: str, vni: int) -> dict[str, str]:
        """Address -> MAC of a network's VXLAN device; empty if there is none."""
        done = self.run(
            host, "nsenter", "--net=/run/vxmesh/netns", "ip", "-j", "neigh", "show", "dev",
            f"vxl{vni}",
        )  # fmt: skip
        if done.returncode:
            return {}
        return {
            row["dst"]: row["lladdr"]
            for row in json.loads(done.stdout)
            if "PERMANENT" in row.get("state", [])
        }

    def links(self, host: str) -> set[str]:
        """Names of the devices in the namespace that the host's agent made."""
        return {link["ifname"] for link in json.loads(self.in_own(host, "ip", "-j", "link"))}

    def vni(self, network: str) -> int:
        return int(self.read("h1", "network", "inspect", network)["vni"])
