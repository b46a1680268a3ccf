"""Agents among themselves: records everywhere, addresses donated, peers found, streams mended."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import pytest

from agent.client import Client
from agent.errors import Timeout
from agent.testbed import temporary
from tests.netns.world import World, said


def test_a_change_is_seen_everywhere(world: World) -> None:
    net = world.network()
    world.vx("h2", "endpoint", "create", "--network", net, "--name", "here", "--wait=10")
    for host in ("h1", "h2", "h3"):
        assert [e["node"] for e in world.read(host, "endpoint", "ls")] == ["h2"]
    world.vx("h2", "endpoint", "rm", "here", "--wait=10")
    for host in ("h1", "h2", "h3"):
        assert world.read(host, "endpoint", "ls") == []


def test_what_a_cut_host_missed_is_repaired(world: World) -> None:
    net = world.network()
    world.bed.cut("h3")
    world.vx("h1", "endpoint", "create", "--network", net, "--name", "missed")
    world.wait(
        lambda: world.read("h1", "node", "inspect", "h3")["state"] == "unreachable", "h1 noticed"
    )
    assert world.read("h3", "endpoint", "ls") == []
    world.bed.heal("h3")
    world.wait(lambda: world.read("h3", "endpoint", "ls"), "h3 caught up")
    world.wait(lambda: world.read("h1", "node", "inspect", "h3")["state"] == "alive", "h3 is back")


def test_records_get_through_loss(world: World) -> None:
    net = world.network()
    for host in ("h1", "h2", "h3"):
        world.bed.loss(host, 10)
    for number in range(10):
        host = ("h1", "h2", "h3")[number % 3]
        world.vx(host, "endpoint", "create", "--network", net, "--name", f"e{number}")

    def sees(host: str) -> bool:
        return len(world.read(host, "endpoint", "ls")) == 10

    for host in ("h1", "h2", "h3"):
        world.wait(partial(sees, host), f"{host} has all")


def test_no_address_twice_when_all_hosts_create_at_once(world: World) -> None:
    net = world.network("--subnet", "10.77.0.0/24")
    script = (
        "for i in $(seq 12); do vxmesh endpoint create --network %s --name $0-$i || exit 1; done"
    )
    running = [
        world.host(h).popen(["sh", "-c", script % net, h], stdout=-1, stderr=-1, text=True)
        for h in ("h1", "h2", "h3")
    ]
    for process in running:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    world.wait(lambda: len(world.read("h1", "endpoint", "ls")) == 36, "h1 has all")
    addresses = [e["addresses"][0] for e in world.read("h1", "endpoint", "ls")]
    assert len(set(addresses)) == 36

    world.wait(lambda: world.owners("h1", net) == {"h1", "h2", "h3"}, "each has a part of it")


def test_a_static_address_works_on_any_node(world: World) -> None:
    net = world.network("--subnet", "10.77.0.0/24")
    make = ("endpoint", "create", "--network", net, "--wait=10")
    world.vx("h3", *make, "--name", "a", "--ip", "10.77.0.77")
    assert world.address("h1", "a") == "10.77.0.77"
    done = world.try_vx("h2", *make, "--name", "b", "--ip", "10.77.0.77")
    assert done.returncode == 5 and "is taken by a on h3" in done.stderr


def test_an_owner_that_is_away_is_named(world: World) -> None:
    net = world.network("--subnet", "10.77.0.0/24", host="h2")
    world.bed.cut("h2")
    make = ("endpoint", "create", "--network", net, "--name", "a")
    done = world.try_vx("h1", *make)
    assert done.returncode == 1 and "h2" in done.stderr and "Bring h2 back" in done.stderr
    assert world.read("h1", "endpoint", "ls") == []
    world.bed.heal("h2")
    world.wait(lambda: world.try_vx("h1", *make).returncode == 0, "h2 donates again")


def test_wait_names_who_lacks_it(world: World) -> None:
    async def create() -> None:
        async with Client(world.host("h1").target) as client:
            await client.networks()  # what a connection takes is not to count
            world.bed.cut("h3")
            # Within a second the stream still counts as alive, and h3 cannot have it.
            await client.create_network("slow", wait=1)

    with pytest.raises(Timeout, match="kernel of h3"):
        asyncio.run(create())
    assert world.read("h1", "network", "inspect", "slow")["name"] == "slow"


def test_what_came_and_went_unheard_does_not_hold_up_a_wait(world: World) -> None:
    # h3 gets only the tombstone of a network that it never knew: nothing in its kernel changes
    # by it, and who waits for h3 must be told that all the same.
    world.bed.cut("h3")
    world.vx("h1", "network", "create", "brief")
    world.vx("h1", "network", "rm", "brief")
    world.bed.heal("h3")
    world.vx("h1", "network", "create", "after", "--wait=60")
    world.vx("h1", "network", "rm", "after", "--wait=60")


def test_an_interface_in_a_namespace_that_exists(world: World) -> None:
    net = world.network()
    one = world.workload("h1", net)
    world.run("h2", "ip", "netns", "add", "mine", check=True)
    world.later(lambda: world.run("h2", "ip", "netns", "del", "mine"))
    make = ("endpoint", "create", "--network", net, "--wait=10")
    world.vx("h2", *make, "--name", "vm", "--netns", "mine", "--alias", "db")
    assert world.reaches("h2", "vm", one)
    assert world.reaches("h1", one, "db")
    link = json.loads(
        world.run("h2", "ip", "-n", "mine", "-j", "addr", "show", "eth0", check=True).stdout
    )[0]
    assert link["address"] == world.read("h1", "endpoint", "inspect", "vm")["mac"]
    twice = world.try_vx("h2", *make, "--name", "vm2", "--netns", "/run/netns/mine")
    assert twice.returncode == 5 and "already" in twice.stderr
    make = ("endpoint", "create", "--network", world.network(), "--wait=10")
    world.vx("h2", *make, "--name", "vm2", "--netns", "/run/netns/mine", "--ifname", "lan1")
    assert "lan1" in world.run("h2", "ip", "-n", "mine", "link", check=True).stdout
    taken = world.try_vx("h2", *make, "--name", "vm3", "--netns", "mine", "--ifname", "lan1")
    assert taken.returncode == 5 and "lan1" in taken.stderr
    world.vx("h2", "endpoint", "rm", "vm2", "--wait=10")
    assert "lan1" not in world.run("h2", "ip", "-n", "mine", "link", check=True).stdout
    assert "eth0" in world.run("h2", "ip", "-n", "mine", "link", check=True).stdout


def test_a_namespace_that_is_deleted_takes_its_endpoints(world: World) -> None:
    net = world.network()
    world.run("h2", "ip", "netns", "add", "gone", check=True)
    world.vx("h2", "endpoint", "create", "--network", net, "--name", "vm", "--netns", "gone")
    world.run("h2", "ip", "netns", "del", "gone", check=True)
    world.wait(lambda: world.read("h1", "endpoint", "ls") == [], "h1 heard")
    world.wait(lambda: world.read("h2", "sandbox", "ls") == [], "and so does its sandbox")


def test_announced_rows_come_and_go_in_bulk(world: World) -> None:
    net = world.network("--subnet", "10.64.0.0/12")
    world.workload("h2", net)
    lines = "\n".join(
        json.dumps({
            "name": f"a{n}", "mac": f"02:55:00:00:{n >> 8:02x}:{n & 255:02x}",
            "addresses": [f"10.65.{n >> 8}.{n & 255}"],
        })
        for n in range(1, 3001)
    )  # fmt: skip
    world.vx("h1", "endpoint", "announce", "--network", net, "--file", "-", "--wait=20",
             input=lines)  # fmt: skip
    vni, via = world.vni(net), world.host("h1").address
    rows = {m: v for m, v in world.fdb("h2", vni).items() if m.startswith("02:55")}
    assert len(rows) == 3000 and set(rows.values()) == {via}
    assert len([m for m in world.neighbours("h2", vni).values() if m.startswith("02:55")]) == 3000
    world.vx("h1", "endpoint", "rm", "--network", net, "--all", "--wait=20")
    assert not [m for m in world.fdb("h2", vni) if m.startswith("02:55")]
    assert not [m for m in world.neighbours("h2", vni).values() if m.startswith("02:55")]


def test_names_aliases_and_addresses_back(world: World) -> None:
    net = world.network()
    one = world.workload("h1", net, "", "--alias", "web")
    two = world.workload("h2", net, "", "--alias", "web")
    found = world.read("h3", "resolve", "web", "--network", net)
    assert found["result"] == "answer"
    both = {world.address("h1", n, net) for n in (one, two)}
    assert {r["data"] for r in found["records"]} == both
    reverse = ".".join(reversed(world.address("h1", one, net).split("."))) + ".in-addr.arpa"
    found = world.read("h1", "resolve", f"{reverse}/PTR", "--network", net)
    assert found["records"][0]["data"].rstrip(".") == f"{one}.{net}.vxmesh.internal"
    address = world.address("h1", two, net)
    world.wait(
        lambda: address in world.inside("h1", one, "getent", "hosts", two).stdout, "it is answered"
    )


def test_reflection_and_health(world: World) -> None:
    program = (
        "import grpc\n"
        "from grpc_health.v1 import health_pb2, health_pb2_grpc\n"
        "from grpc_reflection.v1alpha.proto_reflection_descriptor_database import "
        "ProtoReflectionDescriptorDatabase\n"
        "channel = grpc.insecure_channel('unix:///run/vxmesh/agent.sock')\n"
        "print(sorted(ProtoReflectionDescriptorDatabase(channel).get_services()))\n"
        "request = health_pb2.HealthCheckRequest(service='vxmesh.v1.Control')\n"
        "print(health_pb2_grpc.HealthStub(channel).Check(request).status)\n"
    )
    done = world.run("h1", "python", "-W", "ignore", "-c", program, check=True)
    assert "vxmesh.v1.Control" in done.stdout and done.stdout.strip().endswith("1")


def test_watch_tells_what_there_is_and_then_what_changes(world: World) -> None:
    program = (
        "import asyncio, sys\nfrom agent.client import Client\n"
        "async def main():\n async with Client() as c:\n  async for e in c.watch():\n"
        "   print(e.action, e.WhichOneof('object'), e.network.name, e.endpoint.name, flush=True)\n"
        "   if e.action == 'remove' and e.endpoint.name: return\n"
        "asyncio.run(main())"
    )
    net = world.network()
    watcher = world.host("h3").popen(["python", "-c", program], stdout=-1, text=True)
    lines: list[str] = []
    while not lines or not lines[-1].startswith("synced"):
        lines.append(said(watcher.stdout))
        assert lines[-1], "the watch ended"
    assert any(line.startswith(f"create network {net}") for line in lines)
    # Of what is gone before it is told of, nothing is.
    world.vx("h1", "endpoint", "create", "--network", net, "--name", "seen", "--wait=20")
    world.vx("h1", "endpoint", "rm", "seen")
    rest, _ = watcher.communicate(timeout=60)
    assert "create endpoint  seen" in rest and "remove endpoint  seen" in rest


def test_peers_find_each_other_by_mdns() -> None:
    # No agent is told of another; `temporary` returns once each sees all.
    with temporary(hosts=2, agent_options=("--mdns",)) as bed:
        world = World(bed)
        assert {n["state"] for n in world.read("h2", "node", "ls")} == {"alive"}
        assert len(world.read("h1", "node", "ls")) == 2
