"""Identity on real hosts: joining, certificates that end while all goes on, another CA."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from agent.errors import VxmeshError
from agent.testbed import Testbed, temporary
from tests.netns.echoes import Echoes
from tests.netns.world import VXMESH, World

AGENT = (VXMESH, "agent", "--name", "h4", "--advertise")


def status(world: World, host: str = "h1") -> Any:
    return world.read(host, "cluster", "status")


def told(world: World, host: str, kind: str) -> list[Any]:
    lines = world.vx(host, "events", "-o", "json").splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def test_pings_and_gossip_go_on_across_three_renewals_and_another_ca() -> None:
    options = ("--cert-life", "15s")
    with temporary(hosts=3, agent_options=options) as bed:
        world = World(bed)
        net = world.network()
        world.workload("h1", net, "one")
        world.workload("h3", net, "three")
        target = world.address("h3", "three")
        command = [VXMESH, "exec", "one", "--", "ping", "-i", "0.1", target]
        before = status(world)["authorities"][0]["fingerprint"]
        made = 0

        def gossip() -> None:
            nonlocal made
            host = f"h{made % 3 + 1}"
            made += 1
            make = ("endpoint", "create", "--network", net, "--name", f"e{made}")
            world.vx(host, *make, "--wait=20")

        def renewed() -> int:
            """How many times each host's certificate was, at least."""
            hosts = ("h1", "h2", "h3")
            return min(len(told(world, host, "certificate.renewed")) for host in hosts)

        with Echoes(bed.host("h1").popen(command, stdout=-1, text=True)) as ping:
            deadline = time.monotonic() + 120
            while renewed() < 3:
                assert time.monotonic() < deadline, "three renewals"
                gossip()
            world.vx("h1", "cluster", "rotate-ca", "--wait=30")
            gossip()
            world.wait(lambda: renewed() >= 4, "and the new CA's")
            assert ping.end() == []
        now = status(world)
        assert now["authorities"][0]["fingerprint"] != before
        assert now["rotation"] == {"phase": "done", "waiting": [], "left_behind": []}
        for host in ("h1", "h2", "h3"):
            log = bed.host(host).log.read_text()
            assert "peer.down" not in log, log[-3000:]
            assert "renewal_failed" not in log and "peer.refused" not in log
            assert len(world.read(host, "endpoint", "ls", "--network", net)) == made + 2


def test_a_node_whose_certificate_ended_comes_back_as_it_was_by_a_token() -> None:
    options = ("--cert-life", "10s")
    with temporary(hosts=4, agent_options=options) as bed:
        world = World(bed)
        world.wait(lambda: len(status(world)["keepers"]) == 3, "three keep the key")
        late = ({"h1", "h2", "h3", "h4"} - set(status(world)["keepers"])).pop()
        others = [h for h in ("h1", "h2", "h3", "h4") if h != late]
        net = world.network(host=others[0])
        world.vx(late, "endpoint", "create", "--network", net, "--name", "kept", "--wait=20")
        id = world.read(others[0], "node", "inspect", late)["id"]
        bed.kill(late)
        time.sleep(11)  # s; the life of its certificate
        address = bed.host(late).address
        join = ("--join", bed.host(others[0]).address)
        done = world.run(late, *AGENT, address, *join)
        assert done.returncode == 1
        assert "ended at" in done.stderr and "vxmesh cluster token" in done.stderr, done.stderr
        bed.start(late)  # with the token of the testbed
        world.wait(
            lambda: world.read(others[0], "node", "inspect", late)["state"] == "alive", "it is back"
        )
        assert world.read(others[0], "node", "inspect", late)["id"] == id
        assert [e["name"] for e in world.read(late, "endpoint", "ls")] == ["kept"]


def test_a_cluster_is_made_before_any_agent_runs_and_no_host_joins_without_its_token() -> None:
    with temporary(hosts=2, with_agents=False) as bed:
        world = World(bed)
        made = json.loads(world.vx("h1", "cluster", "init", "-o", "json"))  # no agent is asked
        again = world.try_vx("h1", "cluster", "init")
        assert again.returncode == 5 and made["id"] in again.stderr
        assert made["command"] == f"vxmesh agent --join 10.99.0.1:7946 --token {made['token']}"
        agent = [VXMESH, "agent", "--advertise", "10.99.0.2"]
        without = world.run("h2", *agent, "--join", "10.99.0.1")
        assert without.returncode == 2 and "needs a join token" in without.stderr
        nowhere = world.run("h2", *agent, "--token", made["token"])
        assert nowhere.returncode == 2 and "--join" in nowhere.stderr
        malformed = world.run("h2", *agent, "--join", "10.99.0.1", "--token", "VXM-1-x")
        assert malformed.returncode == 2 and "malformed" in malformed.stderr
        assert not bed.host("h2").run(["ls", "/var/lib/vxmesh"]).stdout, "nothing was left there"
        Testbed.up(prefix=bed.prefix)
        assert world.read("h1", "cluster", "token")["token"] == made["token"]
        assert status(world, "h2")["id"] == made["id"]

        def certified() -> list[str]:
            return [c["node"] for c in status(world, "h2")["certificates"]]

        # Records come by streams, that the other one is alive with the first probes.
        world.wait(lambda: certified() == ["h1", "h2"], "h2 has heard of both")
        assert world.read("h1", "node", "inspect", "h1")["id"] == made["node"]


def test_an_identity_that_was_damaged_is_refused_with_the_way_out() -> None:
    with temporary(hosts=2) as bed:
        world = World(bed)
        tls = "/var/lib/vxmesh/tls"
        id = world.read("h1", "node", "inspect", "h2")["id"]
        bed.kill("h2")
        bed.host("h2").run(["truncate", "-s", "100", f"{tls}/node.pem"], check=True)
        with pytest.raises(VxmeshError, match=r"node\.pem.*--join and --token"):
            bed.start("h2")
        bed.host("h2").run(["rm", f"{tls}/node.pem"], check=True)
        bed.start("h2")
        assert world.read("h2", "node", "inspect", "h2")["id"] == id
        bed.kill("h2")
        bed.host("h2").run(["sh", "-c", "rm /var/lib/vxmesh/state.db*"], check=True)
        with pytest.raises(VxmeshError, match="is gone, which is of node"):
            bed.start("h2")


def test_a_change_of_the_ca_is_gone_on_with_after_a_restart() -> None:
    with temporary(hosts=3) as bed:
        world = World(bed)
        world.wait(lambda: len(status(world)["keepers"]) == 3, "three keep the key")
        bed.kill("h3")  # its host is there: it is waited for
        begun = world.read("h1", "cluster", "rotate-ca")
        assert begun["rotation"]["phase"] == "introducing"
        world.wait(lambda: status(world)["rotation"]["waiting"] == ["h3"], "h2 has taken it in")
        late = world.try_vx("h1", "cluster", "rotate-ca", "--wait=1")
        assert late.returncode == 1 and "waiting for h3" in late.stderr, late.stderr
        bed.kill("h1")
        bed.start("h3")
        bed.start("h1")
        world.wait(lambda: status(world, "h2")["rotation"]["phase"] == "done", "it is done")
        done = {"phase": "done", "waiting": [], "left_behind": []}
        world.wait(lambda: status(world)["rotation"] == done, "h1 knows it too")
        world.wait(
            lambda: {n["state"] for n in world.read("h1", "node", "ls")} == {"alive"}, "all live"
        )
