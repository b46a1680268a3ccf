"""Networks whose interfaces are straight on a wire of the hosts': what their options say.

An interface of such a network (macvlan, ipvlan) shares a device of its host, the parent. What
is behind that is not ours: no bridge, no gateway, no guard, no masquerade.
Source: Linux drivers/net/macvlan.c, Documentation/networking/ipvlan.rst, drivers/net/8021q.
What stands opposite: drivers/macvlan.py and drivers/ipvlan.py, which say what follows from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from agent.errors import Invalid
from agent.model import Endpoint, Network, plugin_of
from agent.notation import shorten

MACVLAN, IPVLAN = "macvlan", "ipvlan"
LAN_DRIVERS = (MACVLAN, IPVLAN)
BRIDGE_MODE, PASSTHRU, L2, L3 = "bridge", "passthru", "l2", "l3"
# The first one is the one that is meant when none is given.
MODES = {MACVLAN: (BRIDGE_MODE, "private", "vepa", PASSTHRU), IPVLAN: (L2, L3)}
# In which modes an interface of the host's own can reach those of workloads beside it.
REACHED = (BRIDGE_MODE, L2)
PARENT, MODE, HOST_INTERFACE = "parent", "mode", "host-interface"
# In the place of a sandbox's id: the endpoint is the host's own interface in the network.
HOST_SIDE = "host"
# Where a sandbox on such a wire asks for names: on its own loopback, at an address that neither
# Docker (127.0.0.11) nor systemd-resolved (127.0.0.53) has; and where that leads.
NAMES_AT, NAMES_PORT_INSIDE = "127.0.83.53", 30053
VLAN_MAX = 4094  # IEEE 802.1Q: 0 and 4095 are no VLANs
_DEVICE = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")


@dataclass(frozen=True, slots=True)
class LanOptions:
    """The options of a network on the hosts' wire."""

    parent: str  # device of each host
    mode: str  # one of MODES
    trunk: str  # the device of which `parent` is the VLAN sub-interface by its name; else empty
    vlan: int  # its VLAN
    has_host_interface: bool


def is_bridged(network: Network) -> bool:
    """Whether a network has a bridge of ours: not if a plugin or the hosts' wire drives it."""
    return not plugin_of(network) and not is_on_lan(network)


def is_on_lan(network: Network) -> bool:
    """Whether the interfaces of a network are straight on a wire of the hosts'."""
    return network.driver in LAN_DRIVERS


def is_host_side(endpoint: Endpoint) -> bool:
    """Whether an endpoint is its host's own interface in a network on the wire."""
    return endpoint.sandbox == HOST_SIDE


def host_side_name(node: str) -> str:
    """What the endpoint of a node's own interface is called."""
    return f"host-{node}"[:63].rstrip("-")


def parse_lan(driver: str, options: Mapping[str, str]) -> LanOptions:
    """The options of a network of `driver`, one of LAN_DRIVERS; Invalid names what is wrong."""
    for key in options:
        if key not in (PARENT, MODE, HOST_INTERFACE):
            raise Invalid(
                f"option {shorten(key)}",
                f"is unknown to driver {driver}",
                f"Use {PARENT}, {MODE} and {HOST_INTERFACE}",
            )
    parent = options.get(PARENT, "")
    if not parent:
        raise Invalid(
            f"driver {driver}",
            "needs the device of the hosts to put interfaces on",
            f"Give -O {PARENT}=eth1, or eth1.20 for VLAN 20 of it",
        )
    if not _DEVICE.match(parent) or parent in (".", ".."):
        raise Invalid(
            f"option {PARENT}={shorten(parent)}", "is no name of a device", "See 'ip link'"
        )
    mode = options.get(MODE, MODES[driver][0])
    if mode not in MODES[driver]:
        raise Invalid(
            f"option {MODE}={shorten(mode)}",
            f"is unknown to driver {driver}",
            f"Use one of {', '.join(MODES[driver])}",
        )
    wanted = options.get(HOST_INTERFACE, "false")
    if wanted not in ("true", "false"):
        raise Invalid(
            f"option {HOST_INTERFACE}={shorten(wanted)}", "is unknown", "Use true or false"
        )
    if wanted == "true" and mode not in REACHED:
        raise Invalid(
            f"option {HOST_INTERFACE}",
            f"has no use in mode {mode}, in which interfaces of one host do not see each other",
            f"Use mode {next(m for m in REACHED if m in MODES[driver])}, or leave it out",
        )
    trunk, _, tag = parent.rpartition(".")
    vlan = int(tag) if trunk and tag.isascii() and tag.isdigit() and len(tag) <= 4 else 0
    if not 1 <= vlan <= VLAN_MAX:
        trunk, vlan = "", 0
    return LanOptions(parent, mode, trunk, vlan, wanted == "true")
