"""How often somebody may do something: token buckets by key, in a table that cannot grow.

PURE: now is an argument. What stands opposite: cluster/admission.py, whose keys are addresses.
"""

from __future__ import annotations

from collections import OrderedDict


class Buckets:
    """A bucket for each key: `burst` at once, and `rate` a second from then on.

    Of more than `most` keys those are forgotten that were used longest ago. Whoever has as many
    keys as that is not held up here: what all may do together needs a bucket of its own.
    """

    def __init__(self, rate: float, burst: float, most: int = 1) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> tokens, when

    def take(self, key: str, now: float) -> bool:
        """Whether `key` may, now; then it has one token less."""
        tokens, since = self._held.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + max(0.0, now - since) * self._rate)
        granted = tokens >= 1.0
        self._held[key] = (tokens - 1.0 if granted else tokens, now)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return granted

    def __len__(self) -> int:
        return len(self._held)
