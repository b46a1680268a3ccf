"""What a container runtime does with vxmesh-cni, through the executable and in real namespaces."""

from __future__ import annotations

import json
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
    assert world.pings("h3", db, "blue")
    asked = blue.inside("python3", "-c", QUESTION, said["dns"]["nameservers"][0], db)
    assert there in asked.stdout, asked
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
sock.settimeout(5)
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
