"""Datagrams that measure a path, and their answers, as bytes; and what is in probes of VXLAN.

    magic 4 | kind 1 | nonce 8 | size 2 | length of id 1 | id of the sender | tag 16 | padding

`size` is that of the IP packet, big-endian. The tag (HMAC-SHA256, RFC 2104, cut to 16 bytes) is
over all before it, by a key that just the two nodes have (pathkeys.py): who is no member is not
answered, cannot make a path look narrow, and cannot have an answer sent to somebody else. An
answer has no padding, so it is never larger than what asked for it.
What stands opposite: pathprober.py, which sends them.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

MAGIC = b"vxmp"
PROBE, ANSWER = 1, 2
HEARING = 3  # an answer of one that takes frames through VXLAN too (tunnelprober.py)
FRAME, REPORT = 4, 5  # what is in such a frame; and that it came, `size` 1 if as it should
FRAME_SIZE = 200  # bytes of the former
_FIXED = struct.Struct("!4sBQHB")
TAG = 16  # bytes
HEADERS = {4: 20 + 8, 6: 40 + 8}  # bytes of IP and UDP, by IP version


class Datagram(NamedTuple):
    """One of them, not yet proven: `signed` is what `tag` is over."""

    kind: int
    nonce: int
    size: int
    sender: str
    signed: bytes
    tag: bytes


def build(kind: int, nonce: int, size: int, sender: str, key: bytes, family: int) -> bytes:
    """The payload of a datagram; of a probe so long that its IP packet has `size` bytes."""
    id = sender.encode()
    signed = _FIXED.pack(MAGIC, kind, nonce, size, len(id)) + id
    data = signed + _tag(key, signed)
    if kind == PROBE:
        return data.ljust(size - HEADERS[family], b"\0")
    return data.ljust(FRAME_SIZE, b"\0") if kind == FRAME else data


def parse(data: bytes, family: int) -> Datagram | None:
    """What a payload says; None if it is none, or does not have the size that it says."""
    if len(data) < _FIXED.size:
        return None
    magic, kind, nonce, size, length = _FIXED.unpack_from(data)
    end = _FIXED.size + length
    sizes = {PROBE: size - HEADERS[family], FRAME: FRAME_SIZE}
    whole = len(data) == sizes.get(kind, end + TAG) and len(data) >= end + TAG
    if magic != MAGIC or not PROBE <= kind <= REPORT or not whole:
        return None
    sender = data[_FIXED.size : end].decode("ascii", "replace")
    return Datagram(kind, nonce, size, sender, data[:end], data[end : end + TAG])


def is_proven(datagram: Datagram, key: bytes) -> bool:
    """Whether who has `key` made it."""
    return hmac.compare_digest(datagram.tag, _tag(key, datagram.signed))


def _tag(key: bytes, signed: bytes) -> bytes:
    return hmac.new(key, signed, hashlib.sha256).digest()[:TAG]
