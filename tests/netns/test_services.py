"""Services through the command line, on the real kernel: made, seen, changed, looked at."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from agent.client import Client
from tests.netns.world import VXMESH, World, said

pytestmark = pytest.mark.netns

# Answers each HTTP request with the name it was given and the client's address.
SERVER = (
    "import http.server, os, socketserver, sys\n"
    "class Handler(http.server.BaseHTTPRequestHandler):\n"
    " protocol_version = 'HTTP/1.1'\n"
    " def do_GET(self):\n"
    "  body = f'{sys.argv[1]} {self.client_address[0]}'.encode()\n"
    "  self.send_response(200 if self.path != '/broken' else 503)\n"
    "  self.send_header('Content-Length', str(len(body)))\n"
    "  self.end_headers()\n"
    "  self.wfile.write(body)\n"
    " def log_message(self, *_): pass\n"
    "class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):\n"
    " daemon_threads = True\n"
    " request_queue_size = 128\n"
    "with Server(('0.0.0.0', 8000), Handler) as server:\n"
    " print(os.getpid(), flush=True)\n"
    " server.serve_forever()\n"
)
ASK = (
    "import sys, urllib.request\n"
    "print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())\n"
)


# Keeps a connection to the service argv[1] on which backend argv[2] answers; asks again for each
# line that it reads, and writes who answered.
KEEPER = (
    "import http.client, sys\n"
    "for _ in range(20):\n"
    " connection = http.client.HTTPConnection(sys.argv[1], timeout=20)\n"
    " connection.connect()\n"
    " connection.auto_open = 0\n"
    " connection.request('GET', '/')\n"
    " if connection.getresponse().read().decode().split()[0] == sys.argv[2]: break\n"
    "for _ in sys.stdin:\n"
    " try:\n"
    "  connection.request('GET', '/')\n"
    "  print(connection.getresponse().read().decode().split()[0], flush=True)\n"
    " except (OSError, http.client.HTTPException) as error:\n"
    "  print('failed', flush=True)\n"
)


class Backend:
    """A workload with a label, and a server in it that can be stopped and started."""

    def __init__(self, world: World, host: str, network: str, name: str, *options: str) -> None:
        self.world, self.host, self.name = world, host, name
        world.workload(host, network, name, *options)
        self.process: subprocess.Popen[str] | None = None
        self.pid = 0  # of the server itself; `exec` forks

    def start(self, server: str = SERVER) -> None:
        words = [VXMESH, "exec", self.name, "--", "python", "-c", server, self.name]
        pipe = subprocess.PIPE
        self.process = self.world.host(self.host).popen(words, text=True, stdout=pipe)
        self.pid = int(said(self.process.stdout))
        self.world.later(self.stop)

    def stop(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None


def served(world: World, host: str, network: str, name: str, *options: str) -> Backend:
    made = Backend(world, host, network, name, *options)
    made.start()
    return made


def backends(world: World, host: str, service: str) -> dict[str, Any]:
    found = world.read(host, "service", "inspect", service)["backends"]
    return {backend["endpoint"]: backend for backend in found}


def ready(world: World, host: str, service: str) -> set[str]:
    return {name for name, b in backends(world, host, service).items() if b["takes"]}


def ask(world: World, host: str, sandbox: str, url: str) -> str:
    done = world.inside(host, sandbox, "python", "-c", ASK, url)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_served(world: World, host: str, sandbox: str, url: str) -> None:
    """Wait until a service answers there: after its state, which is the agent's, come the rules,
    which are the kernel's."""
    command = ("python", "-c", ASK, url)
    world.wait(lambda: world.inside(host, sandbox, *command).returncode == 0, f"{url} answers")


def refused(world: World, host: str, *words: str) -> tuple[int, dict[str, str]]:
    """Status and error of a command that should fail."""
    done = world.try_vx(host, *words, "-o", "json")
    assert done.returncode, f"{words} worked: {done.stdout}"
    error: dict[str, str] = json.loads(done.stderr)["error"]
    return done.returncode, error


def test_made_on_one_host_seen_on_another_and_its_backends_follow_the_workloads(
    world: World,
) -> None:
    net = world.network("--subnet", "10.61.0.0/24")
    world.workload("h2", net, "early", "--label", "app=web")
    id = world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--wait=10",
    )  # fmt: skip
    seen = world.read("h3", "service", "inspect", "web")
    assert (seen["id"], seen["network"], seen["mode"]) == (id, net, "vip")
    assert len(seen["vips"]) == 1 and seen["vips"][0].startswith("10.61.0.")
    assert seen["ports"] == [
        {"port": 80, "target": 8000, "protocol": "tcp", "published": 0, "published_at": ""}
    ]
    assert set(backends(world, "h3", "web")) == {"early"}
    world.workload("h3", net, "late", "--label", "app=web")
    world.workload("h3", net, "other", "--label", "app=db")
    for host in ("h1", "h2", "h3"):
        assert set(backends(world, host, "web")) == {"early", "late"}
    world.vx("h3", "sandbox", "rm", "late", "--wait=10")
    assert set(backends(world, "h1", "web")) == {"early"}
    [row] = world.read("h2", "service", "ls")
    assert (row["name"], row["state"]) == ("web", "up")
    assert world.vx("h1", "service", "rm", "web", "--wait=10") == id
    assert world.read("h3", "service", "ls") == []


def test_named_backends_have_weights_and_are_drained(world: World) -> None:
    net = world.network("--subnet", "10.62.0.0/24")
    for host, name in (("h1", "one"), ("h2", "two")):
        world.workload(host, net, name)
    world.vx("h1", "service", "create", "web", "--network", net, "--port", "80", "--wait=10")
    assert world.read("h1", "service", "inspect", "web")["state"] == "empty"
    world.vx("h1", "service", "backend", "add", "web", "one", "--weight", "3", "--wait=10")
    world.vx("h3", "service", "backend", "add", "web", "two", "--wait=10")
    shown = backends(world, "h2", "web")
    assert {n: b["weight"] for n, b in shown.items()} == {"one": 3, "two": 1}
    assert {b["node"] for b in shown.values()} == {"h1", "h2"}
    world.vx("h2", "service", "backend", "drain", "web", "one", "--wait=10")
    shown = backends(world, "h3", "web")
    assert (shown["one"]["state"], shown["one"]["takes"]) == ("draining", False)
    assert shown["two"]["takes"] and shown["one"]["weight"] == 3
    world.vx("h3", "service", "backend", "add", "web", "one", "--wait=10")
    assert backends(world, "h1", "web")["one"]["state"] == "active"
    world.vx("h3", "service", "backend", "rm", "web", "one", "--wait=10")
    assert set(backends(world, "h2", "web")) == {"two"}
    status, error = refused(world, "h1", "service", "backend", "rm", "web", "one")
    assert (status, error["code"]) == (4, "NOT_FOUND")


def test_health_turns_on_every_node(world: World) -> None:
    net = world.network("--subnet", "10.63.0.0/24")
    interval = 0.5
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--health", "http:/fine", "--health-interval", str(interval),
        "--wait=10",
    )  # fmt: skip
    first = served(world, "h2", net, "first", "--label", "app=web")
    served(world, "h3", net, "second", "--label", "app=web")
    for host in ("h1", "h2", "h3"):
        world.wait(lambda h=host: ready(world, h, "web") == {"first", "second"}, "healthy")  # type: ignore[misc]
    assert world.read("h1", "endpoint", "inspect", "first")["health"] == "healthy"
    before = time.time()
    first.stop()
    world.wait(lambda: ready(world, "h1", "web") == {"second"}, "unhealthy")
    seen = [
        datetime.datetime.fromisoformat(event["time"]).timestamp()
        for event in map(json.loads, world.vx("h1", "events", "-o", "json").splitlines())
        if event["kind"] == "endpoint.update" and event["endpoint"]["health"] == "unhealthy"
    ]
    # Measured by tests/bench/serving.py, on a machine that has nothing else to do.
    print(f"h1 heard of it {seen[-1] - before:.2f} s after, looks are {interval} s apart")
    world.wait(lambda: ready(world, "h3", "web") == {"second"}, "unhealthy to h3")
    shown = backends(world, "h3", "web")["first"]
    assert shown["health"] == "unhealthy"
    # Reset if a look was on its way in when the process ended: it is what was found first.
    assert any(word in shown["reason"] for word in ("refused", "reset by peer")), shown["reason"]
    told = [json.loads(line) for line in world.vx("h2", "events", "-o", "json").splitlines()]
    changes = [event for event in told if event["kind"] == "health.changed"]
    assert changes[-1]["fields"]["state"] == "unhealthy"
    first.start()
    world.wait(lambda: ready(world, "h3", "web") == {"first", "second"}, "healthy again")


def test_states_outlive_an_agents_restart(world: World) -> None:
    net = world.network("--subnet", "10.64.0.0/24")
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--health", "tcp", "--health-interval", "30", "--wait=10",
    )  # fmt: skip
    served(world, "h2", net, "first", "--label", "app=web")
    world.wait(lambda: ready(world, "h1", "web") == {"first"}, "healthy")
    since = world.read("h2", "endpoint", "inspect", "first")["health_since"]
    world.bed.kill("h2")
    world.bed.start("h2")
    shown = world.read("h2", "endpoint", "inspect", "first")
    assert (shown["health"], shown["health_since"]) == ("healthy", since)


def test_what_the_runtime_tells_counts(world: World) -> None:
    net = world.network("--subnet", "10.65.0.0/24")
    world.workload("h2", net, "first")
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80", "--health", "runtime",
    )  # fmt: skip
    world.vx("h1", "service", "backend", "add", "web", "first", "--wait=10")
    assert ready(world, "h3", "web") == set(), "nothing was told yet"
    world.vx("h2", "endpoint", "health", "first", "healthy", "--wait=10")
    assert ready(world, "h3", "web") == {"first"}
    world.vx("h2", "endpoint", "health", "first", "unhealthy", "--reason", "ill", "--wait=10")
    shown = backends(world, "h3", "web")["first"]
    assert (shown["health"], shown["reason"], shown["takes"]) == ("unhealthy", "ill", False)
    assert world.read("h1", "service", "inspect", "web")["state"] == "down"
    world.vx("h1", "service", "update", "web", "--all-unhealthy", "all", "--wait=10")
    assert ready(world, "h3", "web") == {"first"}
    status, error = refused(world, "h1", "endpoint", "health", "first", "healthy")
    assert (status, error["code"]) == (5, "FAILED_PRECONDITION")
    world.vx("h2", "endpoint", "health", "first", "none", "--wait=10")
    assert world.read("h3", "endpoint", "inspect", "first")["health"] == "unknown"


def test_names_and_ports_that_are_taken_are_refused(world: World) -> None:
    net = world.network("--subnet", "10.66.0.0/24")
    world.workload("h2", net, "one", "--alias", "uno")
    make = ("service", "create", "--network", net, "--port", "80")
    for name in ("one", "uno"):
        status, error = refused(world, "h1", *make, name)
        assert (status, error["code"]) == (5, "ALREADY_EXISTS"), error
    world.vx("h1", *make, "web", "--publish", "8080:80", "--wait=10")
    status, error = refused(world, "h3", *make, "web")
    assert status == 5 and "exists" in error["message"]
    status, error = refused(world, "h3", *make, "web2", "--publish", "8080:80")
    assert status == 5 and "published by service web" in error["message"]
    for words in (("--name", "web"), ("--name", "x", "--alias", "web")):
        done = world.try_vx("h2", "run", "--network", net, *words, "-d", "--", "sleep", "9")
        assert done.returncode == 5 and "service web" in done.stderr, done.stderr
    done = world.try_vx(
        "h2", "run", "--network", net, "--publish", "8080:80", "-d", "--", "sleep", "9"
    )
    assert done.returncode == 5 and "published by service web" in done.stderr, done.stderr
    status, error = refused(world, "h1", "network", "rm", net)
    assert status == 5
    vip = world.read("h1", "service", "inspect", "web")["vips"][0]
    done = world.try_vx("h3", "endpoint", "create", "--network", net, "--name", "y", "--ip", vip)
    assert done.returncode == 5 and "service web" in done.stderr, done.stderr


def test_a_port_that_something_holds_is_told_with_the_node(world: World) -> None:
    net = world.network("--subnet", "10.67.0.0/24")
    holder = world.host("h3").popen(
        ["python", "-c", "import socket, sys\n"
         "s = socket.create_server(('0.0.0.0', 8088))\nprint('up', flush=True)\nsys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    world.later(holder.kill)
    assert said(holder.stdout) == "up\n"
    make = ("service", "create", "--network", net, "--port", "80", "web", "--publish", "8088:80")
    status, error = refused(world, "h1", *make)
    assert status == 5 and "h3 (" in error["message"], error
    assert world.read("h1", "service", "ls") == []
    world.vx("h1", *make, "--publish-on", "h1", "--publish-on", "h2", "--wait=10")
    assert world.read("h3", "service", "inspect", "web")["publish_on"] == ["h1", "h2"]
    status, error = refused(
        world, "h1", "service", "create", "--network", net, "--port", "80", "far",
        "--publish", "10.250.0.9:8089:80",
    )  # fmt: skip
    assert status == 2 and "no node's" in error["message"], error
    # On a node of one sandbox's port a service's cannot be.
    world.vx(
        "h2", "run", "--network", net, "--name", "w", "--publish", "8099:80", "-d", "--wait=10",
        "--", "sleep", "3600",
    )  # fmt: skip
    status, error = refused(
        world, "h1", "service", "create", "--network", net, "--port", "80", "more",
        "--publish", "8099:80",
    )  # fmt: skip
    assert status == 5 and "h2 (" in error["message"] and "sandbox w" in error["message"], error


BAD: list[tuple[tuple[str, ...], int]] = [
    (("--port", "0"), 2),
    (("--port", "70000"), 2),
    (("--port", "80:x"), 2),
    (("--port", "80/sctp"), 2),
    (("--port", "80:1", "--port", "80:2"), 2),
    ((), 2),
    (("--port", "80", "--publish", "1:2:3:4"), 2),
    (("--port", "80", "--publish", "10.0.0.1:x:80"), 2),
    (("--port", "80", "--publish", "90:80", "--publish", "90:80"), 2),
    (("--port", "80", "--mode", "odd"), 2),
    (("--port", "80", "--affinity", "odd"), 2),
    (("--port", "80", "--affinity-timeout", "9"), 2),
    (("--port", "80", "--health", "odd"), 2),
    (("--port", "80", "--health", "http:nopath"), 2),
    (("--port", "80/udp", "--health", "tcp"), 2),
    (("--port", "80", "--health", "tcp", "--health-interval", "0"), 2),
    (("--port", "80", "--health", "tcp", "--health-interval", "1e9"), 2),
    (("--port", "80", "--health-interval", "5"), 2),
    (("--port", "80", "--selector", "novalue"), 2),
    (("--port", "80", "--drain-timeout", "-1"), 2),
    (("--port", "80", "--ip", "10.1.2.3"), 2),
    (("--port", "80", "--ip", "10.68.0.1"), 5),
    (("--port", "80", "--publish-on", "h1"), 2),
    (("--port", "80", "--publish", "90:80", "--publish-on", "h9"), 4),
    (("--port", "80", "--all-unhealthy", "odd"), 2),
]


def test_bad_input_is_refused_and_changes_nothing(world: World) -> None:
    net = world.network("--subnet", "10.68.0.0/24")
    for words, wanted in BAD:
        status, _ = refused(world, "h1", "service", "create", "s", "--network", net, *words)
        assert status == wanted, words
    for name in ("a.b", "é", "a" * 64, ""):
        status, _ = refused(world, "h1", "service", "create", name, "--network", net, "--port", "1")
        assert status == 2, name
    assert world.read("h1", "service", "ls") == []
    for noun in (("inspect",), ("rm",), ("update", "--affinity", "client")):
        assert refused(world, "h1", "service", *noun, "nothing")[0] == 4
    status, _ = refused(world, "h1", "service", "create", "s", "--network", "no", "--port", "80")
    assert status == 4


def test_names_follow(world: World) -> None:
    net = world.network("--subnet", "10.69.0.0/24")
    world.workload("h2", net, "one", "--label", "app=web")
    for name, mode in (("web", "vip"), ("rr", "dnsrr")):
        world.vx(
            "h1", "service", "create", name, "--network", net, "--port", "80:8000",
            "--selector", "app=web", "--mode", mode, "--wait=10",
        )  # fmt: skip
    vip = world.read("h1", "service", "inspect", "web")["vips"][0]
    one = world.address("h2", "one")

    def answers(host: str, name: str) -> list[str]:
        found = json.loads(
            world.try_vx(host, "resolve", name, "--network", net, "-o", "json").stdout
        )
        return sorted(record["data"] for record in found["records"])

    for host in ("h2", "h3"):  # with a sandbox in it, and without
        assert answers(host, "web") == [vip]
        assert answers(host, "tasks.web") == [one]
        assert answers(host, f"rr.{net}.vxmesh.internal") == [one]
        assert "80" in answers(host, "_80._tcp.web/SRV")[0]
    two = Backend(world, "h1", net, "two", "--label", "app=web")
    there = sorted((one, world.address("h1", two.name)))
    for host in ("h1", "h2", "h3"):
        world.wait(lambda h=host: answers(h, "rr") == there, "both")  # type: ignore[misc]
    world.vx("h1", "service", "backend", "drain", "rr", "one", "--wait=10")
    world.wait(lambda: answers("h2", "rr") == [world.address("h1", "two")], "drained")
    world.vx("h1", "service", "rm", "web", "rr", "--wait=10")
    world.wait(lambda: answers("h2", "web") == [], "gone")


def test_connections_reach_backends_that_see_the_client(world: World) -> None:
    net = world.network("--subnet", "10.70.0.0/24")
    world.workload("h1", net, "client")
    served(world, "h3", net, "back", "--label", "app=web")
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--health", "tcp", "--health-interval", "0.5",
        "--publish", "8080:80", "--wait=10",
    )  # fmt: skip
    wait_served(world, "h1", "client", "http://web/")
    assert ask(world, "h1", "client", "http://web/") == f"back {world.address('h1', 'client')}"
    client = world.bed.client
    node = world.read("h2", "node", "inspect", "h1")["address"].partition(":")[0]
    for host in ("h1", "h2", "h3"):  # with and without a backend there
        address = world.read("h1", "node", "inspect", host)["address"].partition(":")[0]
        command, told = ["python", "-c", ASK, f"http://{address}:8080/"], f"back {client.address}"
        world.wait(lambda c=command, t=told: client.run(c).stdout.strip() == t, f"by {host}")  # type: ignore[misc]
    # A node's own processes, by its address and by localhost; a sandbox by any node's.
    for url in (f"http://{node}:8080/", "http://127.0.0.1:8080/"):
        done = world.run("h1", "python", "-c", ASK, url)
        assert done.returncode == 0, f"{url}: {done.stderr}"
        assert done.stdout.startswith("back ")
    assert ask(world, "h1", "client", f"http://{node}:8080/").startswith("back ")


def test_with_affinity_a_client_stays_at_every_node_when_backends_come(world: World) -> None:
    net = world.network("--subnet", "10.72.0.0/24")
    for host, name in (("h2", "one"), ("h3", "two")):
        served(world, host, net, name)
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--publish", "8080:80", "--affinity", "client", "--affinity-timeout", "1800", "--wait=10",
    )  # fmt: skip
    nodes = {
        host: world.read("h1", "node", "inspect", host)["address"].partition(":")[0]
        for host in ("h1", "h2", "h3")
    }
    client = world.bed.client

    def answers() -> list[str]:
        urls = [f"http://{address}:8080/" for address in nodes.values()]
        asked = [client.run(["python", "-c", ASK, url]) for url in urls]
        return [done.stdout.partition(" ")[0] or done.stderr for done in asked]

    world.vx("h1", "service", "backend", "add", "web", "one", "--wait=10")
    assert answers() == ["one"] * 3
    for host in nodes:
        known = world.in_own(host, "nft", "list", "map", "inet", "vxmesh_balance", "clients4")
        assert f"{client.address} . " in known and "timeout 30m" in known
    world.vx("h3", "service", "backend", "add", "web", "two", "--weight", "100", "--wait=10")
    assert answers() == ["one"] * 3
    world.bed.kill("h1")
    world.bed.start("h1")
    assert answers() == ["one"] * 3
    world.vx("h2", "service", "backend", "drain", "web", "one", "--wait=10")
    assert answers() == ["two"] * 3


def test_what_is_drained_loses_new_connections_only_until_its_time_is_up(world: World) -> None:
    net = world.network("--subnet", "10.71.0.0/24")
    world.workload("h1", net, "client")
    for host, name in (("h2", "one"), ("h3", "two")):
        served(world, host, net, name, "--label", "app=web")
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--wait=10",
    )  # fmt: skip
    asks: set[str] = set()

    def asked() -> set[str]:
        asks.add(ask(world, "h1", "client", "http://web/").split()[0])
        return asks

    world.wait(lambda: asked() == {"one", "two"}, "each has its share")
    # One connection kept alive to each: what each answers is whom it reached.
    keeper = world.host("h1").popen(
        [VXMESH, "exec", "client", "--", "python", "-c", KEEPER, "web", "one"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    world.later(keeper.kill)

    def again() -> str:
        assert keeper.stdin
        keeper.stdin.write("\n")
        keeper.stdin.flush()
        return said(keeper.stdout).strip()

    assert again() == "one"

    async def drain() -> None:
        async with Client(world.host("h1").target) as client:
            await client.drain_backend("web", "one", wait=20)

    began = time.monotonic()
    asyncio.run(drain())
    assert again() == "one", "it goes on"
    asks = {ask(world, "h1", "client", "http://web/").split()[0] for _ in range(3)}
    assert asks == {"two"}
    # From when it began to drain; only now, as nobody knows how long all of that takes.
    limit = f"{time.monotonic() - began + 2:.1f}"
    world.vx("h1", "service", "update", "web", "--drain-timeout", limit, "--wait=20")
    world.wait(lambda: again() != "one", "its connection was reset")
    keeper.communicate("", timeout=60)


def test_the_documentations_example(world: World) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/services.md").read_text()
    commands, expected = re.findall(r"```(?:sh)?\n(.*?)```", text, re.S)[:2]
    net = world.network("--subnet", "10.72.0.0/24")
    shown = ""
    for line in commands.strip().splitlines():
        words = line.replace("NET", net).split()
        assert words[0] == "vxmesh"
        shown = world.vx("h1", *words[1:])
    titles, row = (re.split(r"\s{2,}", line.strip()) for line in shown.splitlines())
    wanted = [re.split(r"\s{2,}", line.strip()) for line in expected.strip().splitlines()]
    assert titles == wanted[0]
    told = dict(zip(titles, wanted[1], strict=True))
    found = dict(zip(titles, row, strict=True))
    assert found["NETWORK"] == net and found["VIPS"].startswith("10.72.0.")
    for title in ("NAME", "MODE", "PORTS", "READY", "STATE"):
        assert found[title] == told[title], title
    options = set(re.findall(r"`(--[a-z-]+)", text))
    help = world.vx("h1", "service", "create", "--help")
    help += world.vx("h1", "service", "update", "--help")
    help += world.vx("h1", "service", "backend", "add", "--help")
    help += world.vx("h1", "endpoint", "health", "--help")
    assert {option for option in options if option not in help} == set()
