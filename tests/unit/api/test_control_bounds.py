"""What one caller of the control API can make an agent hold: uploads, watches, objects named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from agent.api import control, requests, watch
from agent.api.control import Control
from agent.api.watch import Watchers
from agent.errors import Exhausted, InUse, Invalid
from agent.requests import parse_endpoint, parse_network
from agent.rpc import control_pb2 as pb
from tests.fuzz import world
from tests.fuzz.targets.local import make_control
from tests.fuzz.targets.unary import Context

LINE = b'{"name":"l%d","mac":"02:00:5e:00:54:%02x","addresses":["10.1.0.%d"]}\n'


@pytest.fixture
def servicer(monkeypatch: pytest.MonkeyPatch) -> Control:
    async def fail(context: Any, error: Exception) -> None:
        raise error

    monkeypatch.setattr("agent.api.errors.abort", fail)
    return make_control(world.make())


class Upload:
    """An announcement that is sent when it is told to."""

    def __init__(self, number: int, size: int) -> None:
        self.go = asyncio.Event()
        self._line = LINE % (number, number, number + 20)
        self._blank = b"\n" * (size - len(self._line))

    async def parts(self) -> AsyncIterator[pb.AnnounceRequest]:
        yield pb.AnnounceRequest(header=pb.AnnounceHeader(network="web"))
        yield pb.AnnounceRequest(lines=self._line + self._blank)
        await self.go.wait()


def context() -> Any:
    return cast(Any, Context())


async def test_all_uploads_together_have_a_bound(
    servicer: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ANNOUNCE_MAX", 1000)
    one, two, three = (Upload(n, size) for n, size in ((1, 600), (2, 400), (3, 100)))
    first = asyncio.ensure_future(servicer.Announce(one.parts(), context()))
    second = asyncio.ensure_future(servicer.Announce(two.parts(), context()))
    for _ in range(3):
        await asyncio.sleep(0)
    with pytest.raises(Exhausted):
        await servicer.Announce(three.parts(), context())
    one.go.set()
    assert (await first).announced == 1
    three.go.set()
    assert (await servicer.Announce(three.parts(), context())).announced == 1
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert servicer._uploading == 0
    large = Upload(4, 1001)
    large.go.set()
    with pytest.raises(Invalid):
        await servicer.Announce(large.parts(), context())


async def test_a_request_names_so_many_objects_each_once(
    servicer: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "REFS_MAX", 3)
    for method in ("RemoveNetwork", "RemoveEndpoint", "RemoveSandbox", "RemoveNode"):
        with pytest.raises(Invalid, match="names 4"):
            await getattr(servicer, method)(pb.RemoveRequest(refs=["x"] * 4), context())
    with pytest.raises(Invalid, match="names 4"):
        await servicer.CreateSandbox(pb.CreateSandboxRequest(networks=["web"] * 4), context())
    removed = await servicer.RemoveEndpoint(pb.RemoveRequest(refs=["one"] * 3), context())
    assert removed.removed == [world.LOCAL]


async def test_there_are_so_many_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WATCHERS_MAX", 2)
    watchers = Watchers(world.make(), world.Rtt())
    open_ = [watchers.watch(pb.WatchRequest()) for _ in range(3)]
    await anext(open_[0])
    await anext(open_[1])
    with pytest.raises(Exhausted):
        await anext(open_[2])
    await cast(Any, open_[0]).aclose()
    again = watchers.watch(pb.WatchRequest())
    await anext(again)
    for each in (open_[1], again):
        await cast(Any, each).aclose()
    assert not watchers._queues


def test_what_a_caller_asks_for_has_the_bounds_of_a_record() -> None:
    with pytest.raises(Invalid, match="65 addresses"):
        parse_endpoint("a", addresses=[f"10.1.0.{n}" for n in range(65)])
    with pytest.raises(Invalid, match="17 subnets"):
        parse_network("a", subnets=[f"10.{n}.0.0/24" for n in range(17)])


async def test_a_caller_takes_no_interface_of_a_container(servicer: Control) -> None:
    node = servicer.node
    held, _ = await servicer.operations.hand_out("web", parse_endpoint("docker-1"))
    for refused in (
        servicer.RemoveSandbox(pb.RemoveRequest(refs=[held.sandbox]), context()),
        servicer.RemoveEndpoint(pb.RemoveRequest(refs=[held.id], network="web"), context()),
        servicer.RemoveEndpoint(pb.RemoveRequest(network="web", all=True), context()),
    ):
        with pytest.raises(InUse, match="Docker engine"):
            await refused
    assert node.local_endpoint(held.id) and held.sandbox in node.sandboxes
