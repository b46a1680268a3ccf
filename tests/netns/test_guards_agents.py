"""Hostile sandboxes beside real agents: the name server flooded, agents sought, operators told."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.datapath.guardrules import GATEWAY_BURST, GATEWAY_RATE
from tests.bench.lookups import Asker, Workload
from tests.netns import frames
from tests.netns.datapath_hosts import connects
from tests.netns.flood import BEGUN
from tests.netns.frames import ARP, BROADCAST, ethernet, send
from tests.netns.world import World, said, until_said

pytestmark = pytest.mark.netns

FLOOD = 100_000  # questions a second
LONGEST = 300.0  # s for one, which is ended long before
LOOKUPS, BETWEEN = 100, 0.02  # of the other one while a flood lasts, and s between two
AGAIN, PATIENCE = 2.0, 30.0  # s until a lookup is asked again, and until it is given up
MORE = 10  # floods, until this machine has sent more in one than one port may


def workload(world: World, host: str, network: str, name: str) -> Workload:
    """A sandbox by its name, with where it is and whom it asks."""
    pid = int(world.read(host, "sandbox", "inspect", name)["pid"])
    gateway = world.read(host, "network", "inspect", network)["gateways"][0]
    return Workload(pid, name, world.address(host, name), gateway)


@dataclass
class Floods:
    """Those that there were."""

    count: int = 0
    sent: int = 0  # questions
    most: float = 0.0  # of them, that one port may ask in that time


@contextlib.contextmanager
def flooding(who: Workload, name: str, floods: Floods) -> Iterator[None]:
    """Questions for `name` from there, meanwhile: a busy machine may not send them all."""
    command = [sys.executable, "-m", "tests.netns.flood", who.name_server, str(FLOOD)]
    begin = time.monotonic()
    process = subprocess.Popen(
        ["nsenter", f"--net={who.netns}", *command, str(LONGEST), name],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        until_said(process.stdout, BEGUN)
        yield
        assert process.poll() is None, "it lasted all that time"
        process.terminate()
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - begin
    floods.count, floods.sent = floods.count + 1, floods.sent + int(output)
    floods.most += GATEWAY_RATE * (seconds + 1) + GATEWAY_BURST
    print(f"the flood was {int(output) / seconds:,.0f} a second for {seconds:.1f} s")


def latencies(who: Workload, name: str, count: int = LOOKUPS) -> list[float]:
    """How long each of so many lookups took, in ms; it is asked again after AGAIN, as resolvers do,
    and one that is never answered fails the test."""
    took = []
    with Asker(who) as asker:
        for _ in range(count):
            begin, ids = time.monotonic(), {asker.ask(name)}
            while not ids & {a.id for a in asker.answers(AGAIN) if a.address}:
                assert time.monotonic() - begin < PATIENCE, f"{name} was not answered"
                ids.add(asker.ask(name))
            took.append((time.monotonic() - begin) * 1e3)
            time.sleep(BETWEEN)
    return took


def describe(what: str, took: list[float]) -> None:
    """For people who look (pytest -s): tests/bench measures."""
    p50, p99 = statistics.median(took), sorted(took)[int(len(took) * 0.99)]
    print(f"{what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms of {len(took)} lookups")


def metric(world: World, host: str, name: str, **labels: str) -> float:
    found = [m for m in world.read(host, "metrics") if m["name"] == name and m["labels"] == labels]
    return float(found[0]["value"])


def test_others_are_answered_and_the_agent_goes_on_while_a_flood_of_questions_lasts(
    world: World,
) -> None:
    network = world.network()
    rogue = workload(world, "h1", network, world.workload("h1", network))
    other = workload(world, "h1", network, world.workload("h1", network))
    far = world.workload("h2", network)
    describe("calm", latencies(other, far))

    def dropped() -> float:
        return metric(world, "h1", "vxmesh_guard_dropped_total", reason="gateway") - before

    before = metric(world, "h1", "vxmesh_guard_dropped_total", reason="gateway")
    questions = metric(world, "h1", "vxmesh_resolver_questions_total", transport="udp")
    floods = Floods()
    for number, name in enumerate((far, "www.example.com", f"nobody.{network}")):
        with flooding(rogue, name, floods):
            describe(f"a flood of questions for {name}", latencies(other, far))
            # What comes to be on h2 is in h1's kernel, and h1's name server has heard of it.
            make = ("endpoint", "create", "--network", network, "--name", f"late{number}")
            world.vx("h2", *make, f"--wait={PATIENCE:g}")
            latencies(other, f"late{number}", 1)
        lag = metric(world, "h1", "vxmesh_loop_lag_seconds")
        rtts = {n["name"]: n["rtt_ms"] for n in world.read("h1", "node", "ls")}
        print(f"  the agent's loop was late by {lag * 1e3:.0f} ms at most; round trips {rtts}")
    world.wait(
        lambda: {n["state"] for n in world.read("h2", "node", "ls")} == {"alive"}, "all are alive"
    )
    while not dropped() and floods.count < 3 + MORE:  # others had the processors
        with flooding(rogue, far, floods):
            latencies(other, far)
    most = floods.most
    world.wait(lambda: dropped() >= max(1, floods.sent - most), "what was too much is counted")
    # What came through is what one port may send, not what was sent.
    asked = metric(world, "h1", "vxmesh_resolver_questions_total", transport="udp") - questions
    assert asked < most + 1000
    world.wait(lambda: told_of(world, "h1", "guard.flood", rogue.name), "it is told of")


def events(world: World, host: str) -> list[dict[str, Any]]:
    lines = world.vx(host, "events", "-o", "json").splitlines()
    return [json.loads(line) for line in lines]


def told_of(world: World, host: str, kind: str, sandbox: str) -> list[dict[str, str]]:
    """The fields of what a host told of a sandbox."""
    told = [e["fields"] for e in events(world, host) if e["kind"] == kind]
    return [fields for fields in told if fields["sandbox"] == sandbox]


def test_who_spoofs_is_named_in_an_event_and_counted(world: World) -> None:
    network = world.network()
    rogue = workload(world, "h1", network, world.workload("h1", network))
    victim = world.address("h1", world.workload("h1", network))
    mac = bytes.fromhex(world.link("h1", rogue.name)["address"].replace(":", ""))
    before = metric(world, "h1", "vxmesh_guard_dropped_total", reason="arp")
    stolen = frames.arp(2, mac, victim, BROADCAST, victim)
    send(rogue.netns, "eth0", *[ethernet(BROADCAST, mac, ARP, stolen)] * 7)
    world.wait(lambda: told_of(world, "h1", "guard.refused", rogue.name), "it is told")
    (told,) = told_of(world, "h1", "guard.refused", rogue.name)
    assert (told["network"], told["reasons"]) == (network, "arp")
    assert 0 < int(told["count"]) <= 7, "those that had come by then"

    def counted() -> float:
        return metric(world, "h1", "vxmesh_guard_dropped_total", reason="arp") - before

    world.wait(lambda: counted() >= 7, "all are counted")
    assert counted() == 7


def test_no_agent_is_reached_from_a_sandbox(world: World) -> None:
    """At any address of its own host, and at another's; by name of a port that is open."""
    network = world.network()
    box = workload(world, "h1", network, world.workload("h1", network))
    h1, h2 = world.host("h1"), world.host("h2")
    listener = subprocess.Popen(
        ["ip", "netns", "exec", h2.namespace, sys.executable, "-c", LISTEN],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert said(listener.stdout)
        assert connects(box.netns, h2.address, 8946), "another port of that host is reached"
        for address in (h1.address, h2.address, "169.254.83.1"):
            assert not connects(box.netns, address, 7946, 1.0), address
        # From the host itself it is, or the test would show nothing.
        assert connects(Path("/run/netns") / h1.namespace, h2.address, 7946)
        assert connects(Path("/run/netns") / h2.namespace, h1.address, 7946)
    finally:
        listener.kill()
        listener.wait()
    world.wait(
        lambda: metric(world, "h1", "vxmesh_guard_dropped_total", reason="agent") > 0, "counted"
    )


LISTEN = """
import socket
s = socket.create_server(("0.0.0.0", 8946))
print(flush=True)
while True:
    s.accept()
"""


def test_ports_of_agents_are_free_to_use_inside_a_network(world: World) -> None:
    network = world.network()
    near = workload(world, "h1", network, world.workload("h1", network))
    far = workload(world, "h2", network, world.workload("h2", network))
    for port in (7946, 4789):
        code = LISTEN.replace("8946", str(port))
        server = subprocess.Popen(
            ["nsenter", f"--net={far.netns}", sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert said(server.stdout)
            assert connects(near.netns, far.address, port)
        finally:
            server.kill()
            server.wait()
