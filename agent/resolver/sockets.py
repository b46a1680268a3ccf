"""Listening sockets in the namespace of ours, and which address a datagram was sent to.

The gateways that sandboxes ask come and go with their bridges, so the sockets are bound to the
wildcard address; an answer must leave from the address that was asked, which IP_PKTINFO (ip(7))
and IPV6_PKTINFO (RFC 3542, section 6) tell and set, a datagram at a time.
What stands opposite: server.py, which reads and writes here.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import Conflict, Invalid, Unavailable, VxmeshError
from agent.notation import shorten
from agent.syscalls import in_netns, socket_in

PORT = 53
DEFAULT_LISTEN = ("0.0.0.0:53", "[::]:53")

_IP_PKTINFO = 8  # linux/in.h; the socket module lacks it
# linux/in.h, in6.h: to answer from an address that is not ours (datapath/questions.py).
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
# linux/udp.h. Without it the kernel would make a hundred questions of one packet that an asker
# sent with UDP_SEGMENT, past the limit that counts packets (datapath/guardrules.py).
_SOL_UDP, _UDP_GRO = 17, 104
_PKTINFO4 = struct.Struct("=i4s4s")  # interface, local address, destination in the header
_PKTINFO6 = struct.Struct("=16si")  # destination, interface
_RECEIVE_BYTES = 1 << 20  # some thousand questions may wait while a feed is taken in
_SEND_BYTES = 128 << 10  # of a TCP connection: two of the largest answers, not megabytes
_BACKLOG = 128
_CHOICES = 10  # of a port by the kernel that is free for UDP and for TCP
_LINK_LOCAL6 = b"\xfe\x80"

Ancillary = list[tuple[int, int, bytes]]
Peer = tuple[str, int] | tuple[str, int, int, int]  # host, port; IPv6: flow and scope too


@dataclass(frozen=True, slots=True)
class Listen:
    """An address and port to listen on; the address may be the wildcard."""

    address: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET or AF_INET6."""
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def parse_listen(text: str) -> Listen:
    """ADDRESS:PORT, [ADDRESS]:PORT for IPv6; Invalid if malformed."""
    host, _, port = text.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError(port)
    except ValueError:
        raise Invalid(
            f"listening address {shorten(text)}",
            "is malformed",
            "Write it as 0.0.0.0:53 or [::]:53",
        ) from None
    return Listen(address, number)


def _open(
    listen: Listen, kind: socket.SocketKind, netns: str | None, shared: bool
) -> socket.socket:
    if netns is None:
        sock = socket.socket(listen.family, kind)
    else:
        sock = socket_in(netns, listen.family, kind)
    try:
        sock.setblocking(False)
        if listen.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if ipaddress.ip_address(listen.address).is_unspecified:
            with contextlib.suppress(PermissionError):  # then only at addresses of our own
                if listen.family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        elif listen.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        if kind == socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        # So that a resolver which gives way (`share`) does not hold the port against its heir.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((listen.address, listen.port))
        if kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
        if not shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    except BaseException:
        sock.close()
        raise
    return sock


def _open_pair(
    listen: Listen, netns: str | None, shared: bool
) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP on one port."""
    for last in (False,) * _CHOICES + (True,):
        udp = _open(listen, socket.SOCK_DGRAM, netns, shared)
        try:
            chosen = Listen(listen.address, udp.getsockname()[1])
            return udp, _open(chosen, socket.SOCK_STREAM, netns, shared)
        except OSError as error:
            udp.close()
            # The kernel chose a port that another's TCP has: it is to choose again.
            if listen.port or last or error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("unreachable")


def open_sockets(
    listens: Sequence[Listen], netns: str | None, optional: bool = False, shared: bool = False
) -> tuple[list[socket.socket], list[socket.socket]]:
    """UDP and TCP sockets on `listens`, in the namespace at the path `netns` (None: our own).

    With port 0 the kernel chooses the UDP port and TCP takes the same. With `optional`, what
    the kernel has no address family for is left out, as long as one is there. With `shared`,
    others of this user may listen there too, and the kernel deals out to all. Raises Conflict
    if a port is taken, Unavailable if it cannot be listened on.
    """
    udp: list[socket.socket] = []
    tcp: list[socket.socket] = []
    try:
        for listen in listens:
            try:
                pair = _open_pair(listen, netns, shared)
                udp.append(pair[0])
                tcp.append(pair[1])
            except OSError as error:
                no_family = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
                if not (optional and no_family and listen.family == socket.AF_INET6):
                    raise _failure(listen, netns, error) from error
    except BaseException:
        for sock in (*udp, *tcp):
            sock.close()
        raise
    return udp, tcp


def share(sockets: Iterable[socket.socket]) -> None:
    """Let another resolver bind to the same ports while we still answer on ours."""
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _failure(listen: Listen, netns: str | None, error: OSError) -> VxmeshError:
    where = f"{listen.address} port {listen.port}" + (f" in {netns}" if netns else "")
    what = f"name server on {where}"
    if error.errno == errno.EADDRINUSE:
        return Conflict(what, "the port is taken", "Stop what listens there")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Unavailable(what, "permission denied", "Run it as root")
    if error.errno in (errno.ENOENT, errno.EINVAL):
        return Unavailable(what, "that is no network namespace", "Start the agent, which makes it")
    return Unavailable(what, error.strerror or str(error))


def is_ours(address: str, port: int, listens: Sequence[Listen], netns: str | None) -> bool:
    """True if a question sent from the host to `address` and `port` would reach ourselves.

    A loopback address is ours only if we listen in the host's own namespace. For others the
    kernel is asked: what can be bound to in our namespace is an address of it.
    """
    here = netns is None or Path(netns).samefile("/proc/self/ns/net")
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if (parsed.is_loopback or parsed.is_unspecified) and not here:
        return False
    candidates = [listen for listen in listens if listen.port == port]
    if any(listen.address == str(parsed) for listen in candidates):
        return True
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6

    def bindable() -> bool:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((str(parsed), 0))
            except OSError:
                return False
            return True

    wildcard = any(
        ipaddress.ip_address(listen.address).is_unspecified and listen.family == family
        for listen in candidates
    )
    return wildcard and (bindable() if netns is None else in_netns(netns, bindable))


def answer_from(ancillary: Ancillary) -> tuple[int, Ancillary]:
    """What came beside a datagram: the bytes of the first question in it, 0 if it is the only
    one, and what an answer needs to leave from the address that was asked.

    Of several that came in one packet the others are lost.
    """
    first = 0
    back: Ancillary = []
    for level, type, data in ancillary:
        if level == socket.IPPROTO_IP and type == _IP_PKTINFO:
            _, local, _ = _PKTINFO4.unpack_from(data)
            # Interface 0: the routes decide, as the sandbox may ask by another interface.
            back = [(level, type, _PKTINFO4.pack(0, local, bytes(4)))]
        elif level == socket.IPPROTO_IPV6 and type == socket.IPV6_PKTINFO:
            destination, interface = _PKTINFO6.unpack_from(data)
            if not destination.startswith(_LINK_LOCAL6):
                interface = 0
            back = [(level, type, _PKTINFO6.pack(destination, interface))]
        elif level == _SOL_UDP and type == _UDP_GRO:
            first = int.from_bytes(data[:4], sys.byteorder)
    return first, back


def source_address(peer: Peer) -> bytes:
    """The address of a peer name as 4 or 16 bytes, without its scope."""
    host = peer[0].partition("%")[0]
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
