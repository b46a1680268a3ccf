"""Whose turn it is: nobody who asks much makes the others wait. Pure.

What stands opposite: server.py, which reads questions from many and answers them one by one;
datapath/guardrules.py, which bounds in the kernel how many come from one port at all.
Source: deficit round robin with equal turns (Shreedhar and Varghese 1995); the generic cell rate
algorithm (ITU-T I.371, appendix A) for the pace.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")

_SOURCES_MAX = 1000  # then those that have been silent are forgotten


class FairQueue(Generic[T]):
    """Items by source; each source that has some is served in turn, one item at a time."""

    def __init__(self, each: int) -> None:
        """`each`: how many items of one source may wait."""
        self._each = each
        self._waiting: OrderedDict[bytes, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, source: bytes, item: T) -> bool:
        """Have it wait for its turn; False if too many of that source do."""
        queue = self._waiting.setdefault(source, deque())
        if len(queue) >= self._each:
            return False
        queue.append(item)
        return True

    def take(self) -> T:
        """The next one; IndexError if nothing waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        source, queue = self._waiting.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._waiting[source] = queue  # behind all others
        return item


class Pace:
    """At most so many a second of each source, with so many at once after silence."""

    def __init__(self, rate: float, burst: float) -> None:
        self._interval, self._allowance = 1 / rate, (burst - 1) / rate  # s
        self._due: dict[bytes, float] = {}  # when the next one would come at an even pace

    def delay(self, source: bytes, now: float) -> float:
        """Count one; how many seconds it has to wait. `now` in seconds, of any clock."""
        if len(self._due) >= _SOURCES_MAX:
            self._due = {s: due for s, due in self._due.items() if due > now}
        due = max(self._due.get(source, now), now)
        self._due[source] = due + self._interval
        return max(0.0, due - now - self._allowance)
