"""What others did to rows, as it is judged by their events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from agent.datapath.backlog import Backlog
from agent.datapath.drift import Drift
from agent.datapath.inspection import Inspection
from agent.datapath.monitor import Events
from agent.datapath.networks import Held, Networks
from agent.drivers.base import DEFAULT, Bridge, Rows

MAC, VTEP, OTHER = bytes([2, 0, 0, 0, 0, 9]), bytes([10, 99, 0, 2]), bytes([10, 99, 0, 3])
BRIDGE = Bridge("n1", 7, "vxb7", "vxl7", 1450, MAC, (), (), False, "10.0.0.1", 4789)


def wanted(vni: int, macs: list[bytes], addresses: list[bytes]) -> Rows:
    fdb: list[tuple[bytes, bytes | None]] = [(mac, VTEP) for mac in macs if mac != DEFAULT]
    defaults = frozenset({VTEP}) if DEFAULT in macs else None
    return Rows(fdb, [], floods=True, defaults=defaults)


@pytest.fixture
def networks() -> Networks:
    """One network, 7, with VXLAN device 22."""
    nothing: Any = None
    networks = Networks(nothing, nothing, 0, nothing, Mock(), nothing)
    networks.held[7] = Held(BRIDGE, 20, 22, {})
    networks.devices = {20: (7, ""), 22: (7, "")}
    return networks


def note(networks: Networks, events: Events, backlog: Backlog) -> list[Any]:
    """Judge events; what was noted of default rows."""
    nothing: Any = None
    desired: Any = SimpleNamespace(rows=wanted, complete=lambda: True)
    uplink: Any = SimpleNamespace(index=3)
    inspection = Inspection(networks, nothing)
    Drift(desired, networks, inspection, uplink, nothing, print).note(events, backlog)
    bulk: Any = networks._bulk
    return [call.args for call in bulk.note_defaults.mock_calls]


def went(vtep: bytes) -> Events:
    return Events(macs={22: [DEFAULT]}, defaults={22: [(vtep, False)]})


def came(vtep: bytes) -> Events:
    return Events(new_macs={22: [(DEFAULT, vtep)]}, defaults={22: [(vtep, True)]})


@pytest.mark.parametrize("events", [went(VTEP), came(OTHER)])
def test_default_rows_are_noted_though_they_are_about_to_be_written(
    networks: Networks, events: Events
) -> None:
    backlog = Backlog()
    backlog.rows[7] = {DEFAULT, MAC}, set()
    assert note(networks, events, backlog) == [(22, events.defaults[22])]
    assert not backlog.lost and not backlog.changed


def test_other_rows_say_nothing_of_default_rows(networks: Networks) -> None:
    assert not note(networks, Events(macs={22: [MAC]}, new_macs={22: [(MAC, OTHER)]}), Backlog())


@pytest.mark.parametrize(
    ("events", "is_wrong"),
    [(went(VTEP), True), (went(OTHER), False), (came(VTEP), False), (came(OTHER), True)],
)
def test_default_rows_are_looked_at_if_they_are_not_as_they_should_be(
    networks: Networks, events: Events, is_wrong: bool
) -> None:
    backlog = Backlog()
    note(networks, events, backlog)
    found: dict[int, tuple[set[bytes], set[bytes]]] = {7: ({DEFAULT}, set())}
    assert backlog.lost == (found if is_wrong and events.macs else {})
    assert backlog.changed == (found if is_wrong and events.new_macs else {})
