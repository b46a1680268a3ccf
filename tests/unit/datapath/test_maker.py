"""What is being made in a thread outlasts whoever asked for it, and so do his descriptors."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest

from agent.datapath import linkpacking, maker
from agent.datapath.maker import Maker
from agent.drivers.base import Port

PORT = Port("e9", "vxp9", bytes([2, 0, 0, 0, 0, 9]), (), "/run/netns/one", 1, "eth0", ())


class Requests:
    """In the place of a netlink socket: each request waits until it may go on."""

    def __init__(self, netns: object) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def ask(self, message: bytes) -> None:
        self.begun.set()
        assert self.go_on.wait(60)

    def index(self, name: str) -> int:
        return 7

    def close(self) -> None:
        pass


@pytest.mark.parametrize("times", [1, 3])
async def test_who_is_cancelled_keeps_his_descriptors_until_the_thread_is_done(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "Requests", Requests)
    sent: list[tuple[int, int]] = []

    made = Maker("", "")
    own: Any = made._own
    fd = os.open("/proc/self/exe", os.O_RDONLY)
    inode = os.fstat(fd).st_ino

    def mark_port(*_: object, **__: object) -> bytes:
        sent.append((fd, os.fstat(fd).st_ino))
        return b""

    monkeypatch.setattr(linkpacking, "new_pair", lambda *_: b"")
    monkeypatch.setattr(linkpacking, "mark_port", mark_port)

    async def attach() -> None:
        try:
            await made.port(PORT, "vxmesh:ep:e9", 1430, 1, fd)
        finally:
            os.close(fd)

    task = asyncio.create_task(attach())
    await asyncio.to_thread(own.begun.wait, 60)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    own.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sent == [(fd, inode)]
    made.close()


async def test_what_the_kernel_refuses_is_told_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maker, "Requests", Requests)
    made = Maker("", "")
    own: Any = made._own

    def refuse(message: bytes) -> None:
        raise FileExistsError

    own.ask = refuse
    with pytest.raises(FileExistsError):
        await made.port(PORT, "vxmesh:ep:e9", 1430, 1, 0)
    made.close()
