"""The documentation's examples do what the documentation says."""

from __future__ import annotations

import re
from pathlib import Path

from tests.netns.world import World

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_clients_example(world: World) -> None:
    text = (DOCS / "api.md").read_text()
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.S)
    assert found
    program, expected = found.groups()
    done = world.run("h1", "python", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_the_announcement_in_the_command_lines_page(world: World) -> None:
    text = (DOCS / "cli.md").read_text()
    line = re.search(r'^\{"name".*\}$', text, re.M)
    assert line
    net = world.network("--subnet", "10.1.0.0/24")
    announce = ("endpoint", "announce", "--network", net, "--file", "-")
    assert world.vx("h1", *announce, input=line[0] + "\n") == "1 announced"


def test_every_command_in_the_table_exists(world: World) -> None:
    text = (DOCS / "cli.md").read_text()
    for noun, rest in re.findall(r"^\| `vxmesh ([a-z]+)(.*?)\|", text, re.M):
        verbs = [v for v in re.findall(r"\b[a-z]+\b", rest) if v in VERBS] or [""]
        for verb in verbs:
            done = world.run("h1", *filter(None, ("vxmesh", noun, verb, "--help")))
            assert done.returncode == 0, f"{noun} {verb}"


VERBS = {"ls", "inspect", "create", "rm", "prune", "announce"}
