"""What a container runtime does with vxmesh-cni, through the executable and in real namespaces."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.netns.world import Failed, World

ROOT = Path(__file__).resolve().parents[2]
CODES = {"again": 11, "taken": 100, "wrong": 103, "unknown": 3}


class Container:
    """A namespace of a host, and the calls of a runtime about it."""

    def __init__(self, world: World, host: str, network: str, id: str, plugin: Path) -> None:
        self.world, self.host, self.network, self.id = world, host, network, id
        self.netns = f"/run/netns/{id}"
        self._plugin = plugin
        self.result: dict[str, Any] = {}
        self.ip_ok("netns", "add", id)
        world.later(lambda: self.world.run(host, "ip", "netns", "del", id))

    def call(
        self,
        command: str,
        ifname: str = "eth0",
        args: str = "",
        version: str = "1.1.0",
        **more: Any,
    ) -> tuple[int, dict[str, Any]]:
        """Exit status, and what was on stdout."""
        config = {"cniVersion": version, "name": "dbnet", "type": "vxmesh-cni"}
        config |= {"network": self.network} | more
        variables = {
            "CNI_COMMAND": command, "CNI_CONTAINERID": self.id, "CNI_NETNS": self.netns,
            "CNI_IFNAME": ifname, "CNI_ARGS": args, "CNI_PATH": "/opt/cni/bin",
        }  # fmt: skip
        done = self.world.run(self.host, str(self._plugin), input=json.dumps(config), env=variables)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    def ok(self, command: str, **how: Any) -> dict[str, Any]:
        status, said = self.call(command, **how)
        if status:
            raise Failed(f"{command}: {said}")
        return said

    def refused(self, command: str, **how: Any) -> dict[str, Any]:
        status, said = self.call(command, **how)
        assert status == 1, said
        assert said["cniVersion"] and said["msg"] and said["details"]
        return said

    def add(self, **how: Any) -> dict[str, Any]:
        self.result = self.ok("ADD", **how)
        return self.result

    def address(self) -> str:
        return str(self.result["ips"][0]["address"]).partition("/")[0]

    def ip(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.world.run(self.host, "ip", *words)

    def ip_ok(self, *words: str) -> str:
        done = self.ip(*words)
        if done.returncode:
            raise Failed(f"ip {words}: {done.stderr}")
        return done.stdout

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.world.run(self.host, "nsenter", f"--net={self.netns}", *command)

    def interfaces(self) -> list[str]:
        return [link["ifname"] for link in json.loads(self.inside("ip", "-j", "link").stdout)]

    def endpoints(self) -> list[Any]:
        found = self.world.read(self.host, "endpoint", "ls", "--network", self.network)
        return [e for e in found if e["labels"].get("cni.container") == self.id]


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable as an installer makes it of the entry point in pyproject.toml."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["vxmesh-cni"].split(":")
    file = tmp_path_factory.mktemp("bin") / "vxmesh-cni"
    file.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from {module} import {function}\nsys.exit({function}())\n"
    )
    file.chmod(0o755)
    return file


@pytest.fixture
def blue(world: World, plugin: Path) -> Container:
    return Container(world, "h1", world.network("--subnet", "10.61.0.0/24"), "blue", plugin)


def test_the_whole_life_of_an_attachment(blue: Container) -> None:
    world = blue.world
    db = world.workload("h3", blue.network, "db")
    said = blue.add()
    mac = said["interfaces"][0]["mac"]
    mtu = said["interfaces"][0]["mtu"]
    assert said == {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "mac": mac, "sandbox": blue.netns, "mtu": mtu}],
        "ips": [{"address": f"{blue.address()}/24", "interface": 0, "gateway": "10.61.0.1"}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.61.0.1"}],
        "dns": {
            "nameservers": ["10.61.0.1"],
            "search": [f"{blue.network}.vxmesh.internal"],
            "options": ["ndots:0"],
        },
    }
    link = json.loads(blue.inside("ip", "-j", "link", "show", "eth0").stdout)[0]
    assert (link["address"], link["mtu"]) == (mac, mtu)
    # By address and by name, both ways.
    there = world.address("h3", db, blue.network)
    world.wait(lambda: blue.inside("ping", "-c1", "-W1", there).returncode == 0, "blue reaches db")
    assert world.reaches("h3", db, "blue")
    ask = ("python3", "-c", QUESTION, said["dns"]["nameservers"][0], db)
    world.wait(lambda: there in blue.inside(*ask).stdout, "the name server knows db")
    blue.ok("CHECK", prevResult=said)
    again = blue.refused("ADD")
    assert again["code"] == CODES["taken"] and len(blue.endpoints()) == 1
    blue.ok("CHECK", prevResult=said)
    assert blue.ok("DEL", prevResult=said) == {}
    assert blue.interfaces() == ["lo"] and not blue.endpoints()
    assert blue.ok("DEL") == {}
    assert blue.refused("CHECK", prevResult=said)["code"] == CODES["unknown"]


QUESTION = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(20)
name = b"".join(bytes([len(p)]) + p.encode() for p in sys.argv[2].split("."))
sock.sendto(b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + name + b"\\0\\0\\1\\0\\1", (sys.argv[1], 53))
print(socket.inet_ntoa(sock.recv(512)[-4:]))
"""


def test_check_says_what_is_not_as_it_should_be(blue: Container) -> None:
    said = blue.add()
    blue.inside("ip", "route", "del", "default")
    told = blue.refused("CHECK", prevResult=said)
    assert told["code"] == CODES["wrong"] and "no route to 0.0.0.0/0" in told["details"]
    blue.inside("ip", "addr", "flush", "dev", "eth0")
    told = blue.refused("CHECK", prevResult=said)
    assert f"no address {blue.address()}/24" in told["details"]
    blue.inside("ip", "link", "set", "eth0", "down")
    assert "it is down" in blue.refused("CHECK", prevResult=said)["details"]


def test_an_interface_that_somebody_deletes_is_put_back_and_a_deleted_endpoint_is_not(
    blue: Container,
) -> None:
    said = blue.add()
    blue.inside("ip", "link", "del", "eth0")
    blue.world.wait(
        lambda: blue.call("CHECK", prevResult=said)[0] == 0, "eth0 is as it was, by drift repair"
    )
    blue.world.vx("h1", "endpoint", "rm", blue.endpoints()[0]["id"])
    assert blue.interfaces() == ["lo"]
    assert blue.refused("CHECK", prevResult=said)["code"] == CODES["unknown"]


def test_the_agent_is_restarted_between_add_and_del(blue: Container) -> None:
    world = blue.world
    said = blue.add()
    world.bed.kill("h1")
    assert blue.refused("ADD", ifname="eth1")["code"] == CODES["again"]
    assert blue.refused("DEL")["code"] == CODES["again"]  # it is not done, and says so
    assert blue.refused("STATUS")["code"] == 50
    assert blue.interfaces() == ["lo", "eth0"]
    world.bed.start("h1")
    blue.ok("STATUS")
    blue.ok("CHECK", prevResult=said)
    assert blue.refused("ADD")["code"] == CODES["taken"]
    blue.ok("DEL")
    assert blue.interfaces() == ["lo"] and not blue.endpoints()


def test_del_when_namespace_and_network_are_gone(blue: Container) -> None:
    world = blue.world
    blue.add()
    blue.ip_ok("netns", "del", "blue")
    blue.ok("DEL")
    assert not blue.endpoints()
    world.vx("h1", "network", "rm", blue.network, "--wait=10")
    blue.ok("DEL")
    assert blue.refused("STATUS")["code"] == 50
    blue.ip_ok("netns", "add", "blue")
    assert blue.refused("ADD")["code"] == 7
    assert blue.interfaces() == ["lo"]


def test_gc_leaves_what_is_valid_and_nothing_else(blue: Container, plugin: Path) -> None:
    world = blue.world
    red = Container(world, "h1", blue.network, "red", plugin)
    kept = blue.add()
    red.add()
    own = world.workload("h1", blue.network)
    valid = {"cni.dev/valid-attachments": [{"containerID": "blue", "ifname": "eth0"}]}
    assert blue.ok("GC", **valid) == {}
    assert red.interfaces() == ["lo"] and not red.endpoints()
    blue.ok("CHECK", prevResult=kept)
    blue.ok("GC", **{"cni.dev/valid-attachments": []})
    left = world.read("h1", "endpoint", "ls", "--network", blue.network)
    assert [e["name"] for e in left] == [own]  # no container's, so no affair of a runtime
    assert blue.interfaces() == ["lo"]


def test_an_add_that_cannot_be_leaves_nothing(blue: Container) -> None:
    blue.inside("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    assert blue.refused("ADD")["code"] == CODES["taken"]
    assert not blue.endpoints() and blue.interfaces() == ["lo", "other", "eth0"]
    blue.inside("ip", "link", "del", "eth0")
    assert blue.refused("ADD", args="IP=10.62.0.9")["code"] == 7
    blue.netns = "/proc/self/ns/net"
    assert blue.refused("ADD")["code"] == 4  # it is the host's
    blue.netns = "/run/netns/nobody"
    assert blue.refused("ADD")["code"] == CODES["unknown"]
    assert not blue.endpoints()


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_wishes_in_each_version(blue: Container, version: str) -> None:
    said = blue.add(
        version=version,
        args="IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0",
        runtimeConfig={"ips": ["10.61.0.77/24"], "mac": "02:00:5e:00:53:77",
                       "aliases": {"dbnet": ["shop"]}},
        labels={"app": "web"},
    )  # fmt: skip
    assert said["cniVersion"] == version and blue.address() == "10.61.0.77"
    assert said["interfaces"][0]["mac"] == "02:00:5e:00:53:77"
    assert ("version" in said["ips"][0]) == (version in ("0.3.1", "0.4.0"))
    (endpoint,) = blue.endpoints()
    assert endpoint["name"] == "web-0" and endpoint["aliases"] == ["blue", "shop"]
    assert endpoint["labels"]["app"] == "web"
    other = blue.world.workload("h3", blue.network)
    assert all(blue.world.reaches("h3", other, name) for name in ("web-0", "blue", "shop"))
    if version != "0.3.1":
        blue.ok("CHECK", version=version, prevResult=said)
    blue.ok("DEL", version=version, prevResult=said)


def test_one_container_in_two_networks(blue: Container) -> None:
    second = blue.world.network("--subnet", "10.62.0.0/24", "--internal")
    first = blue.add()
    said = blue.ok("ADD", ifname="net1", network=second, name="other")
    assert "gateway" not in said["ips"][0] and said["routes"] == []
    assert blue.interfaces() == ["lo", "eth0", "net1"]
    blue.ok("CHECK", prevResult=first)
    blue.ok("CHECK", ifname="net1", network=second, name="other", prevResult=said)
    blue.ok("DEL", ifname="net1", network=second, name="other")
    assert blue.interfaces() == ["lo", "eth0"]
    blue.ok("DEL")


def test_a_published_port_leads_to_the_container(blue: Container) -> None:
    mappings = [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]
    blue.add(runtimeConfig={"portMappings": mappings})
    served = blue.world.host("h1").popen(
        ["nsenter", f"--net={blue.netns}", sys.executable, "-c", ONE_ANSWER]
    )
    blue.world.later(served.kill)
    ask = (
        "import socket, sys; s = socket.create_connection((sys.argv[1], 18080), 10);"
        "print(s.recv(64).decode())"
    )
    client, host = blue.world.host("client"), blue.world.host("h1").address

    def told() -> str:
        return client.run([sys.executable, "-c", ask, host]).stdout.strip()

    blue.world.wait(lambda: told() == client.address, "the container sees the client's own address")
    taken = blue.refused("ADD", ifname="eth1", runtimeConfig={"portMappings": mappings})
    assert taken["code"] == CODES["taken"]
    blue.ok("DEL")
    served.kill()
    served.wait()


ONE_ANSWER = """
import socket
with socket.create_server(("", 80)) as server:
    while True:
        connection, peer = server.accept()
        with connection:
            connection.sendall(peer[0].encode())
"""


def test_the_four_lines_of_the_documentation(world: World, plugin: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs/cni.md").read_text()
    found = re.match(r"# CNI\n\n```\n(.*?)```", text, re.S)
    assert found
    lines = found[1].splitlines()
    assert len(lines) == 4
    world.later(lambda: world.run("h1", "ip", "netns", "del", "blue"))
    path = os.pathsep.join([str(plugin.parent), os.environ["PATH"]])
    script = "\n".join(["set -e", f"cd {tmp_path}", *lines])
    done = world.run("h1", "sh", "-c", script, env={"PATH": path})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    address = result["ips"][0]["address"].partition("/")[0]
    other = world.workload("h3", "demo")
    assert world.reaches("h3", other, address) and world.reaches("h3", other, "blue")
