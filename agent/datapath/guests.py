"""Interfaces that a plugin made in the host's namespace, lent to a sandbox.

What stands opposite: agent/remote/driver.py says which and when; the plugin deletes them.
Source: libnetwork's docs/remote.md, Join; rtnetlink(7).
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

from agent.datapath import namespaces
from agent.datapath.netlink import Netlink
from agent.datapath.sandbox import LOOPBACK, lead_out
from agent.errors import Conflict, NotFound
from agent.model import Sandbox
from agent.notation import format_mac


class Guests:
    """The host's namespace, from which interfaces come and to which they go back."""

    def __init__(self, host_netns: str = "/proc/self/ns/net") -> None:
        self._host_netns = host_netns

    async def move_in(
        self,
        sandbox: Sandbox,
        source: str,
        name: str,
        addresses: tuple[str, ...],
        mac: bytes,
        routes: tuple[tuple[str, str], ...],
    ) -> bytes:
        """Move interface `source` into `sandbox` as `name` and furnish it; its MAC.

        `addresses` are in interface notation, `routes` CIDR and next hop, "" for on the link.
        NotFound if the interface is not there, Conflict if the kernel refuses what is asked.
        """
        fd = _open(sandbox.netns, sandbox.inode)
        if fd < 0:
            raise NotFound(f"sandbox {sandbox.name}", "has ended", "Start it again")
        try:
            async with Netlink(self._host_netns) as host, Netlink(f"/proc/self/fd/{fd}") as box:
                link = await host.link(source)
                if link is None:
                    raise NotFound(
                        f"interface {source}",
                        "is not on this host, though the plugin says so",
                        "See the plugin's log",
                    )
                await host.set_link(link.index, state="down")
                await host.hand_over(link.index, name, fd)
                index = await box.index(name)
                if mac:
                    await box.set_link(index, address=format_mac(mac))
                for address in addresses:
                    await box.add_address(index, address)
                await box.set_link(LOOPBACK, state="up")
                await box.set_link(index, state="up")
                # Those on the link first: next hops may be behind them.
                for destination, hop in sorted(routes, key=lambda route: bool(route[1])):
                    await box.add_route(destination, hop, index)
                found = await box.link(name)
                return bytes.fromhex(found.mac.replace(":", "")) if found else mac
        except OSError as error:
            raise Conflict(
                f"interface {source}",
                f"cannot be made {name} of the sandbox ({error.strerror or error})",
                "See whether that name is taken, and what the plugin answers",
            ) from None
        finally:
            os.close(fd)

    async def lead_out(self, sandbox: Sandbox, name: str, gateways: tuple[str, ...]) -> None:
        """Have default routes of `sandbox` go by an interface that was moved in; fine if it is
        gone. OSError."""
        fd = _open(sandbox.netns, sandbox.inode)
        if fd < 0:
            return
        try:
            async with Netlink(f"/proc/self/fd/{fd}") as box:
                link = await box.link(name)
                if link is None:
                    return
                for gateway in gateways:
                    await lead_out(box, link.index, gateway, sandbox.netns)
        finally:
            os.close(fd)

    async def show(self, path: str, netns: str) -> None:
        """Have a sandbox's namespace be found at `path` too, where nothing else is. OSError.

        By a link: a mount would have the namespace outlive its workload.
        """

        def link() -> None:
            place = Path(path)
            place.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            if place.is_symlink():
                place.unlink()
            place.symlink_to(netns)

        await asyncio.to_thread(link)

    async def hide(self, path: str) -> None:
        """Take such a link away; fine if it is gone. OSError."""

        def unlink() -> None:
            place = Path(path)
            if place.is_symlink():
                place.unlink()

        await asyncio.to_thread(unlink)

    async def move_out(self, netns: str, inode: int, name: str, source: str) -> None:
        """Give an interface back to the host under its old name; fine if it is gone. OSError."""
        fd = _open(netns, inode)
        if fd < 0:
            return  # with its namespace it went, or the kernel gave it back
        host = os.open(self._host_netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            async with Netlink(f"/proc/self/fd/{fd}") as box:
                link = await box.link(name)
                if link is None:
                    return
                await box.set_link(link.index, state="down")
                await box.hand_over(link.index, source, host)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        finally:
            os.close(host)
            os.close(fd)


def _open(netns: str, inode: int) -> int:
    """A file descriptor of the namespace that is meant; -1 if it is gone."""
    if namespaces.inode(netns) != inode:
        return -1
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(fd).st_ino == inode:
        return fd
    os.close(fd)
    return -1
