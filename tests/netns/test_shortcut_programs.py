"""What the programs of shortcuts say of a frame, run by the kernel for one frame at a time.

What comes of it, on real devices: test_shortcuts.py.
"""

from __future__ import annotations

import ctypes
import socket
import struct

import pytest

from agent.datapath import bpf, shortcutprograms, shortcuts
from agent.notation import parse_address
from tests.netns import frames

pytestmark = pytest.mark.netns

PROG_TEST_RUN = 10  # of bpf(2), linux/bpf.h
MAC, FAR_MAC, NEAR_MAC, ROUTER = (bytes([2, 0, 0, 7, 1, n]) for n in (2, 3, 4, 1))
PACKET4 = frames.ipv4("10.7.0.2", "10.7.0.3", frames.TCP, frames.tcp_syn(999, 80))
PACKET6 = frames.ipv6("fd00:7::2", "fd00:7::3", frames.TCP, frames.tcp_syn(999, 80))
REDIRECT, NEXT = 7, 0xFFFFFFFF  # TC_ACT_REDIRECT, TC_ACT_UNSPEC


def frame(packet: bytes, to: bytes = FAR_MAC, source: bytes = MAC, kind: int = 0) -> bytes:
    kind = kind or (frames.IPV4 if packet[0] >> 4 == 4 else frames.IPV6)
    return frames.ethernet(to, source, kind, packet)


def changed(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + bytes([value]) + packet[at + 1 :]


OUTWARDS: dict[str, tuple[bytes, int]] = {
    "TCP over IPv4": (frame(PACKET4), REDIRECT),
    "TCP over IPv6": (frame(PACKET6), REDIRECT),
    "to a sandbox here": (frame(PACKET4, to=NEAR_MAC), NEXT),
    "to the gateway": (frame(PACKET4, to=ROUTER), NEXT),
    "to all": (frame(PACKET4, to=frames.BROADCAST), NEXT),
    "to several": (frame(PACKET6, to=bytes.fromhex("333300000001")), NEXT),
    "of another MAC": (frame(PACKET4, source=NEAR_MAC), NEXT),
    "of another address": (frame(frames.ipv4("10.7.0.9", "10.7.0.3", 6, bytes(20))), NEXT),
    "of another IPv6 address": (frame(frames.ipv6("fd00:7::9", "fd00:7::3", 6, bytes(20))), NEXT),
    "of its IPv4 address, over IPv6": (
        frame(frames.ipv6("::ffff:10.7.0.2", "fd00:7::3", 6, bytes(20))), NEXT,
    ),
    "UDP": (frame(frames.udp4("10.7.0.2", "10.7.0.3", 68)), NEXT),
    "UDP over IPv6": (frame(frames.udp6("fd00:7::2", "fd00:7::3", 546)), NEXT),
    "with options": (frame(changed(PACKET4, 0, 0x46)), NEXT),
    "of another version": (frame(changed(PACKET4, 0, 0x65), kind=frames.IPV4), NEXT),
    "of another version, as IPv6": (frame(changed(PACKET6, 0, 0x40), kind=frames.IPV6), NEXT),
    "longer than it is": (frame(changed(PACKET6, 4, 1)), NEXT),
    "behind a header of options": (frame(changed(PACKET6, 6, 0)), NEXT),
    "ARP": (frame(bytes(46), kind=frames.ARP), NEXT),
}  # fmt: skip
INWARDS: dict[str, tuple[bytes, int]] = {
    "IPv4": (frame(PACKET4, to=NEAR_MAC), REDIRECT),
    "IPv6": (frame(PACKET6, to=NEAR_MAC), REDIRECT),
    "UDP": (frame(frames.udp4("10.7.0.3", "10.7.0.4", 9), to=NEAR_MAC), REDIRECT),
    "to the gateway": (frame(PACKET4, to=ROUTER), NEXT),
    "to nobody here": (frame(PACKET4, to=FAR_MAC), NEXT),
    "to all": (frame(PACKET4, to=frames.BROADCAST), NEXT),
    "ARP": (frame(bytes(46), to=NEAR_MAC, kind=frames.ARP), NEXT),
}


@pytest.mark.parametrize("slot", [shortcutprograms.INWARDS, shortcutprograms.OUTWARDS])
def test_what_is_taken_and_what_is_left_to_the_bridge(slot: int) -> None:
    maps = {name: bpf.Map(name, spec) for name, spec in shortcutprograms.MAPS.items()}
    device = socket.if_nametoindex("lo")  # of what is run so, the kernel takes no other one's word
    way, stations = shortcutprograms.WAY.pack(device), shortcutprograms.STATION
    here = {NEAR_MAC: 5, ROUTER: 0}
    maps["stations"].update(
        {stations.pack(device, mac): shortcutprograms.PORT.pack(to) for mac, to in here.items()}
    )
    own = (
        (shortcutprograms.IPV4, shortcutprograms.MAPPED + parse_address("10.7.0.2")),
        (shortcutprograms.IPV6, parse_address("fd00:7::2")),
    )
    maps["sources"].update({shortcutprograms.SOURCE.pack(device, MAC, *one): way for one in own})
    lines = shortcuts.PROGRAMS[slot]()
    program = bpf.load("test", lines, {n: each.fd for n, each in maps.items()}, bpf.SCHED_CLS)
    try:
        cases = INWARDS if slot == shortcutprograms.INWARDS else OUTWARDS
        said = {name: verdict(program, sent) for name, (sent, _) in cases.items()}
        assert said == {name: expected for name, (_, expected) in cases.items()}
    finally:
        bpf.close_all([program, *(each.fd for each in maps.values())])


def verdict(program: int, sent: bytes) -> int:
    """What a program says of a frame: BPF_PROG_TEST_RUN of bpf(2)."""
    data = ctypes.create_string_buffer(sent, len(sent))
    attributes = bytearray(bpf.ATTRIBUTES)
    struct.pack_into("=4I2Q", attributes, 0, program, 0, len(sent), 0, ctypes.addressof(data), 0)
    buffer = ctypes.create_string_buffer(bytes(attributes), len(attributes))
    bpf._call("test", PROG_TEST_RUN, buffer)
    return int(struct.unpack_from("=I", buffer.raw, 4)[0])
