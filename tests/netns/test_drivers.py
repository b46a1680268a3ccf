"""The drivers none, host and macvlan on the real kernel."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.netns.world import VXMESH, World, said


def test_network_none_is_loopback_alone(world: World) -> None:
    world.vx("h1", "run", "--network", "none", "--name", "alone", "-d", "--", "sleep", "3600")
    links = json.loads(world.vx("h1", "exec", "alone", "--", "ip", "-j", "addr"))
    assert [link["ifname"] for link in links] == ["lo"] and "UP" in links[0]["flags"]
    assert world.reaches("h1", "alone", "127.0.0.1")
    assert not world.pings("h1", "alone", world.host("client").address)
    [found] = world.read("h1", "sandbox", "ls")
    assert (found["stack"], found["endpoints"]) == ("none", [])
    assert "nameserver" not in world.vx("h1", "exec", "alone", "--", "cat", "/etc/resolv.conf")
    world.run("h1", "kill", str(found["pid"]))
    world.wait(lambda: not world.read("h1", "sandbox", "ls"), "it goes with its workload")


def test_network_host_is_the_hosts_own_stack(world: World) -> None:
    told = "import http.server as h; h.ThreadingHTTPServer(('', 18099), None).serve_forever()"
    world.vx("h1", "run", "--network", "host", "--name", "web", "-d", "--", "python3", "-c", told)
    h1 = world.host("h1").address
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 18099), 20)"
    ask = ("python3", "-c", connect, h1)
    world.wait(lambda: not world.run("client", *ask).returncode, "it listens at the node's address")
    assert world.run("h2", *ask).returncode == 0
    addresses = ("ip", "-j", "addr", "show", "eth0")
    inside = json.loads(world.vx("h1", "exec", "web", "--", *addresses))
    assert inside == json.loads(world.run("h1", *addresses).stdout)
    [found] = world.read("h1", "sandbox", "ls")
    assert (found["stack"], found["endpoints"]) == ("host", [])
    world.bed.kill("h1")
    world.bed.start("h1")
    assert world.read("h1", "sandbox", "inspect", "web")["pid"] == found["pid"]
    assert world.run("client", *ask).returncode == 0
    world.run("h1", "kill", str(found["pid"]))
    world.wait(lambda: not world.read("h1", "sandbox", "ls"), "it goes with its workload")


TELL = """\
import http.server as h
class Tell(h.BaseHTTPRequestHandler):
    def do_GET(s):
        s.send_response(200)
        s.end_headers()
        s.wfile.write(b"HERE " + s.client_address[0].encode())
h.ThreadingHTTPServer(("", 18099), Tell).serve_forever()
"""
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read().decode())"


def _fetched(where: Callable[..., Any], url: str) -> list[str]:
    """Which host answers, and whom it sees as client; empty if none does."""
    return list(where("python3", "-c", FETCH, url).stdout.split())


def _is_up(world: World, service: str) -> bool:
    return bool(world.read("h1", "service", "inspect", service)["state"] == "up")


def test_a_workload_of_a_host_is_a_services_backend_at_the_nodes_address(world: World) -> None:
    net = world.network()
    boxes = [(host, world.workload(host, net)) for host in ("h1", "h2")]
    inside = [functools.partial(world.inside, host, box) for host, box in boxes]
    outside, on_host = functools.partial(world.run, "client"), functools.partial(world.run, "h1")
    for host in ("h1", "h2"):
        world.vx(
            "h1", "service", "create", f"web{host}", "--network", net, "--port", "80:18099",
            "--publish", f"180{host[1]}0:80", "--selector", f"at={host}", "--health", "http:/",
            "--wait=10",
        )  # fmt: skip
        world.vx(
            host, "run", "--network", f"host,{net}", "--name", f"own{host}", "--label",
            f"at={host}", "-d", "--wait=10", "--", "python3", "-c", TELL.replace("HERE", host),
        )  # fmt: skip
        assert world.address(host, f"own{host}", net) == world.host(host).address
        world.wait(functools.partial(_is_up, world, f"web{host}"), "its own node finds it healthy")
    addresses = {host: world.host(host).address for host in ("h1", "h2", "h3")}
    for host in ("h1", "h2"):
        for (at, box), where in zip(boxes, inside, strict=True):
            seen = world.address(at, box) if at == host else addresses[at]
            for url in (f"http://web{host}/", f"http://own{host}:18099/"):
                fetch = functools.partial(_fetched, where, url)
                world.wait(functools.partial(_says, fetch, [host, seen]), f"{url} from {at}")
        # Of its health each node hears by itself.
        for entrance, address in addresses.items():
            fetch = functools.partial(_fetched, outside, f"http://{address}:180{host[1]}0/")
            seen = "169.254.83.2" if entrance == host else address
            world.wait(functools.partial(_says, fetch, [host, seen]), f"{host} by {entrance}")
        assert _fetched(on_host, f"http://127.0.0.1:180{host[1]}0/")[:1] == [host]
    world.vx("h2", "sandbox", "rm", "ownh2", "--wait=10")
    assert world.read("h1", "service", "inspect", "webh2")["backends"] == []


def _says(fetch: Callable[[], list[str]], what: list[str]) -> bool:
    return fetch() == what


def test_a_command_in_network_host_gives_its_status_and_leaves_nothing(world: World) -> None:
    done = world.try_vx("h1", "run", "--network", "host", "--", "sh", "-c", "exit 3")
    assert done.returncode == 3, done.stderr
    assert world.read("h1", "sandbox", "ls") == []


def test_what_networks_none_and_host_cannot_be_is_refused(world: World) -> None:
    net = world.network()
    for words in (
        ("network", "create", "none"),
        ("network", "create", "x", "--driver", "host"),
        ("network", "rm", "none"),
        ("service", "create", "web", "--network", "host", "--port", "80"),
        ("endpoint", "create", "--network", "none", "--name", "x"),
        ("run", "--network", "none", "--publish", "80:80", "--", "true"),
        ("run", "--network", f"{net},host", "--", "true"),
    ):
        refused = world.try_vx("h1", *words)
        assert refused.returncode == 2, (words, refused.stderr)


SUBNET = "10.99.0.0/24"  # the testbed's wire (agent/testbed/fabric.py)


def _lan(world: World, *options: str) -> str:
    """A macvlan network on the hosts' own wire; the client is the gateway there."""
    return world.network(
        "--driver", "macvlan", "--subnet", SUBNET, "--ip-range", "10.99.0.128/25",
        "--gateway", world.host("client").address, "-O", "parent=eth0", *options,
    )  # fmt: skip


def _device(world: World, name: str) -> Any:
    """A device of h1, as `ip -j link` tells of it."""
    return json.loads(world.run("h1", "ip", "-j", "link", "show", name).stdout)[0]


def _reaches(world: World, host: str, target: str, within: float = 10.0) -> bool:
    ping = ("ping", "-c", "1", "-W", f"{within:g}", target)
    return world.run(host, *ping).returncode == 0


def test_workloads_of_macvlan_are_on_the_hosts_wire(world: World) -> None:
    net = _lan(world)
    one, two, far = (world.workload(h, net) for h in ("h1", "h1", "h2"))
    client = world.host("client").address
    for target in (world.address("h1", two), world.address("h1", far), client):
        assert world.reaches("h1", one, target), target
    assert _reaches(world, "client", world.address("h1", one)), "from outside, straight"
    assert _reaches(world, "h2", world.address("h1", one)), "from another host"
    assert not _reaches(world, "h1", world.address("h1", one), within=1), "not from its own host"
    assert not world.pings("h1", one, world.host("h1").address)
    routes = world.inside("h1", one, "ip", "route").stdout
    assert f"default via {client}" in routes
    [link] = json.loads(world.vx("h1", "exec", one, "--", "ip", "-d", "-j", "link", "show", "eth0"))
    assert link["linkinfo"]["info_kind"] == "macvlan"
    assert link["linkinfo"]["info_data"]["mode"] == "bridge"
    assert link["address"] == world.read("h1", "endpoint", "inspect", one)["mac"]
    assert not [n for n in world.links("h1") if n.startswith("vxb")], "nothing of it is in ours"


def test_the_host_reaches_macvlan_by_an_interface_of_its_own(world: World) -> None:
    net = _lan(world, "-O", "host-interface=true")
    one, two = world.workload("h1", net), world.workload("h1", net)
    far = world.workload("h2", net)
    for name in (one, two, far):
        assert _reaches(world, "h1", world.address("h1", name)), name
    own = world.read("h1", "endpoint", "inspect", "host-h1")["addresses"][0]
    assert world.reaches("h1", one, own)
    assert world.reaches("h2", far, own), "from the wire too"
    assert _reaches(world, "client", world.host("h1").address), "and the host where it was"
    neighbours = world.run("client", "ip", "neigh", "show", world.host("h1").address).stdout
    assert _device(world, "eth0")["address"] in neighbours
    for name in (one, two):
        world.vx("h1", "sandbox", "rm", name, "--wait=10")
    assert "vxh" not in world.run("h1", "ip", "link", check=True).stdout
    assert [e["name"] for e in world.read("h1", "endpoint", "ls")] == ["host-h2", far]


def test_workloads_of_one_host_are_apart_in_mode_private(world: World) -> None:
    net = _lan(world, "-O", "mode=private")
    one, two, far = (world.workload(h, net) for h in ("h1", "h1", "h2"))
    assert not world.pings("h1", one, world.address("h1", two))
    assert world.reaches("h1", one, world.address("h1", far))


def test_macvlan_is_what_it_was_after_a_restart_and_when_it_was_changed(world: World) -> None:
    net = _lan(world)
    one, two = world.workload("h1", net), world.workload("h1", net)
    target = world.address("h1", one)
    before = world.link("h1", one)
    world.bed.kill("h1")
    assert _reaches(world, "client", target), "no agent is needed for traffic"
    world.bed.start("h1")
    assert world.link("h1", one)["ifindex"] == before["ifindex"], "it was left as it was"
    world.vx("h1", "exec", one, "--", "ip", "link", "del", "eth0")
    world.wait(lambda: _reaches(world, "client", target, within=1), "it is made again")
    assert world.link("h1", one)["ifindex"] != before["ifindex"], "which is another one"
    world.vx("h1", "endpoint", "rm", one, "--wait=10")
    links = json.loads(world.vx("h1", "exec", one, "--", "ip", "-j", "link"))
    assert [link["ifname"] for link in links] == ["lo"], "gone, while its sandbox lives"
    assert world.reaches("h1", two, world.host("client").address)


def test_a_namespace_of_the_users_can_be_on_the_wire(world: World) -> None:
    net = _lan(world)
    world.run("h1", "ip", "netns", "add", "vxt-mine")
    world.later(lambda: world.run("h1", "ip", "netns", "del", "vxt-mine"))
    world.vx(
        "h1", "endpoint", "create", "--network", net, "--name", "mine", "--netns", "vxt-mine",
        "--ip", "10.99.0.200", "--wait=10",
    )  # fmt: skip
    assert _reaches(world, "client", "10.99.0.200")
    world.run("h1", "ip", "netns", "del", "vxt-mine")
    world.wait(lambda: not world.read("h1", "endpoint", "ls"), "it goes with its namespace")


def test_mode_passthru_gives_a_device_to_one_workload(world: World) -> None:
    h1, client = world.host("h1"), world.host("client")
    subprocess.run(
        ["ip", "-n", h1.namespace, "link", "add", "eth1", "type", "veth", "peer", "name", "eth1",
         "netns", client.namespace],
        check=True,
    )  # fmt: skip
    world.later(lambda: h1.run(["ip", "link", "del", "eth1"]))
    world.run("client", "ip", "addr", "add", "10.98.0.100/24", "dev", "eth1")
    world.run("client", "ip", "link", "set", "eth1", "up")
    net = world.network(
        "--driver", "macvlan", "--subnet", "10.98.0.0/24", "--gateway", "10.98.0.100",
        "-O", "parent=eth1", "-O", "mode=passthru",
    )  # fmt: skip
    done = world.try_vx("h1", "run", "--network", net, "--", "true")
    assert "is down" in done.stderr
    world.run("h1", "ip", "link", "set", "eth1", "up")
    before = _device(world, "eth1")["address"]
    one = world.workload("h1", net)
    assert world.reaches("h1", one, "10.98.0.100")
    done = world.try_vx("h1", "run", "--network", net, "--", "true")
    assert done.returncode and "in mode passthru" in done.stderr
    world.vx("h1", "sandbox", "rm", one, "--wait=10")
    assert _device(world, "eth1")["address"] == before
    world.run("h1", "ip", "link", "del", "eth1")
    done = world.try_vx("h1", "run", "--network", net, "--", "true")
    assert done.returncode and "is not on this host" in done.stderr


LOOK_UP = """\
import socket, sys
print(socket.getaddrinfo(sys.argv[1], None, socket.AF_INET)[0][4][0])
"""
# A workload that is a name server itself, on all its addresses, by UDP and TCP.
NAME_SERVER = """\
import os, socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", 53))
tcp = socket.create_server(("", 53))
print(os.getpid(), flush=True)
udp.recv(1)
"""


def _looked_up(world: World, host: str, sandbox: str, name: str) -> str:
    return world.inside(host, sandbox, "python3", "-c", LOOK_UP, name).stdout.strip()


def test_names_are_asked_on_the_sandboxs_own_loopback(world: World) -> None:
    net, other = _lan(world), world.network()
    one, far = world.workload("h1", net), world.workload("h2", net)
    apart = world.workload("h1", other)
    both = world.workload("h1", f"{other},{net}")
    done = world.try_vx("h1", "run", "--network", net, "--", "python3", "-c", LOOK_UP, far)
    assert done.stdout.strip() == world.address("h2", far), "from its first moment on"
    assert _looked_up(world, "h1", one, far) == world.address("h2", far)
    assert _looked_up(world, "h2", far, f"{one}.{net}") == world.address("h1", one)
    assert _looked_up(world, "h1", one, apart) == "", "of its own networks only"
    assert _looked_up(world, "h1", both, apart) == world.address("h1", apart)
    assert _looked_up(world, "h1", both, far) == world.address("h2", far)
    asks = "import dns.message as m, dns.query as q, sys; print(q.tcp(m.make_query(sys.argv[1],"
    asks += " 'A'), '127.0.83.53', 10).answer[0][0])"
    told = world.inside("h1", one, sys.executable, "-c", asks, f"{far}.")
    assert told.stdout.strip() == world.address("h2", far), told.stderr
    pid = str(world.read("h1", "sandbox", "inspect", one)["pid"])
    world.bed.kill("h1")
    enter = ("nsenter", "-t", pid, "-n", "-m", "python3", "-c", LOOK_UP, far)
    assert world.run("h1", *enter).stdout.strip() == world.address("h2", far), "without the agent"
    world.bed.start("h1")
    late = world.workload("h2", net)
    world.wait(
        lambda: _looked_up(world, "h1", one, late) == world.address("h2", late), "a name that came"
    )


def test_a_workload_on_the_wire_can_be_a_name_server(world: World) -> None:
    net = _lan(world)
    one = world.workload("h1", net)
    process = world.host("h1").popen(
        [VXMESH, "exec", one, "--", "python3", "-c", NAME_SERVER], stdout=subprocess.PIPE, text=True
    )
    world.later(process.kill)
    pid = int(said(process.stdout))  # `exec` forks
    assert _looked_up(world, "h1", one, one) == world.address("h1", one)
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 53), 10)"
    reached = world.run("client", "python3", "-c", connect, world.address("h1", one))
    assert reached.returncode == 0, reached.stderr

    def tables() -> str:
        enter = ("nsenter", f"--net=/proc/{pid}/ns/net", "nft", "list", "tables")
        return world.run("h1", *enter, check=True).stdout

    assert "vxmesh_names" in tables()
    world.vx("h1", "sandbox", "rm", one, "--wait=10")
    assert "vxmesh_names" not in tables()


def test_a_sandbox_on_the_wire_ends_with_its_workload_though_no_agent_runs(world: World) -> None:
    net = _lan(world)
    one = world.workload("h1", net)
    target, [found] = world.address("h1", one), world.read("h1", "sandbox", "ls")
    world.bed.kill("h1")
    assert _reaches(world, "client", target)
    world.run("h1", "kill", str(found["pid"]))
    world.wait(lambda: not _reaches(world, "client", target, within=1), "the kernel takes it apart")
    world.bed.start("h1")
    world.wait(lambda: world.read("h1", "endpoint", "ls") == [], "its endpoint goes with it")


def test_what_macvlan_cannot_be_is_refused(world: World) -> None:
    create = ("network", "create", "nolan", "--driver", "macvlan", "--subnet", SUBNET)
    for words, told in (
        ((), "parent=eth1"),
        (
            ("-O", "parent=eth0", "-O", "mode=sideways"),
            "Use one of bridge, private, vepa, passthru",
        ),
        (("-O", "parent=eth0", "--encrypted"), "has no encryption"),
        (("-O", "parent=eth0", "--vni", "7"), "has no VNI"),
        (("-O", "parent=eth0", "-O", "speed=high"), "is unknown"),
        (("-O", "parent=eth0", "-O", "mode=vepa", "-O", "host-interface=true"), "Use mode bridge"),
    ):
        refused = world.try_vx("h1", *create, *words)
        assert refused.returncode == 2 and told in refused.stderr, (words, refused.stderr)
    net = _lan(world)
    for call, told in (
        (("run", "--network", net, "-p", "80:80", "--", "true"), "at its own address"),
        (("run", "--network", net, "--ip", world.host("h2").address, "--", "true"), "of host h2"),
        (("service", "create", "web", "--network", net, "--port", "80"), "whose driver is macvlan"),
    ):
        done = world.try_vx("h1", *call)
        assert done.returncode and told in done.stderr, (call, done.stderr)
    for parent, mode, told in (
        ("eth7", "bridge", "is not on this host"),
        ("eth0.20", "bridge", "no VLANs (8021q)"),
        ("eth0", "passthru", "would cut off"),
    ):
        other = f"p-{parent.replace('.', '-')}-{mode}"
        world.vx(
            "h1", "network", "create", other, "--driver", "macvlan", "--subnet", "10.98.0.0/24",
            "-O", f"parent={parent}", "-O", f"mode={mode}",
        )  # fmt: skip
        done = world.try_vx("h1", "run", "--network", other, "--", "true")
        assert done.returncode and told in done.stderr, done.stderr
        assert world.read("h1", "endpoint", "ls", "--network", other) == []
        world.vx("h1", "network", "rm", other, "--wait=10")


def test_ipvlan_is_there_or_its_absence_is_said(world: World) -> None:
    world.vx(
        "h1", "network", "create", "ipv", "--driver", "ipvlan", "--subnet", SUBNET,
        "--ip-range", "10.99.0.128/25", "-O", "parent=eth0",
    )  # fmt: skip
    probe = ("ip", "link", "add", "link", "eth0", "name", "probe", "type", "ipvlan")
    has_it = world.run("h1", *probe).returncode == 0
    world.run("h1", "ip", "link", "del", "probe")
    done = world.try_vx("h1", "run", "--network", "ipv", "--", "ip", "-d", "link", "show", "eth0")
    if has_it:
        assert "ipvlan  mode l2" in done.stdout, done.stderr
    else:
        assert done.returncode == 1 and "of driver ipvlan, which this host's kernel has not" in (
            done.stderr
        )
        assert world.read("h1", "endpoint", "ls") == world.read("h1", "sandbox", "ls") == []
