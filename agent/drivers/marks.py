"""Numbers and addresses that are our own on each host, which no record may bring into use. Pure.

What stands opposite: datapath/nft.py, whose rules have them; datapath/uplink.py has the addresses.
"""

from __future__ import annotations

import ipaddress

UNTRACKED = 0x76786D75  # mark of packets of our own that are part of no connection (prods.py)
ASKED = 0x76786D71  # mark of questions that our name server is to answer (questions.py)
# Marks of sockets in sandboxes that were led to a backend when they connected (socketprograms.py):
# by which VIP is in the rest. None is one of the above, nor has the highest bit (egress.py).
LED, LED_MASK = 0x56000000, 0xFF000000
# Device groups of our bridges, which a rule reads at far less cost than it looks into a set
# (docs/decisions/0025). One in none of them is reached from nowhere. OPEN: it may be, from the host
# and what is behind it. PROVEN: and whatever comes from it has been proven to bear its own source.
OPEN, PROVEN = 0x76786D01, 0x76786D02
# Our ends of the uplink (uplink.py), to which the host leads the published ports of services.
DOOR = {4: "169.254.83.2", 6: "fd76:786d:6573:6800::2"}

# What means this host, a link of it or nobody to whom it is asked for: this network, loopback,
# link-local (the uplink's too, and clouds' metadata), multicast and reserved; of IPv6 all that is
# mapped or embeds IPv4, and the uplink's.
_BARRED = {
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"),
    6: ("::/8", "fe80::/10", "ff00::/8", "fd76:786d:6573:6800::/64"),
}
_MASKS = {
    4 if version == 4 else 16: tuple(
        (int(net.netmask), int(net.network_address)) for net in map(ipaddress.ip_network, texts)
    )
    for version, texts in _BARRED.items()
}


def is_barred(address: bytes) -> bool:
    """Whether an address (4 or 16 bytes) is one to which nothing that a record says may lead."""
    number = int.from_bytes(address, "big")
    return any(number & mask == start for mask, start in _MASKS[len(address)])
