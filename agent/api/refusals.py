"""Attempts to control this node that were refused: told at once, but of a flood only its sum.

Who is refused can try again as fast as they like; the history, the log and the metrics must not
suffer. So each (reason, who) is told once, and what follows within `INTERVAL` together at its
end. What stands opposite: rights.py and the fronts, which refuse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from agent.node import NodeState

# Why: no right to what was called; too many connections; no certificate that may control.
REASONS = ("right", "busy", "certificate")
INTERVAL = 10.0  # s
# Different ones a time; beyond, they are counted as one. A scan of the port has many addresses.
KEYS = 64
OTHERS = "others"


@dataclass(slots=True)
class _Held:
    text: str
    count: int = 0  # since it was last told


class Refusals:
    """Tells `control.refused`."""

    def __init__(self, node: NodeState, interval: float = INTERVAL) -> None:
        self._node = node
        self._interval = interval
        self._held: dict[tuple[str, str], _Held] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}

    def note(self, reason: str, who: str, text: str) -> None:
        """Somebody was refused. `reason` is one of REASONS, `text` for people."""
        key = reason, who
        if key not in self._held and len(self._held) >= KEYS:
            key = reason, OTHERS
        held = self._held.get(key)
        if held is not None:
            held.text = text
            held.count += 1
            return
        self._held[key] = _Held(text)
        self._tell(key, text, 1)
        self._wait(key)

    def close(self) -> None:
        """Tell what is left, and no more."""
        for key in list(self._timers):
            self._timers[key].cancel()
            self._end(key)

    def _wait(self, key: tuple[str, str]) -> None:
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(self._interval, self._over, key)

    def _over(self, key: tuple[str, str]) -> None:
        if self._held[key].count:
            text, count = self._held[key].text, self._held[key].count
            self._held[key].count = 0
            self._tell(key, text, count)
            self._wait(key)
        else:
            self._end(key)

    def _end(self, key: tuple[str, str]) -> None:
        held = self._held.pop(key)
        self._timers.pop(key, None)
        if held.count:
            self._tell(key, held.text, held.count)

    def _tell(self, key: tuple[str, str], text: str, count: int) -> None:
        more = f" ({count} times)" if count > 1 else ""
        reason, who = key
        self._node.tell(
            "control.refused", f"{text}{more}", reason=reason, who=who, count=str(count)
        )


Note = Callable[[str, str, str], None]  # Refusals.note
