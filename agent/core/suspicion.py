"""Doubt of others (a suspicion), of oneself (local health), and of doubts (lenience).

The first two are Lifeguard's:
Dadgar, Phillips, Currey: "Lifeguard: Local Health Awareness for More Accurate Failure
Detection", 2018. What stands opposite: core/judgement.py keeps a Suspicion for each suspect.
"""

from __future__ import annotations

import math

PATIENCE = 0.25  # of the health level: how much longer an unwell node holds its suspicions


class Suspicion:
    """A timer that runs faster the more independent accusers there are. Times in s.

    With C confirmations of K wanted it lasts max - (max - min) * log(C + 1) / log(K + 1): the
    first confirmations say most. K = 0 (nobody could confirm) is the minimum at once.
    """

    __slots__ = ("accusers", "begin", "maximum", "minimum", "wanted")

    def __init__(self, by: str, begin: float, minimum: float, maximum: float, wanted: int) -> None:
        self.accusers = [by]
        self.begin = begin
        self.minimum = minimum
        self.maximum = maximum
        self.wanted = wanted

    def confirm(self, by: str) -> bool:
        """Take an accuser in; whether it is a new one, and one that still makes a difference."""
        if by in self.accusers or len(self.accusers) > self.wanted:
            return False
        self.accusers.append(by)
        return True

    def deadline(self, possible: int) -> float:
        """When it ends, if no more than `possible` nodes could confirm it now."""
        wanted = min(self.wanted, possible)
        confirmed = min(len(self.accusers) - 1, wanted)
        if wanted <= 0:
            return self.begin + self.minimum
        share = math.log(confirmed + 1) / math.log(wanted + 1)
        return self.begin + self.maximum - (self.maximum - self.minimum) * share


class Health:
    """The local health multiplier: 0 is well, and the more, the less we trust our own eyes.

    An answer in time lowers it; a helper's missing nack, an accusation that we had to refute and
    a clock that jumped (we were not run) raise it.
    """

    __slots__ = ("level", "limit")

    def __init__(self, limit: int) -> None:
        self.level = 0
        self.limit = limit

    def better(self) -> None:
        """A probe was answered in time."""
        if self.level:
            self.level -= 1

    def worse(self, by: int = 1) -> None:
        """Something says that the fault is ours."""
        self.level = min(self.limit, self.level + by)

    @property
    def factor(self) -> float:
        """What probe interval and timeout are multiplied by."""
        return 1.0 + self.level

    @property
    def patience(self) -> float:
        """What the suspicions that we hold are multiplied by."""
        return 1.0 + PATIENCE * self.level


class Lenience:
    """Who refuted suspicions lately is slow rather than dead, and gets more time with each.

    `limit` refutations count at most; one is forgotten each `decay` s.
    """

    __slots__ = ("_decay", "_limit", "_refuted")

    def __init__(self, limit: int, decay: float) -> None:
        self._limit = limit
        self._decay = decay
        self._refuted: dict[str, tuple[int, float]] = {}  # node -> how many, when the last

    def refuted(self, node: str, now: float) -> None:
        """It was suspected, and lives."""
        self._refuted[node] = (min(self._limit, self.factor(node, now)), now)

    def forget(self, node: str) -> None:
        """It is no member any more."""
        self._refuted.pop(node, None)

    def factor(self, node: str, now: float) -> int:
        """How many times the usual window a probe of it may take."""
        if node not in self._refuted:
            return 1
        count, last = self._refuted[node]
        factor = 1 + count - int((now - last) / self._decay)
        if factor > 1:
            return factor
        del self._refuted[node]
        return 1
