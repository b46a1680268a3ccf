"""How closely to look at what should be right already.

What stands opposite: applier.py and lanapplier.py, which look.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from agent.datapath.netlink import Link


@dataclass(frozen=True, slots=True)
class Look:
    """How closely to look at what should be right already."""

    links: Mapping[str, Link] | None = None  # all devices by name, if they were just read
    interior: bool = False  # into the sandboxes too
    rows: bool = False  # at all rows
    drift: bool = True  # and count as repairs what differs
    only: Collection[str] | None = None  # of the ports at those of these endpoints; None: at all
    gone: Callable[[str], None] | None = None  # told of endpoints whose namespace is gone
