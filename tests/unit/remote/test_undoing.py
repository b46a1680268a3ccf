"""What is undone at plugins, with a stand-in of a plugin that takes its time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from agent.remote.ledger import Ledger, Step
from agent.remote.undoing import Undoer


class SlowPlugin:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.calls: list[str] = []

    async def call(self, plugin: str, method: str, body: dict[str, Any]) -> bytes:
        self.calls.append(method)
        self.asked.set()
        await self.may_answer.wait()
        return b"{}"


async def test_who_settles_waits_for_what_another_is_undoing(tmp_path: Path) -> None:
    plugin, ledger = SlowPlugin(), Ledger(tmp_path / "plugins.json")
    await ledger.add("net:n", Step("weird", "NetworkDriver.DeleteNetwork", {}))
    node = SimpleNamespace(
        listeners=[], catalogue=SimpleNamespace(get=lambda id: None), local_endpoint=lambda id: None
    )
    undoer = Undoer(cast(Any, node), cast(Any, plugin), ledger, {})
    first = asyncio.create_task(undoer.settle())
    await plugin.asked.wait()
    second = asyncio.create_task(undoer.settle())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not second.done(), "the network is still the plugin's"
    plugin.may_answer.set()
    await asyncio.gather(first, second)
    assert ledger.steps == {} and plugin.calls == ["NetworkDriver.DeleteNetwork"]
