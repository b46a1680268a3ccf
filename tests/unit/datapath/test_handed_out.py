"""Ports whose other end is another's: what becomes of that end is no matter for ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.datapath.backlog import Backlog
from agent.datapath.drift import Drift
from agent.datapath.inspection import Inspection
from agent.datapath.linkstate import LinkState
from agent.datapath.monitor import Events
from agent.datapath.networks import Held, Networks
from agent.drivers.base import Bridge, Port
from agent.model import HANDED_OUT

MAC = bytes([2, 0, 0, 0, 0, 9])
HOST = Path(HANDED_OUT).stat().st_ino
PORT = Port("e1", "vxpe1", MAC, ("10.1.0.9/24",), HANDED_OUT, HOST, "vxde1", ())
BRIDGE = Bridge("n1", 7, "vxb7", "vxl7", 1450, MAC, (), (), False, "10.0.0.1", 4789, {"e1": PORT})
LINK = LinkState(21, "vxpe1", True, True, MAC, 1450, 20, "vxmesh:ep:e1", False, False)


@pytest.fixture
def networks() -> Networks:
    """One network with that port, and no kernel: who asks it fails."""
    nothing: Any = None
    made = Networks(nothing, nothing, 0, nothing, nothing, nothing)
    made.held[7] = Held(BRIDGE, 20, 22, {"e1": (PORT, 21)})
    made.devices = {20: (7, ""), 21: (7, "e1"), 22: (7, "")}
    return made


@pytest.fixture
def noted(networks: Networks) -> Callable[[Events], Backlog]:
    """What is to be looked at again after some events."""
    desired: Any = SimpleNamespace(bridge={7: BRIDGE}.get, complete=lambda: True)
    nothing: Any = None
    uplink: Any = SimpleNamespace(index=3)
    inspection = Inspection(networks, nothing)

    def note(events: Events) -> Backlog:
        backlog = Backlog()
        Drift(desired, networks, inspection, uplink, nothing, print).note(events, backlog)
        return backlog

    return note


def test_a_container_that_ends_is_no_drift(noted: Callable[[Events], Backlog]) -> None:
    gone = replace(LINK, carrier=False)
    assert not noted(Events(links=[gone], addresses={21: [bytes(16)]}))


@pytest.mark.parametrize(
    "events",
    [
        Events(links=[replace(LINK, up=False)]),
        Events(links=[replace(LINK, carrier=False, learning=True)]),
        Events(lost={21}),
        Events(macs={21: [MAC]}),
    ],
)
def test_what_is_done_to_our_own_end_is(noted: Callable[[Events], Backlog], events: Events) -> None:
    assert noted(events).suspects == {7: {"e1"}}


def test_the_carrier_of_a_port_that_we_furnish_is_looked_at(
    networks: Networks, noted: Callable[[Events], Backlog], tmp_path: Path
) -> None:
    inside = replace(PORT, netns=str(tmp_path), inode=tmp_path.stat().st_ino)
    networks.held[7].ports["e1"] = inside, 21
    assert noted(Events(links=[replace(LINK, carrier=False)])).suspects == {7: {"e1"}}


async def test_where_the_other_end_went_needs_nothing_of_the_kernel(networks: Networks) -> None:
    moved = replace(PORT, moved=("/run/netns/x", 9, "eth0"))
    await networks.attach(7, moved, interior=False)
    assert networks.held[7].ports == {"e1": (moved, 21)}
    assert networks.devices[21] == (7, "e1")
