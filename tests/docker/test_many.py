"""Fifty containers started at once on each of two hosts: all reach all by name, and all go."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import dns.message
import dns.rdatatype
import pytest

from agent.syscalls import in_netns
from agent.testbed.engines import IMAGE
from tests.docker.test_life import devices
from tests.docker.world import FOREVER, DockerWorld

MANY = 50  # on each host
HOSTS = ("h1", "h3")
AT_ONCE = 8  # requests; an engine does some after the other anyway
WITHIN = 60.0  # s
AGAIN = 1.0  # s until what was not answered is asked again, as resolvers and ping do
RESOLVER = ("127.0.0.11", 53)  # Docker's, in each container
# The neighbours that all of a kernel's network namespaces may know together (arp(7)), and here two
# hosts have one kernel: each container learns of each other one, from both sides.
NEIGHBOURS = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3")
ECHO = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number: RFC 792


@pytest.fixture
def neighbours() -> Iterator[None]:
    """Room for all of them."""
    before = int(NEIGHBOURS.read_text())
    NEIGHBOURS.write_text(str(max(before, 4 * (MANY * len(HOSTS)) ** 2)))
    yield
    NEIGHBOURS.write_text(str(before))


@pytest.mark.usefixtures("neighbours")
def test_all_reach_all_by_name_and_all_go(world: DockerWorld) -> None:
    # Docker's own choice on h1, the first free one; h3's are of the ring.
    world.docker("h1", "network", "create", "-d", "vxmesh", "--subnet", "10.21.0.0/24", "web")
    world.wait(lambda: "web" in world.networks("h3"), "web is on h3")
    names = {f"c{host}-{n}": host for n in range(MANY) for host in HOSTS}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = dict(
            zip(names, pool.map(partial(start, world), names.values(), names), strict=True)
        )
        addresses = {name: address for name, (_, address) in started.items()}
        assert len(set(addresses.values())) == len(names)
        # A container is known by its address first: its name comes with the engine's events.
        for host in ("h2", *HOSTS):
            world.wait(partial(all_known, world, host, addresses), f"{host} knows all", WITHIN)
        for name, (pid, _) in started.items():
            netns = f"/proc/{pid}/ns/net"
            assert in_netns(netns, partial(resolved, list(names))) == addresses, name
            assert in_netns(netns, partial(reached, set(addresses.values()))) == set(), name
        list(pool.map(partial(remove, world), HOSTS))
    world.wait(lambda: world.read("h2", "endpoint", "ls") == [], "no endpoint is left", WITHIN)
    for host in HOSTS:
        world.wait(partial(no_sandbox, world, host), f"{host} has no sandbox left", WITHIN)
        world.wait(partial(none_left, world, host), f"{host} has no device left", WITHIN)
    assert world.read("h2", "network", "inspect", "web")["subnets"] == ["10.21.0.0/24"]


def all_known(world: DockerWorld, host: str, addresses: dict[str, str]) -> bool:
    """Whether a host knows these endpoints, by name, and no others."""
    told = {e["name"]: e["addresses"] for e in world.read(host, "endpoint", "ls")}
    return bool(told == {name: [address] for name, address in addresses.items()})


def start(world: DockerWorld, host: str, name: str) -> tuple[int, str]:
    """Make and start a container; its process and address, as the engine says."""
    body = {"Image": IMAGE, "Cmd": FOREVER, "StopTimeout": 0, "HostConfig": {"NetworkMode": "web"}}
    id = world.api(host, "POST", f"/containers/create?name={name}", body)["Id"]
    world.api(host, "POST", f"/containers/{id}/start")
    about = world.api(host, "GET", f"/containers/{id}/json")
    return about["State"]["Pid"], about["NetworkSettings"]["Networks"]["web"]["IPAddress"]


def remove(world: DockerWorld, host: str) -> None:
    """Take all of a host's away, by one command."""
    world.docker(host, "rm", "-f", *world.docker(host, "ps", "-aq").split())


def no_sandbox(world: DockerWorld, host: str) -> bool:
    return not world.read(host, "sandbox", "ls")


def none_left(world: DockerWorld, host: str) -> bool:
    return not devices(world, host)


def resolved(names: list[str]) -> dict[str, str]:
    """What the resolver of the calling container says, asked for all at once, and again for
    those that it has no address for."""
    found: dict[str, str] = {}
    left = {}
    for number, name in enumerate(names):
        question = dns.message.make_query(name, dns.rdatatype.A, id=number)
        left[number] = name, question.to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        deadline = time.monotonic() + WITHIN
        while left and time.monotonic() < deadline:
            for _, wire in left.values():
                sock.sendto(wire, RESOLVER)
            while left and select.select([sock], [], [], AGAIN)[0]:
                answer = dns.message.from_wire(sock.recv(4096))
                if answer.answer and answer.id in left:
                    name, _ = left.pop(answer.id)
                    found[name] = str(answer.answer[0][0])
    return found


def reached(addresses: set[str]) -> set[str]:
    """Those that do not answer an ICMP echo of the calling container, asked for all at once."""
    left, own = set(addresses), os.getpid() & 0xFFFF
    sum = (0xFFFF - 0x0800 - own - 1) % 0xFFFF
    request = ECHO.pack(8, 0, sum, own, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        deadline = time.monotonic() + WITHIN
        while left and time.monotonic() < deadline:
            for address in left:
                sock.sendto(request, (address, 0))
            while left and select.select([sock], [], [], AGAIN)[0]:
                packet, (address, _) = sock.recvfrom(4096)
                kind, _, _, identifier, _ = ECHO.unpack_from(packet, 20)  # behind the IP header
                if (kind, identifier) == (0, own):
                    left.discard(address)
    return left
