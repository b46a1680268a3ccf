"""The words of vxmesh as frozen values, and whether one that another agent wrote is sound.

The structs are also the stored and gossiped form, as msgpack arrays: a field is only ever added,
at the end and with a default, so that old and new agents read each other.
What stands opposite: notation.py, which parses what they are made of; proto/types.proto, the form
that users see.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from agent.errors import Invalid
from agent.notation import WIDTHS, parse_address, shorten

VNI_MAX = (1 << 24) - 1  # RFC 7348, section 5
ALIASES_MAX = 32
NAMES_PORT = 53  # of name servers (RFC 1035, section 4.2)
# Where no node takes VXLAN: who asks name servers would be cut off from them, on whichever host.
# With 52 it is inside WireGuard that 53 is the port (drivers/wireguard.py: data_port).
BARRED_DATA_PORTS = frozenset((NAMES_PORT, NAMES_PORT ^ 1))
VXLAN_OVERHEAD_V4 = 50  # outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14
VXLAN_OVERHEAD_V6 = 70
CERTIFICATE_MAX = 4096  # bytes of DER; ours have some 700
AUTHORITIES_MAX = 16  # CAs that a cluster remembers, the present ones among them
KEEPER_PROOF_MAX = 80  # bytes; ECDSA of P-256 in DER has at most 72
VOID_MAX = 32  # join tokens that are told from wrong ones
ONLY = "it"  # the id in the key of a record of which each node has one at most
# Of WireGuard: outer IPv4 20 or IPv6 40, UDP 8, message header 16, authentication tag 16.
WIREGUARD_OVERHEAD_V4 = 60
WIREGUARD_OVERHEAD_V6 = 80
WIREGUARD_KEY = 32  # bytes; Curve25519
WIREGUARD_KEYS_MAX = 4  # of one node; two while it changes them
CLOSED_MAX = 16  # ports of one agent; it has a metrics and a control port
# Where the interface of a sandbox waits that somebody else moves into the workload: our own
# namespace, the host's. Such a sandbox is left as it is once its interface has been moved.
HANDED_OUT = "/proc/self/ns/net"
AUX = "aux."  # a network's options aux.NAME=ADDRESS: what is no endpoint's to have
SPOOF = "spoof"  # a network's option: deny (default) or allow, see docs/guards.md
# Label of endpoints: those of one node that bear the same are of one workload, as when an engine
# makes an endpoint for each network that a container is in.
WORKLOAD = "docker.container"
OVERLAY = "overlay"  # the driver of networks over all hosts
BRIDGE = "bridge"  # the driver of networks that are on their creator alone
NONE, HOST = "none", "host"  # networks that each node has by itself, and their drivers
PREDEFINED = (NONE, HOST)
STAMP_MAX = 1 << 62  # core/clock.py: what is above is garbage, and would not fit when counted up


class WireguardKey(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A public key of a node, and the UDP port at which packets sealed for it are taken."""

    public: bytes  # WIREGUARD_KEY bytes
    port: int
    generation: int  # counts the node's keys


class Narrow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What fits through the path to a node, as measured, where that is less than should."""

    node: str
    mtu: int  # bytes, of IP packets of the underlay


class Node(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A host that runs an agent, as that agent describes itself."""

    id: str
    name: str
    address: str  # where its peers reach the agent
    port: int
    vtep: str  # where its VXLAN packets come from and go to
    data_port: int
    version: str
    since: float  # when this agent started, seconds since the epoch
    mtu: int  # of the underlay, towards the default route, in bytes
    routes: tuple[str, ...] = ()  # what the host itself can route to, CIDR; not the default
    incarnation: int = 0  # at its start; higher than anything said of its earlier lives
    certificate: bytes = b""  # its present one, DER; cluster/trust.py says what is in it
    keeper: bool = False  # it says that it holds the key of the CA; NodeState.is_keeper judges
    trust: int = 0  # the epoch of the Trust that it follows
    wireguard: tuple[WireguardKey, ...] = ()  # the one to use first; none: no encrypted networks
    closed: tuple[int, ...] = ()  # its other TCP ports that no sandbox may reach: metrics …
    keeper_proof: bytes = b""  # that `keeper` is true (cluster/identity/proof.py)
    narrow: tuple[Narrow, ...] = ()  # the paths from it that it found too narrow, by node


class Loss(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a network had to leave to another one that was made elsewhere at the same time."""

    what: str  # name or vni
    value: str  # what both claimed
    winner: str  # id of the network that has it


class Ipam(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The plugin that gives out a network's addresses, and what it calls the network's subnets."""

    plugin: str
    pools: tuple[str, ...]  # its ids of them, one for each subnet
    space: str  # address space; the plugin's own word
    options: dict[str, str] = {}


class Network(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An isolated layer-2 segment. Stamps are those of core/clock.py: see core/judging.py."""

    id: str
    name: str
    driver: str
    subnets: tuple[str, ...]
    gateways: tuple[str, ...]
    ip_range: str
    vni: int
    mtu: int  # 0: from the underlay
    internal: bool
    encrypted: bool
    options: dict[str, str]
    labels: dict[str, str]
    created: float
    creator: str  # node id; the first owner of its address range
    stamp: int = 0  # of this record
    deleted: bool = False
    born: int = 0  # stamp of the creation; 0 in records of agents that did not know it
    lost: tuple[Loss, ...] = ()
    ipam: Ipam | None = None  # none: its addresses are ours to give out
    more_ranges: tuple[str, ...] = ()  # beside `ip_range`, which older agents know

    @property
    def ranges(self) -> tuple[str, ...]:
        """The IP ranges that addresses are chosen from, of whichever subnet."""
        return (self.ip_range, *self.more_ranges) if self.ip_range else ()


class Endpoint(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One interface of one workload in one network. Its node is the record's origin."""

    id: str
    network: str  # network id
    name: str
    mac: bytes  # 6
    addresses: tuple[bytes, ...]  # 4 or 16 each
    aliases: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    sandbox: str = ""  # sandbox id; empty for an announced interface


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Who owns the addresses start..end (inclusive, as integers) of a network, since `epoch`."""

    family: int  # 4 or 6
    start: bytes  # big-endian, 4 or 16 bytes, so that msgpack holds IPv6 too
    end: bytes
    owner: str
    epoch: int


class Claims(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one node states about the ownership of one network's addresses."""

    network: str
    segments: tuple[Segment, ...]


class Publish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A port of this host that leads to a port of a sandbox."""

    host_port: int
    target_port: int
    protocol: str = "tcp"
    host_address: str = ""


class Sandbox(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A workload's network stack on this node. Local: never gossiped.

    `netns` is a path; `inode` says which namespace was meant when it was taken, so that
    another one at the same path (a pid or a name used again) is never mistaken for it.
    With a `pid` the sandbox lives as long as that process, else as long as the path.
    """

    id: str
    name: str
    netns: str
    inode: int
    pid: int
    start_time: int
    created: float
    endpoints: tuple[str, ...] = ()  # ids, eth0 first
    ifnames: tuple[str, ...] = ()
    publishes: tuple[Publish, ...] = ()
    log: str = ""
    default: str = ""  # the endpoint with the IPv4 default route; core/waysout.py chooses it
    default6: str = ""  # and that with the one of IPv6
    priorities: tuple[int, ...] = ()  # of the endpoints, for the default routes
    lent: dict[str, tuple[str, ...]] = {}  # endpoint of a plugin's network -> its gateways
    # Where the interface was moved that was handed out, once that is known: path and inode of the
    # namespace, and the interface's name there.
    moved_to: str = ""
    moved_inode: int = 0
    moved_name: str = ""
    stack: str = ""  # none or host: made in that network; its endpoints have no interface


class Removal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A node that will not come back, removed by another, which inherited its addresses.

    Kept for good: nothing of that node is taken from anybody any more.
    """

    node: str
    name: str
    by: str  # node id
    stamp: int  # as a network's
    when: float  # seconds since the epoch
    by_name: str = ""  # the remover's at the time: it may be removed itself


class Trust(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Whom the cluster trusts since `epoch`, stated by a keeper; the highest one counts.

    Signed with the key of a CA that was trusted before: being a member is not enough to make
    others trust somebody (cluster/identity/statements.py).
    """

    epoch: int
    stamp: int  # of two with one epoch the higher counts
    cluster: str
    authorities: tuple[bytes, ...]  # certificates, DER; the first one issues
    retired: tuple[bytes, ...]  # earlier ones, the latest first: for signatures of records only
    by: str  # node id
    phase: int = 0  # of a change of the CA (cluster/identity/rotation.py); 0: none is under way
    left_behind: tuple[str, ...] = ()  # nodes that were away and have to join anew
    signatures: tuple[bytes, ...] = ()  # with the keys of CAs, the signer's present ones


class TokenState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which join token holds, stated by a keeper; the one with the highest stamp counts.

    The secret follows from `nonce` and the CA's key, so nobody but keepers can tell it; it is
    written down nowhere. Signed with that same key, and of no use with another CA.
    """

    stamp: int
    cluster: str
    nonce: bytes
    void: tuple[bytes, ...]  # hashes of secrets that held before, the latest first
    by: str  # node id
    when: float  # seconds since the epoch
    signature: bytes = b""


class Notice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something that an operator wants to hear of and that is no object of its own.

    `kind` is one of a few fixed words with a dot (member.dead, drift.repaired, space.low,
    network.conflict …), `message` a sentence for people, `fields` the same for machines.
    """

    kind: str
    message: str
    fields: dict[str, str] = {}


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(value: msgspec.Struct) -> bytes:
    """The stored and gossiped form of a struct of this module."""
    return _encoder.encode(value)


def aux_addresses(options: Mapping[str, str]) -> list[bytes]:
    """The addresses that a network's options keep from its endpoints; what is none is left out."""
    found = []
    for key, value in options.items():
        if key.startswith(AUX):
            with contextlib.suppress(Invalid):
                found.append(parse_address(value))
    return found


def check_endpoint(value: Endpoint, id: str) -> None:
    """The same as `check_sound`, of what there is 100,000 of."""
    widths = map(len, value.addresses)
    if value.id != id or len(value.mac) != 6 or not WIDTHS.issuperset(widths):
        raise Invalid("record", f"is not sound: {shorten(repr(value), 120)}")


def check_sound(
    value: Node | Network | Endpoint | Claims | Removal | Trust | TokenState, id: str
) -> None:
    """Whether what another agent wrote can be worked with; Invalid or ValueError if not.

    `id` is the one in the record's key. Types are msgspec's to check, this is the rest.
    """
    if isinstance(value, Endpoint):
        check_endpoint(value, id)
        return
    if isinstance(value, Network):
        for text in (*value.subnets, *value.ranges):
            ipaddress.ip_network(text)
        for text in value.gateways:
            parse_address(text)
        sound = value.id == id and 1 <= value.vni <= VNI_MAX and 0 <= value.mtu <= 65535
        sound = sound and len(value.gateways) == len(value.subnets)
        sound = sound and (value.ipam is None or len(value.ipam.pools) == len(value.subnets))
        sound = sound and 0 <= value.stamp <= STAMP_MAX and 0 <= value.born <= STAMP_MAX
    elif isinstance(value, Node):
        parse_address(value.address)
        parse_address(value.vtep)
        for text in value.routes:
            ipaddress.ip_network(text, strict=False)
        sound = value.id == id and 0 < value.port < 65536 and 0 < value.data_port < 65536
        sound = sound and len(value.certificate) <= CERTIFICATE_MAX and 0 <= value.trust < 1 << 32
        sound = sound and len(value.wireguard) <= WIREGUARD_KEYS_MAX
        for held in value.wireguard:
            sound = sound and len(held.public) == WIREGUARD_KEY and 0 < held.port < 65536
            sound = sound and 0 <= held.generation <= STAMP_MAX
        sound = sound and len(value.closed) <= CLOSED_MAX
        sound = sound and len(value.keeper_proof) <= KEEPER_PROOF_MAX
        sound = sound and all(0 < port < 65536 for port in value.closed)
    elif isinstance(value, Removal):
        sound = value.node == id and bool(value.by)
    elif isinstance(value, Trust):
        known = (*value.authorities, *value.retired)
        sound = id == ONLY and 0 < value.epoch < 1 << 32 and 0 <= value.stamp <= STAMP_MAX
        sound = sound and len(value.authorities) > 0 and len(known) <= AUTHORITIES_MAX
        sound = sound and len(value.signatures) <= AUTHORITIES_MAX
        sound = sound and all(len(certificate) <= CERTIFICATE_MAX for certificate in known)
    elif isinstance(value, TokenState):
        sound = id == ONLY and 0 <= value.stamp <= STAMP_MAX and len(value.nonce) <= 64
        sound = sound and len(value.void) <= VOID_MAX
    else:
        sound = value.network == id
    if not sound:
        raise Invalid("record", f"is not sound: {shorten(repr(value), 120)}")


# A network's driver, or who gives out its addresses, that begins so is a plugin by the name that
# follows.
REMOTE = "remote:"


def plugin_of(network: Network) -> str:
    """The plugin that drives a network; empty if one of our own drivers does."""
    return network.driver.removeprefix(REMOTE) if network.driver.startswith(REMOTE) else ""
