"""Ports of this host that published ports take: held, so that nobody else gets them.

The sockets are bound and never read; packets are led elsewhere by nftables before they would
reach them. What stands opposite: datapath/nft.py makes the rules.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import structlog

from agent.errors import Conflict
from agent.model import Publish

log = structlog.get_logger()


class PortHolder:
    """Sockets by sandbox id."""

    def __init__(self) -> None:
        self._held: dict[str, list[socket.socket]] = {}

    def hold(self, sandbox: str, publishes: Sequence[Publish]) -> None:
        """Take the ports, all or none; Conflict names the one that something else holds."""
        taken: list[socket.socket] = []
        try:
            for publish in publishes:
                taken.append(_bind(publish))
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


def _bind(publish: Publish) -> socket.socket:
    family = socket.AF_INET6 if ":" in publish.host_address else socket.AF_INET
    kind = socket.SOCK_DGRAM if publish.protocol == "udp" else socket.SOCK_STREAM
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    try:
        sock.bind((publish.host_address, publish.host_port))
    except OSError as error:
        sock.close()
        raise Conflict(
            f"port {publish.host_port}/{publish.protocol}",
            f"cannot be published on this host ({error.strerror})",
            "Stop what holds it, or choose another",
        ) from None
    return sock
