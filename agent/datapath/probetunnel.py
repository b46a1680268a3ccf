"""Frames through VXLAN itself, as workloads' are, to see in what state they arrive.

A VXLAN device with VNI 0, which no network has, in a namespace that has no name and ends with the
agent. A frame (TCP in IPv4) goes out in one of two ways: with its checksum, or with the kernel
asked to have it computed, as it is for every packet of a workload: a job for the NIC, if that says
that it can do it inside VXLAN. What comes in is looked at before the kernel drops it for a checksum
that is wrong.
What stands opposite: cluster/tunnelprober.py. Source: packet(7), linux/virtio_net.h, ethtool(8).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable

from agent.datapath.netlink import Netlink
from agent.syscalls import CLONE_NEWNET, in_thread, socket_in, unshare

DEVICE = "vxmprobe"
PREFIX = b"\x0a\x77"  # of MACs: locally administered, and no network's routers have it
MTU = 1000  # bytes; passes wherever anything does
BUFFER = 2048
DRAINED = 64  # frames at a wake-up
ETH_P_IP = 0x0800
SOL_PACKET, PACKET_AUXDATA, PACKET_VNET_HDR = 263, 8, 15
STATUS_CSUM_NOT_READY = (
    8  # TP_STATUS_CSUMNOTREADY: nobody computed it, as it never left the machine
)
NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
_VNET = struct.Struct("=BBHHHH")  # struct virtio_net_hdr
_ETHERNET, _IP, _TCP = 14, 20, 20  # bytes of headers
_CSUM = 16  # where it is in TCP's
_ADDRESSES = socket.inet_aton("169.254.0.1") + socket.inet_aton("169.254.0.2")


class ProbeTunnel:
    """One end, for all other nodes. `received` is told what came in a frame, and whether its
    checksum was right."""

    def __init__(self, received: Callable[[bytes, bool], None]) -> None:
        self._received = received
        self._netns = -1
        self._index = 0
        self._led: dict[str, bytes] = {}  # VTEP -> the MAC by which the device finds it
        self._socket: socket.socket | None = None

    async def open(self, vtep: str, port: int) -> None:
        """Make it, with its VTEP at UDP `port` of this host. OSError."""
        self._netns = await asyncio.to_thread(_new_netns)
        path = f"/proc/self/fd/{self._netns}"
        try:
            async with Netlink("/proc/self/ns/net") as host, Netlink(path) as own:
                await host.add_vxlan(DEVICE, 0, vtep, port, MTU, 0, self._netns)
                self._index = await own.index(DEVICE)
                await own.set_link(self._index, state="up")
            self._socket = socket_in(path, socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.setblocking(False)
            self._socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            self._socket.bind((DEVICE, ETH_P_IP))
        except BaseException:
            await self.close()
            raise
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    async def close(self) -> None:
        """Take it away; fine if it is not there."""
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._netns >= 0:
            path = f"/proc/self/fd/{self._netns}"
            try:
                async with Netlink(path) as own:
                    if link := await own.link(DEVICE):
                        await own.delete_link(link.index)
            finally:
                os.close(self._netns)
                self._netns = -1
        self._led.clear()

    @property
    def is_open(self) -> bool:
        """Whether frames can be sent and are taken."""
        return self._socket is not None

    async def send(self, vtep: str, data: bytes, offloaded: bool) -> None:
        """Have a frame with `data` go to a VTEP; nothing if it cannot be sent now. OSError."""
        if self._socket is None:
            return
        mac = self._led.get(vtep)
        if mac is None:
            mac = PREFIX + len(self._led).to_bytes(4, "big")
            async with Netlink(f"/proc/self/fd/{self._netns}") as own:
                await own.lead(self._index, mac, vtep)
            self._led[vtep] = mac
        try:
            self._socket.send(frame(mac, data, offloaded))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ENETDOWN):
                raise

    def _read(self) -> None:
        for _ in range(DRAINED):
            if self._socket is None:
                return
            try:
                raw, controls, _, _ = self._socket.recvmsg(BUFFER, 256)
            except OSError:
                return
            statuses = [
                struct.unpack_from("=I", value)[0]
                for level, kind, value in controls
                if (level, kind) == (SOL_PACKET, PACKET_AUXDATA)
            ]
            is_ready = not any(status & STATUS_CSUM_NOT_READY for status in statuses)
            found = read(raw[_VNET.size :], is_ready)
            if found is not None:
                self._received(*found)


def frame(mac: bytes, data: bytes, offloaded: bool) -> bytes:
    """What is handed to the socket: how to treat the frame, and the frame. `offloaded`: its
    checksum is to be computed by whoever comes last."""
    total = _IP + _TCP + len(data)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, total, 0, 0, 64, socket.IPPROTO_TCP, 0) + _ADDRESSES
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    pseudo = _ADDRESSES + struct.pack("!BBH", 0, socket.IPPROTO_TCP, _TCP + len(data))
    tcp = struct.pack("!HHIIBBHHH", 9, 9, 0, 0, _TCP // 4 << 4, 0, 0, 0, 0)
    if offloaded:
        told = _VNET.pack(NEEDS_CSUM, 0, 0, 0, _ETHERNET + _IP, _CSUM)
        number = checksum(pseudo) ^ 0xFFFF
    else:
        told = bytes(_VNET.size)
        number = checksum(pseudo + tcp + data)
    tcp = tcp[:_CSUM] + struct.pack("!H", number) + tcp[_CSUM + 2 :]
    return told + mac + b"\x02" + bytes(5) + struct.pack("!H", ETH_P_IP) + ip + tcp + data


def read(raw: bytes, is_ready: bool) -> tuple[bytes, bool] | None:
    """What came in a frame, and whether its checksum is right: unless it is not `is_ready`, which
    it is on everything that has crossed a wire. None if it is no frame of ours."""
    if len(raw) < _ETHERNET + _IP + _TCP:
        return None
    ip, tcp = raw[_ETHERNET : _ETHERNET + _IP], raw[_ETHERNET + _IP :]
    total = int.from_bytes(ip[2:4], "big")
    if ip[0] != 0x45 or ip[9] != socket.IPPROTO_TCP or ip[12:] != _ADDRESSES:
        return None
    tcp = tcp[: total - _IP]
    pseudo = _ADDRESSES + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
    return tcp[_TCP:], not is_ready or checksum(pseudo + tcp) == 0


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _new_netns() -> int:
    """A file descriptor of a network namespace that is nowhere else to be found."""

    def make() -> int:
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return in_thread(make)
