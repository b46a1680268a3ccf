"""The virtual clock, and a network that loses, delays, doubles, reorders and splits."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Weather:
    """How bad the network is. Times in virtual seconds, chances in 0..1."""

    loss: float
    duplication: float
    delay: tuple[float, float]
    partitions: int


class Clock:
    """Events in the order of their time; ties in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._count), action))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def run_until(self, end: float) -> None:
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end


class Wire:
    """Carries messages between nodes as the weather has it. `cut` holds directed pairs."""

    def __init__(self, clock: Clock, rng: random.Random, weather: Weather) -> None:
        self.clock = clock
        self.rng = rng
        self.weather = weather
        self.cut: set[tuple[str, str]] = set()
        self.sent = 0

    def passes(self, a: str, b: str) -> bool:
        """Whether one packet from a to b would arrive."""
        return (a, b) not in self.cut and self.rng.random() >= self.weather.loss

    def carry(self, a: str, b: str, deliver: Callable[[], None]) -> None:
        self.sent += 1
        copies = 2 if self.rng.random() < self.weather.duplication else 1
        for _ in range(copies):
            if self.passes(a, b):
                self.clock.after(self.rng.uniform(*self.weather.delay), deliver)
