"""Drift through the whole agent: put back, counted, told; and what shows that."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

from agent.testbed import temporary
from tests.netns.world import World, said, until_said

NETNS = "/run/vxmesh/netns"


def notices(world: World, host: str, *words: str) -> list[Any]:
    """The drift that an agent told of, as events of `vxmesh events`."""
    lines = world.vx(host, "events", "-o", "json", *words).splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] == "drift.repaired"]


def failures(world: World, host: str) -> list[float]:
    """How much of what an agent wants in the kernel is not, and is tried again."""
    found = world.read(host, "metrics")
    return [s["value"] for s in found if s["name"] == "vxmesh_kernel_failures"]


def counter(world: World, host: str, kind: str) -> float:
    for series in world.read(host, "metrics"):
        if (series["name"], series["labels"]) == ("vxmesh_drift_repaired_total", {"kind": kind}):
            return float(series["value"])
    raise AssertionError(f"no counter of {kind}")


def test_a_deleted_row_is_put_back_counted_and_told(world: World) -> None:
    net = world.network()
    near, far = world.workload("h1", net), world.workload("h2", net)
    vni = world.vni(net)
    rows = world.fdb("h1", vni)
    (mac,) = rows
    before = counter(world, "h1", "fdb")
    began = world.vx("h1", "events", "-o", "json").splitlines()[-1]
    world.in_own("h1", "bridge", "fdb", "del", mac, "dev", f"vxl{vni}", "self")
    world.wait(lambda: counter(world, "h1", "fdb") == before + 1, "it is counted")
    assert world.fdb("h1", vni) == rows
    since = ("--since", str(json.loads(began)["revision"]))
    world.wait(lambda: notices(world, "h1", *since), "it is told")
    (told,) = notices(world, "h1", *since)
    assert told["fields"] == {"kind": "fdb", "count": "1", "networks": net}
    assert told["message"] == f"1 FDB row of network {net} put back"
    lines = [x for x in world.vx("h1", "events", *since).splitlines() if "drift.repaired" in x]
    assert lines[0].split()[1:3] == ["drift.repaired", net] and lines[0].endswith("put back")
    assert world.reaches("h1", near, far)


def test_following_shows_what_happens_and_ends_when_told(world: World) -> None:
    following = world.host("h1").popen(
        ["vxmesh", "events", "--follow", "--since", "0.001s"], stdout=-1, stderr=-1, text=True
    )
    assert said(following.stdout).startswith("TIME ")
    try:
        net = world.network()
        line = until_said(following.stdout, net)
        assert line.split()[1] == "network.create"
    finally:
        following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=60)
    assert (following.returncode, errors) == (0, "")


def test_what_the_history_does_not_have_is_said(world: World) -> None:
    done = world.try_vx("h1", "events", "--since", "100d")
    assert done.returncode == 0
    assert "the history of this agent begins at 20" in done.stderr
    done = world.try_vx("h1", "events", "--since", "7")
    assert done.returncode == 2
    assert "revision 7: is not in this agent's history" in done.stderr


def test_a_namespace_deleted_under_the_agent_loses_nothing(world: World) -> None:
    net = world.network()
    near, far = world.workload("h1", net, "near"), world.workload("h2", net, "far")
    before = counter(world, "h1", "namespace")
    devices = world.links("h1")
    resolver = world.run("h1", "cat", "/run/vxmesh/resolver.lock").stdout
    world.run("h1", "umount", "--lazy", NETNS, check=True)
    world.wait(lambda: counter(world, "h1", "namespace") == before + 1, "it is counted")
    assert world.links("h1") == devices
    assert world.reaches("h1", near, far) and world.reaches("h2", far, "near")
    assert world.run("h1", "cat", "/run/vxmesh/resolver.lock").stdout == resolver


def test_a_namespace_deleted_while_no_agent_runs_is_made_anew(world: World) -> None:
    """The name server keeps the old one alive, VXLAN device and all, and has to be replaced."""
    net = world.network()
    near, far = world.workload("h1", net, "near"), world.workload("h2", net, "far")
    address = world.address("h1", near)
    resolver = world.run("h1", "cat", "/run/vxmesh/resolver.lock").stdout
    world.bed.kill("h1")
    world.run("h1", "sh", "-c", f"umount --lazy {NETNS} && rm {NETNS}", check=True)
    world.bed.start("h1")
    begin = time.monotonic()
    world.wait(lambda: world.pings("h1", near, "far"), "it passes traffic and resolves")
    world.wait(lambda: world.pings("h2", far, "near"), "and the other way")
    print(f"all of it was there {time.monotonic() - begin:.2f} s after the agent answered")
    assert world.address("h1", near) == address
    assert world.run("h1", "cat", "/run/vxmesh/resolver.lock").stdout != resolver
    # The old namespace goes with its name server, a moment later: what was in the way until
    # then has been tried again.
    world.wait(lambda: failures(world, "h1") == [0], "nothing is left that failed")


def test_metrics_over_http_where_it_is_asked_for() -> None:
    options = ("--metrics-listen", "127.0.0.1:9646")
    with temporary(hosts=1, agent_options=options) as bed:
        world = World(bed)
        program = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9646/metrics').read().decode())"

        def told() -> list[str]:
            return world.run("h1", "python", "-c", program, check=True).stdout.splitlines()

        assert 'vxmesh_nodes{state="alive"} 1.0' in told()
        world.wait(lambda: "vxmesh_resolver_up 1.0" in told(), "the name server is up")
        checked = world.read("h1", "agent", "--check-config", *options)
        assert {"metrics_listen", "--metrics-listen"} <= {
            v for row in checked for v in row.values() if isinstance(v, str)
        }
