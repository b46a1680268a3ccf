"""Which connections are ended of those that were led at the socket, and when."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from agent.datapath import ledsockets, sandbox, sockdiag
from agent.datapath.balancer import Way
from agent.datapath.ledsockets import LedSockets
from agent.datapath.packing import HEADER, NLMSG_ERROR
from agent.datapath.sockdiag import Socket
from agent.datapath.socketmaps import mark
from agent.notation import parse_address

VIP, OTHER = parse_address("10.1.0.100"), parse_address("10.1.0.101")
ONE, TWO = parse_address("10.1.0.2"), parse_address("10.1.0.3")
CLIENT = parse_address("10.1.0.9")
MAPPED = bytes(10) + b"\xff\xff"
GONE = Way("tcp", VIP, 80, ONE, 8080)


def led(vip: bytes = VIP, backend: bytes = ONE, port: int = 8080, source: bytes = CLIENT) -> Socket:
    family = socket.AF_INET if len(backend) == 4 else socket.AF_INET6
    return Socket(family, mark(vip, 80), source, 40000, backend, port, b"")


SOCKETS = {
    "gone": led(),
    "mapped": led(backend=MAPPED + ONE, source=MAPPED + CLIENT),
    "by another VIP": led(vip=OTHER),
    "elsewhere": led(backend=TWO),
    "another port": led(port=8081),
    "itself": led(backend=ONE, port=40001, source=ONE),
}


class Kernel:
    """Sandboxes whose sockets are SOCKETS."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: list[set[str]] = []
        self.errors: list[OSError] = []  # of the next look
        self.changed = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        monkeypatch.setattr(ledsockets, "_end_in", self.end)
        monkeypatch.setattr(sockdiag, "check_possible", lambda: None)

    def end(
        self, ports: Collection[Any], ends: Callable[[Socket], bool]
    ) -> tuple[int, list[OSError]]:
        errors, self.errors = self.errors, []  # before anybody can set those of the next look
        found = {name for name, one in SOCKETS.items() if ends(one)}
        self.looks.append(found)
        self.loop.call_soon_threadsafe(self.changed.set)
        return len(found), errors

    async def looked(self, times: int) -> None:
        async with asyncio.timeout(30):
            while len(self.looks) < times:
                self.changed.clear()
                await self.changed.wait()


def sandboxes() -> Any:
    inside = Mock(netns="/n", inode=1)
    bridge = Mock(subnets=("10.1.0.0/24",))
    return {7: Mock(bridge=bridge, ports={"e": (Mock(inside=inside), 1)})}


@pytest.fixture
async def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


async def test_what_goes_is_ended_at_once_and_looked_for_once_more(kernel: Kernel) -> None:
    mine = LedSockets(sandboxes(), lambda vips: ())
    mine.end([GONE, Way("udp", VIP, 80, TWO, 8080)])
    await kernel.looked(2)
    assert kernel.looks == [{"gone", "mapped"}] * 2
    mine.end([Way("udp", VIP, 80, TWO, 8080)])
    mine.end([Way("tcp", parse_address("10.2.0.100"), 80, TWO, 8080)])  # of no network here
    mine.end([GONE])
    await kernel.looked(4)
    mine.close()


async def test_what_is_back_before_the_look_is_left_alone(kernel: Kernel) -> None:
    back: list[Way] = []
    mine = LedSockets(sandboxes(), lambda vips: back)
    mine.end([GONE, Way("tcp", VIP, 80, TWO, 8080)])
    back.append(GONE)
    await kernel.looked(1)
    assert kernel.looks[0] == {"elsewhere"}
    mine.close()


async def test_at_a_start_all_is_ended_that_goes_by_no_way_there_is(kernel: Kernel) -> None:
    mine = LedSockets(sandboxes(), lambda vips: ())
    await mine.end_others([GONE, Way("tcp", OTHER, 80, ONE, 8080)])
    assert kernel.looks == [{"elsewhere", "another port"}]
    await mine.end_others([])
    assert kernel.looks[1] == set(SOCKETS) - {"itself"}


async def test_stragglers_are_looked_for_in_their_time_though_others_go_meanwhile(
    kernel: Kernel,
) -> None:
    now = 100.0
    mine = LedSockets(sandboxes(), lambda vips: (), lambda: now)
    mine.end([GONE])
    await kernel.looked(1)
    now += ledsockets.STRAGGLERS / 2
    mine.end([Way("tcp", OTHER, 80, ONE, 8080)])
    await kernel.looked(2)
    now += ledsockets.STRAGGLERS * 0.6
    mine.end([Way("tcp", VIP, 80, TWO, 8080)])
    await kernel.looked(3)
    now += ledsockets.STRAGGLERS * 2
    await kernel.looked(4)
    first = {"gone", "mapped"}
    other, elsewhere = {"by another VIP"}, {"elsewhere"}
    assert kernel.looks == [first, other, first | elsewhere, other | elsewhere]
    mine.close()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning, whatever other tests have done to logs."""
    events: list[str] = []

    def warn(event: str, **_: object) -> None:
        events.append(event)

    monkeypatch.setattr(
        ledsockets, "log", SimpleNamespace(warning=warn, info=lambda *_, **__: None)
    )
    return events


async def test_what_could_not_be_looked_at_is_looked_for_again(
    kernel: Kernel, warned: list[str]
) -> None:
    now = 0.0
    mine = LedSockets(sandboxes(), lambda vips: (), lambda: now)
    kernel.errors = [OSError(errno.ENOMEM, "no memory")]
    mine.end([GONE])
    await kernel.looked(1)
    for times in (2, 3):  # the first one again, and for stragglers
        now += 1
        await kernel.looked(times)
    assert kernel.looks == [{"gone", "mapped"}] * 3
    assert mine._task
    async with asyncio.timeout(30):
        await mine._task
    assert warned == ["datapath.sockets_not_ended"]


async def test_what_can_never_be_looked_at_is_left_in_the_end(kernel: Kernel) -> None:
    now = 0.0
    mine = LedSockets(sandboxes(), lambda vips: (), lambda: now)
    for times in range(1, ledsockets.FAILURES + 2):
        kernel.errors = [OSError(errno.ENOMEM, "no memory")]
        if times == 1:
            mine.end([GONE])
        now += 1000
        mine._wake.set()
        await kernel.looked(times)
    assert mine._task
    async with asyncio.timeout(30):
        await mine._task


async def test_where_sockets_cannot_be_ended_nothing_fails(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    def refuse() -> None:
        raise OSError(errno.EPROTONOSUPPORT, "no sock_diag")

    with monkeypatch.context() as patch:
        patch.setattr(sockdiag, "check_possible", refuse)
        mine = LedSockets(sandboxes(), lambda vips: ())
        for _ in range(3):
            await mine.end_others([])
        assert not kernel.looks
        assert warned == ["datapath.sockets_not_ended"]
    await mine.end_others([])
    assert len(kernel.looks) == 1


class Diag:
    """A socket of sock_diag that answers each SOCK_DESTROY with the next of these errors."""

    def __init__(self, *answers: int) -> None:
        self.answers, self.asked = deque(answers), 0

    def send(self, data: bytes) -> None:
        self.asked += 1

    def recv(self, size: int) -> bytes:
        code = self.answers.popleft()
        if code == errno.ETIMEDOUT:
            raise TimeoutError
        return HEADER.pack(20, NLMSG_ERROR, 0, 0, 0) + struct.pack("=i", -code)

    def __enter__(self) -> Diag:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_a_socket_that_cannot_be_ended_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone: Any = Diag(errno.EOPNOTSUPP, errno.ENOENT, 0, 0)
    assert sockdiag.destroy(gone, [led()] * 4) == 2
    refused: Any = Diag(0, errno.EPERM, 0)
    with pytest.raises(PermissionError):
        sockdiag.destroy(refused, [led()] * 3)
    assert refused.asked == 3
    silent: Any = Diag(errno.ETIMEDOUT, 0)
    with pytest.raises(TimeoutError):
        sockdiag.destroy(silent, [led()] * 2)
    assert silent.asked == 1
    for code in (errno.EOPNOTSUPP, errno.ENOENT):
        monkeypatch.setattr(sockdiag, "open_here", lambda code=code: Diag(code))
        monkeypatch.setattr(sockdiag, "find", lambda *_: iter(()))
        if code == errno.ENOENT:
            sockdiag.check_possible()
        else:
            with pytest.raises(OSError, match="sockets"):
                sockdiag.check_possible()


def test_a_sandbox_that_cannot_be_looked_at_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the first one no socket of sock_diag can be had, the second one cannot be searched."""
    diags = [OSError(errno.ENFILE, os.strerror(errno.ENFILE)), Diag(), Diag(0)]

    def find(diag: Diag, family: int, mark: int, mask: int) -> Iterator[Socket]:
        if not diag.answers and not diag.asked:
            raise OSError(errno.ENOENT, "no inet_diag")
        if family == socket.AF_INET:
            yield led()

    monkeypatch.setattr(sandbox, "in_namespaces", lambda ports, make: diags)
    monkeypatch.setattr(sockdiag, "find", find)
    ended, errors = ledsockets._end_in([Mock()], lambda one: True)
    assert ended == 1
    assert [error.errno for error in errors] == [errno.ENFILE, errno.ENOENT, errno.ENOENT]
