"""The first lines of the documentation do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.docker.world import DockerWorld

PAGE = Path(__file__).resolve().parents[2] / "docs/docker.md"


def test_the_four_lines(world: DockerWorld) -> None:
    found = re.search(r"```\n(.*?)```", PAGE.read_text(), re.S)
    assert found
    up, *lines = found[1].splitlines()
    assert up == "vxmesh testbed up --docker" and len(lines) == 3
    for line in lines:
        host, command = re.fullmatch(r"vxmesh testbed exec (h\d) -- (.*)", line).groups()  # type: ignore[union-attr]
        if host == "h3":
            world.wait(lambda: "web" in world.networks("h3"), "web is on h3")
            world.known("h3", "db")
        said = world.docker(host, *shlex.split(command)[1:])
    assert "1 packets received" in said
