"""What anybody can send to the UDP port beside the peer port, and into VXLAN with VNI 0."""

from __future__ import annotations

import random

from agent.cluster import pathwire
from agent.datapath import probetunnel
from tests.fuzz import world
from tests.fuzz.engine import Target

KEY = bytes(range(32))
KINDS = (pathwire.PROBE, pathwire.ANSWER, pathwire.HEARING, pathwire.FRAME, pathwire.REPORT)
MAC = bytes.fromhex("0a7700000000")


def _datagram(rng: random.Random) -> bytes:
    size = rng.choice((0, 1, 576, 1500))
    kind = rng.choice(KINDS)
    return pathwire.build(kind, rng.getrandbits(64), size, world.PEER, KEY, 4)


def _parse(data: bytes) -> object:
    found = pathwire.parse(data, 4)
    if found is None:
        return None
    # What is taken for ours says what the bytes say, and only who has the key proves it.
    if not data.startswith(found.signed + found.tag):
        raise AssertionError("it is not what was sent")
    return found, pathwire.is_proven(found, KEY)


def _frame(rng: random.Random) -> bytes:
    data = pathwire.build(pathwire.FRAME, rng.getrandbits(64), 0, world.PEER, KEY, 4)
    made = probetunnel.frame(MAC, data, offloaded=rng.random() < 0.5)
    return made[10:]  # without what only the kernel sees


def _read(data: bytes) -> object:
    return probetunnel.read(data, True), probetunnel.read(data, False)


TARGETS = [
    Target("path-datagram", _parse, _datagram, ()),
    Target("probe-frame", _read, _frame, ()),
]
