"""The main job: workloads on three hosts reach each other, by name, and nobody else does."""

from __future__ import annotations

import re
import signal
import subprocess

from tests.netns.echoes import Echoes
from tests.netns.world import PATIENCE, World, said, until_said


def test_workloads_reach_each_other_by_name(world: World) -> None:
    net = world.network()
    names = [world.workload(h, net) for h in ("h1", "h2", "h3")]
    for host, sandbox in zip(("h1", "h2", "h3"), names, strict=True):
        for target in names:
            assert world.reaches(host, sandbox, target), f"{sandbox} to {target}"
        assert world.reaches(host, sandbox, f"{names[0]}.{net}")
        assert world.reaches(host, sandbox, f"{names[0]}.{net}.vxmesh.internal")


def test_the_wire_sees_vxlan_and_no_arp_inside(world: World) -> None:
    net = world.network()
    one, two = world.workload("h1", net), world.workload("h3", net)
    address = world.address("h1", two, net)
    # But for VNI 0, by which agents see in what state frames arrive.
    capture = world.host("h1").popen(
        ["tcpdump", "-nni", "eth0", "-U", "-c", "4", "-l", "--immediate-mode",
         "udp port 4789 and udp[12:4] & 0xffffff00 != 0"],
        stdout=-1, stderr=-1, text=True,
    )  # fmt: skip
    try:
        until_said(capture.stderr, "listening on")
        # Someone who is not there is asked for as well: that question must not leave either.
        nobody = re.sub(r"\d+$", "250", address)
        assert not world.pings("h1", one, nobody)
        assert world.pings("h1", one, address, count=2, within=10)
        out, _ = capture.communicate(timeout=30)
    finally:
        capture.kill()
    assert "VXLAN" in out and "vni" in out
    assert f"> {address}: ICMP echo request" in out
    assert "ARP" not in out


def test_two_networks_cannot_reach_each_other(world: World) -> None:
    a, b = world.network(), world.network()
    in_a, in_b = world.workload("h1", a), world.workload("h1", b)
    far_b = world.workload("h2", b)
    gateway_b = world.read("h1", "network", "inspect", b)["gateways"][0]
    targets = [world.address("h1", in_b, b), world.address("h1", far_b, b), gateway_b]
    for target in targets:
        assert not world.pings("h1", in_a, target), target
    # Nor with a route that says so, nor by asking on the wire.
    gateway_a = world.read("h1", "network", "inspect", a)["gateways"][0]
    for target in targets:
        world.inside("h1", in_a, "ip", "route", "replace", target, "via", gateway_a)
        assert not world.pings("h1", in_a, target), target
        world.inside("h1", in_a, "ip", "route", "replace", target, "dev", "eth0")
        assert not world.pings("h1", in_a, target), target
    assert not world.pings("h1", in_a, in_b), "nor by name"


def test_a_workload_in_two_networks_reaches_both(world: World) -> None:
    a, b = world.network(), world.network()
    in_a, in_b = world.workload("h2", a), world.workload("h3", b)
    both = world.workload("h1", f"{a},{b}")
    assert world.reaches("h1", both, in_a)
    assert world.reaches("h1", both, in_b)
    assert world.reaches("h3", in_b, both)
    assert not world.pings("h2", in_a, in_b)


def test_traffic_leaves_through_the_host_unless_internal(world: World) -> None:
    out, closed = world.network(), world.network("--internal")
    client = world.host("client").address
    free, shut = world.workload("h1", out), world.workload("h1", closed)
    assert world.reaches("h1", free, client)
    assert not world.pings("h1", shut, client)
    other = world.workload("h2", closed)
    assert world.reaches("h1", shut, other), "but inside it goes on"
    # The client sees the host, not the workload.
    capture = world.host("client").popen(
        ["tcpdump", "-nni", "eth0", "-c", "1", "-l", "--immediate-mode", "icmp[0] == 8"],
        stdout=-1, stderr=-1, text=True,
    )  # fmt: skip
    until_said(capture.stderr, "listening on")
    assert world.reaches("h1", free, client)
    out, _ = capture.communicate(timeout=30)
    assert f"{world.host('h1').address} > {client}" in out


def test_the_client_cannot_reach_a_workload_by_a_route(world: World) -> None:
    net = world.network()
    one = world.workload("h1", net)
    address = world.address("h1", one, net)
    host = world.host("h1").address
    world.run("client", "ip", "route", "add", f"{address}/32", "via", host, check=True)
    world.later(lambda: world.run("client", "ip", "route", "del", f"{address}/32"))
    done = world.run("client", "ping", "-c1", "-W1", address)
    assert done.returncode != 0


def test_the_mtu_is_what_fits(world: World) -> None:
    net = world.network()
    one, two = world.workload("h1", net), world.workload("h2", net)
    link = world.link("h1", one)
    assert link["mtu"] == 1450
    address = world.address("h2", two)
    whole = ("ping", "-c1", "-W10", "-M", "do", "-s", str(1450 - 28), address)
    assert world.inside("h1", one, *whole).returncode == 0
    narrow = world.network("--mtu", "1300")
    three = world.workload("h1", narrow)
    link = world.link("h1", three)
    assert link["mtu"] == 1300


def test_rows_are_there_only_while_a_local_endpoint_is(world: World) -> None:
    net = world.network()
    vni = world.vni(net)
    one = world.workload("h1", net)
    mac = world.read("h1", "endpoint", "inspect", one, "--network", net)["mac"]
    assert world.fdb("h2", vni) == {}
    two = world.workload("h2", net)
    assert world.fdb("h2", vni) == {mac: world.host("h1").address}
    assert world.neighbours("h2", vni) == {world.address("h1", one, net): mac}
    assert f"vxl{vni}" not in world.links("h3")
    world.vx("h2", "sandbox", "rm", two, "--wait=10")
    assert world.links("h2").isdisjoint({f"vxl{vni}", f"vxb{vni}"})
    assert world.fdb("h1", vni) == {}


def test_a_command_ends_with_its_status_and_leaves_nothing(world: World) -> None:
    net = world.network()
    before = world.links("h1")
    done = world.try_vx("h1", "run", "--network", net, "--", "sh", "-c", "echo seen; exit 7")
    assert (done.returncode, done.stdout) == (7, "seen\n")
    assert world.links("h1") == before
    assert world.read("h1", "sandbox", "ls") == []
    assert world.read("h1", "endpoint", "ls") == []
    done = world.try_vx("h1", "run", "--network", net, "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == 128 + 9
    done = world.try_vx("h1", "run", "--network", net, "--", "no-such-command")
    assert done.returncode == 127 and "no-such-command" in done.stderr


def test_a_command_gets_what_is_sent_to_run_and_exec(world: World) -> None:
    net = world.network()
    one = world.workload("h1", net)
    tells = (
        "import signal, sys\n"
        "def tell(number, frame):\n print(number, flush=True)\n number == 15 and sys.exit(7)\n"
        "for n in (1, 2, 3, 15): signal.signal(n, tell)\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    for words in (["exec", one], ["run", "--network", net]):
        ours = world.host("h1").popen(
            ["vxmesh", *words, "--", "python3", "-c", tells], stdout=subprocess.PIPE, text=True
        )
        world.later(ours.kill)
        assert said(ours.stdout) == "ready\n"
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
            ours.send_signal(number)
            assert said(ours.stdout) == f"{int(number)}\n"
        assert ours.wait(PATIENCE) == 7 and said(ours.stdout) == ""


def test_a_workload_that_is_killed_is_cleaned_up(world: World) -> None:
    net = world.network()
    one, two = world.workload("h1", net), world.workload("h2", net)
    pid = world.read("h1", "sandbox", "inspect", one)["pid"]
    world.run("h1", "kill", "-9", str(pid), check=True)
    world.wait(lambda: not world.read("h2", "endpoint", "ls", "--node", "h1"), "h2 heard")
    world.wait(lambda: world.fdb("h2", world.vni(net)) == {}, "h2's row is gone")
    assert not world.pings("h2", two, one)


def test_what_ends_while_the_agent_is_down_is_gone_when_it_is_back(world: World) -> None:
    net = world.network()
    one, two = world.workload("h1", net), world.workload("h2", net)
    stays = world.workload("h1", net)
    address = world.address("h1", stays, net)
    pid = world.read("h1", "sandbox", "inspect", one)["pid"]
    world.bed.kill("h1")
    world.run("h1", "kill", "-9", str(pid), check=True)
    assert world.reaches("h2", two, stays), "traffic goes on without the agent"
    assert world.reaches("h2", two, address)
    world.bed.start("h1")
    assert [s["name"] for s in world.read("h1", "sandbox", "ls")] == [stays]
    world.wait(
        lambda: [e["name"] for e in world.read("h2", "endpoint", "ls", "--node", "h1")] == [stays],
        "h2 heard",
    )
    assert world.address("h1", stays, net) == address
    world.wait(
        lambda: len([d for d in world.links("h1") if d.startswith("vxp")]) == 1, "one port is left"
    )


def test_traffic_and_names_do_not_notice_the_agents_restart(world: World) -> None:
    net = world.network()
    one, two = world.workload("h1", net), world.workload("h2", net)
    assert world.reaches("h1", one, two), "the name server has heard of it"
    address = world.address("h2", two, net)
    pid = world.read("h1", "sandbox", "inspect", one)["pid"]
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ping", "-i", "0.01", address]
    with Echoes(world.host("h1").popen(command, stdout=-1, text=True)) as ping:
        world.bed.kill("h1")
        world.bed.kill("h2")
        names = world.run(
            "h1", "nsenter", "-t", str(pid), "-n", "-m", "ping", "-c1", "-W10", two, timeout=60
        )
        assert names.returncode == 0, "a name resolves while no agent runs"
        world.bed.start("h1")
        world.bed.start("h2")
        assert ping.end() == []


def test_several_at_once_leave_nothing(world: World) -> None:
    net = world.network()
    hosts = ["h1", "h2", "h3"] * 4
    started = [
        world.host(h).popen(
            ["vxmesh", "run", "--network", net, "--", "sh", "-c", "sleep 0.3; hostname"],
            stdout=-1, stderr=-1, text=True,
        )
        for h in hosts
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out
    for host in ("h1", "h2", "h3"):
        assert world.read(host, "sandbox", "ls") == []
        assert not [d for d in world.links(host) if d.startswith(("vxp", "vxb", "vxl"))]


def test_published_ports_lead_to_the_workload(world: World) -> None:
    net = world.network()
    one = world.workload("h1", net, "", "--publish", "18080:8080")
    server = (
        "import socket; s = socket.create_server(('', 8080)); s.settimeout(60)\n"
        "for _ in range(3):\n c, a = s.accept(); c.sendall(a[0].encode()); c.close()"
    )
    listening = world.host("h1").popen(["vxmesh", "exec", one, "--", "python3", "-c", server])
    world.wait(
        lambda: ":8080" in world.inside("h1", one, "ss", "-ltn").stdout, "the server listens"
    )
    address = world.host("h1").address
    read = (
        "import socket; c = socket.create_connection(('{}', 18080), 10); print(c.recv(99).decode())"
    )
    seen = world.run("client", "python3", "-c", read.format(address), check=True)
    assert seen.stdout.strip() == world.host("client").address, "the client's own address"
    for target in (address, "127.0.0.1"):
        world.run("h1", "python3", "-c", read.format(target), check=True)
    assert listening.wait(60) == 0
    taken = world.try_vx("h1", "run", "--network", net, "-p", "18080:80", "--", "true")
    assert taken.returncode == 5 and "port 18080/tcp" in taken.stderr
