"""Who may use an agent, seen from the command line of users and groups on a host."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from agent.testbed import temporary
from tests.netns.world import World

CHANGE, READ = 64711, 64712  # gids that no machine has
# The command line, run by another user. It is imported first: that user may not be able to read
# the interpreter's own files.
AS_USER = """
import difflib, grp, os, pwd, sys
import agent.cli.calls, agent.cli.main, agent.cli.network, agent.cli.output
import google.protobuf.json_format, google.rpc.error_details_pb2, google.rpc.status_pb2
gid = int(sys.argv.pop(1))
os.setgroups([gid])
os.setresgid(64700, 64700, 64700)
os.setresuid(64700, 64700, 64700)
agent.cli.main.main()
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    options = ("--change-group", str(CHANGE), "--read-group", str(READ))
    with temporary(hosts=1, agent_options=options) as bed:
        yield World(bed)


def vx_as(world: World, gid: int, *words: str) -> subprocess.CompletedProcess[str]:
    return world.run("h1", "python", "-c", AS_USER, str(gid), *words)


def test_members_of_the_groups_change_and_look_and_nobody_else_does(world: World) -> None:
    done = vx_as(world, CHANGE, "network", "create", "web")
    assert done.returncode == 0, done.stderr
    done = vx_as(world, READ, "network", "ls", "-o", "json")
    assert done.returncode == 0 and '"web"' in done.stdout, done.stderr

    done = vx_as(world, READ, "network", "rm", "web")
    assert done.returncode == 1
    assert "may look and not change: RemoveNetwork is for root" in done.stderr, done.stderr
    done = vx_as(world, 64713, "network", "ls")
    assert done.returncode == 1
    assert f"is for root and the group {CHANGE}" in done.stderr, done.stderr
    assert [n["name"] for n in world.read("h1", "network", "ls")] == ["web"]
    world.vx("h1", "network", "rm", "web")


def test_a_refusal_is_an_event_and_a_metric_and_a_change_is_in_the_log(world: World) -> None:
    def refused() -> float:
        return sum(
            float(series["value"])
            for series in world.read("h1", "metrics")
            if series["name"] == "vxmesh_control_refused_total"
            and series["labels"] == {"reason": "right"}
        )

    before = refused()
    vx_as(world, READ, "network", "create", "no")
    vx_as(world, CHANGE, "network", "create", "yes")
    world.vx("h1", "network", "rm", "yes")
    # A second refusal of one caller is told within ten seconds, together with what follows.
    world.wait(lambda: refused() > before, "the metric", 15)
    assert "uid 64700 has no right to call" in world.vx("h1", "events")
    lines = [x for x in world.host("h1").log.read_text().splitlines() if "control.change" in x]
    assert "CreateNetwork" in lines[-2] and "uid=64700" in lines[-2] and "yes" in lines[-2]
    assert "RemoveNetwork" in lines[-1] and "uid=0" in lines[-1]
