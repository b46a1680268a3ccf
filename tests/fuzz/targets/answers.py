"""What a command hears from whatever answers on the socket that it was told."""

from __future__ import annotations

import random

from hpack import Encoder

from agent.http2 import Broken, Connection
from tests.fuzz.engine import Target
from tests.fuzz.inputs import number, text

DATA, HEADERS, SETTINGS, CONTINUATION = 0, 1, 4, 9  # RFC 9113, 6
FIELDS = (b":status", b"grpc-status", b"grpc-message", b"grpc-status-details-bin", b"te")


def hear(data: bytes) -> None:
    """The bytes of a connection, cut where they fall. A call is under way, and then another."""
    connection = Connection()
    connection.begin("/vxmesh.v1.Control/ListNodes", {})
    connection.send(bytes(100_000))
    for at in range(0, len(data), 700):
        connection.feed(data[at : at + 700])
        assert len(connection.take()) < 1 << 18
        assert len(connection.messages) <= len(data)
        if connection.status:
            connection.begin("/vxmesh.v1.Control/Watch", {})
            connection.send(b"")
            connection.finish()


def make_answer(rng: random.Random) -> bytes:
    """For `hear`."""
    frames = [_frame(SETTINGS, 0, 0, _settings(rng))] if rng.random() < 0.9 else []
    for _ in range(rng.randrange(8)):
        kind = rng.choice((DATA, HEADERS, CONTINUATION, rng.randrange(11)))
        flags = rng.choice((0, 1, 4, 5, rng.randrange(256)))
        frames.append(_frame(kind, flags, rng.choice((0, 1, 1, 1, 3, 4)), _payload(rng, kind)))
    return b"".join(frames)


def _payload(rng: random.Random, kind: int) -> bytes:
    if kind == DATA:
        message = rng.randbytes(rng.randrange(50))
        size = len(message) if rng.random() < 0.7 else number(rng, 32)
        return bytes([rng.random() < 0.1]) + size.to_bytes(4) + message
    if kind in (HEADERS, CONTINUATION):
        fields = [(rng.choice(FIELDS), _value(rng)) for _ in range(rng.randrange(4))]
        return rng.choice((b"\x88", b"", b"\x20")) + Encoder().encode(fields)
    if kind == SETTINGS:
        return _settings(rng)
    return number(rng, 32).to_bytes(4) * rng.randrange(3)


def _settings(rng: random.Random) -> bytes:
    keys = [rng.randrange(9) for _ in range(rng.randrange(4))]
    return b"".join(key.to_bytes(2) + number(rng, 32).to_bytes(4) for key in keys)


def _value(rng: random.Random) -> bytes:
    return rng.choice((b"200", b"0", b"5", b"99", b"%4", text(rng).encode(errors="replace")))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


TARGETS = [
    Target("control.answer", hear, make_answer, (Broken,)),
]
