"""WireGuard in the kernel: its devices' settings over generic netlink.

The bytes are packed and read by hand, as rows are; the tests hold them against pyroute2's reading
of the same messages.
What stands opposite: wireguard.py says when; netlink.py makes and deletes the devices.
Source: linux/wireguard.h, linux/genetlink.h; Linux drivers/net/wireguard/netlink.c.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Callable, Iterator

from agent.datapath.netlink import Netlink
from agent.datapath.netlinkmessages import answers, attribute, check, message, read_attributes
from agent.datapath.packing import (
    AF_INET,
    AF_INET6,
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)
from agent.datapath.wgconfig import Config, Endpoint, Peer, Update
from agent.datapath.wireguard_go import port_taken
from agent.syscalls import socket_in

NETLINK_GENERIC = 16
GENL = struct.Struct("=BBxx")  # struct genlmsghdr: command, version
CTRL, CTRL_GETFAMILY, CTRL_FAMILY_ID, CTRL_FAMILY_NAME = 0x10, 3, 1, 2
FAMILY, VERSION = "wireguard", 1
GET_DEVICE, SET_DEVICE = 0, 1
# WGDEVICE_A_*
DEVICE_IFNAME, DEVICE_PRIVATE_KEY, DEVICE_LISTEN_PORT, DEVICE_PEERS = 2, 3, 6, 8
# WGPEER_A_*
PEER_PUBLIC_KEY, PEER_FLAGS, PEER_ENDPOINT, PEER_KEEPALIVE, PEER_HANDSHAKE, PEER_ALLOWED = (
    1, 3, 4, 5, 6, 9,
)  # fmt: skip
REMOVE_ME, REPLACE_ALLOWED = 1, 2  # WGPEER_F_*
ALLOWED_FAMILY, ALLOWED_ADDRESS, ALLOWED_LENGTH = 1, 2, 3  # WGALLOWEDIP_A_*
NESTED = 0x8000  # NLA_F_NESTED
TIMESPEC = struct.Struct("=qq")  # struct __kernel_timespec
PEERS_A_MESSAGE = 100  # some 140 bytes each; an attribute has 64 KiB at most
ANSWER_WITHIN = 5.0  # s


class WireguardKernel:
    """The devices of one host."""

    def __init__(self, host: Netlink, host_netns: str) -> None:
        """`host` is the namespace at `host_netns`. Nothing is opened before the first call."""
        self._host, self._host_netns = host, host_netns

    async def create(self, name: str) -> None:
        """Make a device, without keys and down. OSError, EOPNOTSUPP without the module."""
        await self._host.add_wireguard(name)

    async def get(self, name: str) -> Config:
        """What a device holds. OSError."""
        answers = await asyncio.to_thread(self._exchange, lambda family: [pack_get(family, name)])
        return read(answers)

    async def set(self, name: str, update: Update) -> None:
        """Change a device. OSError; Conflict if its port is taken."""
        try:
            await asyncio.to_thread(self._exchange, lambda family: pack_set(family, name, update))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise port_taken(update.port or 0) from None

    async def end(self, name: str) -> None:
        """There is no process to end."""

    def _exchange(self, requests: Callable[[int], list[bytes]]) -> list[bytes]:
        """Send requests one after the other, and take the answers in. In a thread."""
        kind = socket.SOCK_RAW
        with socket_in(self._host_netns, socket.AF_NETLINK, kind, NETLINK_GENERIC) as sock:
            sock.bind((0, 0))
            sock.settimeout(ANSWER_WITHIN)
            family = read_family(_ask(sock, pack_family()))
            return [answer for request in requests(family) for answer in _ask(sock, request)]


def _ask(sock: socket.socket, request: bytes) -> list[bytes]:
    """The bodies of the messages that answer a request, each after its genlmsghdr."""
    is_dump = HEADER.unpack_from(request)[2] & NLM_F_DUMP == NLM_F_DUMP
    sock.send(request)
    found: list[bytes] = []
    for kind, body in answers(sock):
        if kind in (NLMSG_ERROR, NLMSG_DONE):
            if body:
                check(body, "WireGuard")
            if kind == NLMSG_DONE or not is_dump:
                break
        else:
            found.append(body[GENL.size :])
    return found


# -- requests --


def pack_family() -> bytes:
    """Ask which message type WireGuard's messages have here."""
    name = attribute(CTRL_FAMILY_NAME, FAMILY.encode() + b"\0")
    return _message(CTRL, NLM_F_REQUEST | NLM_F_ACK, CTRL_GETFAMILY, name)


def pack_get(family: int, name: str) -> bytes:
    """Ask for all of a device."""
    named = attribute(DEVICE_IFNAME, name.encode() + b"\0")
    return _message(family, NLM_F_REQUEST | NLM_F_DUMP, GET_DEVICE, named)


def pack_set(family: int, name: str, update: Update) -> list[bytes]:
    """Requests that make an update: the device's own settings and peers, so many a message."""
    own = attribute(DEVICE_IFNAME, name.encode() + b"\0")
    first = b""
    if update.private_key is not None:
        first += attribute(DEVICE_PRIVATE_KEY, update.private_key)
    if update.port is not None:
        first += attribute(DEVICE_LISTEN_PORT, struct.pack("=H", update.port))
    peers = [_gone(key) for key in update.gone] + [_peer(peer) for peer in update.peers]
    found = []
    for start in range(0, max(1, len(peers)), PEERS_A_MESSAGE):
        part = b"".join(peers[start : start + PEERS_A_MESSAGE])
        body = own + (first if start == 0 else b"")
        body += attribute(DEVICE_PEERS | NESTED, part) if part else b""
        found.append(_message(family, NLM_F_REQUEST | NLM_F_ACK, SET_DEVICE, body))
    return found


def _gone(key: bytes) -> bytes:
    flags = attribute(PEER_FLAGS, struct.pack("=I", REMOVE_ME))
    return attribute(NESTED, attribute(PEER_PUBLIC_KEY, key) + flags)


def _peer(peer: Peer) -> bytes:
    body = attribute(PEER_PUBLIC_KEY, peer.public_key)
    body += attribute(PEER_FLAGS, struct.pack("=I", REPLACE_ALLOWED))
    if peer.endpoint:
        body += attribute(PEER_ENDPOINT, _sockaddr(peer.endpoint))
    body += attribute(PEER_KEEPALIVE, struct.pack("=H", peer.keepalive))
    allowed = b""
    for cidr in sorted(peer.allowed):
        network = ipaddress.ip_network(cidr)
        family = AF_INET6 if network.version == 6 else AF_INET
        one = attribute(ALLOWED_FAMILY, struct.pack("=H", family))
        one += attribute(ALLOWED_ADDRESS, network.network_address.packed)
        one += attribute(ALLOWED_LENGTH, struct.pack("=B", network.prefixlen))
        allowed += attribute(NESTED, one)
    return attribute(NESTED, body + attribute(PEER_ALLOWED | NESTED, allowed))


def _sockaddr(endpoint: Endpoint) -> bytes:
    """struct sockaddr_in or sockaddr_in6: family in the machine's order, port in the network's."""
    address, port = endpoint
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return struct.pack("=H", AF_INET) + struct.pack("!H", port) + parsed.packed + bytes(8)
    return struct.pack("=H", AF_INET6) + struct.pack("!HI", port, 0) + parsed.packed + bytes(4)


def _message(kind: int, flags: int, command: int, body: bytes) -> bytes:
    return message(kind, flags, GENL.pack(command, VERSION) + body)


# -- answers --


def read_family(answers: list[bytes]) -> int:
    """The message type, out of the answer to pack_family. OSError if it is not in there."""
    for body in answers:
        found = dict(read_attributes(body))
        if CTRL_FAMILY_ID in found:
            return _number(found[CTRL_FAMILY_ID])
    raise OSError(errno.ENOENT, "WireGuard: the kernel does not know it")


def read(answers: list[bytes]) -> Config:
    """What a device holds, out of the answers to pack_get.

    A peer that does not fit in one message goes on in the next (wg_get_device_dump).
    """
    private, port = b"", 0
    peers: dict[bytes, Peer] = {}
    for body in answers:
        for kind, value in read_attributes(body):
            if kind == DEVICE_PRIVATE_KEY:
                private = value
            elif kind == DEVICE_LISTEN_PORT:
                port = _number(value)
            elif kind == DEVICE_PEERS:
                for _, inner in read_attributes(value):
                    peer = _read_peer(inner)
                    begun = peers.get(peer.public_key)
                    if begun:
                        whole = begun.allowed | peer.allowed
                        peer = Peer(
                            begun.public_key,
                            begun.endpoint,
                            whole,
                            begun.keepalive,
                            begun.handshake,
                        )
                    peers[peer.public_key] = peer
    return Config(private, port, peers)


def _read_peer(data: bytes) -> Peer:
    found = dict(read_attributes(data))
    seconds, nanoseconds = TIMESPEC.unpack(found.get(PEER_HANDSHAKE, bytes(TIMESPEC.size)))
    return Peer(
        public_key=found[PEER_PUBLIC_KEY],
        endpoint=_read_sockaddr(found.get(PEER_ENDPOINT, b"")),
        allowed=frozenset(_read_allowed(found.get(PEER_ALLOWED, b""))),
        keepalive=_number(found.get(PEER_KEEPALIVE, b"")),
        handshake=seconds + nanoseconds / 1e9,
    )


def _read_sockaddr(data: bytes) -> Endpoint | None:
    family = _number(data[:2])
    port = int.from_bytes(data[2:4], "big")
    if family == AF_INET:
        return str(ipaddress.IPv4Address(data[4:8])), port
    if family == AF_INET6:
        return str(ipaddress.IPv6Address(data[8:24])), port
    return None


def _read_allowed(data: bytes) -> Iterator[str]:
    for _, inner in read_attributes(data):
        found = dict(read_attributes(inner))
        address = ipaddress.ip_address(found[ALLOWED_ADDRESS])
        yield f"{address}/{_number(found[ALLOWED_LENGTH])}"


def _number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)
