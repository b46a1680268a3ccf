"""Encrypted networks: the WireGuard devices of a node, and the addresses inside them.

VXLAN of an encrypted network goes from inner address to inner address. A node has one for each
of its keys, and it follows from the key, so nobody allocates it and nobody can claim another's.
WireGuard takes from a peer only what comes from that peer's inner address (cryptokey routing),
and an inner address leads nowhere but into WireGuard: so rows that name one cannot send in the
clear, whatever else is there or not.
Source: WireGuard (Donenfeld 2017), section 2 for cryptokey routing; RFC 4193 for the prefix.
What stands opposite: overlay.py makes rows of the addresses, datapath/wireguard.py the devices.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping

from agent.drivers.base import WireguardDevice, WireguardPeer
from agent.model import WIREGUARD_OVERHEAD_V4, WIREGUARD_OVERHEAD_V6, Node, WireguardKey

# A ULA: fd, then "vxmwg" in ASCII. The same in every cluster: rules and routes for it are fixed.
PREFIX = ipaddress.IPv6Network("fd76:786d:7767::/48")
DEVICES = ("vxw0", "vxw1")  # by a key's generation, so that two in a row never meet
DEVICES_MATCH = "vxw*"  # all of them, in rules: one comparison
UNDERLAY_MTU = 1500  # of a node that has not said


def key_address(node: str, key: WireguardKey) -> bytes:
    """The address of a node's key inside WireGuard, 16 bytes."""
    text = f"{node}/{key.generation}/".encode() + key.public
    host = hashlib.blake2s(text, digest_size=10).digest()
    return PREFIX.network_address.packed[:6] + host


def inner_address(node: Node) -> bytes:
    """Where to send what is for a node and encrypted, 16 bytes; empty if it has no key."""
    return key_address(node.id, node.wireguard[0]) if node.wireguard else b""


def data_port(outer: int) -> int:
    """The UDP port of VXLAN inside WireGuard, in a cluster whose other VXLAN has port `outer`.

    Another one, so that a socket has either sealed packets or open ones, and what comes to this
    port by any other way than WireGuard can be dropped unseen.
    """
    return outer ^ 1 or 2


def overhead(vteps: Iterable[str]) -> int:
    """Bytes that WireGuard adds to each packet between nodes with these underlay addresses."""
    return max(
        (WIREGUARD_OVERHEAD_V6 if ":" in vtep else WIREGUARD_OVERHEAD_V4 for vtep in vteps),
        default=WIREGUARD_OVERHEAD_V4,
    )


def find_owners(me: Node, nodes: Iterable[Node], before: Mapping[bytes, str]) -> dict[bytes, str]:
    """Whose each public key is (id), where `before` says whose they were when this was last asked.

    A public key is no secret, so anybody can state another's. This node's own are its own; any
    other is whose it was, for as long as that one's record states it, or else of the first of
    `nodes` that does.
    """
    nodes = list(nodes)
    stated = {(key.public, node.id) for node in nodes for key in node.wireguard}
    owners = {key.public: me.id for key in me.wireguard}
    for public, owner in before.items():
        if (public, owner) in stated:
            owners.setdefault(public, owner)
    for node in nodes:
        for key in node.wireguard:
            owners.setdefault(key.public, node.id)
    return owners


def devices(
    me: Node,
    private_keys: Mapping[bytes, bytes],
    nodes: Iterable[Node],
    partners: Collection[str],
    owners: Mapping[bytes, str],
) -> tuple[WireguardDevice, ...]:
    """The devices that this node should have: one for each of its keys.

    `private_keys` are by public key. Every key of every other node is a peer of each device, so
    that who begins is known already; a session is held with `partners` (ids), the nodes with
    which there is something to talk about. `owners` is whose each public key is (id): who else
    states it gets nothing by that, and it is no peer of its own owner.
    """
    others = [node for node in nodes if node.id != me.id]
    peers = {
        key.public: WireguardPeer(
            key.public,
            (node.vtep, key.port),
            key_address(node.id, key),
            node.id in partners,
        )
        for node in sorted(others, key=lambda node: node.id)
        for key in node.wireguard
        if owners.get(key.public) == node.id and key.public not in private_keys
    }
    mtu = (me.mtu or UNDERLAY_MTU) - overhead(node.vtep for node in (me, *others))
    return tuple(
        WireguardDevice(
            device=DEVICES[key.generation % len(DEVICES)],
            private_key=private_keys[key.public],
            port=key.port,
            address=key_address(me.id, key),
            mtu=mtu,
            peers=peers,
        )
        for key in me.wireguard
        if key.public in private_keys
    )
