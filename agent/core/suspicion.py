"""Lifeguard's two ideas about doubt: of others (a suspicion) and of oneself (local health).

Dadgar, Phillips, Currey: "Lifeguard: Local Health Awareness for More Accurate Failure
Detection", 2018. What stands opposite: core/membership.py keeps one Suspicion for each suspect,
and one Health.
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
