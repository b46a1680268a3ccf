"""Which interface has a sandbox's default route, in each family."""

from __future__ import annotations

import msgspec
import pytest

from agent.core.waysout import (
    Way,
    lead,
    led_by,
    priorities,
    reached,
    renewed,
    with_interface,
    without,
)
from agent.model import Endpoint, Network, Sandbox
from agent.notation import parse_address

BOTH, V4, V6, NONE = frozenset((4, 6)), frozenset((4,)), frozenset((6,)), frozenset[int]()
BOX = Sandbox("b" * 16, "box", "/x", 1, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("ways", "v4", "v6"),
    [
        ([], "", ""),
        ([("a", 0, NONE)], "", ""),
        ([("a", 0, BOTH), ("b", 0, BOTH)], "a", "a"),
        ([("a", 0, V4), ("b", 0, V6)], "a", "b"),
        ([("a", 0, BOTH), ("b", 1, BOTH)], "b", "b"),
        ([("a", 0, BOTH), ("b", 1, V6)], "a", "b"),
        ([("a", 9, NONE), ("b", -1, V4), ("c", -2, BOTH)], "b", "c"),
        ([("a", 1, V4), ("b", 2, V4), ("c", 2, V4)], "b", ""),
    ],
)
def test_the_highest_that_leads_outside_has_it_and_of_equals_the_oldest(
    ways: list[tuple[str, int, frozenset[int]]], v4: str, v6: str
) -> None:
    given = [Way(*way) for way in ways]
    assert (lead(given, 4), lead(given, 6)) == (v4, v6)


def test_an_interface_is_put_in_and_taken_out_with_all_that_is_its_own() -> None:
    box = with_interface(with_interface(BOX, "e1", "eth0", 0), "e2", "eth1", 3)
    box = msgspec.structs.replace(box, lent={"e2": ("10.1.0.1",)})
    assert (box.endpoints, box.ifnames, priorities(box)) == (("e1", "e2"), ("eth0", "eth1"), (0, 3))
    rest = without(box, {"e2"})
    assert (rest.endpoints, rest.ifnames, rest.priorities, rest.lent) == (
        ("e1",), ("eth0",), (0,), {},
    )  # fmt: skip
    assert without(box, {"e3"}) is box


def test_a_default_goes_by_the_gateways_of_its_family_alone() -> None:
    box = msgspec.structs.replace(BOX, default="e1", default6="e2")
    gateways = ("10.1.0.1", "fd00:1::1", "10.2.0.1")
    assert led_by(box, "e1", gateways) == ("10.1.0.1", "10.2.0.1")
    assert led_by(box, "e2", gateways) == ("fd00:1::1",)
    assert led_by(box, "e3", gateways) == ()


def test_what_an_older_agent_stored_had_both_families_by_one_interface() -> None:
    old = msgspec.structs.replace(BOX, endpoints=("e1", "e2"), ifnames=("a", "b"), default="e2")
    assert renewed(old).default6 == "e2" and renewed(old).priorities == (0, 0)
    fresh = msgspec.structs.replace(old, priorities=(0, 1))
    assert renewed(fresh).default6 == "", "this one says that there is none"
    assert with_interface(old, "e3", "c", 1).priorities == (0, 0, 1)


@pytest.mark.parametrize(
    ("addresses", "gateways"),
    [
        (["10.1.0.5"], ("10.1.0.1",)),
        (["10.2.0.5"], ("10.2.0.1",)),
        (["10.2.0.5", "fd00::5"], ("10.2.0.1", "fd00::1")),
        (["10.2.0.5", "10.1.0.5"], ("10.1.0.1",)),
        (["fd00::5"], ("fd00::1",)),
        ([], ()),
    ],
)
def test_of_several_subnets_the_gateway_is_that_of_ones_own(
    addresses: list[str], gateways: tuple[str, ...]
) -> None:
    subnets = ("10.1.0.0/24", "10.2.0.0/24", "fd00::/64")
    network = Network("a" * 16, "net", "overlay", subnets, ("10.1.0.1", "10.2.0.1", "fd00::1"),
                      "", 7, 0, False, False, {}, {}, 0.0, "a" * 16)  # fmt: skip
    own = tuple(map(parse_address, addresses))
    assert reached(network, Endpoint("e", network.id, "one", b"", own)) == gateways
