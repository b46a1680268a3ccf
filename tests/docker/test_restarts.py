"""Containers that start again have the address that they had, whoever ended meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from agent import syscalls
from agent.testbed.state import ENGINE_CONFIG
from tests.docker.test_life import both_reach, names, nothing_is_left, pair, reaches
from tests.docker.world import DockerWorld
from tests.netns.echoes import Echoes

# What a host loses with its memory: all but the engine's data, which would be on disk.
LOSE = """
for mount in /run/docker/netns/* /run/vxmesh/netns /run/docker-data/*/*/merged; do
  umount -l $mount
done
rm -rf /run/docker /run/vxmesh
for link in $(ip -o link | sed -n 's/^[0-9]*: \\(vx[^@:]*\\).*/\\1/p'); do
  ip link del $link
done
""".strip()


def addresses(world: DockerWorld, host: str, *containers: str) -> list[tuple[str, str]]:
    """Address and MAC of containers, as the engine says; empty ones of such as do not run."""
    found = [world.about(host, container, "web") for container in containers]
    return [(str(one["IPAddress"]), str(one["MacAddress"])) for one in found]


def pid_of(world: DockerWorld, host: str, container: str) -> str:
    return world.docker(host, "inspect", "-f", "{{.State.Pid}}", container)


def engine(world: DockerWorld, host: str) -> int:
    return int(world.run(host, "cat", "/run/docker.pid").stdout)


def end_engine(world: DockerWorld, host: str, number: signal.Signals) -> None:
    """End an engine by a signal, and wait until it has ended."""
    pid = engine(world, host)
    os.kill(pid, number)
    world.wait(lambda: syscalls.start_time(pid) == 0, f"the engine of {host} has ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_starts_again(world: DockerWorld, number: signal.Signals) -> None:
    pair(world)
    world.container("h1", "web", "other")
    world.docker("h1", "rm", "-f", "other")  # so that the next free one is another
    had = addresses(world, "h1", "one")
    end_engine(world, "h1", number)
    world.bed.start("h1")
    world.wait(lambda: both_reach(world), "both reach each other again")
    assert addresses(world, "h1", "one") == had
    nothing_is_left(world)


def test_containers_that_are_started_in_another_order(world: DockerWorld) -> None:
    pair(world)
    several = [world.container("h3", "web", f"c{n}") for n in range(3)]
    had = addresses(world, "h3", *several)
    for name in several:
        world.docker("h3", "stop", name)
    world.container("h3", "web", "new")  # has none of theirs
    assert not set(addresses(world, "h3", "new")) & set(had)
    for name in reversed(several):
        world.docker("h3", "start", name)
    assert addresses(world, "h3", *several) == had
    world.docker("h3", "rm", "-f", "new", *several)
    nothing_is_left(world)


def test_live_restore(world: DockerWorld) -> None:
    """Containers go on without their engine, which takes them over when it is back."""
    config = f"{ENGINE_CONFIG}/daemon.json"
    said = json.dumps({"live-restore": True})
    assert world.run("h1", "sh", "-c", f"echo '{said}' > {config}").returncode == 0
    end_engine(world, "h1", signal.SIGTERM)
    world.bed.start("h1")
    try:
        pair(world)
        had = addresses(world, "h1", "one")
        pid = pid_of(world, "h1", "one")
        there = ("nsenter", "-n", "-t", pid_of(world, "h3", "two"))
        command = [*there, "ping", "-i", "0.05", had[0][0]]
        with Echoes(world.host("h3").popen(command, stdout=-1, text=True)) as ping:
            end_engine(world, "h1", signal.SIGTERM)
            assert reaches(world, "h3", "two", "one")  # while the engine is away
            world.bed.kill("h1")
            world.bed.start("h1")  # the agent, and the engine
            assert pid_of(world, "h1", "one") == pid
            assert addresses(world, "h1", "one") == had
            assert ping.end() == [], "it was reached all the time"
        world.wait(lambda: both_reach(world), "by name too: those come with the engine's events")
        world.container("h1", "web", "new")
        world.wait(lambda: reaches(world, "h3", "two", "new"), "who is new is reached")
        world.docker("h1", "rm", "-f", "new")
        nothing_is_left(world)
    finally:
        world.run("h1", "rm", config)
        end_engine(world, "h1", signal.SIGTERM)
        world.bed.start("h1")


def test_a_host_that_starts_anew(world: DockerWorld) -> None:
    """All that runs on it ends at once, and what is in memory is gone."""
    pair(world)
    had = addresses(world, "h1", "one")
    host = world.host("h1")
    containers = [int(pid_of(world, "h1", "one"))]
    wire = Path(host.namespaces.net).stat().st_ino
    for pid in containers + [int(p.name) for p in Path("/proc").glob("[1-9]*")]:
        with contextlib.suppress(OSError):
            own = Path(f"/proc/{pid}/ns/net").stat().st_ino == wire
            if pid in containers or (own and not _holds(pid)):
                os.kill(pid, signal.SIGKILL)
    world.wait(lambda: not (host.is_running or host.is_engine_running), "both have ended")
    world.run("h1", "sh", "-c", LOSE)
    assert "vx" not in world.run("h1", "ip", "-o", "link", check=True).stdout
    world.bed.start("h1")
    world.wait(lambda: both_reach(world), "both reach each other again")
    assert addresses(world, "h1", "one") == had
    world.wait(lambda: names(world) == ["one", "two"], "h2 knows them and no others")
    nothing_is_left(world)  # also: no "has active endpoints"


def _holds(pid: int) -> bool:
    """Whether a process is there for the host's own mounts alone."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/bin/sleep\0infinity")
