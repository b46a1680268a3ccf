"""When the guard's table is loaded whole and when a few elements do; without a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from agent.datapath.guard import Guard
from agent.datapath.nft import Ruleset
from agent.drivers.base import Closed
from agent.errors import VxmeshError
from tests.unit.datapath.test_guardrules import OTHER, PORT
from tests.unit.datapath.test_nft import DATABASE, WEB

FLOODING = replace(DATABASE, flood_rate=100)
SECOND = replace(OTHER, endpoint="00000000000000e2")


class Table:
    """Takes in what Nftables would; refuses the next `refusals` loads."""

    def __init__(self) -> None:
        self.loads: list[Ruleset] = []
        self.altered: list[tuple[Any, Any]] = []
        self.refusals = 0

    async def load(self, ruleset: Ruleset) -> None:
        if self.refusals:
            self.refusals -= 1
            raise VxmeshError("firewall rules", "nftables refused them", "Try again")
        self.loads.append(ruleset)

    async def alter(self, come: Any, gone: Any) -> None:
        self.altered.append((come, gone))


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def guard(table: Table) -> Iterator[Guard]:
    made = Guard("/proc/self/ns/net")
    made.table.close()
    made.table = table  # type: ignore[assignment]
    yield made


def has_groups(ruleset: Ruleset) -> bool:
    return "chain groups" in ruleset.chains


async def test_what_failed_to_load_is_loaded_with_the_next_change(
    guard: Guard, table: Table
) -> None:
    await guard.load([replace(WEB, ports={PORT.endpoint: PORT})], Closed())
    table.refusals = 1
    flooding = replace(FLOODING, ports={SECOND.endpoint: SECOND})
    with pytest.raises(VxmeshError, match="guard of sandboxes' ports"):
        await guard.admit(flooding)
    await guard.admit(flooding)
    assert not table.altered and len(table.loads) == 2
    assert has_groups(table.loads[-1])
    assert f'"{SECOND.device}"' in table.loads[-1].sets["ports"].elements
    await guard.admit(flooding)
    assert len(table.loads) == 2, "it is loaded now"


async def test_a_network_that_floods_without_a_port_here_loads_nothing(
    guard: Guard, table: Table
) -> None:
    await guard.load([], Closed())
    for _ in range(3):
        await guard.admit(FLOODING)
        await guard.release(FLOODING.vni)
    assert len(table.loads) == 1 and not table.altered
    held = replace(FLOODING, ports={SECOND.endpoint: SECOND})
    await guard.admit(held)
    assert [has_groups(ruleset) for ruleset in table.loads] == [False, True]
    # The port that goes is limited until it is gone.
    await guard.admit(FLOODING)
    assert len(table.loads) == 2
    await guard.release(FLOODING.vni)
    assert [has_groups(ruleset) for ruleset in table.loads] == [False, True, False]
