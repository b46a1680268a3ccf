"""PURE: who keeps the CA's key. Few, so that few can betray it; more than one, so that it is
not lost. What stands opposite: service.py, which looks at it whenever a node comes or goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

KEEPERS = 3


def choose_heir(me: str, keepers: Iterable[str], others: Mapping[str, float]) -> str | None:
    """To whom this node is to hand the key now; None if to nobody, or if another one does it.

    `keepers` and `others` (who keep none) are those that live, by id, with this node; of the
    others since when each is a member (s). Who came first is the heir: an id is its node's to
    choose, so by ids a newcomer could have it that the key is handed to it.
    """
    present = set(keepers)
    if me not in present or me != min(present) or len(present) >= KEEPERS:
        return None
    return min(others, key=lambda id: (others[id], id), default=None)


def is_surplus(me: str, keepers: Iterable[str]) -> bool:
    """Whether this node can forget the key: enough others keep it, and live. For `keepers` a
    claim is not enough: who has made it up would have the key forgotten by all who have it.

    Two nodes that see different ones live may differ about it, but those that each sees first
    stay.
    """
    return me in sorted(keepers)[KEEPERS:]
