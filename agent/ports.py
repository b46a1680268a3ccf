"""Ports of this host that published ports take: held, so that nobody else gets them.

The sockets are bound and never read; packets are led elsewhere by nftables before they would
reach them. What stands opposite: datapath/nft.py makes the rules.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from agent.errors import Conflict
from agent.model import Publish

log = structlog.get_logger()


class Taken(NamedTuple):
    """A port of this host that cannot be published now."""

    publish: Publish
    why: str  # for people
    is_foreign: bool = False  # the address is not this host's


def find_taken(publishes: Sequence[Publish]) -> list[Taken]:
    """Which of these ports something on this host holds. Nothing stays bound."""
    found = []
    for publish in publishes:
        for family in _families(publish):
            try:
                _bound(publish, family, is_probe=True).close()
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:
                    continue
                is_foreign = error.errno == errno.EADDRNOTAVAIL
                why = "not its address" if is_foreign else (error.strerror or str(error))
                found.append(Taken(publish, why[:1].lower() + why[1:], is_foreign))
                break
    return found


def _families(publish: Publish) -> list[socket.AddressFamily]:
    if publish.host_address:
        return [socket.AF_INET6 if ":" in publish.host_address else socket.AF_INET]
    return [socket.AF_INET, *([socket.AF_INET6] if socket.has_ipv6 else [])]


def _kind(publish: Publish) -> socket.SocketKind:
    return socket.SOCK_DGRAM if publish.protocol == "udp" else socket.SOCK_STREAM


class PortHolder:
    """Sockets by sandbox id."""

    def __init__(self) -> None:
        self._held: dict[str, list[socket.socket]] = {}

    def hold(self, sandbox: str, publishes: Sequence[Publish]) -> None:
        """Take the ports, all or none; Conflict names the one that something else holds."""
        taken: list[socket.socket] = []
        try:
            for publish in publishes:
                for family in _families(publish):
                    try:
                        taken.append(_bound(publish, family))
                    except OSError as error:
                        if error.errno != errno.EAFNOSUPPORT:
                            raise _conflict(publish, error) from None
        except Conflict:
            for sock in taken:
                sock.close()
            raise
        if taken:
            self._held.setdefault(sandbox, []).extend(taken)

    def release(self, sandbox: str) -> None:
        """Give the ports of a sandbox back."""
        for sock in self._held.pop(sandbox, []):
            sock.close()


def _conflict(publish: Publish, error: OSError) -> Conflict:
    return Conflict(
        f"port {publish.host_port}/{publish.protocol}",
        f"cannot be published on this host ({error.strerror})",
        "Stop what holds it, or choose another",
    )


def _bound(publish: Publish, family: socket.AddressFamily, is_probe: bool = False) -> socket.socket:
    """A socket that has the port. OSError.

    As a probe it overlooks connections over TCP that have ended (TIME_WAIT): nobody holds those. A
    socket that is kept must not allow others what that takes, SO_REUSEADDR: see socket(7).
    """
    sock = socket.socket(family, _kind(publish) | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if is_probe and publish.protocol != "udp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((publish.host_address, publish.host_port))
    except OSError:
        sock.close()
        raise
    return sock
