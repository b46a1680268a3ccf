"""Sandboxes whose process ended: the agent is told, also of one that ended before it looked."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from types import SimpleNamespace
from typing import Any

from agent.model import Sandbox
from agent.syscalls import start_time
from agent.watcher import Watcher


async def first_told_of(*sandboxes: Sandbox) -> str:
    """The first sandbox that a watcher says has ended."""
    node: Any = SimpleNamespace(sandboxes={each.id: each for each in sandboxes}, listeners=[])
    gone: asyncio.Queue[str] = asyncio.Queue()
    watcher = Watcher(node, gone.put_nowait)
    watcher.start()
    try:
        return await asyncio.wait_for(gone.get(), 60)
    finally:
        watcher.stop()


def sandbox(id: str, pid: int, started: int) -> Sandbox:
    return Sandbox(id, id, "/proc/self/ns/net", 1, pid, started, 0.0)


def test_one_that_ended_is_told_and_one_that_lives_is_not() -> None:
    lives, ends = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    try:
        made = [sandbox(str(each.pid), each.pid, start_time(each.pid)) for each in (lives, ends)]
        ends.kill()
        assert asyncio.run(first_told_of(*made)) == str(ends.pid)
    finally:
        for process in (lives, ends):
            process.kill()
            process.wait()


def test_one_whose_number_is_another_threads_by_now_has_ended() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id
        assert asyncio.run(first_told_of(sandbox("a", thread.native_id, 1))) == "a"
    finally:
        done.set()
        thread.join()
