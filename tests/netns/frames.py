"""Frames by hand, as a hostile sandbox makes them: every field is the caller's.

Each ends in 8 bytes of its own, so that a listener knows it again whatever was done to its head.
Layouts: RFC 791, 768, 826, 8200, 4443, 4861; IEEE 802.3, 802.1Q.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.notation import parse_address
from agent.syscalls import in_netns

BROADCAST = b"\xff" * 6
ETH_P_ALL = 3
IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
UDP, TCP, ICMP, ICMP6, FRAGMENT, OPTIONS = 17, 6, 1, 58, 44, 60
SOLICIT, ADVERTISE, ROUTER_SOLICIT, ROUTER_ADVERTISE, REDIRECT = 135, 136, 133, 134, 137
SOURCE_LINK, TARGET_LINK, NONCE = 1, 2, 14  # options of neighbour discovery


def ethernet(to: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    """A frame, with what makes it known again."""
    return to + source + struct.pack(">H", kind) + payload + secrets.token_bytes(8)


def mark_of(frame: bytes) -> bytes:
    """What tells it from all others."""
    return frame[-8:]


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = int(sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1])))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, to: str, protocol: int, payload: bytes, flags: int = 0, id: int = 1) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), id, flags, 64, protocol, 0)
    head += parse_address(source) + parse_address(to)
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def ipv6(source: str, to: str, next_header: int, payload: bytes) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), next_header, 255)
    return head + parse_address(source) + parse_address(to) + payload


def udp4(source: str, to: str, port: int, data: bytes = b"hello!", source_port: int = 999) -> bytes:
    return ipv4(source, to, UDP, struct.pack(">HHHH", source_port, port, 8 + len(data), 0) + data)


def tcp_syn(source_port: int, port: int) -> bytes:
    """A segment without a checksum: it is looked at on the way, not at its end."""
    return struct.pack(">HHIIBBHHH", source_port, port, 1, 0, 0x50, 2, 1024, 0, 0)


def udp6(source: str, to: str, port: int, data: bytes = b"hello!") -> bytes:
    body = struct.pack(">HHHH", 999, port, 8 + len(data), 0) + data
    sum_ = checksum(pseudo6(source, to, len(body), UDP) + body)
    return ipv6(source, to, UDP, body[:6] + struct.pack(">H", sum_ or 0xFFFF) + body[8:])


def pseudo6(source: str, to: str, length: int, next_header: int) -> bytes:
    return parse_address(source) + parse_address(to) + struct.pack(">II", length, next_header)


def icmp6(
    source: str, to: str, type: int, body: bytes, before: bytes = b"", code: int = 0
) -> bytes:
    """With `before`, a header of options of its own kind in front."""
    message = struct.pack(">BBH", type, code, 0) + body
    sum_ = checksum(pseudo6(source, to, len(message), ICMP6) + message)
    message = message[:2] + struct.pack(">H", sum_) + message[4:]
    return ipv6(source, to, OPTIONS if before else ICMP6, before + message)


def neighbour(
    source: str, to: str, type: int, target: str, *options: tuple[int, bytes], flags: int = 0
) -> bytes:
    """A solicitation or advertisement; each option 6 bytes long."""
    body = struct.pack(">I", flags << 24) + parse_address(target)
    body += b"".join(bytes([kind, 1]) + data for kind, data in options)
    return icmp6(source, to, type, body)


def arp(operation: int, sender: bytes, address: str, target: bytes, asked: str) -> bytes:
    head = struct.pack(">HHBBH", 1, IPV4, 6, 4, operation)
    return head + sender + parse_address(address) + target + parse_address(asked)


def send(netns: Path, device: str, *frames: bytes) -> None:
    """Put frames on a device of a namespace, in that order."""

    def work() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((device, 0))
            for frame in frames:
                sock.send(frame)

    in_netns(netns, work)


class Ear:
    """What reaches a namespace's device from outside, whatever it is and whomever it is for."""

    def __init__(self, netns: Path, device: str = "eth0") -> None:
        def work() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            # SO_RCVBUFFORCE: whatever the machine lets others have. What does not fit is not heard.
            sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)
            sock.bind((device, ETH_P_ALL))
            # Frames for others too: the bridge alone decides what comes here.
            index = socket.if_nametoindex(device)
            sock.setsockopt(263, 1, struct.pack("iHH8s", index, 1, 0, b""))  # PACKET_MR_PROMISC
            sock.setblocking(False)
            return sock

        self._sock: socket.socket = in_netns(netns, work)
        self._heard: list[bytes] = []

    def close(self) -> None:
        self._sock.close()

    def heard(self) -> list[bytes]:
        """All frames so far, without those that left by this device."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, where = self._sock.recvfrom(1 << 16)
                if where[2] != socket.PACKET_OUTGOING:
                    self._heard.append(frame)
        return self._heard

    def forget(self) -> None:
        """What has come so far."""
        self.heard().clear()

    def lost(self) -> int:
        """How many frames found no room here since this was last asked."""
        _, lost = struct.unpack("II", self._sock.getsockopt(263, 6, 8))  # PACKET_STATISTICS
        return int(lost)

    def hears(self, frame: bytes, seconds: float = 30.0) -> bool:
        """Whether it comes within a time; at once if it has."""
        return self.wait(lambda: self.has(frame), seconds)

    def has(self, frame: bytes) -> bool:
        """Whether it has come."""
        return any(mark_of(frame) in heard for heard in self.heard())

    @staticmethod
    def wait(holds: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


@contextlib.contextmanager
def listening(*places: Path) -> Iterator[list[Ear]]:
    """An ear in each of these namespaces."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Ear(place))) for place in places]
