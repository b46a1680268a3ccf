"""Who does not belong reads nothing and writes nothing, and each attempt is an event and a metric.

The stranger is the testbed's client, which is on the wire and has no agent, with whatever it can
have got hold of: no certificate, one of another cluster, an old one of a node's, a token.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cluster.identity.files import Files
from agent.cluster.identity.founding import found_cluster
from agent.cluster.trust import Credentials
from agent.testbed import temporary
from agent.testbed.namespaces import STATE_DIR
from tests.netns.stranger import write_identity
from tests.netns.world import VXMESH, World, said

PORT = 7946
LIFE = "12s"  # of certificates, for the test that waits until one has ended


def identity_of(world: World, host: str) -> Credentials:
    """What somebody has who has read a host's disk."""
    held = Files(Path(f"/proc/{world.host(host).pid}/root{STATE_DIR}")).load()
    assert held is not None
    return held.credentials()


def stranger(world: World, how: str, host: str, *identity: str) -> list[str]:
    target = f"{world.host(host).address}:{PORT}"
    return [sys.executable, "-m", "tests.netns.stranger", how, target, *identity]


def probe(world: World, host: str, *identity: str) -> dict[str, str]:
    """What the client gets for each method: method -> "answered", or why not."""
    done = world.run("client", *stranger(world, "probe", host, *identity))
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def refusals(world: World, host: str) -> dict[str, int]:
    """The metric, by reason."""
    series = world.read(host, "metrics")
    return {
        s["labels"]["reason"]: int(s["value"])
        for s in series
        if s["name"] == "vxmesh_peer_refused_total" and s["value"]
    }


def events(world: World, host: str, kind: str = "peer.refused") -> list[dict[str, Any]]:
    lines = world.vx(host, "events", "-o", "json").splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] == kind]


def knows_nothing_new(world: World, before: list[Any]) -> None:
    assert state(world) == before


def state(world: World) -> list[Any]:
    nouns = ("node", "network", "endpoint")
    seen = [world.read(host, noun, "ls") for host in ("h1", "h2") for noun in nouns]
    return [sorted(str((o["id"], o["name"])) for o in objects) for objects in seen]


def attempt(
    world: World, reason: str, seen: str, *identity: str, node: str = "", host: str = "h1"
) -> None:
    """Try everything, see that it is refused, counted and told, and that nothing has changed.

    `seen` is what the stranger gets to see for every method.
    """
    where = world.host("client").address

    def told() -> list[dict[str, str]]:
        """Of this alone: a removed node's own agent, say, may be refused at the same time."""
        fields = [event["fields"] for event in events(world, host)]
        return [f for f in fields if (f["reason"], f["address"]) == (reason, where)]

    before, counted = state(world), refusals(world, host).get(reason, 0)
    known = len(told())
    found = probe(world, host, *identity)
    assert set(found.values()) == {seen}, found
    world.wait(lambda: refusals(world, host).get(reason, 0) > counted, f"counted as {reason}")
    world.wait(lambda: len(told()) > known, "it is told")
    assert told()[known]["node"] == node
    knows_nothing_new(world, before)


def test_without_a_certificate(world: World, tmp_path: Path) -> None:
    mine = identity_of(world, "h2")
    attempt(world, "no-tls", "UNAVAILABLE")  # an agent of before there were identities
    bare = Credentials(mine.cluster, "", b"", b"", mine.authorities, b"")
    file = write_identity(tmp_path / "bare", bare)
    attempt(world, "no-certificate", "no-certificate", file)


def test_with_a_certificate_of_another_cluster(world: World, tmp_path: Path) -> None:
    theirs = found_cluster(Files(tmp_path), "e" * 16, time.time(), 3600.0).credentials()
    file = write_identity(tmp_path / "theirs", theirs)
    attempt(world, "abandoned", "UNAVAILABLE", file)  # it does not believe us either
    mine = identity_of(world, "h2")
    feigned = dataclasses.replace(theirs, cluster=mine.cluster, authorities=mine.authorities)
    file = write_identity(tmp_path / "feigned", feigned)
    attempt(world, "foreign", "UNAVAILABLE", file)


def test_without_a_token_and_with_a_void_one(world: World, tmp_path: Path) -> None:
    before = state(world)
    client, h1 = world.host("client"), world.host("h1")
    agent = (VXMESH, "agent", "--name", "h4", "--advertise", client.address, "--join", h1.address)
    where = ("--state-dir", str(tmp_path / "lib"), "--run-dir", str(tmp_path / "run"))
    without = world.run("client", *agent, *where)
    assert without.returncode == 2 and "needs a join token" in without.stderr, without.stderr
    old = world.read("h1", "cluster", "token")["token"]
    world.read("h1", "cluster", "token", "--rotate")
    for host in ("h1", "h2"):  # one that keeps the CA's key, and one that may not
        counted = len(events(world, host, "join.refused"))
        agent = (*agent[:-1], world.host(host).address)
        void = world.run("client", *agent, *where, "--token", old)
        assert void.returncode == 1 and "is void" in void.stderr, void.stderr
        world.wait(lambda h=host, n=counted: events(world, h, "join.refused")[n:], "it is told")  # type: ignore[misc]
        (new,) = events(world, host, "join.refused")[counted:]
        assert new["fields"]["reason"] == "void"
        assert new["fields"]["address"] == client.address
        metric = [
            s["value"]
            for s in world.read(host, "metrics")
            if s["name"] == "vxmesh_notices_total" and s["labels"]["kind"] == "join.refused"
        ]
        assert metric and metric[0] >= 1
    knows_nothing_new(world, before)


@pytest.fixture
def short() -> Iterator[World]:
    """Three hosts whose certificates hold for a few seconds only."""
    with temporary(hosts=3, agent_options=("--cert-life", LIFE)) as bed:
        yield World(bed)


def test_with_an_expired_certificate_of_a_node(short: World, tmp_path: Path) -> None:
    held = identity_of(short, "h3")
    file = write_identity(tmp_path / "h3", held)
    while time.time() < held.not_after:
        time.sleep(0.1)
    # It is old, and h3 itself has another one by now.
    attempt(short, "expired", "expired", file, node=held.node)
    short.wait(
        lambda: {n["state"] for n in short.read("h1", "node", "ls")} == {"alive"}, "all are alive"
    )


def ended(calls: Iterable[subprocess.Popen[str]]) -> float:
    """When the last of these was cut off: time.monotonic, which all processes share. One that is
    not would be answered in the end."""
    told = [json.loads(call.communicate(timeout=90)[0]) for call in calls]
    assert {each["code"] for each in told} == {"UNAVAILABLE"}
    return max(float(each["ended"]) for each in told)


@pytest.fixture
def own() -> Iterator[World]:
    with temporary(hosts=3) as bed:
        yield World(bed)


def test_a_removed_node_is_cut_off_by_all_and_stays_out(own: World, tmp_path: Path) -> None:
    held = identity_of(own, "h3")
    file = write_identity(tmp_path / "h3", held)
    # Connections that stand, of who has its certificate, and are no sign that its agent lives.
    calls = {}
    for host in ("h1", "h2"):
        command = stranger(own, "hold", host, file)
        calls[host] = own.host("client").popen(command, stdout=-1, text=True)
        assert said(calls[host].stdout) == "standing\n"
    own.bed.cut("h3")
    for host in ("h1", "h2"):
        own.wait(
            lambda host=host: own.read(host, "node", "inspect", "h3")["state"] == "unreachable",  # type: ignore[misc]
            f"{host} misses h3",
        )
    assert all(call.poll() is None for call in calls.values())
    own.vx("h1", "node", "rm", "h3")
    began = time.monotonic()
    taken = ended(calls.values()) - began
    print(f"\nremoved and cut off by all: {taken:.2f} s", end="")
    for host in ("h1", "h2"):
        attempt(own, "removed", "removed, by whom", file, node=held.node, host=host)
    # Its own agent, which has noticed nothing of all that, is told and ends.
    own.bed.heal("h3")
    own.wait(lambda: not own.host("h3").is_running, "h3's agent ended")
    assert "was removed from the cluster by h1" in own.host("h3").log.read_text()
    assert own.names("h1") == ["h1", "h2"]


def test_one_that_lives_is_cut_off_by_all_and_stays_out(own: World, tmp_path: Path) -> None:
    net = own.network("--subnet", "10.77.0.0/28", host="h3")
    for host, name in (("h3", "taken-over"), ("h1", "mine"), ("h2", "yours")):
        own.vx(host, "endpoint", "create", "--network", net, "--name", name, "--wait=10")
    held = identity_of(own, "h3")
    file = write_identity(tmp_path / "h3", held)
    calls = {}
    for host in ("h1", "h2"):
        command = stranger(own, "hold", host, file)
        calls[host] = own.host("client").popen(command, stdout=-1, text=True)
        assert said(calls[host].stdout) == "standing\n"
    before = state(own)
    refused = own.try_vx("h1", "node", "rm", "h3")
    assert refused.returncode == 5 and "node rm --force h3" in refused.stderr, refused.stderr
    assert "addresses are handed out again" in refused.stderr
    knows_nothing_new(own, before)
    assert all(call.poll() is None for call in calls.values())

    asked = time.monotonic()
    own.vx("h1", "node", "rm", "--force", "h3")
    began = time.monotonic()
    cut = ended(calls.values())
    print(
        f"\none that lives is cut off by all {cut - began:.2f} s after 'node rm --force', which "
        f"took {began - asked:.2f} s",
        end="",
    )
    for host in ("h1", "h2"):
        own.wait(lambda h=host: own.names(h) == ["h1", "h2"], f"{host} heard")  # type: ignore[misc]
    own.wait(lambda: not own.host("h3").is_running, "h3's agent was told and ended")
    assert "was removed from the cluster by h1" in own.host("h3").log.read_text()

    # Nothing of it is left with the others, and it does not come back.
    for host in ("h1", "h2"):
        own.wait(lambda h=host: own.names(h, "endpoint") == ["mine", "yours"], "all but its own")  # type: ignore[misc]
        assert own.try_vx(host, "resolve", "mine", "--network", net).returncode == 0
        assert own.try_vx(host, "resolve", "taken-over", "--network", net).returncode == 4
        own.wait(lambda h=host: own.owners(h, net) <= {"h1", "h2"}, "its ranges are inherited")  # type: ignore[misc]
        attempt(own, "removed", "removed, by whom", file, node=held.node, host=host)
    lost = own.host("h3")
    started = own.run("h3", VXMESH, "agent", "--name", "h3", "--advertise", lost.address)
    assert started.returncode == 1 and "was removed from the cluster" in started.stderr
    # All its addresses can be had again, none of the others' twice.
    for number in range(11):
        own.vx(f"h{1 + number % 2}", "endpoint", "create", "--network", net, "--name", f"e{number}")
    own.wait(lambda: len(own.read("h1", "endpoint", "ls")) == 13, "h1 has all")
    assert len({e["addresses"][0] for e in own.read("h1", "endpoint", "ls")}) == 13
