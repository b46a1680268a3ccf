"""Our end inside a sandbox: its name, MAC, addresses and default routes.

What stands opposite: networks.py makes the pair; the sandbox's owner may change the rest of
that namespace at will, and we touch only what we put there.
"""

from __future__ import annotations

import asyncio
import errno
import os

import structlog

from agent.datapath import namespaces
from agent.datapath.netlink import Link, Netlink
from agent.datapath.rtnetlink import in_thread
from agent.drivers.base import Port, Stack
from agent.errors import Conflict, Invalid, NotFound
from agent.model import format_mac

log = structlog.get_logger()

LOOPBACK = 1  # the index of lo in every network namespace
DEFAULT = {False: "0.0.0.0/0", True: "::/0"}


def open_netns(port: Port | Stack) -> int:
    """A file descriptor of the namespace that is meant. NotFound, Invalid."""
    what = f"namespace {port.netns}"
    try:
        fd = os.open(port.netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(what, f"cannot be opened ({error.strerror})", "See 'ip netns'") from None
    if not namespaces.is_network_namespace(f"/proc/self/fd/{fd}"):
        os.close(fd)
        raise Invalid(what, "is no network namespace", "See 'ip netns'")
    if os.fstat(fd).st_ino != port.inode:
        os.close(fd)
        raise Invalid(
            what, "is another namespace than the one that was meant", "Make the endpoint anew"
        )
    return fd


def alive(port: Port) -> bool:
    """Whether the namespace that is meant is still at its path."""
    return namespaces.inode(port.netns) == port.inode


def taken(port: Port) -> Conflict:
    """The error for an interface name that is not free in the sandbox."""
    return Conflict(
        f"interface {port.ifname} of {port.netns}",
        "exists already",
        "Choose another name with --ifname",
    )


@in_thread
async def set_up(stack: Stack) -> None:
    """Make a stack so in which there is no interface of ours. NotFound, Invalid, OSError."""
    if not stack.up:
        return
    fd = open_netns(stack)
    try:
        async with Netlink(f"/proc/self/fd/{fd}") as box:
            for name in stack.up:
                await box.set_link(await box.index(name), state="up")
    finally:
        os.close(fd)


@in_thread
async def furnish(fd: int, port: Port, mtu: int, peer: int, old: Port | None = None) -> int:
    """Make the sandbox's end as it should be; how many things were not.

    `fd` is the namespace, `peer` the index of our end of the pair, `old` what the port was
    before, whose addresses and routes go. LookupError if the other end is not there.
    """
    path = f"/proc/self/fd/{fd}"
    async with Netlink(path) as box:
        link = await box.link(port.ifname)
        if link is None or not _is_ours(link, peer):
            raise LookupError(port.ifname)
        if any(":" in a for a in port.addresses):
            sysctls = {f"ipv6/conf/{port.ifname}/disable_ipv6": "0"}
            await asyncio.to_thread(namespaces.set_sysctls, path, sysctls)
        changes = await _addresses(box, link, port, old)
        changes += await _link(box, link, port, mtu)
        return changes + await _routes(box, link, port, old)


def _is_ours(link: Link | None, peer: int) -> bool:
    return link is not None and link.kind == "veth" and link.peer == peer


async def _addresses(box: Netlink, link: Link, port: Port, old: Port | None) -> int:
    # First what goes: the kernel takes the other addresses of a subnet with the first one.
    for interface in old.addresses if old else ():
        if interface not in port.addresses:
            await box.delete_address(link.index, interface)
    # What is down has just been made and has none.
    have = await box.addresses(link.index) if link.up else set()
    missing = [a for a in port.addresses if a not in have]
    for interface in missing:
        await box.add_address(link.index, interface)
    return len(missing)


async def _link(box: Netlink, link: Link, port: Port, mtu: int) -> int:
    await box.set_link(LOOPBACK, state="up")
    wrong: dict[str, object] = {}
    if link.mtu != mtu:
        wrong["mtu"] = mtu
    if link.mac != format_mac(port.mac):
        wrong["address"] = format_mac(port.mac)
    if not link.up:
        wrong["state"] = "up"
    if wrong:
        await box.set_link(link.index, **wrong)
    if not link.up:
        await box.link(port.ifname)  # so that IPv6 is ready when we are
    return len(wrong)


async def _routes(box: Netlink, link: Link, port: Port, old: Port | None) -> int:
    for gateway in old.gateways if old else ():
        if gateway not in port.gateways:
            await box.delete_route(DEFAULT[":" in gateway], gateway, link.index)
    changes = 0
    for gateway in port.gateways:
        destination = DEFAULT[":" in gateway]
        try:
            await box.add_route(destination, gateway, link.index)
            changes += 1
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            there = [r for r in await box.routes() if r.destination == destination]
            if not any(r.gateway == gateway and r.device == link.index for r in there):
                # Not ours to replace: whoever made the namespace gave it a way out already.
                log.warning("sandbox.has_default_route", netns=port.netns, gateway=gateway)
    return changes
