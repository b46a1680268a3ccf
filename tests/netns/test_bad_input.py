"""Bad input: a clear error with its exit status, nothing half made, and the agent goes on."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from agent.testbed import Testbed
from tests.netns.world import World

CASES = [
    ("network create x --subnet 10.0.0.0/99", 2, "subnet '10.0.0.0/99': is malformed"),
    ("network create x --subnet 10.99.0.0/24", 5, "a route of host h"),
    ("network create not.a.label", 2, "is not a DNS label"),
    ("network create x --driver carrier-pigeon", 2, "driver 'carrier-pigeon': is unknown"),
    ("network create x --mtu 70000", 2, "MTU 70000: is out of range"),
    ("network create x --vni 99999999", 2, "VNI 99999999: is out of range"),
    ("network create x --encrypted --mtu 1371", 2, "MTU 1371: is more than fits"),
    ("network create x -O novalue", 2, "Write it as key=value"),
    ("network create", 2, "missing argument"),
    ("network inspect nope", 4, "network 'nope': does not exist"),
    ("network rm nope", 4, "does not exist"),
    ("node inspect nope", 4, "does not exist"),
    ("endpoint inspect nope", 4, "does not exist"),
    ("endpoint rm nope", 4, "does not exist"),
    ("sandbox inspect nope", 4, "does not exist"),
    ("exec nope -- true", 4, "does not exist"),
    ("run --network nope -- true", 4, "network 'nope': does not exist"),
    ("endpoint create --network {net} --name A_B", 2, "is not a DNS label"),
    ("endpoint create --network {net} --name taken", 5, "endpoint taken: exists"),
    ("endpoint create --network {net} --name b --mac 02:00:00:00:00:77", 5, "taken by taken"),
    ("endpoint create --network {net} --name b --mac 01:00:00:00:00:77", 2, "no station"),
    ("endpoint create --network {net} --name b --ip 10.77.0.5", 5, "is taken by taken"),
    ("endpoint create --network {net} --name b --ip 10.78.0.5", 2, "is in no subnet"),
    ("endpoint create --network {net} --name b --ip 10.77.0.1", 5, "gateway"),
    ("endpoint create --network {net} --name b --netns nope", 4, "namespace nope: does not"),
    ("endpoint create --network {net} --name b --netns /etc/passwd", 2, "no network namespace"),
    ("endpoint create --network {net} --name b --netns /proc/self/ns/mnt", 2, "no netw"),
    ("endpoint create --network {net} --name b --netns /proc/self/ns/net", 5, "host's own"),
    ("endpoint announce --network {net} --file /no/such", 2, "does not exist"),
    ("run --network {net} --publish 80 -- true", 2, "is malformed"),
    ("run --network {net} --publish 7946:80 -- true", 5, "port 7946/tcp: cannot be published"),
    ("run --network {net} --ip 10.99.9.9 -- true", 2, "is in no subnet"),
    ("resolve nosuchname --network {net}", 4, "name nosuchname: does not exist"),
    ("resolve x/NOTYPE --network {net}", 2, "NOTYPE"),
    ("no-such-noun", 2, "no such command"),
]  # fmt: skip


@pytest.fixture(scope="class")
def stage(bed: Testbed) -> Iterator[tuple[World, str]]:
    """A network with an endpoint, which all the bad requests leave as they are."""
    world = World(bed)
    net = world.network("--subnet", "10.77.0.0/29")
    world.vx("h1", "endpoint", "create", "--network", net, "--name", "taken",
             "--ip", "10.77.0.5", "--mac", "02:00:00:00:00:77", "--wait=10")  # fmt: skip
    yield world, net
    world.clean()


class TestEach:
    @pytest.mark.parametrize(("words", "status", "text"), CASES)
    def test_each_gets_a_clear_error(
        self, stage: tuple[World, str], words: str, status: int, text: str
    ) -> None:
        world, net = stage
        before = _everything(world)
        done = world.try_vx("h1", *words.format(net=net).split())
        assert (done.returncode, text in done.stderr) == (status, True), done.stderr
        assert done.stderr.startswith("vxmesh: ")
        assert _everything(world) == before


def _everything(world: World) -> object:
    kinds = ("network", "endpoint", "sandbox")
    return [world.read("h1", k, "ls") for k in kinds], world.links("h1")


def test_errors_as_json(world: World) -> None:
    done = world.try_vx("h1", "network", "inspect", "nope", "-o", "json")
    assert done.returncode == 4
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "NOT_FOUND" and "nope" in error["message"]


def test_a_label_of_a_megabyte(world: World) -> None:
    net = world.network()
    program = (
        "import asyncio\nfrom agent.client import Client\n"
        "async def main():\n async with Client() as c:\n"
        f"  await c.create_endpoint('{net}', 'big', labels={{'k': 'x' * 1_000_000}})\n"
        "asyncio.run(main())"
    )
    done = world.run("h1", "python", "-c", program)
    assert "is too long (1 bytes of key, 1000000 of value)" in done.stderr
    assert world.read("h1", "endpoint", "ls") == []


def test_a_full_range(world: World) -> None:
    net = world.network("--subnet", "10.77.0.0/29")
    for number in range(5):
        make = ("endpoint", "create", "--network", net, "--name", f"e{number}")
        world.vx("h1", *make, "--wait=20")
    for host in ("h1", "h2"):
        done = world.try_vx(host, "endpoint", "create", "--network", net, "--name", "over")
        assert done.returncode == 1, done.stderr
        assert "5 of 5" in done.stderr or "5 of the network's 5" in done.stderr
    assert len(world.read("h1", "endpoint", "ls")) == 5


def test_an_announcement_is_taken_whole_or_not_at_all(world: World) -> None:
    net = world.network("--subnet", "10.77.0.0/16")
    good = [
        json.dumps(
            {"name": f"a{n}", "mac": f"02:00:00:00:01:{n:02x}", "addresses": [f"10.77.1.{n}"]}
        )
        for n in range(1, 100)
    ]  # fmt: skip
    announce = ("endpoint", "announce", "--network", net, "--file", "-")
    for bad, text in (
        ("garbage", "line 100: is no endpoint"),
        (good[0], "endpoint a1: exists"),
        ('{"name": "b", "mac": "02:00:00:00:01:01", "addresses": ["10.77.2.1"]}', "taken by a1"),
        ('{"name": "b", "mac": "02:00:00:00:09:01", "addresses": ["10.1.2.1"]}', "in no subnet"),
    ):
        done = world.try_vx("h1", *announce, input="\n".join([*good, bad]))
        assert done.returncode in (2, 5) and text in done.stderr, done.stderr
        assert world.read("h1", "endpoint", "ls") == []
    assert world.vx("h1", *announce, input="\n".join(good)) == "99 announced"
    assert len(world.read("h3", "endpoint", "ls", "--network", net)) <= 99
    world.vx("h1", "endpoint", "rm", "--network", net, "--all", "--wait=10")
    assert world.read("h3", "endpoint", "ls", "--network", net) == []


def test_garbage_on_the_peer_port(world: World) -> None:
    address = world.host("h1").address
    pieces = [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0xFFFFFF00) + b"\0" * 9,
        b"",
    ]

    def send() -> None:
        for piece in pieces:
            with socket.create_connection((address, 7946), 10) as sock:
                sock.sendall(piece)

    world.host("client").call(send)
    program = (
        "import grpc, sys, os\n"
        f"channel = grpc.insecure_channel('{address}:7946')\n"
        "call = channel.stream_stream('/vxmesh.v1.Peer/Sync')\n"
        "for data in (b'', os.urandom(300), b'\\x0a\\x00'):\n"
        "  try: list(call(iter([data]), timeout=5))\n"
        "  except grpc.RpcError as error: print(error.code())\n"
    )
    done = world.run("client", "python", "-c", program, check=True)
    assert "Traceback" not in done.stderr

    def states() -> dict[str, str]:
        return {n["name"]: n["state"] for n in world.read("h1", "node", "ls")}

    world.wait(lambda: states() == dict.fromkeys(("h1", "h2", "h3"), "alive"), "all are alive")
    assert world.network(), "the agent goes on"


def test_a_port_in_use_and_a_second_agent(world: World) -> None:
    address = world.host("h1").address
    agent = ("vxmesh", "agent", "--name", "second", "--advertise", address)
    done = world.run("h1", *agent)
    assert done.returncode == 5 and "is another agent's" in done.stderr, done.stderr
    elsewhere = ("--run-dir", "/tmp/vxt-run", "--state-dir", "/run/vxt-state")
    done = world.run("h1", *agent, *elsewhere)
    assert done.returncode == 5 and f"{address}:7946" in done.stderr, done.stderr
    done = world.run("h1", *agent, "--state-dir", "/var/lib/vxmesh", "--run-dir", "/tmp/vxt-run")
    assert done.returncode == 5 and "held by another agent" in done.stderr, done.stderr
    assert world.read("h1", "node", "inspect", "h1")["state"] == "alive"


def test_no_agent(world: World) -> None:
    world.bed.kill("h3")
    done = world.try_vx("h3", "node", "ls")
    assert done.returncode == 3 and "does not answer" in done.stderr
    world.bed.start("h3")
    assert world.read("h3", "node", "ls")
