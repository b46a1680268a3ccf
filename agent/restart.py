"""What a starting agent takes back from its disk, and what follows from how its last life ended.

A process that was killed lost nothing that it had told: what is published was committed, and
commits outlive the process. A machine that lost its power may have lost the last commits that
were not synced; this shows in the kernel's boot id, which is kept beside the records. Peers
may then have records of ours that we know nothing of, under versions that we would use again.
So versions go on far above, and the floor with them: every peer takes our whole state, what it
has and we lost goes, and no version is used twice (core/replica.py).
What stands opposite: store.py, or the disk of the simulation (tests/sim/disk.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.core.replica import VERSION_MAX, Record, beyond
from agent.errors import Unavailable, VxmeshError
from agent.model import Sandbox
from agent.node import JOIN_ANEW, NodeState
from agent.store import HELD, WITHDRAWN, PeerBatch
from agent.views import Status

NUMBERS = ("version", "floor", "incarnation")  # in the meta, as text
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4): differs after each boot


class Disk(Protocol):
    """What is read and written before an agent begins to work; see store.Store."""

    def load(self) -> tuple[dict[str, str], list[Record], list[Sandbox]]: ...

    def load_peers(self) -> list[PeerBatch]: ...

    def set_meta(self, values: dict[str, str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Life:
    """One run of an agent on its state."""

    node: str  # id, the same in every life
    incarnation: int  # the number of this life, from 1 on; on disk for good before it is told
    may_have_lost: bool  # commits of the life before
    records: list[Record]
    sandboxes: list[Sandbox]
    version: int
    floor: int
    withdrawn: dict[str, tuple[str, int]]  # who counted as gone: node -> state, incarnation
    held: dict[str, dict[str, int]]  # see core/removal.py


def begin(disk: Disk, boot_id: str, new_id: Callable[[], str]) -> Life:
    """Begin a life: the next incarnation, and what was known of this node's own.

    `boot_id` is the kernel's, `new_id` makes a node id for a state that has none yet.
    VxmeshError if the node was removed from its cluster, or what it wrote of itself is no
    such thing.
    """
    meta, records, sandboxes = disk.load()
    withdrawn, held = _check(meta)
    if "node" not in meta and (records or sandboxes):
        raise Unavailable(
            "state", "has records, but not whose", "Start with --reset-state to set it aside"
        )
    if "removed" in meta:
        raise VxmeshError("this node", meta["removed"], JOIN_ANEW)
    lost = "node" in meta and meta.get("boot") != boot_id
    if lost:
        marks = [int(meta.get("version", 0)), *(record.version for record in records)]
        meta["version"] = meta["floor"] = str(beyond(max(marks)))
    meta["node"] = meta.get("node") or new_id()
    meta["incarnation"] = str(int(meta.get("incarnation", 0)) + 1)
    meta["boot"] = boot_id
    disk.set_meta(meta)  # all at once: a boot id of today beside versions of before would lie
    return Life(
        meta["node"],
        int(meta["incarnation"]),
        lost,
        records,
        sandboxes,
        int(meta.get("version", 0)),
        int(meta.get("floor", 0)),
        withdrawn,
        held,
    )


def _check(
    meta: dict[str, str],
) -> tuple[dict[str, tuple[str, int]], dict[str, dict[str, int]]]:
    """Who counted as gone, and who is held off.

    Unavailable if that, or a number that is kept, cannot be read.
    """
    try:
        for key in NUMBERS:
            if not 0 <= int(meta.get(key, 0)) <= VERSION_MAX:
                raise ValueError(f"{key} is {meta[key][:40]}")
        withdrawn = {
            id: (str(state), int(number))
            for id, (state, number) in json.loads(meta.get(WITHDRAWN, "{}")).items()
        }
        held = {
            id: {str(who): int(number) for who, number in by.items()}
            for id, by in json.loads(meta.get(HELD, "{}")).items()
        }
        return withdrawn, held
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Unavailable(
            "state",
            f"has settings that cannot be read ({str(error)[:200]})",
            "Restore it from a backup, or start with --reset-state to set it aside",
        ) from None


def recall(node: NodeState, disk: Disk, life: Life) -> None:
    """Give a fresh node what it knew of itself and of others, before anything listens to it."""
    node.restore(life.records, life.sandboxes, life.version, life.floor)
    for known in disk.load_peers():
        if known.origin == node.me:
            raise Unavailable(
                "state", "has this node's records as another's", "Start with --reset-state"
            )
        node.restore_peer(known.origin, known.records, known.version, known.floor, known.seals)
    node.removing.held = life.held
    for id, (state, incarnation) in life.withdrawn.items():
        if id in node.nodes and id != node.me:
            reason = "" if state == "left" else "was gone before this agent was started again"
            node.status[id] = Status(state, reason, node.clock(), True, incarnation)
            node.withdrawn.add(id)
