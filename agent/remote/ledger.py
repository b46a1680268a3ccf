"""What has been done at plugins and is to be undone one day: written down before it is done.

A step says whom to ask what. Those of one owner (a network or an endpoint) are undone last one
first, and each is kept until the plugin has done it: also over a restart of the agent.
What stands opposite: driver.py, which does and undoes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from agent import wholefile
from agent.errors import Unavailable


class Step(msgspec.Struct):
    """One call that undoes something. Without a plugin it is our own: to give an interface back."""

    plugin: str
    method: str
    body: dict[str, Any]


class Ledger:
    """Owner -> steps, oldest first; a file holds the same."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Unavailable if that is not what was written."""
        self._path = path
        self._lock = asyncio.Lock()
        self.steps: dict[str, list[Step]] = {}
        try:
            self.steps = msgspec.json.decode(path.read_bytes(), type=dict[str, list[Step]])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            raise Unavailable(
                f"file {path}", f"cannot be read ({error})", "Mend it, or move it away"
            ) from None

    async def add(self, owner: str, step: Step) -> None:
        """Write a step down; it is on disk when this returns."""
        self.steps.setdefault(owner, []).append(step)
        await self._save()

    async def drop(self, owner: str, step: Step) -> None:
        """A step was undone, or never came to be."""
        left = [other for other in self.steps.get(owner, []) if other is not step]
        if left:
            self.steps[owner] = left
        else:
            self.steps.pop(owner, None)
        await self._save()

    async def put(self, owner: str, steps: list[Step]) -> None:
        """Replace what undoes an owner: of what was there before nothing is left to undo."""
        self.steps[owner] = list(steps)
        if not steps:
            del self.steps[owner]
        await self._save()

    def is_shared(self, step: Step) -> bool:
        """Whether another owner wants the same undone."""
        return any(
            other == step and other is not step for steps in self.steps.values() for other in steps
        )

    async def _save(self) -> None:
        async with self._lock:
            content = msgspec.json.encode(self.steps)
            await asyncio.to_thread(wholefile.replace, self._path, content)
