"""Huge pages for the name server's table: which memory, and when."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.resolver import hugepages, server
from tests.needs import lacks
from tests.unit.resolver.test_server import Running, running, until

__all__ = ["running"]  # a fixture

MAPS = """\
00400000-00e00000 r-xp 00000000 08:01 77 /usr/bin/python3
00e00000-01a00000 rw-p 00a00000 08:01 77 /usr/bin/python3
01b00000-02300000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000600000 rw-p 00000000 00:00 0
7f0000900000-7f0000b00000 rw-p 00000000 00:00 0
7f0000c00000-7f0001000000 rw-s 00000000 00:01 5 /dev/shm/x (deleted)
7f0001000000-7f0001400000 ---p 00000000 00:00 0
7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0 [stack]
"""


def test_only_whole_huge_pages_of_memory_that_is_no_files() -> None:
    assert list(hugepages.ranges(MAPS)) == [
        (0x1C00000, 0x600000),
        (0x7F0000000000, 0x600000),
    ]


def test_what_was_in_memory_is_there_and_in_huge_pages_if_the_kernel_can() -> None:
    with mmap.mmap(-1, 4 * hugepages.SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        content = bytes(range(256)) * (len(memory) // 256)
        memory[:] = content
        for _ in range(600):  # there may be no huge page left now
            could = hugepages.gather()
            assert memory[:] == content
            if not could:
                lacks("this kernel gives no huge pages")
            rollup = Path("/proc/self/smaps_rollup").read_text()
            found = re.search(r"AnonHugePages: +(\d+) kB", rollup)
            if found and int(found[1]) * 1024 >= hugepages.SIZE:
                return
            time.sleep(0.05)
        raise AssertionError(rollup)


async def test_many_answers_are_gathered_beside_the_answering_and_not_where_the_kernel_cannot(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    go_on = threading.Event()

    def gather() -> bool:
        threads.append(threading.current_thread().name)
        assert go_on.wait(60)
        return len(threads) < 2

    monkeypatch.setattr(server, "GATHERED", 3)
    monkeypatch.setattr(server, "hugepages", SimpleNamespace(gather=gather))
    names = (f"no{number}.demo" for number in itertools.count())
    for _ in range(2):
        await running.udp(next(names))
    assert not threads
    for _ in range(6):  # it is under way, and answers are given
        await running.udp(next(names))
    await until(lambda: len(threads) == 1)
    go_on.set()
    for _ in range(1000):
        await running.udp(next(names))
        if len(threads) == 2:
            break
        await asyncio.sleep(0.01)
    assert len(threads) == 2
    assert threading.main_thread().name not in threads
    second = running.server._gathering
    assert second is not None and not await second
    for _ in range(6):  # it has said that the kernel cannot
        await running.udp(next(names))
    assert running.server._gathering is second
