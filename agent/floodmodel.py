"""Networks that carry broadcast and multicast between hosts: what their options say.

Without the option a network has neither between hosts (docs/datapath.md). With it the host of a
workload that sends one makes a copy for each other host that has members: head-end replication.
What stands opposite: drivers/flooding.py, which says what follows; docs/drivers.md tells users.
Source: RFC 7348, section 4.2; RFC 8365, section 8.3.1 (ingress replication).
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.errors import Invalid
from agent.model import OVERLAY, Network
from agent.notation import shorten

FLOOD, FLOOD_RATE = "flood", "flood-rate"
ON, OFF = "on", "off"
# Packets a second of one sandbox. Each is copied for every host with members: of 1,000 that are
# as large as can be, 12 Mbit/s leave the host for each other one.
RATE_DEFAULT = 1000
RATE_MAX = 1_000_000


def parse_flood(driver: str, options: Mapping[str, str]) -> None:
    """Check what the options of a network of `driver` say of this; Invalid names what is wrong."""
    given = [key for key in (FLOOD, FLOOD_RATE) if key in options]
    if not given:
        return
    if driver != OVERLAY:
        raise Invalid(
            f"option {given[0]}",
            f"is of overlay networks, and driver {driver} has no VXLAN to flood",
            "Leave it out, or use the overlay driver",
        )
    wanted = options.get(FLOOD, OFF)
    if wanted not in (ON, OFF):
        raise Invalid(f"option {FLOOD}={shorten(wanted)}", "is unknown", f"Use {ON} or {OFF}")
    if FLOOD_RATE not in options:
        return
    rate = options[FLOOD_RATE]
    if not _is_rate(rate):
        raise Invalid(
            f"option {FLOOD_RATE}={shorten(rate)}",
            "is no number of packets a second",
            f"Use 1 to {RATE_MAX}",
        )
    if wanted == OFF:
        raise Invalid(
            f"option {FLOOD_RATE}",
            "bounds what is not sent at all",
            f"Give -O {FLOOD}={ON} as well",
        )


def flood_rate(network: Network) -> int:
    """How many broadcast and multicast packets a second each sandbox of a network may send, to
    all hosts; 0: it has neither between hosts."""
    if network.driver != OVERLAY or network.options.get(FLOOD) != ON:
        return 0
    rate = network.options.get(FLOOD_RATE, "")
    return int(rate) if _is_rate(rate) else RATE_DEFAULT  # as another agent wrote it


def _is_rate(text: str) -> bool:
    sound = text.isascii() and text.isdigit() and len(text) <= len(str(RATE_MAX))
    return sound and 1 <= int(text) <= RATE_MAX
