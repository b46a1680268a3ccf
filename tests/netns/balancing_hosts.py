"""Services for the datapath's tests: frontends by hand, servers that say whom they see.

What stands opposite: datapath_hosts.py, which has the hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from agent.datapath.conntrack import Conntrack, Entry, with_table
from agent.drivers.balancing import Backend, Frontend
from agent.notation import format_address, parse_address
from agent.syscalls import in_netns, socket_in
from tests.netns.datapath_hosts import Fabric, Host, Sandbox, run

TIMEOUT = 30.0  # s, for an answer that comes in milliseconds
NEVER = 1.5  # s, for one that does not come
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True)
class Over:
    """A protocol over one family, and what addresses are called there."""

    version: Literal[4, 6]
    protocol: str = "tcp"

    def __str__(self) -> str:
        return f"{self.protocol}{self.version}"

    def box(self, number: int, vni: int = 7) -> str:
        """A port's address (see Host.add_port)."""
        return f"10.{vni}.0.{number}" if self.version == 4 else f"fd00:{vni}::{number:x}"

    @property
    def vip(self) -> str:
        """That of `frontend`."""
        return "10.7.0.100" if self.version == 4 else "fd00:7::100"

    @property
    def node(self) -> str:
        """The address of host a that the outsider sees."""
        return "10.98.0.1" if self.version == 4 else "fd98::1"

    @property
    def own(self) -> str:
        """An address of host a that it has itself."""
        return "10.99.0.1" if self.version == 4 else "fd98::1"

    @property
    def any(self) -> str:
        """Where a server takes questions to all addresses."""
        return "0.0.0.0" if self.version == 4 else "::"

    def outsider(self, number: int = 9) -> str:
        """The outsider's own address, the first of those that it may have."""
        return f"10.98.0.{number}" if self.version == 4 else f"fd98::{number:x}"


def backend(
    host: Host, number: int, vni: int = 7, version: Literal[4, 6] = 4, **changes: Any
) -> Backend:
    """The port 10.<vni>.0.<number> of a host (see Host.add_port), as a backend at 8080."""
    key = f"{vni:04x}{number:04x}{host.number:08x}"
    found = Backend(parse_address(Over(version).box(number, vni)), 8080, 1, key)
    return replace(found, **changes)


def frontend(
    *backends: Backend,
    vni: int = 7,
    name: str = "web",
    vip: str = "10.7.0.100",
    protocol: str = "tcp",
    **changes: Any,
) -> Frontend:
    """A service at `vip`, port 80."""
    address = parse_address(vip) if vip else b""
    version: Literal[4, 6] = 6 if ":" in vip else 4
    found = Frontend(
        name,
        f"{vni:016x}",
        vni,
        "udp" if protocol == "udp" else "tcp",
        address,
        80,
        backends,
        version=version,
    )
    return replace(found, **changes)


def add_address(outsider: Path, address: str) -> None:
    """Give the outsider an address more."""
    given = ("side6", "64", ["nodad"]) if ":" in address else ("side", "24", [])
    device, length, more = given
    run("ip", "address", "add", f"{address}/{length}", "dev", device, *more, netns=outsider)


def announce_routers(fabric: Fabric, vni: int) -> None:
    """Tell each host where the others' routers are, as the overlay driver does."""
    for host in fabric.hosts:
        for other in fabric.hosts:
            if other is not host and (bridge := other.desired.networks.get(vni)):
                host.desired.fdb.setdefault(vni, {})[bridge.router_mac] = parse_address(other.vtep)
                host.reconciler.touch_rows(vni, [bridge.router_mac], [])


def serve(hosts: Iterable[Host], *frontends: Frontend) -> None:
    """Have hosts balance these services beside others that they do; see `withdraw`."""
    for host in hosts:
        for one in frontends:
            host.desired.services[one.id] = one
            bridge = host.desired.networks.get(one.vni)
            if one.address and bridge:
                rows = host.desired.neighbours.setdefault(one.vni, {})
                rows[one.address] = bridge.router_mac
        host.reconciler.touch_services([one.id for one in frontends])


def withdraw(hosts: Iterable[Host], *frontends: Frontend) -> None:
    """Have hosts balance these no longer."""
    for host in hosts:
        for one in frontends:
            host.desired.services.pop(one.id, None)
            host.desired.neighbours.get(one.vni, {}).pop(one.address, None)
        host.reconciler.touch_services([one.id for one in frontends])


async def network(fabric: Fabric, *where: Host, vni: int = 7, first: int = 2) -> list[Sandbox]:
    """A network on both hosts, with a sandbox on each of `where`: 10.<vni>.0.2, .3 …"""
    for host in fabric.hosts:
        if vni not in host.desired.networks:
            host.add_network(vni)
    boxes = []
    for number, host in enumerate(where, first):
        box = Sandbox(fabric)
        host.add_port(vni, number, box)
        boxes.append(box)
    announce_routers(fabric, vni)
    await fabric.settle()
    return boxes


class Server:
    """Answers over TCP and UDP with its name and the address and port that it sees."""

    def __init__(self, path: Path, name: str, port: int = 8080, address: str = "0.0.0.0") -> None:
        self.path, self.name, self.where = path, name, (address, port)
        self.connections: list[asyncio.StreamWriter] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Server:
        family = FAMILY[6 if ":" in self.where[0] else 4]
        tcp = socket_in(self.path, family, socket.SOCK_STREAM)
        udp = socket_in(self.path, family, socket.SOCK_DGRAM)
        for sock in (tcp, udp):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self.where)
            sock.setblocking(False)
        server = await asyncio.start_server(self._accepted, sock=tcp)
        await self._stack.enter_async_context(server)
        loop = asyncio.get_running_loop()
        loop.add_reader(udp, self._received, udp)
        self._stack.callback(udp.close)
        self._stack.callback(loop.remove_reader, udp)
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self.connections:
            writer.close()
        await self._stack.aclose()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        host, port = writer.get_extra_info("peername")[:2]
        with contextlib.suppress(OSError):
            while await reader.readline():
                writer.write(f"{self.name} {host} {port}\n".encode())
        writer.close()

    def _received(self, sock: socket.socket) -> None:
        _, peer = sock.recvfrom(2048)
        sock.sendto(f"{self.name} {peer[0]} {peer[1]}\n".encode(), peer)


class Client:
    """One connection, or one UDP socket, from a namespace."""

    def __init__(
        self, path: Path, protocol: str = "tcp", version: int = 4, source: str = ""
    ) -> None:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        self.sock = socket_in(path, FAMILY[version], kind)
        self.sock.setblocking(False)
        self.protocol = protocol
        if source:
            self.sock.bind((source, 0))

    async def connect(self, address: str, port: int, timeout: float = TIMEOUT) -> Client:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout):
            await loop.sock_connect(self.sock, (address, port))
        return self

    async def ask(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """One question: the server's name, and the address at which it sees us."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout):
            await loop.sock_sendall(self.sock, b"?\n")
            answer = await loop.sock_recv(self.sock, 2048)
        if not answer:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        name, host, port = answer.decode().split()
        if host == self.sock.getsockname()[0]:
            assert int(port) == self.sock.getsockname()[1]
        return name, host

    async def wait(self, timeout: float = TIMEOUT) -> bytes:
        """What comes without being asked for; TimeoutError if nothing does."""
        async with asyncio.timeout(timeout):
            return await asyncio.get_running_loop().sock_recv(self.sock, 2048)

    def close(self) -> None:
        self.sock.close()


async def ask(
    path: Path, address: str, port: int, protocol: str = "tcp", timeout: float = TIMEOUT
) -> tuple[str, str]:
    """One question on a connection of its own: who answers, and whom that one sees."""
    client = Client(path, protocol, 6 if ":" in address else 4)
    try:
        await client.connect(address, port, timeout)
        return await client.ask(timeout)
    finally:
        client.close()


async def refused(
    path: Path, address: str, port: int, protocol: str = "tcp", timeout: float = TIMEOUT
) -> bool:
    """Whether a question is refused, and not left without an answer."""
    try:
        await ask(path, address, port, protocol, timeout)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    return False


def forget_all(netns: Path) -> None:
    """Have a namespace forget all connections, as it does with idle ones in time."""

    def work(table: Conntrack) -> None:
        table.delete(list(table.find(socket.AF_INET)), socket.AF_INET)

    with_table(netns, work)


def tracked(netns: Path) -> int:
    """How many TCP and UDP connections a namespace tracks."""
    found: list[Entry] = []
    with_table(netns, lambda table: found.extend(table.find(socket.AF_INET)))
    return len(found)


def udp_targets(netns: Path, port: int) -> set[str]:
    """Where the UDP flows to a port lead of which a namespace knows."""
    found: list[Entry] = []
    with_table(netns, lambda table: found.extend(table.find(socket.AF_INET)))
    return {
        format_address(e.original.target)
        for e in found
        if e.protocol == socket.IPPROTO_UDP and e.original.target_port == port
    }


def listening(path: Path, address: str, port: int) -> socket.socket:
    """A socket that listens in a namespace."""

    def make() -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        return sock

    return in_netns(path, make)
