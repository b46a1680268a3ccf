"""A simulated host, and the seam where it gets its protocols.

Membership is one (membership.py). Another (records, say) is a further `Protocol`: it is appended
to every host's list at the same place, gets its messages there, and shares clock and streams.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from typing import Any

from tests.sim.large.world import World


class Protocol(ABC):
    """One state machine of `agent/core` on one host. `channel` is its place in host.protocols."""

    __slots__ = ("channel", "host")

    def __init__(self, host: Host) -> None:
        self.host = host
        self.channel = len(host.protocols)
        host.protocols.append(self)

    @abstractmethod
    def start(self) -> None:
        """All hosts and streams are there."""

    @abstractmethod
    def receive(self, peer: Host, message: Any) -> None:
        """A message came on the stream from `peer`."""

    def send(self, peer: Host, message: Any, size: int) -> None:
        """Put a message of `size` bytes on the stream to `peer`."""
        self.host.send(peer, self.channel, message, size)


class Host:
    """One node. It is `up` while it answers at all; its `agent` may be dead all the same."""

    __slots__ = (
        "agent",
        "bytes",
        "id",
        "messages",
        "neighbours",
        "protocols",
        "sent",
        "side",
        "slow",
        "up",
        "world",
    )

    def __init__(self, world: World, id: str) -> None:
        self.world = world
        self.id = id
        self.up = True
        self.agent = True
        self.slow = False
        self.side = 0  # of a partition: only hosts of one side reach each other
        self.neighbours: list[str] = []  # whom it has streams with
        self.sent: dict[str, float] = {}  # peer -> when the last message to it arrives
        self.protocols: list[Protocol] = []
        self.messages = 0  # that it sent
        self.bytes = 0
        world.hosts[id] = self

    def send(self, peer: Host, channel: int, message: Any, size: int) -> None:
        """Put a message of `size` bytes on the stream to `peer`."""
        self.world.stream(self, peer, channel, message, size)

    @property
    def runs(self) -> bool:
        """Whether its agent does anything."""
        return self.up and self.agent


EVERYBODY = 30  # up to this many nodes each has a stream with each


def connect(hosts: list[Host], rng: random.Random) -> None:
    """Give each host streams to about log2(n) + 1 others: a ring, and chords at random."""
    links: dict[str, set[str]] = {host.id: set() for host in hosts}
    ids = [host.id for host in hosts]
    count = len(ids)
    for place, id in enumerate(ids):
        if count <= EVERYBODY:
            chosen = [other for other in ids if other != id]
        else:
            chords = rng.sample(ids, math.ceil((math.log2(count) - 1) / 2))
            chosen = [ids[(place + 1) % count], *chords]
        for other in chosen:
            if other != id:
                links[id].add(other)
                links[other].add(id)
    for host in hosts:
        host.neighbours = sorted(links[host.id])
