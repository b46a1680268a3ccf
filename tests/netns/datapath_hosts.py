"""Hosts for the datapath's tests: network namespaces on one wire, a desired state by hand.

    sandboxes - [our namespace] - vxt-…-a ===== vxt-…-b - [our namespace] - sandboxes
                                     ║
                                  vxt-…-o   an outsider without an agent

What stands opposite: agent/datapath/, driven through its Reconciler only.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import secrets
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.datapath import namespaces
from agent.datapath.reconciler import Reconciler
from agent.drivers.balancing import Frontend, FrontendKey
from agent.drivers.base import Bridge, Closed, Forward, Lan, Port, Rows, WireguardDevice
from agent.drivers.overlay import ROUTER_PREFIX
from agent.notation import parse_address
from agent.syscalls import in_netns

DEADLINE = 60.0  # s, for what takes milliseconds when it works

_numbers = itertools.count(1)
_indexes = itertools.count(1001)


def run(*command: str, netns: str | Path = "", check: bool = True, text: str = "") -> str:
    """The output of a command, in the network namespace at path `netns`."""
    prefix = ["nsenter", f"--net={netns}"] if netns else []
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, input=text)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout if done.returncode == 0 else ""


async def until(what: Callable[[], Any], why: str) -> None:
    """Poll until `what` is true; the loop goes on meanwhile."""
    deadline = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < deadline, f"never: {why}"
        await asyncio.sleep(0.01)


def pings(*attempts: tuple[Path, str], wait: float = 2.3) -> list[bool]:
    """Whether an echo from a namespace to an address is answered, all at once.

    `wait` s: the kernel asks for a neighbour again after 1 and 2 s, which a busy machine needs.
    """
    started = [
        subprocess.Popen(
            ["nsenter", f"--net={path}", "ping", "-n", "-c", "1", "-W", str(wait), address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for path, address in attempts
    ]
    return [process.wait() == 0 for process in started]


def connects(netns: Path, address: str, port: int, within: float = 10.0) -> bool:
    """Whether a TCP connection from there is taken `within` s."""

    def work() -> bool:
        try:
            socket.create_connection((address, port), timeout=within).close()
        except OSError:
            return False
        return True

    return in_netns(netns, work)


class Desired:
    """A DesiredState that a test fills in."""

    def __init__(self) -> None:
        self.networks: dict[int, Bridge] = {}
        self.fdb: dict[int, dict[bytes, bytes]] = {}
        self.neighbours: dict[int, dict[bytes, bytes]] = {}
        self.published: tuple[Forward, ...] = ()
        self.closes = Closed()
        self.services: dict[FrontendKey, Frontend] = {}
        self.version = 0
        self.all_known = True
        self.devices: tuple[WireguardDevice, ...] = ()

    def lans(self) -> dict[int, Lan]:
        return {}

    def lan(self, vni: int) -> Lan | None:
        return None

    def bridges(self) -> dict[int, Bridge]:
        return dict(self.networks)

    def bridge(self, vni: int) -> Bridge | None:
        return self.networks.get(vni)

    def rows(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> Rows:
        fdb, neighbours = self.fdb.get(vni, {}), self.neighbours.get(vni, {})
        return Rows([(m, fdb.get(m)) for m in macs], [(a, neighbours.get(a)) for a in addresses])

    def complete(self) -> bool:
        return self.all_known

    def all_rows(self, vni: int) -> Rows:
        return Rows(list(self.fdb.get(vni, {}).items()), list(self.neighbours.get(vni, {}).items()))

    def forwards(self) -> tuple[Forward, ...]:
        return self.published

    def closed(self) -> Closed:
        return self.closes

    def frontends(self) -> dict[FrontendKey, Frontend]:
        return dict(self.services)

    def frontend(self, key: FrontendKey) -> Frontend | None:
        return self.services.get(key)

    def mark(self) -> object:
        return self.version

    def wireguard(self) -> tuple[WireguardDevice, ...]:
        return self.devices


class Sandbox:
    """A workload's namespace."""

    def __init__(self, fabric: Fabric) -> None:
        self.path = fabric.namespace(f"s{next(_numbers)}")
        self.inode = namespaces.inode(self.path)

    def ping(self, address: str, size: int = 56, wait: float = 2.3) -> bool:
        """Whether one echo is answered in time."""
        dont_fragment = ("-M", "do", "-s", str(size))
        command = ["ping", "-n", "-c", "1", "-W", str(wait), *dont_fragment, address]
        return bool(run(*command, netns=self.path, check=False))

    def run(self, *command: str, check: bool = True) -> str:
        return run(*command, netns=self.path, check=check)


class Host:
    """A host: its namespace, what is desired there, and the reconciler that makes it so."""

    def __init__(self, fabric: Fabric, letter: str, number: int, vtep: str, folder: Path) -> None:
        self.fabric, self.letter, self.number, self.vtep = fabric, letter, number, vtep
        self.path = fabric.namespace(letter)
        self.folder = folder / letter
        self.desired = Desired()
        self.gone: list[str] = []
        self.applied: list[object] = []
        self.reconciler = self.make()

    def make(self, **options: Any) -> Reconciler:
        """A reconciler for this host, as a new agent would make it."""
        options = {"at_sockets": self.fabric.at_sockets, **options}
        self.reconciler = Reconciler(
            self.desired,
            self.folder,
            on_applied=self.applied.append,
            on_port_gone=self.gone.append,
            host_netns=str(self.path),
            **options,
        )
        return self.reconciler

    @property
    def own(self) -> Path:
        """Our namespace on it."""
        return self.reconciler.netns

    @property
    def has_shortcuts(self) -> bool:
        """Whether frames go past the bridge, where they are to."""
        applier = self.reconciler._applier
        return applier is None or not applier.shortcuts.is_due

    def add_network(self, vni: int, **changes: Any) -> Bridge:
        """Desire a network, 10.<vni>.0.0/24 and fd00:<vni>::/64, without ports as yet."""
        bridge = Bridge(
            network=f"{vni:016x}",
            vni=vni,
            device=f"vxb{vni}",
            vxlan=f"vxl{vni}",
            mtu=1430,
            router_mac=ROUTER_PREFIX + bytes([0x80, vni % 256, self.number, 0x80 | self.number]),
            gateways=(f"10.{vni}.0.1/24", f"fd00:{vni}::1/64"),
            subnets=(f"10.{vni}.0.0/24", f"fd00:{vni}::/64"),
            internal=False,
            vtep=self.vtep,
            data_port=4789,
            ports={},
        )
        self.desired.networks[vni] = replace(bridge, **changes)
        self.reconciler.touch_bridge(vni)
        return self.desired.networks[vni]

    def add_port(self, vni: int, number: int, sandbox: Sandbox, **changes: Any) -> Port:
        """Desire a port for 10.<vni>.0.<number>, and its rows on the other hosts."""
        endpoint = f"{vni:04x}{number:04x}{self.number:08x}"
        port = Port(
            endpoint=endpoint,
            device=f"vxp{endpoint[:12]}",
            mac=bytes([2, 0, vni >> 8, vni & 255, self.number, number]),
            addresses=(f"10.{vni}.0.{number}/24", f"fd00:{vni}::{number:x}/64"),
            netns=str(sandbox.path),
            inode=sandbox.inode,
            ifname="eth0",
            gateways=(f"10.{vni}.0.1", f"fd00:{vni}::1"),
        )
        port = replace(port, **changes)
        bridge = self.desired.networks[vni]
        self.set_ports(vni, {**bridge.ports, endpoint: port})
        for other in self.fabric.hosts:
            if other is not self:
                other.desired.fdb.setdefault(vni, {})[port.mac] = parse_address(self.vtep)
                for address in port.addresses:
                    key = parse_address(address.split("/")[0])
                    other.desired.neighbours.setdefault(vni, {})[key] = port.mac
                other.reconciler.touch_rows(
                    vni, [port.mac], [parse_address(a.split("/")[0]) for a in port.addresses]
                )
        return port

    def set_ports(self, vni: int, ports: dict[str, Port]) -> None:
        """Desire exactly these ports."""
        self.desired.networks[vni] = replace(self.desired.networks[vni], ports=ports)
        self.reconciler.touch_bridge(vni)

    # -- what is there --

    def run(self, *command: str, check: bool = True, text: str = "") -> str:
        return run(*command, netns=self.path, check=check, text=text)

    def inside(self, *command: str, check: bool = True) -> str:
        """Run in our namespace."""
        return run(*command, netns=self.own, check=check)

    def links(self) -> dict[str, dict[str, Any]]:
        """The devices of our namespace, as `ip -d -j link` shows them."""
        found = json.loads(self.inside("ip", "-d", "-j", "link"))
        return {link["ifname"]: link for link in found}

    def fdb(self, vni: int) -> dict[str, str]:
        """MAC -> VTEP of a network's VXLAN device, as `bridge` shows them."""
        lines = self.inside("bridge", "fdb", "show", "dev", f"vxl{vni}").splitlines()
        return {line.split()[0]: line.split()[2] for line in lines if " dst " in line}

    def neighbours(self, vni: int) -> dict[str, str]:
        """Address -> MAC of the permanent neighbours, as `ip` shows them."""
        found: dict[str, str] = {}
        for family in ("-4", "-6"):
            out = self.inside("ip", family, "neigh", "show", "dev", f"vxl{vni}", "nud", "permanent")
            found |= {line.split()[0]: line.split()[2] for line in out.splitlines()}
        return found


class Fabric:
    """Two hosts and an outsider, and all that a test makes beside them."""

    def __init__(self, folder: Path, ipv6: bool = False, at_sockets: bool = True) -> None:
        self.at_sockets = at_sockets  # whether services are balanced at connect(2) too
        self.id = f"vxt-{secrets.token_hex(5)}"  # another test's may be there at the same time
        self.folder = folder
        self.names: list[str] = []
        self.hosts: list[Host] = []
        wire = ("fd99::{}", 64) if ipv6 else ("10.99.0.{}", 24)
        for number, letter in enumerate("ab", 1):
            self.hosts.append(Host(self, letter, number, wire[0].format(number), folder))
        self.a, self.b = self.hosts
        self.outsider = self.namespace("o")
        a, b, o = self.a.path, self.b.path, self.outsider
        self._wire("wire", a, f"{wire[0].format(1)}/{wire[1]}", b, f"{wire[0].format(2)}/{wire[1]}")
        self._wire("side", a, "10.98.0.1/24", o, "10.98.0.9/24")
        self._wire("side6", a, "fd98::1/64", o, "fd98::9/64")

    def namespace(self, suffix: str) -> Path:
        """A new namespace; the path of its file."""
        name = f"{self.id}-{suffix}"
        run("ip", "netns", "add", name)
        self.names.append(name)
        path = Path("/run/netns") / name
        # No duplicate address detection, whose second would otherwise pass before IPv6 works.
        run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", netns=path)
        run("ip", "link", "set", "lo", "up", netns=path)
        return path

    def _wire(self, name: str, left: Path, address: str, right: Path, other: str) -> None:
        # The kernel hurries to tell that a device has a carrier unless its index equals that of
        # its other end (linkwatch_urgent_event): then it takes up to a second.
        end = ["type", "veth", "peer", name, "netns", right.name]
        run("ip", "link", "add", name, "index", str(next(_indexes)), *end, netns=left)
        for path, interface in ((left, address), (right, other)):
            nodad = ["nodad"] if ":" in interface else []
            run("ip", "address", "add", interface, "dev", name, *nodad, netns=path)
            run("ip", "link", "set", name, "mtu", "1500", "up", netns=path)

    async def start(self) -> None:
        """Start both reconcilers."""
        for host in self.hosts:
            await host.reconciler.start()

    async def settle(self) -> None:
        """All that is desired is there, the shortcuts too, for which nobody else waits."""
        for host in self.hosts:
            await host.reconciler.settle()
        await until(
            lambda: all(host.has_shortcuts for host in self.hosts), "programs are at their devices"
        )

    async def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for host in self.hosts:
            with contextlib.suppress(Exception):
                await host.reconciler.stop()
            namespaces.remove(host.own)
        for name in self.names:
            run("ip", "netns", "delete", name, check=False)


@contextlib.asynccontextmanager
async def opened(
    folder: Path, ipv6: bool = False, at_sockets: bool = True
) -> AsyncIterator[Fabric]:
    """A fabric, started, and gone at the end."""
    fabric = Fabric(folder, ipv6, at_sockets)
    try:
        await fabric.start()
        yield fabric
    finally:
        await fabric.close()


@contextlib.contextmanager
def counting_wire(path: Path, device: str) -> Iterator[list[bytes]]:
    """Every frame that passes `device` of a namespace meanwhile, filled in at the end."""
    frames: list[bytes] = []

    def open_socket() -> socket.socket:
        everything = socket.htons(3)  # ETH_P_ALL
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, everything)
        sock.bind((device, 3))
        sock.setblocking(False)
        return sock

    sock = in_netns(path, open_socket)
    try:
        yield frames
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(sock.recv(1 << 16))
    finally:
        sock.close()


def open_files() -> int:
    """How many file descriptors this process has, without those that nobody holds any more.

    A test before this one may have left such: whenever they went, it would look like a leak.
    """
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def longest_pause() -> float:
    """Until cancelled; then the longest time, in seconds, that the loop came round too late."""
    longest = 0.0
    try:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - begin - 0.001)
    except asyncio.CancelledError:
        return longest


async def paired(fabric: Fabric) -> tuple[Fabric, Sandbox, Sandbox]:
    """Network 7 on both hosts, with 10.7.0.2 on a and 10.7.0.3 on b."""
    near, far = Sandbox(fabric), Sandbox(fabric)
    for host, number, sandbox in ((fabric.a, 2, near), (fabric.b, 3, far)):
        host.add_network(7)
        host.add_port(7, number, sandbox)
    await fabric.settle()
    return fabric, near, far


async def restart(host: Host, **options: float) -> Reconciler:
    """What happens to a host's kernel when its agent is started again."""
    await host.reconciler.stop()
    reconciler = host.make(**options)
    await reconciler.start()
    return reconciler


def ports_of(host: Host, vni: int = 7) -> list[str]:
    """The names of a network's ports on a host."""
    return [port.device for port in host.desired.networks[vni].ports.values()]
