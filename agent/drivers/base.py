"""The desired kernel state, as values, and the one interface through which it is asked for.

A driver says what the kernel should hold; datapath/ makes it so and never asks why. The
reconciler is only ever told *what to look at again* and pulls the newest desired value at the
moment it applies it, so that changes coalesce and their order cannot matter.
What stands opposite: datapath/reconciler.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from agent.drivers.balancing import Frontend, FrontendKey
from agent.drivers.marks import OPEN, PROVEN
from agent.model import HANDED_OUT, Publish


@dataclass(frozen=True, slots=True)
class Port:
    """One local endpoint: a veth pair, one end on the bridge, the other in the sandbox; or an
    interface in the sandbox that shares a device of the host (Lan)."""

    endpoint: str  # endpoint id, 16 hex digits
    device: str  # name of the end on the bridge, in our namespace
    mac: bytes  # of the end in the sandbox; empty: whichever it has
    addresses: tuple[str, ...]  # interface notation: 10.1.0.2/24
    netns: str  # path of the sandbox's network namespace
    inode: int  # which namespace is meant; another one at that path is not it
    ifname: str  # name of the end in the sandbox
    # Default routes of the sandbox through this port; often empty. 0.0.0.0 and ::: on the link.
    gateways: tuple[str, ...]
    # The families whose default route another port has, or takes over in one step: what this one
    # had is left to that.
    handed_on: tuple[int, ...] = ()
    moved: tuple[str, int, str] | None = None  # path, inode and name where it was moved to
    kind: str = "veth"  # of device, as the kernel calls it

    @property
    def is_handed_out(self) -> bool:
        """Whether the end in the sandbox is moved and furnished by somebody else, as Docker does:
        we make the pair, and look at our own end only."""
        return self.netns == HANDED_OUT

    @property
    def inside(self) -> Port | None:
        """The same port where its interface is by now; None: it waits to be moved, or nobody has
        said where it was moved to."""
        if not self.is_handed_out:
            return self
        if self.moved is None:
            return None
        netns, inode, ifname = self.moved
        return replace(self, netns=netns, inode=inode, ifname=ifname, moved=None)


@dataclass(frozen=True, slots=True)
class Stack:
    """The network stack of a workload that has no interface of ours."""

    netns: str  # path of its network namespace
    inode: int  # which namespace is meant
    up: tuple[str, ...]  # devices of it that are to be up


@dataclass(frozen=True, slots=True)
class Seen:
    """An interface in a sandbox as the kernel has it, whoever made it so."""

    mac: str
    mtu: int  # bytes
    up: bool
    addresses: frozenset[str]  # interface notation
    routes: tuple[tuple[str, str], ...]  # by it, and beyond its link: CIDR, next hop or ""
    destinations: frozenset[str]  # of every route of the sandbox, by whichever interface; CIDR


@dataclass(frozen=True, slots=True)
class Bridge:
    """One network's bridge on this node and, for an overlay, the VXLAN device on it."""

    network: str  # network id: our mark on the devices
    vni: int
    device: str  # bridge
    vxlan: str  # VXLAN device; empty: none, the network is on this host alone
    mtu: int  # of the bridge, the ports and the VXLAN device, in bytes
    router_mac: bytes  # of the bridge itself, which answers for the gateways
    gateways: tuple[str, ...]  # interface notation, first address of each subnet as a rule
    subnets: tuple[str, ...]
    internal: bool  # no way out through the host
    vtep: str  # our own underlay address; empty: whichever leads to the peer, and all are IPv6
    data_port: int
    ports: Mapping[str, Port] = field(default_factory=dict)  # by endpoint id
    # Those of `subnets` whose addresses lead to another network on this host: in `gateways` is
    # none of them, and nothing of them goes to the host or comes from there.
    apart: frozenset[str] = frozenset()
    encrypted: bool = False  # its VXLAN packets go inside WireGuard and nowhere else
    asked: bool = False  # name servers elsewhere that are asked from it: ours is to answer
    spoof: bool = False  # its sandboxes may send with others' MACs and addresses
    # Broadcast and multicast packets a second of each sandbox, which go to all hosts with members
    # (Rows.defaults); 0: none goes to another host.
    flood_rate: int = 0

    @property
    def hands_on_unknown(self) -> bool:
        """Whether it sends the VXLAN device unicast for whom it does not know. Where that floods
        it knows whoever is behind it (Rows.floods), and the device would send all else to all."""
        return not self.flood_rate

    @property
    def open_subnets(self) -> tuple[str, ...]:
        """The subnets that the host and what is behind it can be reached from."""
        if self.internal:
            return ()
        return tuple(s for s in self.subnets if s not in self.apart)

    @property
    def group(self) -> int:
        """The device group of the bridge, by which rules know whether it leads out (marks.py); 0:
        none of ours.

        PROVEN where each frame comes out of a port whose guard allows the endpoint's own addresses
        alone, and all of those lead out. What comes by VXLAN another host has looked at, or nobody.
        """
        if not self.open_subnets:
            return 0
        return OPEN if self.vxlan or self.spoof or self.apart else PROVEN


@dataclass(frozen=True, slots=True)
class HostSide:
    """The host's own interface in a network that is on its wire."""

    endpoint: str  # endpoint id: our mark
    device: str
    mac: bytes  # empty: whichever it has
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lan:
    """One network whose interfaces share a device of this host and are straight on its wire."""

    network: str  # network id
    name: str  # for people
    vni: int  # what it goes by here; nothing of it is on the wire
    kind: str  # macvlan, ipvlan
    mode: str
    parent: str  # the device that is shared
    trunk: str  # if the parent is not there: the device to make it on, as VLAN sub-interface;
    vlan: int  # and of which VLAN. Empty, 0: it is not made
    mtu: int  # bytes; 0: the parent's
    ports: Mapping[str, Port] = field(default_factory=dict)  # by endpoint id
    host_side: HostSide | None = None


DEFAULT = bytes(6)  # in the place of a MAC, of rows for what no other row is for


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one VXLAN device. A value of None says that there should be none for that key."""

    fdb: list[tuple[bytes, bytes | None]]  # MAC -> VTEP (4 or 16 bytes)
    neighbours: list[tuple[bytes, bytes | None]]  # address (4 or 16 bytes) -> MAC
    # Whether the network floods: then the bridge, too, leads each MAC of `fdb` to the device.
    floods: bool = False
    # The VTEPs that its default rows lead to; None: they were not asked for (by the MAC DEFAULT).
    defaults: frozenset[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """A published port of this host and where it leads."""

    publish: Publish
    address: str  # of the endpoint


@dataclass(frozen=True, slots=True)
class WireguardPeer:
    """One key of another node, as each WireGuard device here is to know it."""

    public_key: bytes  # 32 bytes
    endpoint: tuple[str, int]  # underlay address, UDP port
    address: bytes  # inner IPv6 address, all that this key may send from and is sent
    keepalive: bool  # hold a session, so that the first packet need not wait for one


@dataclass(frozen=True, slots=True)
class WireguardDevice:
    """One key of this node: a device in the host's namespace."""

    device: str
    private_key: bytes  # 32 bytes
    port: int  # UDP
    address: bytes  # inner IPv6 address
    mtu: int
    peers: Mapping[bytes, WireguardPeer]  # by public key

    def __repr__(self) -> str:
        """Without the private key: this goes into logs."""
        return f"WireguardDevice({self.device}, port {self.port}, {len(self.peers)} peers)"


@dataclass(frozen=True, slots=True)
class Closed:
    """What no sandbox may reach by the way out, on whichever host it is."""

    # UDP ports that carry overlays, at every address: who sends there speaks for other sandboxes.
    carriers: frozenset[int] = frozenset()
    agents: frozenset[tuple[str, int]] = frozenset()  # address and TCP port of every agent
    own: frozenset[int] = frozenset()  # TCP ports of this host's agent, at all its addresses


class DesiredState(Protocol):
    """What the reconciler pulls. Every method answers for this very moment, without waiting."""

    def bridges(self) -> Mapping[int, Bridge]:
        """All bridges that should exist, by VNI."""

    def bridge(self, vni: int) -> Bridge | None:
        """One of them; None if it should not exist."""

    def lans(self) -> Mapping[int, Lan]:
        """All networks that are to be on a wire of this host, by VNI."""

    def lan(self, vni: int) -> Lan | None:
        """One of them; None if it should not exist."""

    def rows(self, vni: int, macs: Collection[bytes], addresses: Collection[bytes]) -> Rows:
        """The desired rows of just these keys; None as value where there should be none."""

    def all_rows(self, vni: int) -> Rows:
        """Every desired row of a network; no value is None. Empty if it has no bridge here."""

    def wireguard(self) -> tuple[WireguardDevice, ...]:
        """The WireGuard devices that should exist; what is sent goes through the first.

        None while no encrypted network is here.
        """

    def complete(self) -> bool:
        """False while rows may be right that this node has not heard of yet, after a start.

        A full compare then leaves rows that are not desired; it is made again once all is known.
        """

    def forwards(self) -> tuple[Forward, ...]:
        """All published ports of this host."""

    def closed(self) -> Closed:
        """What is the agents' alone."""

    def frontends(self) -> Mapping[FrontendKey, Frontend]:
        """The services that this host balances."""

    def frontend(self, key: FrontendKey) -> Frontend | None:
        """One of them; None if there should be none."""

    def mark(self) -> object:
        """An opaque token of what has been taken in so far; given back when it is applied."""
