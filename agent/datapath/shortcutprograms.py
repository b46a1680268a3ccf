"""The programs that take a frame past the bridge, between a sandbox and the VXLAN device. Pure.

    inwards   a frame from another host, for a MAC of a sandbox here: into the sandbox at once
    outwards  TCP of a sandbox, with a source of its own, for a MAC that is not here: to the VXLAN
              device, which knows the way or drops it
    entry     what the devices have at their ingress: leads to one of these while the agent lives

They do what the bridge and the guard of the port (guardrules.py) would do, for what is nearly all
traffic and can be told at a glance; whatever else there is goes on to those. The kernel empties a
map of programs when who made it is gone: then `entry` leads nowhere, and all goes by the bridge.

MACs and addresses stand in maps as they do in frames, IPv4 as IPv6 has it (::ffff:a.b.c.d); numbers
are the machine's.
What stands opposite: shortcuts.py says what is in the maps; bpf.py loads this.
Source: linux/bpf.h (struct __sk_buff), bpf-helpers(7); Linux kernel/bpf/arraymap.c
(prog_array_map_clear), net/core/filter.c (skb_do_redirect), drivers/net/vxlan.
"""

from __future__ import annotations

import socket
import struct

from agent.datapath import bpfasm as asm
from agent.datapath.bpfasm import (
    FP,
    HASH,
    PROG_ARRAY,
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    Line,
    MapSpec,
)

STATION = struct.Struct("=I6s2x")  # a VXLAN device's index, a MAC that is behind it on this host
PORT = struct.Struct("=I")  # the index of that one's port; 0: it is here, and reached by the bridge
# A port's index, and a MAC and an address that are its own, of that protocol (EtherType): else IPv6
# could have a source that is another's IPv4 address.
SOURCE = struct.Struct("=I6sH16s")
WAY = struct.Struct("=I")  # the VXLAN device's index
SLOT = struct.Struct("=I")  # which program
PROGRAM = struct.Struct("=I")  # its descriptor

MAPS = {
    "stations": MapSpec(HASH, STATION.size, PORT.size, 1 << 16),
    "sources": MapSpec(HASH, SOURCE.size, WAY.size, 1 << 16),
    "programs": MapSpec(PROG_ARRAY, 4, 4, 2),
}
INWARDS, OUTWARDS = range(2)  # in "programs"

# Before an IPv4 address, and the EtherTypes as they are in frames.
MAPPED = bytes(10) + b"\xff\xff"
IPV4, IPV6 = socket.htons(0x0800), socket.htons(0x86DD)
_HEAD = 14  # bytes of Ethernet's header
_NEXT = -1  # TC_ACT_UNSPEC: as if nothing had been here
_TO_HOST = 0  # PACKET_HOST
_TCP = socket.IPPROTO_TCP

# struct __sk_buff
_LENGTH, _PROTOCOL, _VLAN_PRESENT, _DEVICE, _DATA, _DATA_END = 0, 16, 20, 40, 76, 80
# Where things are in a frame of IPv4 or IPv6.
_DESTINATION, _SOURCE = 0, 6
_VERSION4, _PROTOCOL4, _ADDRESS4, _END4 = _HEAD, _HEAD + 9, _HEAD + 12, _HEAD + 20
_VERSION6, _SIZE6, _PROTOCOL6, _ADDRESS6, _END6 = _HEAD, _HEAD + 4, _HEAD + 6, _HEAD + 8, _HEAD + 40
# And on the stack.
_STATION, _ORIGIN = -12, -40
_MAC, _KIND, _ADDRESS = 4, 10, 12  # in a SOURCE; the first in a STATION, too


def _lookup(name: str, key: int) -> list[Line]:
    """R0 = where the value of the key at FP + `key` is; 0: nowhere."""
    return [asm.map_of(R1, name), *asm.address(R2, FP, key), asm.call("map_lookup_elem")]


def _within(end: int) -> list[Line]:
    """R2 = where the frame begins, of which `end` bytes are to be there."""
    return [
        asm.load(R2, R6, _DATA),
        asm.load(R3, R6, _DATA_END),
        *asm.address(R1, R2, end),
        asm.jump_above(R1, R3, "out"),
    ]


def _copy_mac(to: int, at: int) -> list[Line]:
    """FP + `to` has the MAC at `at` of the frame in R2, and two bytes of nought."""
    return [
        asm.load(R1, R2, at),
        asm.store(FP, to, R1),
        asm.load(R1, R2, at + 4, 2),
        asm.store(FP, to + 4, R1, 2),
        asm.store_number(FP, to + 6, 0, 2),
    ]


def entry(slot: int) -> list[Line | str]:
    """Goes on with the program in a slot, if there is one."""
    return [
        asm.map_of(R2, "programs"),
        asm.number(R3, slot),
        asm.call("tail_call"),
        *asm.leave(_NEXT),
    ]


def inwards() -> list[Line | str]:
    """At the ingress of a VXLAN device."""
    return [
        asm.move(R6, R1),
        asm.load(R1, R6, _PROTOCOL),
        asm.jump_if(R1, "=", IPV4, "ip"),
        asm.jump_if(R1, "!=", IPV6, "out"),
        "ip",
        *_within(_HEAD),
        *_copy_mac(_STATION + _MAC, _DESTINATION),
        asm.load(R1, R6, _DEVICE),
        asm.store(FP, _STATION, R1),
        *_lookup("stations", _STATION),
        asm.jump_if(R0, "=", 0, "out"),
        asm.load(R7, R0, 0),
        asm.jump_if(R7, "=", 0, "out"),
        # The kernel took it for another's (PACKET_OTHERHOST): it is not for the VXLAN device's MAC.
        asm.move(R1, R6),
        asm.number(R2, _TO_HOST),
        asm.call("skb_change_type"),
        asm.move(R1, R7),
        asm.number(R2, 0),
        asm.call("redirect_peer"),
        asm.EXIT,
        "out",
        *asm.leave(_NEXT),
    ]


def outwards() -> list[Line | str]:
    """At the ingress of our end of a port."""
    return [
        asm.move(R6, R1),
        # A VLAN's tag stands beside the frame by now, and not in it.
        asm.load(R1, R6, _VLAN_PRESENT),
        asm.jump_if(R1, "!=", 0, "out"),
        asm.load(R4, R6, _PROTOCOL),
        asm.jump_if(R4, "=", IPV4, "ipv4"),
        asm.jump_if(R4, "!=", IPV6, "out"),
        *_within(_END6),
        asm.load(R1, R2, _VERSION6, 1),
        asm.mask(R1, 0xF0),
        asm.jump_if(R1, "!=", 0x60, "out"),
        asm.load(R1, R2, _PROTOCOL6, 1),
        asm.jump_if(R1, "!=", _TCP, "out"),
        # Of one that says it is longer than it is the guard sees no protocol, and drops it.
        asm.load(R1, R2, _SIZE6, 2),
        asm.from_network(R1),
        *asm.address(R1, R1, _END6),
        asm.load(R3, R6, _LENGTH),
        asm.jump_above(R1, R3, "out"),
        *(
            line
            for at in range(0, 16, 4)
            for line in (
                asm.load(R1, R2, _ADDRESS6 + at),
                asm.store(FP, _ORIGIN + _ADDRESS + at, R1),
            )
        ),
        asm.jump("known"),
        "ipv4",
        *_within(_END4),
        asm.load(R1, R2, _VERSION4, 1),
        asm.jump_if(R1, "!=", 0x45, "out"),  # without options
        asm.load(R1, R2, _PROTOCOL4, 1),
        asm.jump_if(R1, "!=", _TCP, "out"),
        asm.store_number(FP, _ORIGIN + _ADDRESS, 0),
        asm.store_number(FP, _ORIGIN + _ADDRESS + 4, 0),
        asm.store_number(FP, _ORIGIN + _ADDRESS + 8, socket.htonl(0xFFFF)),
        asm.load(R1, R2, _ADDRESS4),
        asm.store(FP, _ORIGIN + _ADDRESS + 12, R1),
        "known",
        asm.load(R1, R2, _DESTINATION, 1),
        asm.mask(R1, 1),
        asm.jump_if(R1, "!=", 0, "out"),  # to several
        *_copy_mac(_STATION + _MAC, _DESTINATION),
        *_copy_mac(_ORIGIN + _MAC, _SOURCE),
        asm.store(FP, _ORIGIN + _KIND, R4, 2),
        asm.load(R1, R6, _DEVICE),
        asm.store(FP, _ORIGIN, R1),
        *_lookup("sources", _ORIGIN),
        asm.jump_if(R0, "=", 0, "out"),
        asm.load(R7, R0, 0),
        asm.store(FP, _STATION, R7),
        *_lookup("stations", _STATION),
        asm.jump_if(R0, "!=", 0, "out"),
        asm.move(R1, R7),
        asm.number(R2, 0),
        asm.call("redirect"),
        asm.EXIT,
        "out",
        *asm.leave(_NEXT),
    ]
