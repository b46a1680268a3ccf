"""The way to the name server in a sandbox that reaches no gateway of ours.

It listens on the sandbox's loopback, at a port that nobody else wants: so a workload can have
port 53 of all its addresses, as a name server on a wire does. What is asked at the address in
resolv.conf is led there.
What stands opposite: resolver/rooms.py, which listens. Source: nft(8).
"""

from __future__ import annotations

import asyncio

from agent.datapath.nftables import run_here
from agent.lanmodel import NAMES_AT, NAMES_PORT_INSIDE
from agent.model import NAMES_PORT
from agent.syscalls import in_netns

TABLE = "ip vxmesh_names"
CHAIN = f"""\
	chain asking {{
		type nat hook output priority -100; policy accept;
		ip daddr {NAMES_AT} meta l4proto {{ tcp, udp }} th dport {NAMES_PORT} \
dnat to {NAMES_AT}:{NAMES_PORT_INSIDE}
	}}
"""


def render() -> str:
    """The table, as a transaction that replaces one of its name. Pure."""
    return f"table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{CHAIN}}}\n"


async def furnish(fd: int) -> None:
    """Make it so in the namespace of file descriptor `fd`. VxmeshError, OSError."""
    await asyncio.to_thread(in_netns, f"/proc/self/fd/{fd}", lambda: run_here(render()))


async def audit(fd: int) -> bool:
    """The same, if it is not so already; True if it was not."""

    def look() -> bool:
        found = run_here(f"list table {TABLE}\n", quiet=True)
        if _words(found) == _words(f"table {TABLE} {{\n{CHAIN}}}\n"):
            return False
        run_here(render())
        return True

    return await asyncio.to_thread(in_netns, f"/proc/self/fd/{fd}", look)


def _words(text: str) -> list[str]:
    """A table's text in the way nft lists it: newer ones have names for priorities."""
    return text.replace("priority dstnat", "priority -100").replace(";", " ").split()


async def clear(fd: int) -> None:
    """Take it away; fine if it is not there."""
    text = f"table {TABLE}\ndelete table {TABLE}\n"
    await asyncio.to_thread(in_netns, f"/proc/self/fd/{fd}", lambda: run_here(text))
