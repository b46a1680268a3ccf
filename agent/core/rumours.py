"""What nodes say about nodes, and the news that is still worth saying.

Claims about one node are ordered by (incarnation, state), and of two the greater holds: a
semilattice, so claims may come in any order, any number of times, and tables may be exchanged at
any time. Only the node itself raises its incarnation, which is how it refutes. What stands
opposite: core/membership.py decides what to claim.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple


class State(IntEnum):
    """What is claimed of a node; at one incarnation the greater holds."""

    ALIVE = 0
    SUSPECT = 1  # silent; it may still refute
    REFUSED = 2  # its host answers, its agent does not
    DEAD = 3  # silent for long, or without an agent for long
    LEFT = 4  # it said so itself


class Rumour(NamedTuple):
    """One claim. `by` is who makes it: the accuser of a SUSPECT, who declared a DEAD."""

    node: str
    incarnation: int
    state: State
    by: str = ""


@lru_cache(maxsize=4096)
def fingerprint(node: str, incarnation: int, state: int) -> int:
    """64 bits for one claim; a table's digest is the XOR of its claims' (as Zobrist's hash)."""
    text = f"{node}\0{incarnation}\0{int(state)}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class _Item:
    __slots__ = ("gone", "rumour", "sent")

    def __init__(self, rumour: Rumour) -> None:
        self.rumour = rumour
        self.sent = 0
        self.gone = False


class News:
    """Rumours that are passed on a bounded number of times each: the newest first, then those
    that wait longest.

    Of one node only the newest claim is news; SUSPECT claims of different accusers stand beside
    each other, because that there are several is what they say.
    """

    __slots__ = ("_items", "_queue")

    def __init__(self) -> None:
        self._queue: deque[_Item] = deque()
        self._items: dict[str, dict[str, _Item]] = {}  # node -> accuser, or "" -> item

    def __bool__(self) -> bool:
        return bool(self._items)

    def __contains__(self, node: object) -> bool:
        return node in self._items

    def put(self, rumour: Rumour) -> None:
        """Something new. Older claims about that node are no news any more."""
        items = self._items.get(rumour.node)
        if items is None:
            items = self._items[rumour.node] = {}
        else:
            for item in items.values():
                item.gone = True
            items.clear()
        self._add(items, rumour)

    def confirm(self, rumour: Rumour) -> None:
        """One accuser more of what is claimed already."""
        items = self._items.setdefault(rumour.node, {})
        if rumour.by not in items:
            self._add(items, rumour)

    def _add(self, items: dict[str, _Item], rumour: Rumour) -> None:
        item = _Item(rumour)
        items[rumour.by if rumour.state is State.SUSPECT else ""] = item
        self._queue.appendleft(item)

    def drop(self, node: str) -> None:
        """Nothing about that node is to be said any more."""
        for item in self._items.pop(node, {}).values():
            item.gone = True

    def take(self, room: int, copies: int, limit: int) -> list[Rumour]:
        """Up to `room` rumours for a message to `copies` nodes; each goes to `limit` in all."""
        out: list[Rumour] = []
        queue = self._queue
        for _ in range(len(queue)):
            if len(out) == room:
                break
            item = queue.popleft()
            if item.gone:
                continue
            out.append(item.rumour)
            item.sent += copies
            if item.sent < limit:
                queue.append(item)
            else:
                self._done(item)
        return out

    def _done(self, item: _Item) -> None:
        item.gone = True
        rumour = item.rumour
        items = self._items[rumour.node]
        del items[rumour.by if rumour.state is State.SUSPECT else ""]
        if not items:
            del self._items[rumour.node]
