"""What others did to rows, as it is judged by their events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("events", "is_doubted"),
    [
        (Events(macs={22: [DEFAULT]}), True),
        (Events(new_macs={22: [(DEFAULT, OTHER)]}), True),
        (Events(macs={22: [MAC]}, new_macs={22: [(MAC, OTHER)]}), False),
    ],
)
def test_default_rows_are_in_doubt_though_they_are_about_to_be_written(
    events: Events, is_doubted: bool
) -> None:
    nothing: Any = None
    doubted: list[int] = []
    bulk: Any = SimpleNamespace(doubt_defaults=doubted.append)
    networks = Networks(nothing, nothing, 0, nothing, bulk, nothing)
    networks.held[7] = Held(BRIDGE, 20, 22, {})
    networks.devices = {20: (7, ""), 22: (7, "")}
    desired: Any = SimpleNamespace(rows=wanted, complete=lambda: True)
    uplink: Any = SimpleNamespace(index=3)
    backlog = Backlog()
    backlog.rows[7] = {DEFAULT, MAC}, set()
    Drift(desired, networks, Inspection(networks, nothing), uplink, nothing, print).note(
        events, backlog
    )
    assert doubted == ([22] if is_doubted else [])
    assert not backlog.lost and not backlog.changed
