"""What a WireGuard device holds, and what has to be set so that it holds what is desired. Pure.

What stands opposite: wireguard_go.py and wireguard_netlink.py carry it to the two
implementations and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.drivers.base import WireguardDevice, WireguardPeer
from agent.notation import format_address

KEEPALIVE = 25  # s; as wg(8) advises: shorter than what any NAT forgets

Endpoint = tuple[str, int]  # address and UDP port


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer as a device has it."""

    public_key: bytes
    endpoint: Endpoint | None = None
    allowed: frozenset[str] = frozenset()  # CIDR
    keepalive: int = 0  # s; 0: none
    handshake: float = 0.0  # when the last one was completed, s since the epoch; 0: never


@dataclass(frozen=True, slots=True)
class Config:
    """A device as it is. Without a private key it does nothing."""

    private_key: bytes
    port: int
    peers: Mapping[bytes, Peer]  # by public key


@dataclass(slots=True)
class Update:
    """What to set; None and what is not named stays as it is."""

    private_key: bytes | None = None
    port: int | None = None
    peers: list[Peer] = field(default_factory=list)  # an endpoint of None stays as it is
    gone: list[bytes] = field(default_factory=list)  # public keys of peers to remove

    def __bool__(self) -> bool:
        own = self.private_key is not None or self.port is not None
        return own or bool(self.peers) or bool(self.gone)


def difference(
    have: Config, want: WireguardDevice, given: Mapping[bytes, Endpoint], *, shrink: bool
) -> Update:
    """How to get from `have` to `want`; peers that are not wanted go only with `shrink`.

    `given` are the endpoints that were set last, by public key. A peer that moved since then is
    followed by WireGuard itself, on proof of its key: that is not undone.
    """
    update = Update()
    if have.private_key != want.private_key:
        update.private_key = want.private_key
    if have.port != want.port:
        update.port = want.port
    for key, peer in want.peers.items():
        held = have.peers.get(key)
        allowed = frozenset([f"{format_address(peer.address)}/128"])
        keepalive = KEEPALIVE if peer.keepalive else 0
        moved = _moved(held, peer, given.get(key))
        if held is None or moved or (held.allowed, held.keepalive) != (allowed, keepalive):
            update.peers.append(Peer(key, peer.endpoint if moved else None, allowed, keepalive))
    if shrink:
        update.gone = [key for key in have.peers if key not in want.peers]
    return update


def _moved(held: Peer | None, peer: WireguardPeer, given: Endpoint | None) -> bool:
    if held is None or held.endpoint is None:
        return True
    return peer.endpoint != (given or held.endpoint)
