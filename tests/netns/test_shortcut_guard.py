"""Nothing goes past the bridge that the guard of its port would drop: random frames of a hostile
sandbox, once with shortcuts and once without, and what the program alone says of each.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.datapath import bpf, shortcutprograms, shortcuts
from agent.datapath.guardrules import link_local
from agent.datapath.shortcutprograms import PORT, SOURCE, STATION
from agent.notation import format_address, parse_address
from agent.syscalls import in_netns
from tests.netns import frames
from tests.netns.datapath_hosts import Sandbox, opened
from tests.netns.test_shortcut_programs import REDIRECT, verdict

pytestmark = pytest.mark.netns

SEED, COUNT = 1, 1500  # another seed, or more, by hand
TOGETHER = 100  # frames before who listens is waited for
MOST = 1400  # bytes; what fits through


class Wire:
    """What a device of a namespace sends."""

    def __init__(self, netns: Path, device: str) -> None:
        def work() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(frames.ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
            sock.bind((device, frames.ETH_P_ALL))
            sock.setblocking(False)
            return sock

        self._sock, self.seen = in_netns(netns, work), set[bytes]()

    def close(self) -> None:
        self._sock.close()

    def look(self) -> set[bytes]:
        """The marks of all that was sent so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, where = self._sock.recvfrom(1 << 16)
                if where[2] == socket.PACKET_OUTGOING:
                    self.seen.add(frame[-8:])
        return self.seen


def hostile(
    chance: random.Random, macs: list[bytes], to: list[bytes], v4: list[str], v6: list[str]
) -> bytes:
    """TCP as a rule, of one's own as a rule, and something wrong with it as a rule."""
    source = macs[0] if chance.random() < 0.9 else chance.choice(macs)
    target = to[0] if chance.random() < 0.7 else chance.choice(to)
    body = frames.tcp_syn(999, 4000) + chance.randbytes(chance.choice((0, 0, 1, 7, 40, 600)))
    protocol = (
        frames.TCP
        if chance.random() < 0.9
        else chance.choice((0, 1, 4, 17, 41, 43, 44, 50, 51, 58, 59, 60, 135, 255))
    )
    if chance.random() < 0.5:
        kind, own = frames.IPV4, v4[0] if chance.random() < 0.8 else chance.choice(v4)
        flags = chance.choice((0, 0, 0x4000, 0x2000, 0x2001, 0x0001, 0x1FFF, 0x8000))
        packet = bytearray(frames.ipv4(own, "10.7.0.4", protocol, body, flags=flags))
        fields: tuple[tuple[int, int], ...] = (
            (0, 1),
            (1, 1),
            (2, 2),
            (6, 2),
            (8, 1),
            (9, 1),
            (10, 2),
            (12, 4),
            (16, 4),
        )
    else:
        kind, own = frames.IPV6, v6[0] if chance.random() < 0.8 else chance.choice(v6)
        for _ in range(chance.choice((0, 0, 0, 1, 2))):
            before = chance.choice((0, 43, 44, 51, 60, 135))
            body = bytes([protocol, 0]) + chance.randbytes(6) + body
            protocol = before
        packet = bytearray(frames.ipv6(own, "fd00:7::4", protocol, body))
        fields = ((0, 1), (0, 4), (4, 2), (6, 1), (7, 1), (8, 16), (24, 16))
    for _ in range(chance.choice((0, 0, 1, 1, 2, 3))):
        at, width = chance.choice(fields)
        if width == 2 and chance.random() < 0.7:  # lengths that are nearly right
            (now,) = struct.unpack_from(">H", packet, at)
            now += chance.choice((-41, -20, -8, -1, 1, 7, 8, 9, 20, 100))
            struct.pack_into(">H", packet, at, now & 0xFFFF)
        else:
            packet[at : at + width] = chance.choice(
                (bytes(width), b"\xff" * width, chance.randbytes(width))
            )
    if chance.random() < 0.1:
        del packet[chance.randrange(len(packet)) :]
    if chance.random() < 0.05:
        kind = chance.choice(
            (frames.IPV4, frames.IPV6, frames.ARP, 0x8847, 0x8864, 0x0005, 40, 0x88A8)
        )
    if chance.random() < 0.1:
        for _ in range(chance.choice((1, 1, 2))):
            packet[:0] = struct.pack(">HH", chance.choice((0, 5, 0x2005)), kind)
            kind = chance.choice((frames.VLAN, 0x88A8))
    return frames.ethernet(target, source, kind, bytes(packet[:MOST]))


@contextlib.contextmanager
def program(here: list[bytes], mac: bytes, v4: str, v6: str) -> Iterator[int]:
    maps = {name: bpf.Map(name, spec) for name, spec in shortcutprograms.MAPS.items()}
    device = socket.if_nametoindex("lo")
    way = shortcutprograms.WAY.pack(device)
    maps["stations"].update({STATION.pack(device, each): PORT.pack(0) for each in here})
    for kind, address in (
        (shortcutprograms.IPV4, shortcutprograms.MAPPED + parse_address(v4)),
        (shortcutprograms.IPV6, parse_address(v6)),
    ):
        maps["sources"].update({SOURCE.pack(device, mac, kind, address): way})
    lines = shortcuts.PROGRAMS[shortcutprograms.OUTWARDS]()
    made = bpf.load("test", lines, {n: each.fd for n, each in maps.items()}, bpf.SCHED_CLS)
    try:
        yield made
    finally:
        bpf.close_all([made, *(each.fd for each in maps.values())])


def takes(program: int, frame: bytes) -> bool:
    try:
        return verdict(program, frame) == REDIRECT
    except OSError as error:
        assert error.errno == errno.EINVAL and len(frame) < 14 + 40, "too short to be run"
        return False


async def test_what_goes_past_the_bridge_its_guard_would_let_pass(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    async with opened(tmp_path) as fabric:
        me, near, far = (Sandbox(fabric) for _ in range(3))
        for host in fabric.hosts:
            host.add_network(7)
        mine, nears = fabric.a.add_port(7, 2, me), fabric.a.add_port(7, 3, near)
        fars = fabric.b.add_port(7, 4, far)
        await fabric.settle()
        router = fabric.a.desired.networks[7].router_mac
        macs = [mine.mac, nears.mac, fars.mac, router, bytes(6), b"\xff" * 6, b"\3" + mine.mac[1:]]
        to = [
            fars.mac,
            nears.mac,
            router,
            mine.mac,
            frames.BROADCAST,
            b"\x33\x33\0\0\0\1",
            b"\1\x80\xc2\0\0\0",
            b"\2" * 6,
        ]
        v4 = ["10.7.0.2", "10.7.0.3", "10.7.0.4", "0.0.0.0", "127.0.0.1", "255.255.255.255"]
        local = format_address(link_local(mine.mac))
        v6 = ["fd00:7::2", "fd00:7::3", "::ffff:10.7.0.2", "::", "::1", local, "ff02::1"]
        sent = [hostile(chance, macs, to, v4, v6) for _ in range(COUNT)]

        def pass_through() -> set[bytes]:
            with contextlib.closing(Wire(fabric.a.own, "vxl7")) as wire:
                for at in range(0, COUNT, TOGETHER):
                    # The last one is right, and goes by the bridge in any case.
                    right = frames.ethernet(
                        fars.mac, mine.mac, frames.IPV4, frames.udp4("10.7.0.2", "10.7.0.4", 9)
                    )
                    frames.send(me.path, "eth0", *sent[at : at + TOGETHER], right)
                    assert frames.Ear.wait(lambda: right[-8:] in wire.look(), 30.0)  # noqa: B023
                return set(wire.look())

        applier = fabric.a.reconciler._applier
        assert applier and applier.shortcuts.is_on and not applier.shortcuts.is_due
        with_shortcuts = pass_through()
        applier.shortcuts.close()
        by_the_guard = pass_through()
        with program([mine.mac, nears.mac, router], mine.mac, "10.7.0.2", "fd00:7::2") as made:
            taken = [frame for frame in sent if takes(made, frame)]
        wrong = [f.hex() for f in taken if f[-8:] not in by_the_guard]
        assert not wrong, "taken past a guard that drops them"
        wrong = [f.hex() for f in sent if f[-8:] in with_shortcuts and f[-8:] not in by_the_guard]
        assert not wrong, "passed with shortcuts alone"
        lost = [f.hex() for f in sent if f[-8:] not in with_shortcuts and f[-8:] in by_the_guard]
        assert not lost, "lost with shortcuts alone"
        assert len(taken) > COUNT // 10 and len(taken) < COUNT
