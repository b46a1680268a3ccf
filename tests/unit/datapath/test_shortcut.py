"""Who may come in by the short way, and which addresses it leads to.

tests/netns/test_shortcut.py has the same in the kernel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.datapath import nft, shortcut
from agent.drivers.base import Bridge
from tests.unit.datapath.test_nft import DATABASE, WEB, golden

LOCAL = replace(WEB, vxlan="", vtep="", data_port=0, mtu=1500)
SIX = replace(LOCAL, vni=4099, gateways=("fd00:9::9/64",), subnets=("fd00:9::/64",))


def test_the_table_of_two_networks() -> None:
    rules = shortcut.ruleset([(LOCAL, 7), (SIX, 9)], 1500)
    golden("shortcut.nft", nft.render(rules))


@pytest.mark.parametrize(
    "other",
    [
        WEB,
        replace(LOCAL, mtu=1499),
        replace(LOCAL, internal=True),
        replace(LOCAL, apart=frozenset(LOCAL.subnets)),
        replace(DATABASE, vxlan=""),
    ],
)
def test_who_has_no_short_way(other: Bridge) -> None:
    assert "ingress" not in shortcut.ruleset([(other, 7)], 1500).chains
    assert "ingress" in shortcut.ruleset([(other, 7), (LOCAL, 8)], 1500).chains


@pytest.mark.parametrize(
    ("subnet", "gateways", "ranges"),
    [
        ("10.1.0.0/24", ["10.1.0.1/24"], {"10.1.0.2-10.1.0.254"}),
        ("10.1.0.0/24", ["10.1.0.254/24"], {"10.1.0.1-10.1.0.253"}),
        ("10.1.0.0/29", ["10.1.0.2/29"], {"10.1.0.1", "10.1.0.3-10.1.0.6"}),
        ("10.1.0.0/30", ["10.1.0.1/30"], {"10.1.0.2"}),
        ("10.1.0.0/24", ["10.2.0.1/24"], {"10.1.0.1-10.1.0.254"}),
        ("10.1.0.0/31", ["10.1.0.0/31"], set()),
        ("10.1.0.7/32", [], set()),
    ],
)
def test_neither_gateways_nor_a_subnets_ends_are_led_to(
    subnet: str, gateways: list[str], ranges: set[str]
) -> None:
    bridge = replace(LOCAL, subnets=(subnet,), gateways=tuple(gateways))
    assert set(shortcut.ruleset([(bridge, 7)], 1500).sets["ways4"].elements) == ranges
