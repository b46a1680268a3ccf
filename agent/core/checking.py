"""Whether a backend is healthy, of one look after the other: rise and fall. PURE.

Source: the words and the rule are HAProxy's (`rise`, `fall`).
What stands opposite: agent/health/checker.py looks.
"""

from __future__ import annotations

from agent.servicemodel import HEALTHY, UNHEALTHY, UNKNOWN, Check

# s since a check began in which a backend that has not been healthy yet may be starting: it is
# looked at often, so that it gets its first connection soon, and what fails says nothing.
START_WITHIN = 3.0
START_EVERY = 0.2  # s; between looks meanwhile


class Streak:
    """The state of one check of one backend, which began at `began` (s, any monotonic clock)."""

    def __init__(self, check: Check, began: float, state: str = UNKNOWN) -> None:
        self.check = check
        self.state = state
        self._began = began
        self._row = 0  # looks in a row that speak against `state`

    def note(self, is_good: bool, now: float) -> bool:
        """Take in a look; whether the state is another one by it."""
        if is_good == (self.state == HEALTHY) and self.state != UNKNOWN:
            self._row = 0
            return False
        if self.state == UNKNOWN:
            # The first good one makes it healthy: there is nothing that it would contradict.
            if not is_good and self._is_starting(now):
                return False
            self.state = HEALTHY if is_good else UNHEALTHY
            return True
        self._row += 1
        if self._row < (self.check.rise if is_good else self.check.fall):
            return False
        self._row = 0
        self.state = HEALTHY if is_good else UNHEALTHY
        return True

    def pause(self, now: float) -> float:
        """How long after the beginning of a look the next one is due, s."""
        if self.state == UNKNOWN and self._is_starting(now):
            return min(START_EVERY, self.check.interval)
        return self.check.interval

    def _is_starting(self, now: float) -> bool:
        return now - self._began < START_WITHIN
