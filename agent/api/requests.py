"""What requests of all kinds have: how long to wait, and which objects are meant.

What stands opposite: control.py and services.py, which answer them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.errors import Invalid

WAIT_MAX = 3600.0  # s
REFS_MAX = 10_000  # objects that one request names; a prefix of an id is looked for among all


def wait_of(request: Any) -> float:
    """For how many seconds the caller wants to wait for all kernels; Invalid if out of range."""
    seconds = request.wait.seconds if request.HasField("wait") else 0.0
    if not 0 <= seconds <= WAIT_MAX:
        raise Invalid(f"--wait={seconds:g}", "is out of range", f"Use 0 to {WAIT_MAX:g} seconds")
    return float(seconds)


def refs_of(refs: Sequence[str]) -> list[str]:
    """What a request names, each once; Invalid if that is too much for one."""
    return list(dict.fromkeys(all_of(refs)))


def all_of(refs: Sequence[str]) -> list[str]:
    """The same, where what is named twice is for somebody else to judge."""
    if len(refs) > REFS_MAX:
        raise Invalid("the request", f"names {len(refs)} objects", f"Name {REFS_MAX} at a time")
    return list(refs)
