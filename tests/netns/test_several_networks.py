"""Workloads in several networks: names, the default routes, connecting and disconnecting live."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent import syscalls
from agent.workload import tell_resolver
from tests.netns.echoes import Echoes
from tests.netns.world import World, said, until_said


def leads(world: World, host: str, sandbox: str, family: str = "-4") -> list[tuple[str, str]]:
    """The default routes of a sandbox: device and gateway."""
    told = world.inside(host, sandbox, "ip", "-j", family, "route", "show", "default").stdout
    return [(route["dev"], route["gateway"]) for route in json.loads(told or "[]")]


def gateway(world: World, network: str, of: int = 0) -> str:
    return str(world.read("h1", "network", "inspect", network)["gateways"][of])


def interfaces(world: World, host: str, sandbox: str) -> dict[str, Any]:
    """Interface name -> what `sandbox inspect` says of it."""
    return {i["name"]: i for i in world.read(host, "sandbox", "inspect", sandbox)["interfaces"]}


def connect(world: World, host: str, sandbox: str, network: str, *options: str) -> str:
    return world.vx(
        host, "endpoint", "create", "--sandbox", sandbox, "--network", network, *options
    )


def leaves_by(world: World, host: str, sandbox: str, device: str, within: float = 10.0) -> bool:
    """Whether a ping of the client goes out by an interface of a sandbox, and is answered; that it
    went is to be seen `within` s."""
    client = world.host("client").address
    capture = world.host(host).popen(
        ["nsenter", "-n", "-t", str(world.read(host, "sandbox", "inspect", sandbox)["pid"]),
         "tcpdump", "-nni", device, "-c", "1", "-l", "--immediate-mode",
         f"icmp[0] == 8 and dst {client}"],
        stdout=-1, stderr=-1, text=True,
    )  # fmt: skip
    until_said(capture.stderr, "listening on")
    answered = world.pings(host, sandbox, client, within=10)
    try:
        capture.wait(timeout=within)
    except subprocess.TimeoutExpired:
        capture.terminate()
    seen, _ = capture.communicate()
    return answered and client in seen


@pytest.mark.parametrize("second", ["overlay", "bridge"])
def test_a_workload_in_two_networks_reaches_both_and_leaves_by_the_chosen(
    world: World, second: str
) -> None:
    a, b = world.network(), world.network("--driver", second)
    in_a = world.workload("h2", a)
    in_b = world.workload("h3" if second == "overlay" else "h1", b)
    first = world.workload("h1", a, "", "--network", b)
    other = world.workload("h1", a, "", "--network", b, "--default", b)
    for both in (first, other):
        assert world.reaches("h1", both, in_a) and world.reaches("h1", both, f"{in_a}.{a}")
        assert world.reaches("h1", both, in_b) and world.reaches("h1", both, f"{in_b}.{b}")
    assert world.reaches("h2", in_a, first)
    assert world.reaches("h3" if second == "overlay" else "h1", in_b, other)
    assert leads(world, "h1", first) == [("eth0", gateway(world, a))]
    assert leads(world, "h1", other) == [("eth1", gateway(world, b))]
    assert leaves_by(world, "h1", first, "eth0") and leaves_by(world, "h1", other, "eth1")
    assert not leaves_by(world, "h1", other, "eth0", within=1)
    told = interfaces(world, "h1", other)
    assert [(i["network"], i["priority"], i["default_routes"]) for i in told.values()] == [
        (a, 0, []), (b, 1, ["ipv4"]),
    ]  # fmt: skip


def test_an_interface_comes_and_goes_while_another_carries_traffic(world: World) -> None:
    a, b = world.network(), world.network()
    in_a, in_b = world.workload("h2", a), world.workload("h3", b)
    one = world.workload("h1", a)
    assert not world.pings("h1", one, in_b)
    pid = str(world.read("h1", "sandbox", "inspect", one)["pid"])
    command = ["nsenter", "-n", "-t", pid, "ping", "-i", "0.02", world.address("h2", in_a, a)]
    with Echoes(world.host("h1").popen(command, stdout=-1, text=True)) as ping:
        for _ in range(3):
            id = connect(world, "h1", one, b, "--priority", "1", "--wait=10")
            assert leads(world, "h1", one) == [("eth1", gateway(world, b))]
            assert world.reaches("h1", one, in_b), "by name"
            assert world.reaches("h3", in_b, one), "and back"
            assert leaves_by(world, "h1", one, "eth1")
            world.vx("h1", "endpoint", "rm", id, "--wait=10")
            assert leads(world, "h1", one) == [("eth0", gateway(world, a))]
            assert not world.pings("h1", one, in_b) and leaves_by(world, "h1", one, "eth0")
        assert ping.end() == []
    assert world.inside("h1", one, "ip", "link", "show", "eth1").returncode


def test_the_way_out_is_taken_over_without_a_gap(world: World) -> None:
    a, b = world.network("--ipv6"), world.network("--ipv6")
    one = world.workload("h1", a)
    # What the kernel tells of the sandbox's routes: between two defaults none is deleted.
    watch = world.host("h1").popen(
        ["nsenter", "-n", "-t", str(world.read("h1", "sandbox", "inspect", one)["pid"]),
         "ip", "-o", "monitor", "route"],
        stdout=-1, text=True,
    )  # fmt: skip
    try:
        assert watch.stdout is not None
        mark = ("ip", "route", "replace", "unreachable", "198.51.100.1")
        while world.inside("h1", one, *mark).returncode == 0:
            if select.select([watch.stdout], [], [], 0.05)[0]:
                break  # it listens
        connect(world, "h1", one, b, "--priority", "1")
        for family in ("-4", "-6"):
            assert [device for device, _ in leads(world, "h1", one, family)] == ["eth1"]
        world.inside("h1", one, "ip", "route", "del", "unreachable", "198.51.100.1")
        seen = []
        while "198.51.100.1" not in (line := said(watch.stdout)) or "Deleted" not in line:
            assert line, "it has ended"
            seen.append(line)
    finally:
        watch.kill()
        watch.wait()
    defaults = [line for line in seen if "default" in line]
    assert len(defaults) == 2, seen
    assert not any("Deleted" in line for line in defaults), defaults


def test_what_a_service_needs_in_a_sandbox_goes_with_the_interface(world: World) -> None:
    a, b = world.network(), world.network("--ipv6")
    one = world.workload("h1", a)
    look = ("h1", one, "sh", "-c", "ip rule; ip -6 rule; nft list tables")
    before = world.inside(*look).stdout
    world.vx("h1", "service", "create", f"{b}-s", "--network", b, "--port", "80", "--wait=10")
    for _ in range(2):
        connect(world, "h1", one, b, "--wait=10")
        world.wait(lambda: "vxmesh_replies" in world.inside(*look).stdout, "the way back is there")
        world.vx("h1", "endpoint", "rm", one, "--network", b, "--wait=10")
        world.wait(lambda: world.inside(*look).stdout == before, "the way back is gone")


def test_a_published_port_follows_the_default_route(world: World) -> None:
    a, b = world.network(), world.network()
    name = f"{a}-web"
    world.vx(
        "h1", "run", "--network", a, "--name", name, "--publish", "18095:80", "-d", "--wait=10",
        "--", "python3", "-m", "http.server", "80",
    )  # fmt: skip
    at = f"http://{world.host('h1').address}:18095/"
    ask = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=float(sys.argv[2]))"

    def answers(within: float = 20) -> bool:
        return world.run("client", "python3", "-c", ask, at, str(within)).returncode == 0

    world.wait(answers, "it answers by the first network")
    connect(world, "h1", name, b, "--priority", "1", "--wait=10")
    assert answers(), "by the second"
    world.vx("h1", "endpoint", "rm", name, "--network", a, "--wait=10")
    assert answers()
    world.vx("h1", "endpoint", "rm", name, "--network", b, "--wait=10")
    assert not answers(within=3)
    connect(world, "h1", name, a, "--wait=10")
    assert answers()


def test_each_family_has_its_default_by_the_first_that_has_it(world: World) -> None:
    a, b = world.network(), world.network("--ipv6-only")
    shut, dual = world.network("--internal", "--ipv6"), world.network("--ipv6")
    one = world.workload("h1", shut, "", "--network", f"{a},{b}")
    assert leads(world, "h1", one) == [("eth1", gateway(world, a))]
    assert leads(world, "h1", one, "-6") == [("eth2", gateway(world, b))]
    told = interfaces(world, "h1", one)
    assert [told[name]["default_routes"] for name in sorted(told)] == [[], ["ipv4"], ["ipv6"]]
    connect(world, "h1", one, dual)
    assert leads(world, "h1", one) == [("eth1", gateway(world, a))], "the older one keeps it"
    world.vx("h1", "endpoint", "rm", one, "--network", b)
    gateways = world.read("h1", "network", "inspect", dual)["gateways"]
    v4, v6 = sorted(gateways, key=lambda g: ":" in g)
    assert leads(world, "h1", one) == [("eth1", gateway(world, a))]
    assert leads(world, "h1", one, "-6") == [("eth3", v6)]
    world.vx("h1", "endpoint", "rm", one, "--network", a)
    assert leads(world, "h1", one) == [("eth3", v4)]
    connect(world, "h1", one, b, "--priority", "-1")
    assert leads(world, "h1", one, "-6") == [("eth3", v6)]
    world.vx("h1", "endpoint", "rm", one, "--network", dual)
    assert leads(world, "h1", one) == []
    assert leads(world, "h1", one, "-6") == [("eth1", gateway(world, b))], "not the internal one's"


def test_a_workload_lives_without_networks_and_is_connected_again(world: World) -> None:
    a, b = world.network(), world.network()
    one, in_b = world.workload("h1", a), world.workload("h2", b)
    world.vx("h1", "endpoint", "rm", one, "--wait=10")
    links = json.loads(world.inside("h1", one, "ip", "-j", "link").stdout)
    assert [link["ifname"] for link in links] == ["lo"]
    assert "nameserver" not in world.vx("h1", "exec", one, "--", "cat", "/etc/resolv.conf")
    assert world.read("h1", "sandbox", "inspect", one)["interfaces"] == []
    connect(world, "h1", one, b, "--wait=10")
    conf = world.inside("h1", one, "cat", "/etc/resolv.conf").stdout
    assert f"nameserver {gateway(world, b)}\n" in conf and f"{b}.vxmesh.internal" in conf
    assert world.reaches("h1", one, in_b), "by name, at the name server of its network now"
    assert world.reaches("h2", in_b, one)
    assert leads(world, "h1", one) == [("eth0", gateway(world, b))]
    world.vx("h1", "sandbox", "rm", one)


def test_a_restart_changes_nothing_and_what_follows_works(world: World) -> None:
    a, b = world.network("--ipv6"), world.network("--ipv6")
    one = world.workload("h1", a, "", "--network", b, "--default", b)
    in_a = world.workload("h2", a)
    ask = (
        "h1",
        one,
        "sh",
        "-c",
        "ip -o addr show scope global; ip route; ip -6 route show default; ip -o link",
    )
    before, told = world.inside(*ask).stdout, interfaces(world, "h1", one)
    world.bed.kill("h1")
    world.bed.start("h1")
    assert world.inside(*ask).stdout == before
    assert interfaces(world, "h1", one) == told
    world.vx("h1", "endpoint", "rm", one, "--network", b)
    assert [device for device, _ in leads(world, "h1", one)] == ["eth0"]
    assert [device for device, _ in leads(world, "h1", one, "-6")] == ["eth0"]
    assert world.reaches("h1", one, in_a)


def test_macs_can_be_given(world: World) -> None:
    a, b = world.network(), world.network()
    mac, in_a, in_b = "02:00:5e:00:53:11", "02:00:5e:00:53:0a", "02:00:5e:00:53:0b"
    one = world.workload("h1", a, "", "--mac", mac)
    assert world.link("h1", one)["address"] == mac
    assert world.read("h2", "endpoint", "inspect", one)["mac"] == mac
    macs = ("--mac", f"{b}={in_b}", "--mac", f"{a}={in_a}")
    two = world.workload("h2", f"{a},{b}", "", *macs)
    assert world.link("h2", two)["address"] == in_a
    assert world.link("h2", two, "eth1")["address"] == in_b
    assert world.reaches("h1", one, two)


REFUSED = [
    ("run --network {a} --network {a} -- true", 2, "is given twice"),
    ("run --network {a} --default {b} -- true", 2, "is none of the networks given"),
    ("run --network {a},{b} --mac 02:00:5e:00:53:12 -- true", 2, "as NET=MAC"),
    ("run --network {a} --mac {b}=02:00:5e:00:53:12 -- true", 2, "is none of the networks given"),
    ("run --network {a} --mac 02:00:5e:00:53 -- true", 2, "is malformed"),
    ("run --network {a} --mac 01:00:5e:00:53:12 -- true", 2, "is no station's address"),
    ("run --network {a} --mac {mac} -- true", 5, "is taken by {one}"),
    ("endpoint create --network {b}", 2, "--name"),
    ("endpoint create --sandbox nobody --network {b}", 4, "sandbox 'nobody': does not exist"),
    ("endpoint create --sandbox {one} --network nowhere", 4, "network 'nowhere': does not exist"),
    ("endpoint create --sandbox {one} --network {a}", 5, "is in network {a} already"),
    ("endpoint create --sandbox {one} --network {a} --name x", 5, "is in network {a} already"),
    ("endpoint create --sandbox {one} --network {b} --name {two}", 5, "exists in network {b}"),
    ("endpoint create --sandbox {one} --network {b} --ifname eth0", 5, "exists in that sandbox"),
    ("endpoint create --sandbox {one} --network {b} --ifname lo", 5, "exists already"),
    ("endpoint create --sandbox {one} --network {b} --netns x", 2, "does not go with --sandbox"),
    ("endpoint create --network {b} --name x --priority 1", 2, "has no namespace to be in"),
    ("endpoint create --sandbox {one} --network {b} --priority 40000", 2, "is out of range"),
    ("endpoint create --sandbox {one} --network {b} --ip 192.0.2.1", 2, "is in no subnet"),
    ("endpoint create --sandbox {one} --network {far}", 5, "is a bridge on h2"),
]


def test_what_cannot_be_is_refused_and_leaves_all_as_it_was(world: World) -> None:
    a, b, far = world.network(), world.network(), world.network("--driver", "bridge", host="h2")
    one, two = world.workload("h1", a), world.workload("h1", b)
    known = {"a": a, "b": b, "far": far, "one": one, "two": two}
    known["mac"] = world.link("h1", one)["address"]

    def look() -> object:
        shown = world.inside("h1", one, "ip", "-o", "addr", "show", "scope", "global").stdout
        return shown, world.read("h1", "sandbox", "ls"), world.read("h1", "endpoint", "ls")

    before = look()
    for words, status, text in REFUSED:
        done = world.try_vx("h1", *words.format(**known).split())
        assert (done.returncode, text.format(**known) in done.stderr) == (status, True), (
            words, done.stderr,
        )  # fmt: skip
        assert look() == before, words


# A workload that brings a /etc/resolv.conf of its own: a file of its root directory, or one that
# it mounted there, or a link out of it.
STRANGER = """
import os, sys
from agent import syscalls
kind, root = sys.argv[1:]
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount(None, "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
file = root + "/etc/resolv.conf"
if kind == "link":
    os.symlink(root + "/victim", file)
else:
    open(file, "w").write("mine")
if kind == "mount":
    syscalls.mount("other", root + "/etc", "tmpfs")
    open(file, "w").write("mine")
os.chroot(root)
os.chdir("/")
print("ready", flush=True)
sys.stdin.read()
print(open("/etc/resolv.conf").read() if kind != "link" else "mine")
"""


@pytest.mark.parametrize("kind", ["file", "mount", "link"])
def test_no_file_but_ours_is_ever_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("the host's")
    with subprocess.Popen(
        [sys.executable, "-c", STRANGER, kind, str(tmp_path)],
        stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as child:  # fmt: skip
        assert said(child.stdout) == "ready\n"
        assert not tell_resolver(child.pid, syscalls.start_time(child.pid), "ours")
        assert not tell_resolver(child.pid, 1, "ours"), "it was another process"
        told, _ = child.communicate("")
    assert told == "mine\n" and victim.read_text() == "the host's"
    assert not tell_resolver(child.pid, 1, "ours"), "it has ended"
