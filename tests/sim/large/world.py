"""The virtual clock and the network: streams and single exchanges, as TCP carries them.

A packet that is lost costs time and not the message: it is sent again after 0.2 s, then 0.4 s and
so on (RFC 6298 with Linux's minimum), and what follows it on the same stream waits. Across a cut,
and from or to a silent host, nothing comes. What stands opposite: host.py.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.large.host import Host

RETRANSMISSION = 0.2  # s, the first time-out; each further one is twice as long
LATENCY = {"lan": (0.0002, 0.001), "wan": (0.05, 0.15), "local": (0.0001, 0.0005)}  # s one way
SLOW = (0.3, 2.0)  # s until a slow host handles a message that has come
OVERHEAD = 80  # bytes of TCP, IP, HTTP/2 and gRPC around a small message

SLOTS = 1000  # a virtual second: how finely events are sorted into slots

Action = Callable[[Any, Any], None]
Event = tuple[float, int, Action, Any, Any]


class World:
    """The clock, the hosts, and what lies between them. Times in virtual s, `loss` in 0..1.

    `latency` is a key of LATENCY; `noise` how late a message is handled or a timer noticed at
    most, because others run.
    """

    def __init__(self, seed: int, loss: float, latency: str = "lan", noise: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.noise = noise
        self._least, most = LATENCY[latency]
        self._spread = most - self._least
        self.now = 0.0
        self.events = 0
        self.hosts: dict[str, Host] = {}
        # Events by the slot that they fall in, and a heap of the slots: sorting the hundred events
        # of a slot once costs less than a heap of ten thousand does for each.
        self._slots: dict[int, list[Event]] = {}
        self._order: list[int] = []
        self._slot = -1  # the one that is being played
        self._now_playing: list[Event] = []
        self._place = 0  # in it
        self._count = 0

    def at(self, when: float, action: Action, a: Any = None, b: Any = None) -> None:
        """`action(a, b)` at `when`; ties in the order in which they were made."""
        self._count += 1
        event = (when, self._count, action, a, b)
        slot = int(when * SLOTS)
        if slot <= self._slot:
            insort(self._now_playing, event, lo=self._place)
        elif slot in self._slots:
            self._slots[slot].append(event)
        else:
            self._slots[slot] = [event]
            heappush(self._order, slot)

    def run_until(self, end: float) -> None:
        """Let everything happen up to `end`."""
        while True:
            playing = self._now_playing
            while self._place < len(playing):
                event = playing[self._place]
                if event[0] > end:
                    self.now = end
                    return
                self._place += 1
                self.now, _, action, a, b = event
                action(a, b)
                self.events += 1
            if not self._order or self._order[0] > end * SLOTS:
                self.now = end
                return
            self._slot = heappop(self._order)
            self._now_playing = sorted(self._slots.pop(self._slot))
            self._place = 0

    def latency(self) -> float:
        """How long a packet that is not lost takes one way."""
        return self._least + (self._spread + self.noise) * self.rng.random()

    def transit(self) -> float:
        """How long a message takes one way, with what had to be sent again."""
        random = self.rng.random
        delay = self._least + (self._spread + self.noise) * random()
        wait, loss = RETRANSMISSION, self.loss
        while random() < loss:
            delay += wait
            wait *= 2
        return delay

    def exchange(
        self, a: Host, b: Host, deliver: Action, message: Any, size: int, refused: Action | None
    ) -> None:
        """One message of its own from a to b: a request or its answer. `deliver(a, message)` is
        called when b handles it, or `refused(b, message)` when a learns that nobody takes it."""
        a.messages += 1
        a.bytes += OVERHEAD + size
        arrival = self.now + self.transit()
        if b.slow:
            arrival += self.rng.uniform(*SLOW)
        self.at(arrival, self._arrive, (a, b, deliver, refused), message)

    def _arrive(self, way: tuple[Host, Host, Action, Action | None], message: Any) -> None:
        a, b, deliver, refused = way
        if not b.up or a.side != b.side:
            return
        if b.agent:
            deliver(a, message)
        elif refused is not None:
            self.at(self.now + self.transit(), refused, b, message)

    def stream(self, a: Host, b: Host, channel: int, message: Any, size: int) -> None:
        """A message on the stream from a to b: handled after all that were sent before it."""
        a.messages += 1
        a.bytes += OVERHEAD + size
        arrival = self.now + self.transit()
        if b.slow:
            arrival += self.rng.uniform(*SLOW)
        last = a.sent.get(b.id, 0.0)
        if arrival < last:
            arrival = last
        a.sent[b.id] = arrival
        self.at(arrival, self._take, (a, b, channel), message)

    @staticmethod
    def _take(way: tuple[Host, Host, int], message: Any) -> None:
        a, b, channel = way
        if b.up and b.agent and a.side == b.side:
            b.protocols[channel].receive(a, message)
