"""How maps become what they are to be, though the kernel refuses or nobody waits any more."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from agent.datapath import bpf, socketbalancer, socketmaps
from agent.datapath.balancerules import Placed
from agent.datapath.socketbalancer import SocketBalancer
from agent.datapath.socketmaps import WRITTEN, Elements
from agent.datapath.socketprograms import TALLY
from agent.drivers.balancing import Backend, Frontend, FrontendKey
from agent.notation import parse_address

ONE, TWO = (Backend(parse_address(f"10.1.0.{n}"), 8080, 1, f"{n:016x}") for n in (2, 3))
HTTP = Frontend("a", "n", 7, "tcp", parse_address("10.1.0.100"), 80, (ONE,))
ENTRY = socketmaps.entry(HTTP.address, 80)


class Map:
    """One of a kernel that has room for so many elements, and may be waited for."""

    def __init__(self) -> None:
        self.there: Elements = {}
        self.room = 1 << 16
        self.calls = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_asked = threading.Event()

    def update(self, elements: Mapping[bytes, bytes]) -> None:
        self.is_asked.set()
        assert self.may_go_on.wait(60)
        self.calls += 1
        for key, value in elements.items():
            if key not in self.there and len(self.there) >= self.room:
                raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
            self.there[key] = value

    def delete(self, keys: Collection[bytes]) -> None:
        self.calls += 1
        for key in keys:
            self.there.pop(key, None)

    def read(self) -> Elements:
        return dict(self.there)


@pytest.fixture
def maps() -> dict[str, Map]:
    return {name: Map() for name in WRITTEN}


@pytest.fixture
def balancer(maps: dict[str, Map], monkeypatch: pytest.MonkeyPatch) -> SocketBalancer:
    """One that is on."""
    monkeypatch.setattr(bpf, "attach", lambda *_: 9)
    monkeypatch.setattr(bpf, "is_attached", lambda link: True)
    monkeypatch.setattr(bpf, "close_all", lambda links: None)
    made = SocketBalancer({7: Mock(bridge=Mock(subnets=("10.1.0.0/16",), apart=()), ports={})})
    inside: Any = made
    inside._maps, inside._programs, inside._is_sure = maps, {1: 1}, True
    inside._tallies = bytearray(TALLY.size << 16)
    return made


def place(*frontends: Frontend) -> dict[FrontendKey, Placed]:
    return {f.id: Placed(f, tuple(b.key for b in f.backends)) for f in frontends}


def many(count: int, *backends: Backend) -> list[Frontend]:
    return [
        replace(
            HTTP,
            service=f"{n:04}",
            address=parse_address(f"10.1.{n // 250 + 1}.{n % 250}"),
            backends=backends,
        )
        for n in range(count)
    ]


def is_right(balancer: SocketBalancer, maps: Mapping[str, Map]) -> bool:
    return {name: each.there for name, each in maps.items()} == balancer._contents.wanted


@pytest.mark.parametrize("full", ["slots", "frontends"])
async def test_what_the_kernel_refuses_is_left_to_the_rules_and_not_led_as_it_was(
    balancer: SocketBalancer, maps: dict[str, Map], full: str
) -> None:
    other = replace(HTTP, service="b", address=parse_address("10.1.0.101"))
    gone = replace(HTTP, service="c", address=parse_address("10.1.0.102"))
    await balancer.alter(place(HTTP, other, gone), [7])
    assert is_right(balancer, maps) and len(maps["frontends"].there) == 3
    maps[full].room = len(maps[full].there)
    came = many(1, TWO)
    now = place(replace(HTTP, backends=(TWO, ONE)), other, *came)
    with pytest.raises(OSError, match=os.strerror(errno.E2BIG)):
        await balancer.alter(now, [7])
    assert set(maps["frontends"].there) == {socketmaps.entry(other.address, 80)}
    maps[full].room += 5
    await balancer.audit()
    assert is_right(balancer, maps) and ENTRY in maps["frontends"].there


async def test_a_frontend_of_which_but_a_slot_is_refused_is_left_to_the_rules(
    balancer: SocketBalancer, maps: dict[str, Map]
) -> None:
    await balancer.alter(place(HTTP), [7])
    maps["slots"].there, maps["slots"].room = {}, 0  # whatever it is that it refuses
    moved = replace(HTTP, backends=(replace(ONE, port=9090),))
    with pytest.raises(OSError, match=os.strerror(errno.E2BIG)):
        await balancer.alter(place(moved), [7])
    assert not maps["frontends"].there


async def test_what_is_foreign_goes_before_what_lacks_comes(
    balancer: SocketBalancer, maps: dict[str, Map]
) -> None:
    await balancer.alter(place(HTTP), [7])
    for each in maps.values():
        each.there, each.room = {bytes(4): b""}, 1
    assert await balancer.audit() == 5  # three foreign ones, a slot and a frontend
    assert is_right(balancer, maps)


async def test_what_is_the_same_though_read_anew_is_not_looked_at(
    balancer: SocketBalancer, maps: dict[str, Map], monkeypatch: pytest.MonkeyPatch
) -> None:
    await balancer.alter(place(*many(3, ONE, TWO)), [7])
    judged: list[Placed] = []

    def shape(one: Placed, subnets: Collection[str]) -> socketmaps.Shape | None:
        judged.append(one)
        return before(one, subnets)

    before = socketmaps.shape
    monkeypatch.setattr(socketmaps, "shape", shape)
    again = place(*many(3, replace(ONE), replace(TWO)))
    await balancer.alter(again, [7])
    assert not judged
    key, one = next(iter(again.items()))
    changed = again | {key: replace(one, slots=one.slots[:1])}
    await balancer.alter(changed, [7])
    assert judged == [changed[key]] and is_right(balancer, maps)


class Placements(dict[FrontendKey, Placed]):
    """All that there are; which were looked at."""

    def __init__(self, placed: Mapping[FrontendKey, Placed]) -> None:
        super().__init__(placed)
        self.looked_at: set[FrontendKey] = set()

    def get(self, key: FrontendKey, default: Any = None) -> Any:
        self.looked_at.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        raise AssertionError("all of them are looked at")


async def test_a_change_looks_at_no_frontend_but_its_own(
    balancer: SocketBalancer, maps: dict[str, Map]
) -> None:
    far = replace(HTTP, service="far", vni=8)
    now = Placements(place(*many(20, ONE), far))
    await balancer.alter(now, [7, 8])
    now.looked_at = set()
    await balancer.alter(now, [7, 8], ())  # the change of a bridge
    assert not now.looked_at
    key, *gone = list(now)[:3]
    now[key] = replace(now[key], slots=())
    for each in gone:
        del now[each]
    await balancer.alter(now, [7, 8], [key, *gone])
    assert now.looked_at == {key, *gone}
    assert is_right(balancer, maps) and len(maps["frontends"].there) == 17
    held: Any = balancer._held
    held[7].bridge.subnets = ("10.1.1.0/24",)  # as its backends are not
    now.looked_at = set()
    await balancer.alter(now, [7, 8], ())
    assert now.looked_at == set(now) - {far.id}
    assert is_right(balancer, maps) and not maps["frontends"].there


async def test_sandboxes_are_those_of_the_ports_that_there_are(
    balancer: SocketBalancer, maps: dict[str, Map], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(unknown: Mapping[socketbalancer.Where, Any]) -> dict[socketbalancer.Where, int]:
        reads.append(len(unknown))
        return {where: where[1] for where in unknown if where[1] != missing}

    reads: list[int] = []
    missing = 2
    monkeypatch.setattr(socketbalancer, "_read_cookies", read)
    held: Any = balancer._held
    ports = held[7].ports
    for n in (1, 2):
        inside = Mock(netns=f"/{n}", inode=n)
        ports[f"{n}"] = Mock(inside=inside), n
    await balancer.alter({}, [7], ())
    assert len(maps["sandboxes"].there) == 2  # one sandbox: itself, and in its network
    missing = 0
    await balancer.alter({}, [7], ())
    assert len(maps["sandboxes"].there) == 4 and reads == [2, 1]
    await balancer.alter({}, [7], ())
    del ports["1"]
    await balancer.alter({}, [7], ())
    assert len(maps["sandboxes"].there) == 2 and reads == [2, 1]
    missing = 2
    await balancer.audit()
    assert not maps["sandboxes"].there
    missing = 0
    await balancer.alter({}, [7], ())
    assert len(maps["sandboxes"].there) == 2
    await balancer.alter({}, [], ())
    assert not maps["sandboxes"].there


async def test_others_have_a_turn_while_many_are_taken_in(
    balancer: SocketBalancer, maps: dict[str, Map]
) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await balancer.alter(place(*many(socketbalancer.TOGETHER * 6, ONE)), [7])
    counting.cancel()
    assert turns >= 5


async def test_a_change_that_is_given_up_half_way_is_made_good_by_the_next(
    balancer: SocketBalancer, maps: dict[str, Map]
) -> None:
    now = place(*many(socketbalancer.TOGETHER * 2, ONE))
    changing = asyncio.create_task(balancer.alter(now, [7]))
    await asyncio.sleep(0)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert not maps["frontends"].there
    await balancer.alter(now, [7], ())
    assert is_right(balancer, maps) and len(maps["frontends"].there) == len(now)


async def test_after_a_fault_half_way_through_a_batch_nothing_of_it_lacks(
    balancer: SocketBalancer, maps: dict[str, Map], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, *kept = many(socketbalancer.TOGETHER, ONE)
    before = place(gone, *kept[:9])
    await balancer.alter(before, [7])
    now = place(*kept)
    bad = kept[25].id

    def shape(one: Placed, subnets: Collection[str]) -> socketmaps.Shape | None:
        if one.frontend.id == bad:
            raise ValueError("a fault of ours")
        return right(one, subnets)

    right = socketmaps.shape
    with monkeypatch.context() as patched:
        patched.setattr(socketmaps, "shape", shape)
        with pytest.raises(ValueError, match="fault"):
            await balancer.alter(now, [7])
    await balancer.alter(now, [7])
    assert is_right(balancer, maps)
    assert set(maps["frontends"].there) == {socketmaps.entry(f.address, 80) for f in kept}


class Awaited:
    """A lock that says when somebody comes for it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock, self.is_wanted = lock, threading.Event()

    def __enter__(self) -> None:
        self.is_wanted.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("by_audit", [False, True])
async def test_closing_waits_for_a_thread_that_nobody_waits_for(
    balancer: SocketBalancer, maps: dict[str, Map], by_audit: bool
) -> None:
    balancer._is_sure = not by_audit
    maps["slots"].may_go_on.clear()
    now = place(*many(socketbalancer.FEW, ONE))
    changing = asyncio.create_task(balancer.alter(now, [7]))
    assert await asyncio.to_thread(maps["slots"].is_asked.wait, 60)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    done: list[bool] = []
    balancer._stack.callback(lambda: done.append(is_right(balancer, maps)))
    balancer._lock = lock = Awaited(balancer._lock)  # type: ignore[assignment]
    closing = asyncio.create_task(asyncio.to_thread(balancer.close))
    assert await asyncio.to_thread(lock.is_wanted.wait, 60)
    assert not done
    maps["slots"].may_go_on.set()
    await closing
    assert done == [True], "all was done before the descriptors went"
    assert not balancer.is_on
    calls = sum(each.calls for each in maps.values())
    await balancer.alter({}, [7])
    await balancer._write(socketmaps.difference(balancer._contents.wanted, {n: {} for n in maps}))
    assert sum(each.calls for each in maps.values()) == calls
    balancer.open()
    assert not balancer.is_on
