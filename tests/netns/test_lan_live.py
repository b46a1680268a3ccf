"""Networks on the hosts' own wire while a workload runs: connected, disconnected, its interface
renamed, and which interface has the default routes."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess

from agent.datapath import nameway
from tests.netns.test_drivers import LOOK_UP, _lan, _reaches
from tests.netns.test_several_networks import connect, gateway, leads
from tests.netns.world import World


def _inside_of(world: World, host: str, sandbox: str) -> list[str]:
    """The names of the interfaces in a sandbox."""
    told = world.inside(host, sandbox, "ip", "-j", "link").stdout
    return sorted(link["ifname"] for link in json.loads(told) if link["ifname"] != "lo")


def test_a_running_workload_is_connected_to_the_wire_and_taken_off_it(world: World) -> None:
    lan, other = _lan(world), world.network()
    one, far, apart = (world.workload(h, n) for h, n in (("h1", other), ("h2", lan), ("h2", other)))
    assert not world.pings("h1", one, far)
    for _ in range(2):
        id = connect(world, "h1", one, lan, "--wait=10")
        address = world.address("h1", one, lan)
        assert _inside_of(world, "h1", one) == ["eth0", "eth1"]
        assert world.reaches("h1", one, far) and world.reaches("h1", one, apart), "by name"
        assert _reaches(world, "client", address)
        world.vx("h1", "endpoint", "rm", id, "--wait=10")
        assert _inside_of(world, "h1", one) == ["eth0"]
        assert world.reaches("h1", one, apart)
        assert not _reaches(world, "client", address, within=1) and world.pings("h1", one, apart)
        assert "vxmesh_names" not in world.vx("h1", "exec", one, "--", "nft", "list", "tables")


def test_an_interface_that_its_workload_renamed_is_off_the_wire_with_its_endpoint(
    world: World,
) -> None:
    lan, other = _lan(world), world.network()
    one = world.workload("h1", lan)
    world.workload("h2", other)
    two = world.workload("h1", f"{other},{lan}")
    for name, device in ((one, "eth0"), (two, "eth1")):
        address = world.address("h1", name, lan)
        renamed = world.inside("h1", name, "ip", "link", "set", device, "name", "mine0")
        assert renamed.returncode == 0, renamed.stderr
        assert _reaches(world, "client", address)
        world.vx("h1", "endpoint", "rm", name, "--network", lan, "--wait=10")
        assert "mine0" not in _inside_of(world, "h1", name)
        assert not _reaches(world, "client", address, within=1)
        late = world.workload("h2", lan, "", "--ip", address)
        # Who has just been found to be away is asked for anew in a second only.
        has = functools.partial(_reaches, world, "client", address, within=1)
        world.wait(has, "another host's workload has it now")
        world.vx("h2", "sandbox", "rm", late, "--wait=10")


def test_what_a_workload_changes_of_its_interface_is_put_right_and_stalls_nobody(
    world: World,
) -> None:
    lan, other = _lan(world), world.network()
    one, two = world.workload("h1", lan), world.workload("h1", lan)
    before = world.link("h1", one)
    assert world.inside("h1", one, "ip", "link", "set", "eth0", "name", "mine0").returncode == 0
    assert world.inside("h1", one, "nft", "delete", "table", "ip", "vxmesh_names").returncode == 0
    world.wait(lambda: _inside_of(world, "h1", one) == ["eth0"], "it has its name again")
    assert world.link("h1", one)["ifindex"] == before["ifindex"], "and is the same"
    address = world.address("h1", two)

    def told() -> str:
        return world.inside("h1", one, "python3", "-c", LOOK_UP, two).stdout.strip()

    world.wait(lambda: told() == address, "the way to the name server too")
    assert _reaches(world, "client", world.address("h1", one))
    mac = world.link("h1", two)["address"]
    steal = (
        f"ip link set eth0 down; ip link set eth0 address 02:00:5e:00:53:77; "
        f"ip link add link eth0 name thief address {mac} type macvlan; ip link set eth0 up"
    )
    # A neighbour's MAC, taken while that one has its interface down: it cannot be set up again.
    assert world.inside("h1", two, "ip", "link", "set", "eth0", "down").returncode == 0
    assert world.inside("h1", one, "sh", "-c", steal).returncode == 0
    for _ in range(3):
        assert world.workload("h1", other)


def test_the_way_to_the_name_server_is_put_right_and_only_then() -> None:
    name = f"vxt-{os.getpid()}-way"
    subprocess.run(["ip", "netns", "add", name], check=True)
    nft = ["ip", "netns", "exec", name, "nft"]
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert asyncio.run(nameway.audit(fd)), "it is not there"
        assert not asyncio.run(nameway.audit(fd))
        asyncio.run(nameway.furnish(fd))
        assert not asyncio.run(nameway.audit(fd))
        subprocess.run([*nft, "flush", "table", "ip", "vxmesh_names"], check=True)
        assert asyncio.run(nameway.audit(fd)), "it is another"
        assert not asyncio.run(nameway.audit(fd))
        asyncio.run(nameway.clear(fd))
        assert asyncio.run(nameway.audit(fd))
    finally:
        os.close(fd)
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_the_way_out_moves_between_the_wire_and_an_overlay_network(world: World) -> None:
    lan, over = _lan(world), world.network()
    client = world.host("client").address
    on_lan, on_over = [("eth0", client)], [("eth1", gateway(world, over))]
    one = world.workload("h1", f"{lan},{over}")
    assert leads(world, "h1", one) == on_lan
    chosen = world.workload("h1", f"{lan},{over}", "", "--default", over)
    assert leads(world, "h1", chosen) == on_over and world.reaches("h1", chosen, client)
    world.vx("h1", "endpoint", "rm", chosen, "--network", over, "--wait=10")
    assert leads(world, "h1", chosen) == on_lan and world.reaches("h1", chosen, client)
    connect(world, "h1", chosen, over, "--priority", "1", "--wait=10")
    assert leads(world, "h1", chosen) == on_over
    live = world.workload("h1", over)
    connect(world, "h1", live, lan, "--wait=10")
    assert leads(world, "h1", live) == [("eth0", gateway(world, over))], "the older one keeps it"
    world.vx("h1", "endpoint", "rm", live, "--network", lan, "--wait=10")
    connect(world, "h1", live, lan, "--priority", "1", "--wait=10")
    assert leads(world, "h1", live) == [("eth1", client)] and world.reaches("h1", live, client)
    world.vx("h1", "endpoint", "rm", live, "--network", lan, "--wait=10")
    assert leads(world, "h1", live) == [("eth0", gateway(world, over))]


def test_ports_are_published_where_the_default_routes_are(world: World) -> None:
    lan, over = _lan(world), world.network()
    serve = ("python3", "-m", "http.server", "80")
    told = "has no use in network " + lan
    for networks in ((f"{over},{lan}", "--default", lan), (lan,), (f"{lan},{over}",)):
        done = world.try_vx("h1", "run", "--network", *networks, "-p", "18097:80", "--", *serve)
        assert done.returncode == 2 and told in done.stderr, (networks, done.stderr)
    name = f"{over}-web"
    world.vx(
        "h1", "run", "--network", f"{lan},{over}", "--default", over, "--name", name, "-d",
        "-p", "18097:80", "--wait=10", "--", *serve,
    )  # fmt: skip
    # Who is on the wire is answered straight: somebody behind it asks.
    beyond, client = "203.0.113.9", world.host("client").address
    world.run("client", "ip", "addr", "add", f"{beyond}/32", "dev", "lo")
    world.later(lambda: world.run("client", "ip", "addr", "del", f"{beyond}/32", "dev", "lo"))
    world.run("h1", "ip", "route", "add", beyond, "via", client)
    world.later(lambda: world.run("h1", "ip", "route", "del", beyond))
    there = (world.host("h1").address, 18097)
    told = f"import socket as s; c = s.create_connection({there}, 20, ({beyond!r}, 0)); "
    ask = ("python3", "-c", told + "c.send(b'GET / HTTP/1.0\\r\\n\\r\\n'); assert c.recv(9)")
    world.wait(lambda: not world.run("client", *ask).returncode, "it answers")
    world.vx("h1", "endpoint", "rm", name, "--network", lan, "--wait=10")
    done = world.try_vx(
        "h1", "endpoint", "create", "--sandbox", name, "--network", lan, "--priority", "2"
    )
    assert done.returncode == 5 and "has published ports" in done.stderr, done.stderr
    connect(world, "h1", name, lan, "--wait=10")
    assert not world.run("client", *ask).returncode
