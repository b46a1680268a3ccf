"""Who may use an agent, seen from the command line of users and groups on a host."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.testbed import temporary
from tests.netns.world import World

PORT = 7947
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
    groups = ("--change-group", str(CHANGE), "--read-group", str(READ))
    options = (*groups, "--control-listen", f"0.0.0.0:{PORT}")
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
    world.wait(lambda: refused() > before, "the metric")
    told = "uid 64700 has no right to call"
    world.wait(lambda: told in world.vx("h1", "events"), "the event")
    lines = [x for x in world.host("h1").log.read_text().splitlines() if "control.change" in x]
    assert "CreateNetwork" in lines[-2] and "uid=64700" in lines[-2] and "yes" in lines[-2]
    assert "RemoveNetwork" in lines[-1] and "uid=0" in lines[-1]


def test_users_control_from_elsewhere_with_certificates_and_nodes_do_not(
    world: World, tmp_path: Path
) -> None:
    host = f"tcp://{world.host('h1').address}:{PORT}"

    def remote(file: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
        return world.try_vx("client", *words, "--host", host, "--tls", str(file))

    files = {name: tmp_path / f"{name}.pem" for name in ("alice", "bob", "node")}
    made = world.read("h1", "cluster", "user", "alice", "--out", str(files["alice"]))
    assert (made["name"], made["right"]) == ("alice", "change") and made["ends"]
    assert files["alice"].stat().st_mode & 0o777 == 0o600
    world.vx("h1", "cluster", "user", "bob", "--read", "--out", str(files["bob"]))
    again = world.try_vx("h1", "cluster", "user", "bob", "--out", str(files["bob"]))
    assert again.returncode == 5 and "exists" in again.stderr

    assert remote(files["alice"], "network", "create", "far", "--wait=10").returncode == 0
    listed = remote(files["bob"], "network", "ls", "-o", "json")
    assert listed.returncode == 0 and '"far"' in listed.stdout, listed.stderr
    refused = remote(files["bob"], "network", "rm", "far")
    assert refused.returncode == 1 and "user bob's certificate" in refused.stderr
    assert remote(files["alice"], "network", "rm", "far").returncode == 0
    log = world.host("h1").log.read_text()
    assert any("control.change" in line and "user=alice" in line for line in log.splitlines())

    # The node's own key and certificate, which whoever broke into it has.
    node = world.run("h1", "cat", "/var/lib/vxmesh/tls/node.pem", check=True).stdout
    key = node[node.index("-----BEGIN PRIVATE") :]
    key = key[: key.index("END PRIVATE KEY-----") + 20] + "\n"
    authorities = files["alice"].read_text().split("-----BEGIN CERTIFICATE-----", 2)[2]
    certificate = node[node.index("-----BEGIN CERTIFICATE") :].split("-----BEGIN PRIVATE")[0]
    files["node"].write_text(f"{key}{certificate}-----BEGIN CERTIFICATE-----{authorities}")
    refused = remote(files["node"], "network", "ls")
    assert refused.returncode == 2 and "names no user" in refused.stderr, refused.stderr
    none = world.try_vx("client", "network", "ls", "--host", host)
    assert none.returncode == 2 and "takes a certificate" in none.stderr
    # Nor by a program that does not look first: it sees its connection end, and the agent tells.
    program = (
        "import socket, ssl, sys\n"
        "context = ssl.create_default_context(cafile=sys.argv[2])\n"
        "context.check_hostname = False\n"
        "if sys.argv[2] != sys.argv[3]: context.load_cert_chain(sys.argv[3])\n"
        "sock = context.wrap_socket(socket.create_connection((sys.argv[1], 7947)))\n"
        "try: print(len(sock.recv(100)))\n"
        "except (OSError, ssl.SSLError): print(0)\n"
    )
    trusted = tmp_path / "ca.pem"
    trusted.write_text("-----BEGIN CERTIFICATE-----" + authorities)
    address = world.host("h1").address
    for shown, why in ((files["node"], "names no user"), (trusted, "did not return a certificate")):
        got = world.run("client", "python", "-c", program, address, str(trusted), str(shown))
        assert got.stdout == "0\n", got.stderr
        world.wait(
            lambda why=why: why in world.vx("h1", "events"),  # type: ignore[misc]
            f"an event says that the certificate {why}",
        )
