"""Our rules in a chain DOCKER-USER made by hand: behind the administrator's, and gone with us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.datapath import firewall
from agent.datapath.cleanup import remove_everything
from agent.syscalls import in_netns
from tests.netns.datapath_hosts import run

pytestmark = pytest.mark.netns
DROP = "-A DOCKER-USER -s 192.0.2.0/24 -o vxmesh0 -j DROP"
LATER = "-A DOCKER-USER -s 198.51.100.0/24 -j DROP"
RETURN = "-A DOCKER-USER -j RETURN"
OURS = [
    f"-A DOCKER-USER -{way} vxmesh0 -m comment --comment vxmesh -j ACCEPT" for way in ("i", "o")
]


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"vxt-fire-{os.getpid()}"
    run("ip", "netns", "add", name)
    yield Path("/run/netns") / name
    run("ip", "netns", "delete", name)


def change(netns: Path, *words: str, program: str = "iptables") -> list[str]:
    run(program, *words, netns=netns)
    return rules(netns, program)


def rules(netns: Path, program: str = "iptables") -> list[str]:
    """Of the chain, but for the line that makes it."""
    return run(program, "-S", firewall.CHAIN, netns=netns).splitlines()[1:]


def open_up(netns: Path) -> int:
    return in_netns(netns, firewall.let_through)


@pytest.mark.parametrize("last", [[], [RETURN]], ids=["no return", "return"])
async def test_ours_are_behind_those_that_are_there(netns: Path, last: list[str]) -> None:
    assert open_up(netns) == 0, "no engine was here"
    change(netns, "-N", firewall.CHAIN)
    for line in (DROP, *last):
        change(netns, *line.split())
    assert open_up(netns) == 2
    assert rules(netns) == [DROP, *OURS, *last]
    assert open_up(netns) == 0 and rules(netns) == [DROP, *OURS, *last]
    # One that comes later is asked before ours as well; one of ours that is gone is put back.
    where = ("-I", firewall.CHAIN, "4") if last else ("-A", firewall.CHAIN)
    change(netns, *where, *LATER.split()[2:])
    change(netns, "-D", *OURS[0].split()[1:])
    assert open_up(netns) == 2 and rules(netns) == [DROP, LATER, *OURS, *last]
    await remove_everything(netns.parent / f"{netns.name}-none", str(netns))
    assert rules(netns) == [DROP, LATER, *last]


def test_each_family_by_itself(netns: Path) -> None:
    change(netns, "-N", firewall.CHAIN, program="ip6tables")
    assert open_up(netns) == 2
    assert rules(netns, "ip6tables") == OURS
