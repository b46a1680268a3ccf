"""Removals among nodes that die, restart and race: `World(seed).run(n)` replays a failure."""

from __future__ import annotations

import os

import pytest

from tests.sim.removal import World

SEEDS = int(os.environ.get("VXMESH_REMOVAL_SEEDS", "400"))
BATCH = 50


@pytest.mark.parametrize("first", range(1, SEEDS + 1, BATCH))
def test_a_lost_node_is_inherited_once_and_no_address_has_two_owners(first: int) -> None:
    inherited = cut_off = 0
    for seed in range(first, min(first + BATCH, SEEDS + 1)):
        world = World(seed).run(250)
        world.finish()
        inherited += len(world.heirs)
        cut_off += world.cut_off
    assert inherited > BATCH / 2, "hardly anybody was inherited: this tests nothing"
    assert cut_off > BATCH / 20, "hardly anybody was cut off: this tests nothing"
