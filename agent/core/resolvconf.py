"""A sandbox's resolv.conf, within what the C libraries take.

What stands opposite: names.py answers what is asked by it; resolver/forward.py reads the host's.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.core.names import ZONE

_SEARCH_BYTES_MAX = 240  # musl skips a line of resolv.conf of 256 bytes or more
_SEARCH_DOMAINS_MAX = 6  # glibc before 2.26 takes no more
_NAMESERVERS_MAX = 3  # glibc and musl take no more


def resolv_conf(nameservers: Sequence[str], networks: Sequence[str]) -> str:
    """The text of a sandbox's resolv.conf: gateways to ask, names of its networks in order.

    `ndots:0`: both glibc and musl ask for `two` and `two.demo` as they stand, which we answer,
    one question a look-up. The search list is for those that never send a single label, such as
    systemd-resolved, and makes NAME.NET.vxmesh.internal of it; a list longer than a C library
    takes loses its last ones.
    """
    lines = [f"nameserver {address}" for address in nameservers[:_NAMESERVERS_MAX]]
    search = ""
    for network in networks[:_SEARCH_DOMAINS_MAX]:
        longer = f"{search} {network}.{ZONE}"
        if len(longer) > _SEARCH_BYTES_MAX:
            break
        search = longer
    if search:
        lines.append(f"search{search}")
    lines.append("options ndots:0")
    return "\n".join(lines) + "\n"
