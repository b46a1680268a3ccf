"""Makes the devices of a network, or of a port of it, in one go: what a container waits for.

Each is a handful of requests that rest on each other, made one after the other in one thread. Only
what is not there is made here: if the first name is taken nothing was changed, and networks.py
looks at what is there.
What stands opposite: linkpacking.py for the bytes; networks.py, which says when.
Source: netlink(7), netdevice(7); Linux net/core/rtnetlink.c (rtnl_newlink_create).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from agent.datapath import filterpacking, linkpacking, netlinkmessages, packing
from agent.drivers.base import Bridge, Port
from agent.syscalls import socket_in

RECEIVE = 1 << 16
SIOCGIFINDEX = 0x8933  # asm-generic/sockios.h

T = TypeVar("T")


class Requests:
    """A netlink socket in one namespace. Blocks: for a thread."""

    def __init__(self, netns: str | Path) -> None:
        """Open in the namespace at path `netns`. OSError."""
        self._sock = socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sock.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def ask(self, message: bytes) -> None:
        """Make one request that is acknowledged. OSError if the kernel refuses it."""
        self._sequence += 1
        self._sock.send(linkpacking.numbered(message, self._sequence))
        while True:
            data = self._sock.recv(RECEIVE)
            _, kind, _, sequence, _ = packing.HEADER.unpack_from(data)
            if kind == packing.NLMSG_ERROR and sequence == self._sequence:
                break  # else it is for one that was interrupted
        (code,) = packing.CODE.unpack_from(data, packing.HEADER.size)
        if code:
            raise OSError(-code, os.strerror(-code))

    def list(self, message: bytes) -> list[tuple[int, bytes]]:
        """Make one request that is answered by a list: type and body of each of it. OSError."""
        self._sequence += 1
        self._sock.send(linkpacking.numbered(message, self._sequence))
        found: list[tuple[int, bytes]] = []
        while True:
            data, at = self._sock.recv(RECEIVE), 0
            while at + packing.HEADER.size <= len(data):
                length, kind, _, sequence, _ = packing.HEADER.unpack_from(data, at)
                body = data[at + packing.HEADER.size : at + length]
                at += (length + 3) & ~3
                if sequence != self._sequence:
                    continue  # for one that was interrupted
                if kind == packing.NLMSG_DONE:
                    return found
                if kind == packing.NLMSG_ERROR:
                    netlinkmessages.check(body, "list")
                found.append((kind, body))

    def index(self, name: str) -> int:
        """The index of a device. OSError if there is none.

        Not by netlink, where a device that has just been set up is first waited for, some 5 ms
        (linkwatch_sync_dev in rtnl_getlink).
        """
        request = struct.pack("16s16x", name.encode())
        answer = fcntl.ioctl(self._sock, SIOCGIFINDEX, request)
        return int(struct.unpack_from("=i", answer, 16)[0])


class Maker:
    """What makes devices in our namespace."""

    def __init__(self, own: str | Path, host: str | Path) -> None:
        """`own` is the path of our namespace, `host` that of the host's. OSError."""
        with contextlib.ExitStack() as stack:
            self._own = stack.enter_context(contextlib.closing(Requests(own)))
            self._host = stack.enter_context(contextlib.closing(Requests(host)))
            self.places = False  # whether devices are made with one for programs (shortcuts.py)
            # Not that of rows: there a deletion waits for all processors, some 20 ms.
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="maker")
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close, once what is under way is done."""
        self._pool.shutdown(wait=True)
        self._stack.close()

    async def network(
        self, bridge: Bridge, alias: str, addresses: Sequence[str], netns: int
    ) -> tuple[int, int]:
        """Make a bridge with its addresses and, if it is to have one, its VXLAN device; their
        indexes, 0 for none. `netns` is a file descriptor of our namespace.

        OSError if the kernel refuses any of it; then a bridge that was made before stays, but no
        VXLAN device, which would be taken for one that has its rows.
        """
        return await self._run(lambda: self._network(bridge, alias, addresses, netns))

    async def port(self, port: Port, alias: str, mtu: int, master: int, netns: int) -> int:
        """Make a port on the bridge with index `master`, its other end in the namespace of file
        descriptor `netns`, down; our end's index. OSError, and then nothing of it is left."""
        return await self._run(lambda: self._port(port, alias, mtu, master, netns))

    async def place(self, index: int) -> None:
        """Where programs can be on a device that is down, if there are any and it can be."""
        await self._run(lambda: self._place(index))

    async def _run(self, function: Callable[[], T]) -> T:
        """Not over before the thread is done, cancelled or not: who asks closes descriptors that
        the thread hands to the kernel, and their numbers are soon those of others."""
        done = asyncio.get_running_loop().run_in_executor(self._pool, function)
        cancelled: asyncio.CancelledError | None = None
        while not done.done():
            try:
                await asyncio.wait([done])  # cancels nothing
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled:
            done.exception()  # nobody asks for it any more
            raise cancelled
        return done.result()

    # -- in the thread --

    def _network(
        self, bridge: Bridge, alias: str, addresses: Sequence[str], netns: int
    ) -> tuple[int, int]:
        ask = self._own.ask
        ask(linkpacking.new_bridge(bridge.device, bridge.router_mac, bridge.mtu, bridge.group))
        ask(linkpacking.mark(bridge.device, alias))
        index = self._own.index(bridge.device)
        # IPv6 gives itself a link-local address where it is up, of the same MAC as ours may be.
        for address in addresses:
            with contextlib.suppress(FileExistsError):
                ask(linkpacking.new_address(index, address))
        if not bridge.vxlan:
            return index, 0
        self._host.ask(
            linkpacking.new_vxlan(
                bridge.vxlan,
                bridge.vni,
                bridge.vtep,
                bridge.data_port,
                bridge.mtu,
                index,
                netns,
            )
        )
        try:
            vxlan = self._own.index(bridge.vxlan)
            self._place(vxlan)
            ask(linkpacking.mark_port(bridge.vxlan, alias, flood=bridge.hands_on_unknown))
            return index, vxlan
        except BaseException:
            with contextlib.suppress(OSError):
                ask(linkpacking.delete(bridge.vxlan))
            raise

    def _port(self, port: Port, alias: str, mtu: int, master: int, netns: int) -> int:
        ask, name = self._own.ask, port.device
        ask(linkpacking.new_pair(name, port.ifname, netns, mtu, master, port.mac))
        try:
            index = self._own.index(name)
            self._place(index)
            ask(linkpacking.mark_port(name, alias, flood=False))
            ask(packing.pack_static(index, port.mac))
        except BaseException:
            with contextlib.suppress(OSError):
                ask(linkpacking.delete(name))  # nothing is left half made
            raise
        return index

    def _place(self, index: int) -> None:
        if self.places:
            with contextlib.suppress(OSError):  # it is not worth a port
                self._own.ask(filterpacking.new_place(index))
