"""Our end inside a sandbox: its name, MAC, addresses and default routes.

What stands opposite: networks.py makes the pair; the sandbox's owner may change the rest of
that namespace at will, and we touch only what we put there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Collection
from typing import TypeVar

import structlog

from agent import syscalls
from agent.datapath import namespaces
from agent.datapath.netlink import Link, Netlink
from agent.datapath.routing import PROTOCOL
from agent.datapath.rtnetlink import in_thread
from agent.drivers.base import Port, Seen, Stack
from agent.errors import Conflict, Invalid, NotFound, VxmeshError
from agent.notation import format_mac

log = structlog.get_logger()

T = TypeVar("T")

MARK = "vxmesh:"  # how the alias of what is ours begins
NETWORK_MARK, ENDPOINT_MARK = f"{MARK}net:", f"{MARK}ep:"
SHARING = ("macvlan", "ipvlan")  # kinds of device whose other side is the host's own
LOOPBACK = 1  # the index of lo in every network namespace
DEFAULT = {False: "0.0.0.0/0", True: "::/0"}


def open_netns(port: Port | Stack) -> int:
    """A file descriptor of the namespace that is meant. NotFound, Invalid."""
    return _open(port.netns, port.inode)


def _open(netns: str, inode: int) -> int:
    what = f"namespace {netns}"
    try:
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(what, f"cannot be opened ({error.strerror})", "See 'ip netns'") from None
    if not namespaces.is_network_namespace(f"/proc/self/fd/{fd}"):
        os.close(fd)
        raise Invalid(what, "is no network namespace", "See 'ip netns'")
    if os.fstat(fd).st_ino != inode:
        os.close(fd)
        raise Invalid(
            what, "is another namespace than the one that was meant", "Make the endpoint anew"
        )
    return fd


def in_namespaces(ports: Collection[Port], make: Callable[[Port], T]) -> list[T]:
    """What `make` gives in the namespace of each port; those that are gone are left out. Blocks."""

    def work() -> list[T]:
        found = []
        for port in ports:
            with contextlib.suppress(VxmeshError, OSError):
                fd = open_netns(port)
                try:
                    syscalls.setns(fd, syscalls.CLONE_NEWNET)
                finally:
                    os.close(fd)
                found.append(make(port))
        return found

    return syscalls.in_thread(work)


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
async def see(netns: str, inode: int, ifname: str) -> Seen | None:
    """An interface as it is now; None if it is not there. NotFound, Invalid, OSError."""
    fd = _open(netns, inode)
    try:
        async with Netlink(f"/proc/self/fd/{fd}") as box:
            link = await box.link(ifname)
            if link is None:
                return None
            routes = await box.routes()
            own = [r for r in routes if r.device == link.index]
            beyond = [r for r in own if r.gateway or r.destination in DEFAULT.values()]
            return Seen(
                link.mac,
                link.mtu,
                link.up,
                frozenset(await box.addresses(link.index)),
                tuple((r.destination, r.gateway) for r in beyond),
                frozenset(r.destination for r in routes),
            )
    finally:
        os.close(fd)


@in_thread
async def furnish(fd: int, port: Port, mtu: int, peer: int, old: Port | None = None) -> int:
    """Make the sandbox's end as it should be; how many things were not.

    `fd` is the namespace, `peer` the index of our end of the pair or of the device that it
    shares, `old` what the port was before, whose addresses and routes go. LookupError if the
    sandbox's end is not there.
    """
    path = f"/proc/self/fd/{fd}"
    async with Netlink(path) as box:
        link = await _find(box, port, peer)
        if link is None:
            raise LookupError(port.ifname)
        changes = await _name(box, link, port)
        sysctls = _sysctls(port)
        if sysctls:
            await asyncio.to_thread(namespaces.set_sysctls, path, sysctls)
        changes += await _addresses(box, link, port, old)
        changes += await _link(box, link, port, mtu)
        return changes + await _routes(box, link, port, old)


@in_thread
async def resize(port: Port, mtu: int, peer: int) -> int:
    """Give an interface that somebody else has furnished another MTU, where it is known to be; how
    many there were. Else what it sends is too large for our end, and lost."""
    inside = port.inside
    if inside is None:
        return 0
    try:
        fd = open_netns(inside)
    except VxmeshError:
        return 0  # its workload is ending
    try:
        async with Netlink(f"/proc/self/fd/{fd}") as box:
            link = await _find(box, inside, peer)
            if link is None or link.mtu == mtu:
                return 0
            await box.set_link(link.index, mtu=mtu)
            return 1
    finally:
        os.close(fd)


@in_thread
async def remove(port: Port, peer: int) -> None:
    """Delete an interface that shares the device with index `peer`, whatever it is called by now;
    fine if it is gone."""
    try:
        fd = open_netns(port)
    except VxmeshError:
        return  # with its namespace it went
    try:
        async with Netlink(f"/proc/self/fd/{fd}") as box:
            for link in await box.links():
                marked = link.kind == port.kind and link.alias == _mark(port)
                if marked or (link.name == port.ifname and _is_ours(link, port, peer)):
                    await box.delete_link(link.index)
    finally:
        os.close(fd)


@in_thread
async def sweep(port: Port, wanted: Collection[str]) -> int:
    """Delete what bears our mark in the namespace of `port`, shares a device of the host's and is
    none of the `wanted` endpoints'; how many there were. NotFound, Invalid, OSError."""
    keep = {f"{ENDPOINT_MARK}{endpoint}" for endpoint in wanted}
    fd = open_netns(port)
    try:
        async with Netlink(f"/proc/self/fd/{fd}") as box:
            left = [
                link
                for link in await box.links()
                if link.kind in SHARING
                and link.alias.startswith(ENDPOINT_MARK)
                and link.alias not in keep
            ]
            for link in left:
                await box.delete_link(link.index)
            return len(left)
    finally:
        os.close(fd)


@in_thread
async def mark(fd: int, port: Port) -> None:
    """Give an interface that has just been made in namespace `fd` our mark."""
    async with Netlink(f"/proc/self/fd/{fd}") as box:
        await box.set_link(await box.index(port.ifname), ifalias=_mark(port))


def _mark(port: Port) -> str:
    return f"{ENDPOINT_MARK}{port.endpoint}"


async def _find(box: Netlink, port: Port, peer: int) -> Link | None:
    """The interface of a port, by its mark if it has one: its name is the workload's to change."""
    if port.kind in SHARING:
        for link in await box.links():
            if link.alias == _mark(port) and _is_ours(link, port, peer):
                return link
    named = await box.link(port.ifname)
    return named if named is not None and _is_ours(named, port, peer) else None


async def _name(box: Netlink, link: Link, port: Port) -> int:
    """Give an interface its name back. LookupError if this kernel would have it down for that
    (before Linux 6.2), so that it is to be made anew."""
    if link.name == port.ifname:
        return 0
    try:
        await box.set_link(link.index, ifname=port.ifname)
    except FileExistsError:
        raise taken(port) from None
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise LookupError(port.ifname) from None
    return 1


def _is_ours(link: Link, port: Port, peer: int) -> bool:
    # Of a pair our end has the mark; one without any is one whose agent died before it marked it.
    marked = port.kind == "veth" or link.alias in (_mark(port), "")
    return link.kind == port.kind and link.peer == peer and marked


def _sysctls(port: Port) -> dict[str, str]:
    """Those of an interface. On a wire of others' it has its own addresses alone, none by a
    router's advertisement; and says that it has come: its address and so its MAC may have been
    on another host, where switches would send to for minutes."""
    has_ipv6 = any(":" in a for a in port.addresses)
    of = f"ipv6/conf/{port.ifname}/"
    if port.kind == "veth":
        return {f"{of}disable_ipv6": "0"} if has_ipv6 else {}
    return {
        f"ipv4/conf/{port.ifname}/arp_notify": "1",
        f"{of}accept_ra": "0",
        f"{of}disable_ipv6": "0" if has_ipv6 else "1",
    }


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
    if port.mac and link.mac != format_mac(port.mac):
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
        family = 6 if ":" in gateway else 4
        if gateway not in port.gateways and family not in port.handed_on:
            await box.delete_route(DEFAULT[":" in gateway], _hop(gateway), link.index)
    return sum([await lead_out(box, link.index, g, port.netns) for g in port.gateways])


async def lead_out(box: Netlink, index: int, gateway: str, netns: str) -> bool:
    """Have the default route of the gateway's family go there, in place of one of ours that goes
    elsewhere; True if it did not yet. `netns` is for the log."""
    destination, hop = DEFAULT[":" in gateway], _hop(gateway)
    try:
        await box.add_route(destination, hop, index)
        return True
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    there = [r for r in await box.routes() if r.destination == destination]
    if any(r.gateway == hop and r.device == index for r in there):
        return False
    if any(r.protocol == PROTOCOL for r in there):
        await box.replace_route(destination, hop, index)
        return True
    # Not ours to replace: whoever made the namespace gave it a way out already.
    log.warning("sandbox.has_default_route", netns=netns, gateway=gateway)
    return False


def _hop(gateway: str) -> str:
    """The next hop; empty: none, all of it is on the link."""
    return "" if gateway in ("0.0.0.0", "::") else gateway
