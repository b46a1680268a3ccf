"""The drivers none, host and macvlan on the real kernel."""

from __future__ import annotations

import json

from tests.netns.world import World


def test_network_none_is_loopback_alone(world: World) -> None:
    world.vx("h1", "run", "--network", "none", "--name", "alone", "-d", "--", "sleep", "3600")
    links = json.loads(world.vx("h1", "exec", "alone", "--", "ip", "-j", "addr"))
    assert [link["ifname"] for link in links] == ["lo"] and "UP" in links[0]["flags"]
    assert world.pings("h1", "alone", "127.0.0.1")
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
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 18099), 2)"
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
