"""Networks that two halves of a cluster made twice, on the real kernel: both go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.netns.datapath_hosts import Fabric, Host, Sandbox, opened, paired, pings, run
from tests.netns.echoes import Echoes, pinging_from
from tests.netns.world import VXMESH, World, said

pytestmark = pytest.mark.netns

SUBNET, VNI = "10.77.0.0/24", "500"
# A line every 10 ms over one TCP connection; at the end, how many came and the longest pause.
SERVER = (
    "import socket, time\n"
    "with socket.create_server(('0.0.0.0', 7000)) as listener:\n"
    " print('ready', flush=True)\n"
    " connection, _ = listener.accept()\n"
    " last, longest, count = time.monotonic(), 0.0, 0\n"
    " while data := connection.recv(4096):\n"
    "  now = time.monotonic()\n"
    "  longest, last, count = max(longest, now - last), now, count + len(data)\n"
    " print(count, round(longest, 3), flush=True)\n"
)
CLIENT = (
    "import socket, sys, time\n"
    "with socket.create_connection((sys.argv[1], 7000)) as connection:\n"
    " print('connected', flush=True)\n"
    " import threading\n"
    " threading.Thread(target=lambda: (sys.stdin.read(), connection.shutdown(1)), daemon=True)"
    ".start()\n"
    " try:\n"
    "  while True:\n"
    "   connection.send(b'x')\n"
    "   time.sleep(0.01)\n"
    " except OSError: pass\n"
)


class Stream:
    """A TCP connection between two sandboxes of one host."""

    def __init__(self, world: World, host: str, source: str, target: str, address: str) -> None:
        def start(sandbox: str, *command: str) -> subprocess.Popen[str]:
            words = [VXMESH, "exec", sandbox, "--", "python", "-c", *command]
            pipe = subprocess.PIPE
            process = world.host(host).popen(words, stdin=pipe, stdout=pipe, text=True)
            world.later(process.kill)
            return process

        self.server = start(target, SERVER)
        assert said(self.server.stdout) == "ready\n"
        self.client = start(source, CLIENT, address)
        assert said(self.client.stdout) == "connected\n"

    def end(self) -> tuple[int, float]:
        """How many bytes came, and the longest pause in s."""
        self.client.communicate(timeout=60)
        out, _ = self.server.communicate(timeout=60)
        count, longest = out.split()
        return int(count), float(longest)


@contextlib.contextmanager
def pinging(world: World, host: str, sandbox: str, address: str) -> Iterator[list[int]]:
    """Echoes every 20 ms meanwhile; at the end, the numbers of those that were lost."""
    words = [VXMESH, "exec", sandbox, "--", "ping", "-n", "-w", "300", "-i", "0.02", address]
    lost: list[int] = []
    with Echoes(world.host(host).popen(words, stdout=subprocess.PIPE, text=True)) as ping:
        yield lost
        lost += ping.end()


def echoes(world: World, host: str, sandbox: str) -> int:
    """How many echo requests a sandbox has received."""
    text = world.inside(host, sandbox, "cat", "/proc/net/snmp").stdout
    names, values = (line.split() for line in text.splitlines() if line.startswith("Icmp:"))
    return int(dict(zip(names, values, strict=True))["InEchos"])


def test_both_halves_go_on(world: World) -> None:
    world.bed.cut("h3")
    for host, other in (("h1", "h3"), ("h2", "h3"), ("h3", "h1"), ("h3", "h2")):
        world.wait(
            lambda h=host, o=other: (
                world.read(h, "node", "inspect", o)["state"] == "unreachable"  # type: ignore[misc]
            ),
            f"{host} noticed",
        )
    same = ("network", "create", "twice", "--subnet", SUBNET, "--vni", VNI)
    old, young = world.vx("h1", *same), world.vx("h3", *same)
    for host, name in (("h1", "a1"), ("h2", "a2"), ("h3", "b1"), ("h3", "b2")):
        world.workload(host, "twice", name)
    at = {
        n: world.address(h, n) for h, n in (("h1", "a1"), ("h2", "a2"), ("h3", "b1"), ("h3", "b2"))
    }
    assert at["a1"] == at["b1"], "as bad as it can be"
    stream = Stream(world, "h3", "b1", "b2", at["b2"])
    interface = world.link("h3", "b1")
    with (
        pinging(world, "h1", "a1", at["a2"]) as ours,
        pinging(world, "h3", "b2", at["b1"]) as theirs,
    ):
        world.bed.heal("h3")
        shown = f"twice-{young[:6]}"
        for host in ("h1", "h2", "h3"):
            world.wait(
                lambda h=host: (
                    {n["name"] for n in world.read(h, "network", "ls")}  # type: ignore[misc]
                    == {"twice", shown}
                ),
                f"{host} sees both",
            )
        world.wait(lambda: f"vxb{VNI}" not in world.links("h3"), "h3 gave the VNI up")
    assert ours == [], "every echo of the winner came back"
    print(f"of the loser's echoes, one every 20 ms, {len(theirs)} were lost")
    assert world.link("h3", "b1")["ifindex"] == interface["ifindex"], "the interface never went"

    def views() -> list[object]:
        return [world.read(h, "network", "ls") for h in ("h1", "h2", "h3")]

    world.wait(lambda: len({json.dumps(view) for view in views()}) == 1, "all see the same")
    by_id = {n["id"]: n for n in world.read("h2", "network", "ls")}
    assert by_id[old]["name"] == "twice" and by_id[old]["vni"] == int(VNI)
    moved = by_id[young]["vni"]
    assert moved != int(VNI)
    for words in (f"{shown} was called twice", f"{shown} had VNI 500", f"{SUBNET} of {shown}"):
        assert words in by_id[young]["conflict"]
    assert "CONFLICT" in world.vx("h2", "network", "ls").splitlines()[0]
    for host in ("h1", "h2", "h3"):

        def told(host: str = host) -> list[str]:
            lines = world.host(host).log.read_text().splitlines()
            return [x for x in lines if "network.conflict" in x and young in x and old in x]

        world.wait(lambda told=told: len(told()) >= 3, f"{host} tells of it")  # type: ignore[misc]
        assert len(told()) == 3, told()

    # Now both on one host: h1, where the winner is, and h3, where the loser is.
    world.workload("h1", shown, "b3")
    world.workload("h3", "twice", "a3")
    assert world.reaches("h1", "b3", at["b1"]) and world.reaches(
        "h3", "b1", world.address("h1", "b3")
    )
    assert world.reaches("h3", "a3", at["a1"]) and world.reaches(
        "h1", "a1", world.address("h3", "a3")
    )
    for host, a, b in (("h1", "a1", "b3"), ("h3", "a3", "b1")):
        assert world.reaches(host, a, "10.77.0.1"), "the winner has its gateway"
        assert not world.pings(host, b, "10.77.0.1"), "which does not answer the loser"
        finds = ("getent", "hosts", "a2")
        world.wait(
            lambda h=host, a=a, f=finds: world.inside(h, a, *f).returncode == 0,  # type: ignore[misc]
            f"{a} finds a2 by name",
        )
        assert world.inside(host, b, "timeout", "2", "getent", "hosts", "b2").returncode != 0
    # The same address twice on h3 and beside it: each echo comes to the one that is meant.
    before = {name: echoes(world, h, name) for h, name in (("h1", "a1"), ("h3", "b1"))}
    assert world.pings("h1", "b3", at["b1"], 5, 10) and world.pings("h3", "b2", at["b1"], 5, 10)
    assert echoes(world, "h1", "a1") == before["a1"]
    assert world.pings("h3", "a3", at["a1"], 5, 10)
    assert world.run("h1", "ping", "-c", "2", "-i", "0.2", "-W", "10", at["a1"]).returncode == 0
    assert echoes(world, "h1", "a1") == before["a1"] + 7
    assert echoes(world, "h3", "b1") == before["b1"] + 10

    # The winner goes, from a host that did not make it; the loser stays what it is.
    for host, name in (("h1", "a1"), ("h2", "a2"), ("h3", "a3")):
        world.vx(host, "sandbox", "rm", name, "--wait=10")
    world.vx("h2", "network", "rm", "twice", "--wait=10")
    for host in ("h1", "h2", "h3"):
        (left,) = world.read(host, "network", "ls")
        assert (left["id"], left["name"], left["vni"]) == (young, shown, moved)
        assert left["conflict"] == ""
    world.wait(lambda: world.pings("h3", "b1", "10.77.0.1"), "its gateway is back")
    find = ("h3", "b1", "getent", "hosts", "b3")
    world.wait(lambda: world.inside(*find).returncode == 0, "and its name server")
    count, longest = stream.end()
    assert count > 100
    print(f"TCP through all of it: {count} bytes, longest pause {longest * 1000:.0f} ms")


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as made:
        yield made


def renumber(host: Host, old: int, new: int) -> None:
    """The network of one VNI is to have another one from now on."""
    desired = host.desired
    bridge = desired.networks.pop(old)
    desired.networks[new] = replace(bridge, vni=new, device=f"vxb{new}", vxlan=f"vxl{new}")
    desired.fdb[new] = desired.fdb.pop(old, {})
    desired.neighbours[new] = desired.neighbours.pop(old, {})
    for vni in (old, new):
        host.reconciler.touch_bridge(vni)


async def test_a_new_vni_leaves_the_workloads_interfaces_alone(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    beside = fabric.a
    box = Sandbox(fabric)
    beside.add_port(7, 4, box)
    await fabric.settle()

    def index() -> int:
        return int(json.loads(near.run("ip", "-j", "link", "show", "eth0"))[0]["ifindex"])

    before = index()
    with await asyncio.to_thread(pinging_from, near.path, "10.7.0.4") as ping:
        for old, new in ((7, 70_000), (70_000, 8), (8, 7)):
            for host in fabric.hosts:
                renumber(host, old, new)
            await fabric.settle()
            attempts = [(near.path, "10.7.0.3"), (far.path, "10.7.0.2"), (near.path, "fd00:7::3")]
            assert pings(*attempts, (near.path, "10.7.0.1")) == [True] * 4
            devices = run("ip", "-br", "link", netns=beside.own)
            assert f"vxl{new}" in devices and f"vxl{old} " not in devices
            assert f"vxb{old} " not in devices
        lost = await asyncio.to_thread(ping.end)
    # A port that leaves a bridge waits for all processors (synchronize_net), some 20 ms each.
    sent = ping.answered[-1] - ping.answered[0] + 1
    print(f"three new VNIs: {len(lost)} of {sent} echoes, one every 5 ms, were lost")
    assert index() == before
    assert not beside.reconciler.failures()
    assert not beside.reconciler.repairs, "what is asked for is no drift"


async def test_another_network_takes_the_vni_over_in_the_same_breath(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    for host in fabric.hosts:
        renumber(host, 7, 9)
        host.add_network(7, network="f" * 16)
    other = Sandbox(fabric)
    fabric.a.add_port(7, 9, other, addresses=("10.7.0.2/24",), gateways=("10.7.0.1",))
    await fabric.settle()
    assert pings((near.path, "10.7.0.3"), (far.path, "10.7.0.2")) == [True, True]
    alias = run("ip", "link", "show", "vxb7", netns=fabric.a.own)
    assert "vxmesh:net:" + "f" * 16 in alias
    assert not fabric.a.reconciler.failures()


async def test_an_agent_that_was_away_while_the_vni_changed(fabric: Fabric) -> None:
    _, near, far = await paired(fabric)
    await fabric.a.reconciler.stop()
    before = near.run("ip", "-j", "link", "show", "eth0")
    renumber_without_agent(fabric.a)
    renumber(fabric.b, 7, 9)
    fabric.a.make()
    await fabric.a.reconciler.start()
    await fabric.settle()
    assert pings((near.path, "10.7.0.3"), (far.path, "10.7.0.2")) == [True, True]
    after = near.run("ip", "-j", "link", "show", "eth0")
    assert json.loads(after)[0]["ifindex"] == json.loads(before)[0]["ifindex"]


def renumber_without_agent(host: Host) -> None:
    bridge = host.desired.networks.pop(7)
    host.desired.networks[9] = replace(bridge, vni=9, device="vxb9", vxlan="vxl9")
    host.desired.fdb[9] = host.desired.fdb.pop(7, {})
    host.desired.neighbours[9] = host.desired.neighbours.pop(7, {})


async def test_of_two_networks_with_one_subnet_only_one_is_open(fabric: Fabric) -> None:
    """The younger of two with one subnet on one host: segments apart, and one way out."""
    subnet = {"subnets": ("10.7.0.0/24",), "gateways": ("10.7.0.1/24",)}
    a = fabric.a
    a.add_network(7, **subnet)
    a.add_network(6, **{**subnet, "gateways": ()}, apart=frozenset({"10.7.0.0/24"}))
    boxes = {}
    for vni, number in ((7, 2), (7, 3), (6, 2), (6, 4)):
        box = boxes[vni, number] = Sandbox(fabric)
        a.add_port(vni, number, box, addresses=(f"10.7.0.{number}/24",), gateways=("10.7.0.1",))
    await fabric.settle()
    seven, six = boxes[7, 3], boxes[6, 4]
    assert pings((seven.path, "10.7.0.2"), (six.path, "10.7.0.2")) == [True, True]
    assert pings((seven.path, "10.7.0.4"), (six.path, "10.7.0.3")) == [False, False]
    assert pings((seven.path, "10.7.0.1"), (six.path, "10.7.0.1")) == [True, False]
    outside = "10.98.0.9"
    assert pings((seven.path, outside), (six.path, outside)) == [True, False]
    assert pings((a.path, "10.7.0.3"), (a.path, "10.7.0.4")) == [True, False]
    # The older one leaves this host: what it held is the younger one's.
    del a.desired.networks[7]
    a.desired.networks[6] = replace(
        a.desired.networks[6], apart=frozenset(), gateways=("10.7.0.1/24",)
    )
    a.reconciler.touch_bridge(6)
    a.reconciler.touch_bridge(7)
    await fabric.settle()
    assert pings((six.path, "10.7.0.1"), (six.path, outside), (a.path, "10.7.0.4")) == [True] * 3
    # And comes back.
    a.add_network(7, **subnet)
    a.desired.networks[6] = replace(
        a.desired.networks[6], apart=frozenset({"10.7.0.0/24"}), gateways=()
    )
    a.reconciler.touch_bridge(6)
    a.add_port(7, 3, seven, addresses=("10.7.0.3/24",), gateways=("10.7.0.1",))
    await fabric.settle()
    assert pings((seven.path, outside), (six.path, outside)) == [True, False]
    assert pings((a.path, "10.7.0.3"), (a.path, "10.7.0.4")) == [True, False]
