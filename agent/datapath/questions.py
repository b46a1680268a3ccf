"""Questions to name servers elsewhere that our own is to answer: those of an engine's containers.

Docker's resolver in a container asks the host's name servers for what it does not know, through
the container's gateway, which is us. Such a packet gets a mark (nft.py), and by that mark it has
arrived: our name server listens at every address, and its answer leaves from the one that was
asked (IP_TRANSPARENT, resolver/sockets.py). No address is translated, and no connection tracked.
What stands opposite: nft.py has the mark; resolver/ answers.
Source: ip-rule(8), Linux Documentation/networking/tproxy.rst.
"""

from __future__ import annotations

from agent.datapath.netlink import Netlink
from agent.drivers.marks import ASKED

TABLE = 836_000  # of routes: what has the mark looks here
PRIORITY = 83
LOOPBACK = 1  # the index of lo in every network namespace


async def ensure(own: Netlink, has_ipv6: bool) -> int:
    """Make the routes and rules of our namespace so; how many were not. OSError."""
    changes = 0
    for ipv6 in (False, True) if has_ipv6 else (False,):
        # The route first: a lookup in a table that has none goes on to the next rule.
        await own.set_local_default(TABLE, LOOPBACK, ipv6)
        changes += await own.ensure_mark(ASKED, TABLE, PRIORITY, ipv6)
    return changes
