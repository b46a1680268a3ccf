"""Services on the real kernel: VIPs and published ports, with the client's own address kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.netns.balancing_hosts import Server, ask, backend, frontend, network, serve
from tests.netns.datapath_hosts import Fabric, opened


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Fabric]:
    async with opened(tmp_path) as fabric:
        yield fabric


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_vip_leads_to_a_backend_on_another_host_which_sees_the_client_itself(
    fabric: Fabric, protocol: str
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3), protocol=protocol))
    await fabric.settle()
    async with Server(far.path, "far"):
        assert await ask(near.path, "10.7.0.100", 80, protocol) == ("far", "10.7.0.2")
