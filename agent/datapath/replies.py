"""What a balanced connection needs in the sandbox of its backend: the way back.

A balanced packet has its client's own address as source, and the MAC of the router of the host
that balanced it. Its answers must return through that host, which alone knows what the client
believes to talk to; by their destination they would go straight to the client. So in the
sandbox, for each interface of ours:

    arriving   a new connection from a router of ours is marked with the lower half of its MAC
    leaving    its answers get the mark, and by the mark (ip rule) a route through the interface
    egress     and there, as destination, the MAC that the mark is (egress.py)

Nothing in here depends on how many hosts or services there are, and nothing has to be changed
when they do. Not tracked and so not marked is what comes from other sandboxes; that other
rules in a sandbox may want to be tracked, so nothing is exempted from tracking.
What stands opposite: drivers/overlay.py (router_mac); balancerules.py on the other host.
Source: nft(8), ip-rule(8); Linux ip-sysctl.rst (tcp_fwmark_accept, src_valid_mark).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
from collections.abc import Iterable

from agent.datapath import egress, namespaces
from agent.datapath.egress import FLAG
from agent.datapath.netlink import Netlink
from agent.datapath.nftables import run_here
from agent.datapath.rtnetlink import in_thread
from agent.drivers.base import Port
from agent.drivers.overlay import ROUTER_PREFIX
from agent.errors import Unsupported
from agent.syscalls import in_netns

PRIORITY = 83  # of the rule that leads to our routing table
TABLE_BASE = 836_000  # + the interface's index: the number of that table

CHAINS = """\
	chain arriving {{
		type filter hook prerouting priority mangle; policy accept;
		iifname "{device}" ct state new ct direction original @ll,48,16 {prefix} \
ct mark set @ll,64,32
		iifname "{device}" ct direction original ct mark & {flag} == {flag} meta mark set ct mark
		iifname != "{device}" ct direction reply ct mark & {flag} == {flag} meta mark set ct mark
	}}

	chain leaving {{
		type route hook output priority mangle; policy accept;
		ct direction reply ct mark & {flag} == {flag} meta mark set ct mark
	}}
"""

# A socket that accepts a marked connection has its mark, so that it finds the way where there is
# no other, and after a connection was forgotten; what the kernel refuses goes back the same way.
SYSCTLS = {
    "ipv4/tcp_fwmark_accept": "1",
    "ipv4/fwmark_reflect": "1",
    "ipv6/fwmark_reflect": "1",
}


def table_name(index: int) -> str:
    """Of both tables of the interface with that index."""
    return f"vxmesh_replies_{index}"


def render(device: str, name: str) -> str:
    """The table that marks, as a transaction that replaces one of its name. Pure."""
    prefix = hex(int.from_bytes(ROUTER_PREFIX, "big"))
    chains = CHAINS.format(device=device, prefix=prefix, flag=hex(FLAG))
    table = f"inet {name}"
    return f"table {table}\ndelete table {table}\ntable {table} {{\n{chains}}}\n"


@in_thread
async def furnish(fd: int, port: Port, gateways: Iterable[str]) -> int:
    """Make the way back of a port so, in the namespace `fd`; how many things were not.

    `gateways` are its bridge's, in interface notation. Unsupported if this kernel cannot; OSError.
    """
    path = f"/proc/self/fd/{fd}"
    async with Netlink(path) as box:
        link = await box.link(port.ifname)
        if link is None:
            raise OSError(errno.ENODEV, f"interface {port.ifname}: {os.strerror(errno.ENODEV)}")
        table = TABLE_BASE + link.index
        sources = {a.split("/")[0] for a in port.addresses}
        changes = 0
        there = await box.lookups(table)
        for source, mark in there.keys() - {(source, FLAG) for source in sources}:
            await box.set_lookup("del", table, source, mark, there[source, mark])
        # The route first: a lookup in a table that has none goes on to the next rule.
        for gateway in gateways:
            hop = ipaddress.ip_interface(gateway)
            if any(ipaddress.ip_address(source) in hop.network for source in sources):
                await box.set_table_default(table, str(hop.ip), link.index)
        for source in sorted(sources):
            if (source, FLAG) not in there:
                await box.set_lookup("add", table, source, FLAG, PRIORITY)
                changes += 1
    sysctls = SYSCTLS | {f"ipv4/conf/{port.ifname}/src_valid_mark": "1"}
    changes += await asyncio.to_thread(namespaces.set_sysctls, path, sysctls)
    return changes + await asyncio.to_thread(in_netns, path, lambda: _load(port, link.index))


def _load(port: Port, index: int) -> int:
    """Both tables, in the calling thread's namespace, unless they are as they should be."""
    name = table_name(index)
    wanted = render(port.ifname, name)
    found = run_here(f"list table inet {name}\n", quiet=True)
    changes = 0
    if _words(found) != _words(wanted.split("\n", 2)[2]):
        run_here(wanted)
        changes += 1
    if "@ll,16,32 set" not in run_here(f"list table netdev {name}\n", quiet=True):
        try:
            egress.load(name, port.ifname)
        except OSError as error:
            if not egress.is_missing(error):
                raise
            raise Unsupported(
                "a service's backend",
                "this kernel has no netfilter at egress (Linux 5.16, CONFIG_NETFILTER_EGRESS)",
                "Use a newer kernel on hosts with backends",
            ) from None
        changes += 1
    return changes


def _words(text: str) -> list[str]:
    """A table's text in the way nft lists it, which writes masks and numbers in another form."""
    text = text.replace(f"& {hex(FLAG)} == {hex(FLAG)}", f"{hex(FLAG)}/1")
    return [str(int(w, 16)) if w.startswith("0x0") else w for w in text.replace(";", " ").split()]


@in_thread
async def clear(fd: int, port: Port, is_gone: bool = False) -> None:
    """Take the way back of a port out of the namespace `fd`; fine if it is not there.

    With `is_gone` its interface was taken out already, and another one may have its name.
    """
    path = f"/proc/self/fd/{fd}"
    async with Netlink(path) as box:
        link = None if is_gone else await box.link(port.ifname)
        sources = {a.split("/")[0] for a in port.addresses}
        led = await box.tables_of(sources, FLAG)
        indexes = {table - TABLE_BASE for table in led if table > TABLE_BASE}
        indexes |= {link.index} if link else set()
        for index in indexes:
            for (source, mark), priority in (await box.lookups(TABLE_BASE + index)).items():
                await box.set_lookup("del", TABLE_BASE + index, source, mark, priority)
    text = "".join(
        f"table {family} {name}\ndelete table {family} {name}\n"
        for name in map(table_name, sorted(indexes))
        for family in ("inet", "netdev")
    )
    if text:
        await asyncio.to_thread(in_netns, path, lambda: run_here(text))
