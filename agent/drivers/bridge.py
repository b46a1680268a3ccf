"""The bridge driver: one node's own network, a bridge without VXLAN in our namespace.

Its gateway, guards, way out and published ports are those of every network here; nothing leads
to another host, so no rows are written and no other node may have endpoints in it.
What stands opposite: datapath/networks.py makes it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from agent.drivers import overlay
from agent.drivers.base import Bridge, Port
from agent.model import Network, Node


def mtu(network: Network, home: Node | None) -> int:
    """The MTU of a network's interfaces, bytes: as asked, else its node's underlay's."""
    return network.mtu or (home.mtu if home else 0) or overlay.UNDERLAY_MTU


def bridge(
    network: Network,
    me: Node,
    ports: Mapping[str, Port],
    apart: frozenset[str] = frozenset(),
) -> Bridge:
    """A network of this node, with these ports by endpoint.

    `apart` are those of its subnets that give way here to another network's.
    """
    sized = msgspec.structs.replace(network, mtu=mtu(network, me))
    made = overlay.bridge(sized, me, (me,), ports, apart)
    return replace(made, vxlan="", vtep="", data_port=0)
