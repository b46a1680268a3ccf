"""A third party's plugin as it is: kuryr-libnetwork, which OpenStack publishes for Docker, with its
network driver and its IPAM driver; of OpenStack itself stands neutron.py beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.needs import lacks
from tests.netns import neutron
from tests.netns.world import World

HOME = Path(__file__).parents[2] / ".venv-plugins"  # scripts/setup.sh dev
SPEC = "lib/python3*/site-packages/usr/lib/docker/plugins/kuryr/kuryr.spec"
PLUGINS = "/run/docker/plugins"
NEUTRON = 9696  # the port that Neutron has
CONFIG = """\
[DEFAULT]
bindir = {home}/libexec/kuryr
[neutron]
auth_type = none
endpoint = http://127.0.0.1:{neutron}
"""


class Kuryr:
    """The plugin on h1."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.process: subprocess.Popen[Any] | None = None
        self.neutron = world.host("h1").popen([sys.executable, neutron.__file__, str(NEUTRON)])
        (directory / "kuryr.conf").write_text(CONFIG.format(home=HOME, neutron=NEUTRON))
        [spec] = HOME.glob(SPEC)
        world.run("h1", "mkdir", "-p", PLUGINS, check=True)
        world.run("h1", "cp", str(spec), PLUGINS, check=True)
        world.wait(lambda: self._asks("/left", NEUTRON), "Neutron's stand-in listens", 60)

    def start(self) -> None:
        with (self.directory / "kuryr.log").open("a") as log:
            self.process = self.world.host("h1").popen(
                [
                    str(HOME / "bin/kuryr-server"),
                    "--config-file",
                    str(self.directory / "kuryr.conf"),
                ],
                stdout=log,
                stderr=log,
            )
        self.world.wait(lambda: self._asks("/", 23750), "the plugin listens", 60)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def stop(self) -> None:
        self.kill()
        self.neutron.kill()
        self.neutron.wait()
        self.world.run("h1", "rm", "-f", f"{PLUGINS}/kuryr.spec", check=True)

    def _asks(self, path: str, port: int) -> bool:
        return self._get(path, port).returncode == 0

    def _get(self, path: str, port: int) -> subprocess.CompletedProcess[str]:
        program = (
            "import http.client, sys\n"
            f"c = http.client.HTTPConnection('127.0.0.1', {port}, timeout=20)\n"
            f"c.request('GET', '{path}')\n"
            "sys.stdout.write(c.getresponse().read().decode())"
        )
        return self.world.run("h1", sys.executable, "-S", "-c", program)

    def has(self) -> dict[str, list[dict[str, Any]]]:
        """What there is at Neutron, by kind; kinds of which there is nothing left out."""
        return {k: v for k, v in json.loads(self._get("/left", NEUTRON).stdout).items() if v}

    def log(self) -> str:
        return (self.directory / "kuryr.log").read_text()


@pytest.fixture
def kuryr(world: World, tmp_path: Path) -> Iterator[Kuryr]:
    if not (HOME / "bin/kuryr-server").exists():
        lacks("needs kuryr-libnetwork: scripts/setup.sh dev")
    made = Kuryr(world, tmp_path)
    made.start()
    yield made
    world.clean()
    made.stop()


def test_kuryr_as_openstack_publishes_it_drives_a_network(kuryr: Kuryr) -> None:
    world = kuryr.world
    world.vx(
        "h1", "network", "create", "red", "--driver", "remote:kuryr",
        "--ipam-driver", "remote:kuryr", "--subnet", "10.55.0.0/24",
    )  # fmt: skip
    there = kuryr.has()
    assert [s["cidr"] for s in there["subnets"]] == ["10.55.0.0/24"], kuryr.log()
    assert len(there["networks"]) == len(there["subnetpools"]) == 1
    one = world.workload("h1", "red")
    two = world.workload("h1", "red", "", "--ip", "10.55.0.77")
    assert world.address("h1", two, "red") == "10.55.0.77"
    assert world.reaches("h1", one, "10.55.0.77")
    assert world.reaches("h1", two, world.address("h1", one, "red"))
    ports = kuryr.has()["ports"]
    macs = {world.read("h1", "endpoint", "inspect", name)["mac"] for name in (one, two)}
    assert {port["mac_address"] for port in ports} == macs
    assert {ip["ip_address"] for port in ports for ip in port["fixed_ips"]} == {
        world.address("h1", one, "red"), "10.55.0.77",
    }  # fmt: skip
    refused = world.try_vx("h1", "run", "--network", "red", "--ip", "10.55.0.77", "--", "true")
    assert refused.returncode == 5, "the address is taken"
    assert len(kuryr.has()["ports"]) == 2, "and nothing of it is left"

    kuryr.kill()
    world.vx("h1", "sandbox", "rm", one)
    assert len(kuryr.has()["ports"]) == 2, "it could not be told"
    kuryr.start()
    world.wait(lambda: len(kuryr.has()["ports"]) == 1, "it is told once it is back", 60)
    assert not world.pings("h1", two, "10.55.0.2")
    world.vx("h1", "sandbox", "rm", two)
    world.vx("h1", "network", "rm", "red")
    world.wait(lambda: not kuryr.has(), "nothing is left of the network", 60)
    links = world.run("h1", "ip", "-o", "link").stdout
    assert "tap" not in links and "t_c" not in links
    for line in links.splitlines():
        if (name := line.split()[1].rstrip(":")).startswith("brq"):
            world.run("h1", "ip", "link", "del", name)  # which kuryr leaves there
