"""Frames of the probe tunnel as bytes: what is asked of the kernel, and what is read."""

from __future__ import annotations

import random
import struct

import pytest

from agent.datapath.probetunnel import checksum, frame, read

MAC = bytes.fromhex("0a770a630002")
VNET = 10  # bytes; struct virtio_net_hdr


def finished(sent: bytes) -> bytes:
    """What a NIC makes of it that was asked for the checksum (virtio, 5.1.6.2)."""
    needs, start, offset = sent[0], *struct.unpack("=HH", sent[6:VNET])
    raw = bytearray(sent[VNET:])
    if needs:
        at = start + offset
        raw[at : at + 2] = checksum(bytes(raw[start:])).to_bytes(2, "big")
    return bytes(raw)


@pytest.mark.parametrize("length", [0, 1, 99, 200, 201])
def test_what_is_sent_is_read_and_right(length: int) -> None:
    data = random.Random(length).randbytes(length)
    plain, offloaded = frame(MAC, data, False), frame(MAC, data, True)
    assert finished(plain) == finished(offloaded) == plain[VNET:]
    assert read(plain[VNET:], True) == (data, True)
    assert read(plain[VNET:] + bytes(6), True) == (data, True)  # as Ethernet pads it
    # With nobody to compute it, it is wrong on a wire, and right where it never was on one.
    assert read(offloaded[VNET:], True) == (data, False)
    assert read(offloaded[VNET:], False) == (data, True)


def test_a_byte_that_was_changed_is_seen() -> None:
    raw = bytearray(frame(MAC, b"x" * 100, False)[VNET:])
    for at in range(14 + 20, len(raw)):
        raw[at] ^= 1
        found = read(bytes(raw), True)
        assert found is not None and not found[1]
        raw[at] ^= 1


def test_frames_of_others_are_none_of_ours() -> None:
    good = frame(MAC, b"x" * 100, False)[VNET:]
    rng = random.Random(2)
    for length in range(14 + 20 + 20):
        assert read(good[:length], True) is None
    for at in (14, 14 + 9, 14 + 12, 14 + 19):
        raw = bytearray(good)
        raw[at] ^= 0xFF
        assert read(bytes(raw), True) is None
    for _ in range(1000):
        read(rng.randbytes(rng.randrange(200)), True)
