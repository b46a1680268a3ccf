"""Operations against a kernel and a cluster that are stand-ins: what a caller may rely on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from agent.core.addresses import Range
from agent.errors import NotFound
from agent.model import Network, Node, Sandbox
from agent.node import NodeState
from agent.operations import Operations


class SlowKernel:
    """Settles when it is let."""

    def __init__(self) -> None:
        self.settled = asyncio.Event()

    async def settle(self, endpoint: str | None = None) -> None:
        await self.settled.wait()


class Alone:
    """A cluster of one."""

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        return {}

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        raise AssertionError("nobody to ask")


async def _durable() -> None:
    pass


async def test_a_sandbox_that_has_just_ended_is_out_of_the_kernel_when_its_rm_returns() -> None:
    # `vxmesh run` asks for it after its command ended; the watcher may have been quicker, and
    # the bridge was then still there when `run` returned.
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    kernel = SlowKernel()
    operations = Operations(node, Alone(), kernel, _durable)
    node.put_sandbox(Sandbox("b" * 16, "sb", "/proc/1/ns/net", 1, 1, 1, 0.0))
    operations.drop_sandbox("b" * 16)
    removing = asyncio.create_task(operations.remove_sandboxes(["b" * 16]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not removing.done()
    kernel.settled.set()
    with pytest.raises(NotFound):
        await removing
