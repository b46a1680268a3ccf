"""Encrypted networks on the wire: nothing of them is seen there, whatever dies or changes.

The hosts have wireguard-go, whatever the kernel has: a process can be killed. What is looked for
is not what the agent says but what tcpdump has taken from the wire.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.wireguard import DEVICES, PREFIX
from agent.testbed import Testbed, temporary
from tests.needs import lacks
from tests.netns.echoes import Echoes
from tests.netns.world import COMMAND_WITHIN, World, said, until_said

HOSTS = ("h1", "h2")
PORT = 9000
INNER_MTU = 1500 - 60 - 70
RUN = "/run/vxmesh"


@pytest.fixture(autouse=True, scope="module")
def wireguard_go() -> None:
    """What these tests cannot do without."""
    if shutil.which("wireguard-go") is None:
        lacks("needs wireguard-go: scripts/setup.sh installs it")


# Sends a marker by UDP and TCP until its stdin ends, and takes what comes to the same port;
# then says how many bytes it sent and took in.
PUMP = """
import os, select, socket, sys, threading, time
mine, other, port, marker = sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4])
payload = marker * (1000 // len(marker))
sent = {"udp": 0, "tcp": 0}
taken = {"udp": 0, "tcp": 0}
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((mine, port))
def udp_out():
    while True:
        try:
            sent["udp"] += udp.sendto(payload, (other, port))
        except OSError:
            pass
        time.sleep(0.002)
def udp_in():
    while True:
        taken["udp"] += len(udp.recv(2000))
def tcp_in():
    server = socket.create_server((mine, port))
    while True:
        peer, _ = server.accept()
        threading.Thread(target=drain, args=(peer,), daemon=True).start()
def drain(peer):
    while data := peer.recv(65536):
        taken["tcp"] += len(data)
def tcp_out():
    while True:
        try:
            with socket.create_connection((other, port), 1) as peer:
                while True:
                    sent["tcp"] += peer.send(payload)
                    time.sleep(0.001)
        except OSError:
            time.sleep(0.05)
for work in (udp_out, udp_in, tcp_in, tcp_out):
    threading.Thread(target=work, daemon=True).start()
for line in sys.stdin:
    print(sent["udp"], sent["tcp"], taken["udp"], taken["tcp"], flush=True)
os._exit(0)
"""

# Counts the datagrams that come to a port; says so for each line on its stdin.
COUNT = """
import os, socket, sys, threading
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", int(sys.argv[1])))
got = []
def take():
    while True:
        got.append(udp.recv(2000))
threading.Thread(target=take, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    print(len(got), flush=True)
os._exit(0)
"""

# One VXLAN packet: from a source address (or any) to a destination and port, with a VNI and an
# Ethernet frame in it. A raw socket with the header from us, so that the source can be anyone's.
CRAFT = """
import socket, struct, sys
family, source, destination, port, vni, frame = sys.argv[1:]
body = struct.pack("!BxxxI", 8, int(vni) << 8) + bytes.fromhex(frame)
if family == "4":
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.sendto(body, (destination, int(port)))
elif not source:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.sendto(body, (destination, int(port)))
else:
    a, b = (socket.inet_pton(socket.AF_INET6, x) for x in (source, destination))
    udp = struct.pack("!HHHH", 40000, int(port), 8 + len(body), 0) + body
    pseudo = a + b + struct.pack("!II", len(udp), 17)
    data = pseudo + udp + bytes(len(udp) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    udp = udp[:6] + struct.pack("!H", ~total & 0xFFFF or 0xFFFF) + udp[8:]
    header = struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + a + b
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    sock.sendto(header + udp, (destination, 0))
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[Testbed]:
    """Two hosts with agents and IPv6 on the wire."""
    with temporary(hosts=2, ipv6=True, agent_options=["--wireguard", "go"]) as bed:
        inodes = {Path(host.netns).stat().st_ino for host in bed.hosts}
        yield bed
        ours = {pid for pid in running_wireguard() if netns_of(pid) in inodes}
    deadline = time.monotonic() + 30
    while left := ours & running_wireguard():
        assert time.monotonic() < deadline, f"down left {left}"
        time.sleep(0.05)


@pytest.fixture
def world(pair: Testbed) -> Iterator[World]:
    made = World(pair)
    yield made
    made.clean()


def netns_of(pid: int) -> int:
    """The inode of a process's network namespace; 0 if it has just ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    return 0


def running_wireguard() -> set[int]:
    """All processes of wireguard-go on this machine, also those of other tests."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "exe").readlink().name == "wireguard-go":
                found.add(int(entry.name))
    return found


def pid_of(world: World, host: str) -> int:
    """The wireguard-go of a host's device that is in use; 0 if there is none."""
    own = world.host(host).call(lambda: Path("/proc/thread-self/ns/net").stat().st_ino)
    return next((pid for pid in running_wireguard() if netns_of(pid) == own), 0)


def devices(world: World, host: str) -> set[str]:
    links = json.loads(world.run(host, "ip", "-j", "link", check=True).stdout)
    return {link["ifname"] for link in links} & set(DEVICES)


def generation(world: World, host: str) -> list[int]:
    keys = world.read(host, "node", "inspect", host)["wireguard"]
    return [int(key["generation"]) for key in keys]


def rotate(world: World, *hosts: str) -> None:
    """Change the keys of several hosts at once."""
    rotating = [world.host(h).popen(["vxmesh", "node", "rotate-keys"], stdout=-1) for h in hosts]
    for process in rotating:
        process.communicate(timeout=60)
        assert process.returncode == 0


def sandboxes(world: World, *options: str) -> tuple[str, str, str]:
    """A network with a workload on either host, that reach each other."""
    net = world.network(*options)
    a, b = world.workload("h1", net), world.workload("h2", net)
    world.wait(lambda: world.pings("h1", a, world.address("h2", b)), "they reach each other")
    return net, a, b


class Pump:
    """A process in a sandbox that sends its marker to a peer and takes the peer's."""

    def __init__(self, world: World, host: str, name: str, peer: str, marker: bytes) -> None:
        mine, other = world.address("h1", name), world.address("h1", peer)
        command = [sys.executable, "-c", PUMP, mine, other, str(PORT), marker.hex()]
        self.process: Any = world.host(host).popen(
            ["vxmesh", "exec", name, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        world.later(self.stop)

    def ask(self) -> tuple[int, int, int, int]:
        """Bytes sent by UDP, by TCP, and taken by UDP, by TCP."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        a, b, c, d = map(int, said(self.process.stdout).split())
        return a, b, c, d

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait(60)
        self.process.stdout.close()


class Capture:
    """What passes a host's wire, in a file."""

    def __init__(self, world: World, host: str, folder: Path) -> None:
        self.world, self.host = world, host
        self.file = folder / f"{host}-{os.urandom(4).hex()}.pcap"
        command = [
            "tcpdump",
            "-i",
            "eth0",
            "-s0",
            "-U",
            "--immediate-mode",
            "-B16384",
            "-Z",
            "root",
            "-w",
            str(self.file),
        ]
        self.process = world.host(host).popen(command, stderr=subprocess.PIPE, text=True)
        until_said(self.process.stderr, "listening on")
        world.later(self.stop)

    def stop(self) -> bytes:
        """End it once all that was sent until now is in the file."""
        if self.process.poll() is None:
            last, before = os.urandom(16), self.file.stat().st_size
            command = ("ping", "-c1", "-W10", "-p", last.hex(), "10.99.0.100")
            self.world.run(self.host, *command, check=True)
            self.world.wait(lambda: last in self._from(before), "the capture is whole")
            self.process.send_signal(signal.SIGINT)
            self.process.communicate(timeout=60)
        return self.file.read_bytes()

    def _from(self, offset: int) -> bytes:
        """What has come since it was that long: the whole of it may be many megabytes."""
        with self.file.open("rb") as file:
            file.seek(offset)
            return file.read()


def slow_wireguard(world: World, host: str) -> Path:
    """Until the file that this returns exists, wireguard-go does not start in a host."""
    run = world.host(host).run_dir
    real = run / "wg" / "wireguard-go"
    real.parent.mkdir()
    shutil.copy(str(shutil.which("wireguard-go")), real)
    wrapper, go = run / "slow", run / "go"
    wrapper.write_text(
        '#!/bin/sh\nwhile [ ! -e /run/go ]; do sleep 0.05; done\nexec /run/wg/wireguard-go "$@"\n'
    )
    wrapper.chmod(0o755)

    def undo() -> None:
        shutil.rmtree(real.parent)
        wrapper.unlink()
        go.unlink(missing_ok=True)

    world.later(undo)
    hide(world, host, "/run/slow")
    return go


def hide(world: World, host: str, by: str) -> None:
    """Put another file in the place of a host's wireguard-go."""
    path = str(shutil.which("wireguard-go"))
    world.run(host, "mount", "--bind", by, path, check=True)
    world.later(lambda: world.run(host, "umount", path))


def kill_wireguard(world: World, host: str) -> int:
    pid = pid_of(world, host)
    assert pid, f"no wireguard-go in {host}"
    os.kill(pid, signal.SIGKILL)
    world.wait(lambda: pid_of(world, host) != pid, "it has ended")
    return pid


def test_nothing_of_an_encrypted_network_is_on_the_wire(world: World, tmp_path: Path) -> None:
    secret, known = os.urandom(40), os.urandom(40)
    _, a, b = sandboxes(world, "--encrypted")
    _, c, d = sandboxes(world)
    captures = [Capture(world, host, tmp_path) for host in HOSTS]
    pumps = [Pump(world, "h1", a, b, secret), Pump(world, "h2", b, a, secret)]
    plain = [Pump(world, "h1", c, d, known), Pump(world, "h2", d, c, known)]

    def flows(pump: Pump) -> None:
        before = pump.ask()
        world.wait(
            lambda: all(now > then for now, then in zip(pump.ask(), before, strict=True)),
            "both ways, UDP and TCP",
        )

    for pump in pumps + plain:
        flows(pump)

    # Start, with the rows and workloads of before, and WireGuard not there yet.
    world.bed.kill("h2")
    go = slow_wireguard(world, "h2")
    kill_wireguard(world, "h2")
    sent = pumps[1].ask()[0]
    world.wait(lambda: pumps[1].ask()[0] > sent + 100_000, "it sends though there is no device")
    start = threading.Thread(target=world.bed.start, args=("h2",))
    start.start()
    sent = pumps[1].ask()[0]
    world.wait(lambda: pumps[1].ask()[0] > sent + 200_000, "it sends while the agent starts")
    assert devices(world, "h2") == set()
    go.touch()
    start.join(COMMAND_WITHIN)
    assert not start.is_alive(), "the agent of h2 is there"
    for pump in pumps:
        flows(pump)

    # Rotation, of both hosts at once.
    before = {host: generation(world, host)[0] for host in HOSTS}
    rotate(world, *HOSTS)
    assert {h: generation(world, h) for h in HOSTS} == {h: [before[h] + 1] for h in HOSTS}
    for pump in pumps:
        flows(pump)

    # WireGuard dies, then the agent.
    kill_wireguard(world, "h1")
    for pump in pumps:
        flows(pump)
    process_before = pid_of(world, "h1")
    world.bed.kill("h1")
    world.bed.start("h1")
    assert pid_of(world, "h1") == process_before, "the agent found the process of its last life"
    for pump in pumps:
        flows(pump)

    world.wait(
        lambda: sum(sum(p.ask()[:2]) for p in pumps) > 10_000_000, "10 MB were sent in all", 120
    )
    for pump in plain:
        flows(pump)
    for pump in pumps + plain:
        pump.stop()
    for capture in captures:
        wire = capture.stop()
        assert known in wire, "what is not encrypted is seen"
        assert secret not in wire
        # Nor any part of it that would tell what was said.
        assert not any(secret[i : i + 8] in wire for i in range(0, len(secret), 8))


def test_each_guard_alone_keeps_it_off_the_wire(world: World, tmp_path: Path) -> None:
    net, a, b = sandboxes(world, "--encrypted")
    vni, to = world.vni(net), world.address("h1", b)
    mac = world.read("h1", "endpoint", "inspect", b)["mac"]
    pid = world.read("h1", "sandbox", "inspect", a)["pid"]
    world.bed.kill("h1")  # it would put back what goes now
    world.run("h1", "ip", "link", "del", devices(world, "h1").pop(), check=True)

    def seen() -> bool:
        """Whether what the workload says now is on the wire."""
        marker = os.urandom(40)
        capture = Capture(world, "h1", tmp_path)
        program = (
            "import socket, time\n"
            "sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for _ in range(20):\n"
            f"    sock.sendto(bytes.fromhex('{marker.hex()}'), ('{to}', {PORT}))\n"
            "    time.sleep(0.005)\n"
        )
        world.run("h1", "nsenter", "-t", str(pid), "-n", sys.executable, "-c", program, check=True)
        return marker in capture.stop()

    def lead(vtep: str) -> None:
        row = ("bridge", "fdb", "replace", mac, "dev", f"vxl{vni}", "dst", vtep, "self")
        world.in_own("h1", *row)

    inner = world.fdb("h1", vni)[mac]
    rules = world.run("h1", "nft", "list", "table", "inet", "vxmesh_sealed", check=True).stdout
    unreachable = ("unreachable", str(PREFIX), "metric", "4278190080", "proto", "120")
    assert not seen(), "with both"
    world.run("h1", "ip", "-6", "route", "del", *unreachable, check=True)
    assert not seen(), "without the route"
    lead(world.host("h2").address6)
    assert not seen(), "with a row that leads past WireGuard"
    lead(inner)
    world.run("h1", "ip", "-6", "route", "add", *unreachable, check=True)
    world.run("h1", "nft", "delete", "table", "inet", "vxmesh_sealed", check=True)
    assert not seen(), "without the rules"
    world.run("h1", "ip", "-6", "route", "del", *unreachable, check=True)
    assert seen(), "with neither it is there: so it is they"
    world.bed.start("h1")
    world.wait(lambda: world.pings("h1", a, to), "and all is well again")
    listed = ("nft", "list", "table", "inet", "vxmesh_sealed")
    world.wait(lambda: world.run("h1", *listed).stdout == rules, "the rules too")
    assert not seen()


def test_a_key_is_changed_without_a_loss(world: World) -> None:
    _, a, b = sandboxes(world, "--encrypted")
    before = {host: generation(world, host)[0] for host in HOSTS}
    command = ["vxmesh", "exec", a, "--", "ping", "-n", "-i", "0.01", world.address("h2", b)]
    with Echoes(world.host("h1").popen(command, stdout=subprocess.PIPE, text=True)) as ping:
        world.vx("h1", "node", "rotate-keys", timeout=60)
        rotate(world, *HOSTS)
        assert generation(world, "h1") == [before["h1"] + 2]
        assert generation(world, "h2") == [before["h2"] + 1]
        assert world.reaches("h1", a, world.address("h2", b)), "with the new keys"
        assert ping.end() == []
    for host in HOSTS:
        assert len(devices(world, host)) == 1, "the old device is gone"


def frame(world: World, name: str) -> str:
    """An Ethernet frame with a UDP datagram for a workload, as hex."""
    held = world.read("h1", "endpoint", "inspect", name)
    mac = bytes.fromhex(held["mac"].replace(":", ""))
    to = ipaddress.ip_address(held["addresses"][0])
    udp = (40000).to_bytes(2, "big") + PORT.to_bytes(2, "big") + b"\0\x0c\0\0evil"
    head = bytearray(b"\x45\0\0\0\0\0\0\0\x40\x11\0\0" + (to - 1).packed + to.packed)
    head[2:4] = (20 + len(udp)).to_bytes(2, "big")
    total = sum(int.from_bytes(head[i : i + 2], "big") for i in range(0, 20, 2))
    total = (total & 0xFFFF) + (total >> 16)
    head[10:12] = (~total & 0xFFFF).to_bytes(2, "big")
    return (mac + b"\x02\0\0\0\0\x99\x08\0" + bytes(head) + udp).hex()


class Counter:
    """How many datagrams a workload got."""

    def __init__(self, world: World, host: str, name: str) -> None:
        self.process: Any = world.host(host).popen(
            ["vxmesh", "exec", name, "--", sys.executable, "-c", COUNT, str(PORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        world.later(self.stop)
        assert said(self.process.stdout) == "ready\n"

    def __call__(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(said(self.process.stdout))

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def test_what_comes_in_the_clear_is_not_taken(world: World) -> None:
    net, a, b = sandboxes(world, "--encrypted")
    other, _, d = sandboxes(world)
    sealed, open_ = Counter(world, "h2", b), Counter(world, "h2", d)
    h1, h2 = (world.read("h1", "node", "inspect", host) for host in HOSTS)
    inner1, inner2 = (node["wireguard"][0]["address"] for node in (h1, h2))
    address6 = world.host("h2").address6
    world.run(
        "client", "ip", "-6", "route", "add", str(PREFIX), "via", address6, check=True
    )  # who is on the wire sends it to the host's MAC

    def craft(family: str, source: str, to: str, port: int, vni: int, name: str, by: str) -> None:
        command = [sys.executable, "-c", CRAFT, family, source, to, str(port), str(vni)]
        # From a host itself such a packet may not even get out.
        world.run(by, *command, frame(world, name), check=by == "client")

    # That such a packet is good is seen where nothing is encrypted.
    craft("4", "", "10.99.0.2", 4789, world.vni(other), d, "client")
    world.wait(lambda: open_() == 1, "the other network takes it")
    vni = world.vni(net)
    ways = [
        ("4", "", "10.99.0.2", 4789),
        ("4", "", "10.99.0.2", 4788),
        ("6", "", address6, 4789),
        ("6", "", address6, 4788),
        ("6", inner1, address6, 4788),  # claims to come from within
        ("6", world.bed.client.address6, inner2, 4788),  # wants in
        ("6", inner1, inner2, 4788),
    ]
    for by in ("client", "h1"):
        for way in ways:
            craft(*way, vni, b, by)
    craft("6", "", address6, 4788, vni, b, "h2")  # one of the host's own processes
    craft("6", "", inner2, 4788, vni, b, "h1")  # by way of the peer's own WireGuard
    # Each of them is in the kernel of h2 before what is sent after it.
    craft("4", "", "10.99.0.2", 4789, world.vni(other), d, "client")
    world.wait(lambda: open_() == 2, "what came last is there")
    assert sealed() == 0
    assert world.reaches("h1", a, world.address("h2", b)), "and what is sealed still is"

    # It is the rules that keep them out: without them, and an agent to put them back, one gets in.
    world.bed.kill("h2")
    world.run("h2", "nft", "delete", "table", "inet", "vxmesh_sealed", check=True)
    craft("6", "", address6, 4788, vni, b, "client")
    world.wait(lambda: sealed() == 1, "the packet is good here too")
    world.bed.start("h2")
    craft("6", "", address6, 4788, vni, b, "client")
    craft("4", "", "10.99.0.2", 4789, world.vni(other), d, "client")
    world.wait(lambda: open_() == 3, "what came last is there")
    assert sealed() == 1
    world.run("client", "ip", "-6", "route", "del", str(PREFIX), check=True)


def test_what_keeps_it_from_going_out_in_the_clear_is_put_back(world: World) -> None:
    _, a, b = sandboxes(world, "--encrypted")
    began = json.loads(world.vx("h1", "events", "-o", "json").splitlines()[-1])["revision"]

    def rules() -> str:
        return world.run("h1", "nft", "list", "table", "inet", "vxmesh_sealed").stdout

    def route() -> str:
        return world.run("h1", "ip", "-6", "route", "show", "type", "unreachable").stdout

    def inner() -> str:
        listed = world.run("h1", "ip", "-6", "route", "show", "root", str(PREFIX)).stdout
        return "\n".join(line for line in listed.splitlines() if "dev vxw" in line)

    want = rules(), route(), inner()
    assert all(want) and str(PREFIX) in want[1]
    world.run("h1", "nft", "delete", "table", "inet", "vxmesh_sealed", check=True)
    world.run("h1", "ip", "-6", "route", "del", "unreachable", str(PREFIX), check=True)
    world.run("h1", "ip", "-6", "route", "del", inner().split()[0], check=True)
    world.wait(lambda: (rules(), route(), inner()) == want, "they are back")
    device = next(iter(devices(world, "h1")))
    before = pid_of(world, "h1")
    world.run("h1", "ip", "link", "del", device, check=True)
    world.wait(
        lambda: devices(world, "h1") == {device} and pid_of(world, "h1") not in (0, before),
        "the device is back, with a process of its own",
    )
    world.wait(lambda: world.pings("h1", a, world.address("h2", b)), "and works")
    world.wait(
        lambda: all(
            re.search(rf"\d {what}s? put back", world.vx("h1", "events", "--since", str(began)))
            for what in ("WireGuard device", "nftables table", "route")
        ),
        "it is told of each",
    )


def test_a_process_that_hangs_is_replaced(world: World) -> None:
    _, a, b = sandboxes(world, "--encrypted")
    pid = pid_of(world, "h1")
    os.kill(pid, signal.SIGSTOP)
    # Anything that makes the agent look; what no event tells of is looked at every 20 s.
    world.run("h1", "ip", "-6", "route", "del", "unreachable", str(PREFIX), check=True)
    world.wait(lambda: pid_of(world, "h1") not in (0, pid), "there is another process")
    world.wait(lambda: world.pings("h1", a, world.address("h2", b)), "and it works")


def test_the_mtu_leaves_room_for_wireguard(world: World) -> None:
    done = world.try_vx("h1", "network", "create", "big", "--encrypted", f"--mtu={INNER_MTU + 1}")
    assert done.returncode == 2 and str(INNER_MTU) in done.stderr, done.stderr
    net, a, b = sandboxes(world, "--encrypted")
    assert world.read("h1", "network", "inspect", net)["mtu"] == INNER_MTU
    assert world.link("h1", a)["mtu"] == INNER_MTU
    ping = ("ping", "-c1", "-W10", "-M", "do", "-s", str(INNER_MTU - 28), world.address("h2", b))
    assert world.inside("h1", a, *ping).returncode == 0


def test_there_are_devices_only_while_something_is_encrypted_here(world: World) -> None:
    def is_sealed(host: str) -> bool:
        return "inet vxmesh_sealed" in world.run(host, "nft", "list", "tables", check=True).stdout

    def are_none() -> bool:
        return not any(devices(world, host) or is_sealed(host) for host in HOSTS)

    net = world.network("--encrypted")
    world.wait(are_none, "there are no devices, nor any rules for them")
    a = world.workload("h1", net)
    assert len(devices(world, "h1")) == 1 and pid_of(world, "h1")
    assert devices(world, "h2") == set()
    assert is_sealed("h1") and not is_sealed("h2")
    world.bed.kill("h1")
    world.bed.start("h1")
    assert is_sealed("h1")
    world.vx("h1", "sandbox", "rm", a, "--wait=10")
    world.wait(lambda: not devices(world, "h1") and not pid_of(world, "h1"), "it is gone")
    world.wait(lambda: not is_sealed("h1"), "and with it the rules")
    route = world.run("h1", "ip", "-6", "route", "show", "type", "unreachable").stdout
    assert str(PREFIX) in route, "this stays"


def test_a_host_without_wireguard_says_so_and_gets_nothing(world: World) -> None:
    net, a, b = sandboxes(world, "--encrypted")
    vni, address = world.vni(net), world.address("h1", b)
    world.bed.kill("h2")
    hide(world, "h2", "/dev/null")
    world.bed.start("h2")
    done = world.try_vx("h2", "network", "create", "more", "--encrypted")
    assert done.returncode == 1, done.stderr
    assert "wireguard-go is not installed" in done.stderr and "nstall" in done.stderr
    done = world.try_vx("h2", "endpoint", "create", "--network", net, "--name", "x")
    assert done.returncode == 1 and "wireguard-go is not installed" in done.stderr
    world.wait(
        lambda: world.read("h1", "network", "inspect", net)["without_key"] == ["h2"], "it is seen"
    )
    assert world.read("h1", "node", "inspect", "h2")["wireguard"] == []
    world.wait(lambda: world.fdb("h1", vni) == {}, "no rows lead there")
    assert not world.pings("h1", a, address)
    told = "h2 has no WireGuard key"
    world.wait(lambda: told in world.vx("h1", "events", "--since", "5m"), "it is told")


def test_rows_lead_to_inner_addresses_only(world: World) -> None:
    net, _, _ = sandboxes(world, "--encrypted")
    for host in HOSTS:
        found: Any = world.fdb(host, world.vni(net)).values()
        assert found and all(ipaddress.ip_address(vtep) in PREFIX for vtep in found)
