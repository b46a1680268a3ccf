"""Bytes to feed: hostile values, what damages sound input, and inputs of several messages.

An input of several messages is a row of frames: two bytes of length and one message each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

NUMBERS = (
    0, 1, 2, 3, 4, 6, 31, 32, 63, 64, 127, 128, 255, 256, 511, 1280, 1500, 4095, 4096, 4789, 7946,
    32767, 32768, 65535, 65536, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 36, 1 << 47, 1 << 61, (1 << 62) - 1, 1 << 62, (1 << 62) + 1, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1,
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e9, 1.7e9, 1e12, 1e18, 1e300, -1e300,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "a", "web", "db", "node-1", "a" * 63, "a" * 64, "a" * 300, "-", ".", "..", "a.b", "A",
    "*", "\0", "\n", "\x1b[2J", "é", "\u202e", "\U0001f600", "a b", "a/b", "../../etc/passwd",
    "%s%n", "{0}", "$(id)", "'; --", "10.1.0.0/24", "10.1.0.0/16", "10.1.0.1", "0.0.0.0/0", "::/0",
    "fd00:1::/64", "fd00:1::1", "fe80::1%eth0", "::ffff:10.1.0.1", "10.1.0.0/33", "10.1.0.1/24",
    "1.2.3", "0x7f.1", "127.0.0.1", "255.255.255.255", "224.0.0.1", "overlay", "remote:x", "name",
    "vni", "subnet", "tcp", "udp", "02:00:5e:00:53:01", "ff:ff:ff:ff:ff:ff", "eth0",
    "vxmesh.internal", "localhost", "1.0.1.10.in-addr.arpa", "NaN", "1e999", "null", "-1",
)  # fmt: skip
ADDRESSES = (
    b"", b"\n\1\0\2", b"\n\1\0\1", b"\n\1\0\0", b"\n\1\0\xff", bytes(4), b"\xff" * 4, b"\x7f\0\0\1",
    b"\xfd\0\0\1" + bytes(11) + b"\2", bytes(16), b"\xff" * 16, b"abc", bytes(5),
)  # fmt: skip
MACS = (
    b"\2\0^\0S\1",
    b"\2\0^\0S\2",
    bytes(6),
    b"\xff" * 6,
    b"\1\0^\0\0\1",
    b"",
    b"12345",
    bytes(7),
)


def number(rng: random.Random, bits: int = 64) -> int:
    """A number of that many bits, often one at which something happens."""
    match rng.randrange(4):
        case 0:
            return rng.randrange(16)
        case 1:
            return rng.getrandbits(rng.randrange(1, bits + 1))
        case _:
            return rng.choice(NUMBERS) & ((1 << bits) - 1)


def text(rng: random.Random, known: Sequence[str] = ()) -> str:
    """A string: one of `known`, one that may break something, or anything."""
    choice = rng.randrange(8)
    if known and choice < 5:
        return rng.choice(known)
    if choice < 7:
        return rng.choice(TEXTS)
    return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0xD800))))
                   for _ in range(rng.randrange(12)))  # fmt: skip


def frame(messages: Iterable[bytes]) -> bytes:
    """Several messages as one input; what is too long for a frame is cut."""
    return b"".join(len(m[:65535]).to_bytes(2, "big") + m[:65535] for m in messages)


def unframe(data: bytes, most: int = 64) -> list[bytes]:
    """The messages of an input, whatever it is."""
    found: list[bytes] = []
    at = 0
    while at + 2 <= len(data) and len(found) < most:
        size = int.from_bytes(data[at : at + 2], "big")
        found.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return found


def mutate(
    data: bytes, rng: random.Random, others: Sequence[bytes] = (), tokens: Sequence[bytes] = ()
) -> bytes:
    """`data` with one to six things wrong in it."""
    buffer = bytearray(data)
    for _ in range(min(6, 1 + int(rng.expovariate(0.7)))):
        at = rng.randrange(len(buffer) + 1)
        span = min(len(buffer) - at, 1 + int(rng.expovariate(0.15)))
        match rng.randrange(9):
            case 0 if at < len(buffer):
                buffer[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(buffer):
                buffer[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del buffer[at : at + span]
            case 3:
                buffer[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                buffer[at:at] = buffer[at : at + span] * rng.choice((1, 1, 2, 30))
            case 5:
                width = rng.choice((1, 2, 4, 8))
                value = number(rng, 8 * width)
                buffer[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
            case 6 if others:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                buffer[at : at + span] = other[begin : begin + rng.randrange(1, 200)]
            case 7 if tokens:
                buffer[at : at + rng.choice((0, span))] = rng.choice(tokens)
            case _:
                del buffer[at:]
    return bytes(buffer[: 1 << 16])
