"""What one record of another node may hold: each bound at its value, and one step past it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from agent.core.bounds import (
    ADDRESSES_MAX,
    INCARNATION_MAX,
    LOSSES_MAX,
    NARROW_MAX,
    POOL_MAX,
    ROUTES_MAX,
    SEGMENTS_MAX,
    SUBNETS_MAX,
    TEXT_MAX,
    TIME_MAX,
    UNDERLAY_MTU_MAX,
    UNDERLAY_MTU_MIN,
    check_bounds,
    clip_time,
)
from agent.errors import VxmeshError
from agent.model import (
    ALIASES_MAX,
    Claims,
    Endpoint,
    Ipam,
    Loss,
    Narrow,
    Network,
    Node,
    Removal,
    Segment,
)
from agent.notation import LABEL_BYTES_MAX, LABELS_MAX

ID = "a" * 16
NODE = Node(ID, "h1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0.1.0", 1.7e9, 1500)
NETWORK = Network(ID, "web", "overlay", ("10.1.0.0/24",), ("10.1.0.1",), "", 4096, 0, False, False,
                  {}, {}, 1.7e9, ID)  # fmt: skip
ENDPOINT = Endpoint(ID, ID, "one", b"\2\0^\0S\1", (b"\n\1\0\2",))
REMOVAL = Removal(ID, "h1", ID, 0, 1.7e9, "h2")
SEGMENT = Segment(4, b"\n\1\0\0", b"\n\1\0\1", ID, 0)
LOSS = Loss("name", "web", ID)
NARROW = tuple(Narrow(f"n{number}", 1400) for number in range(NARROW_MAX + 1))


def labels(count: int, size: int = 1) -> dict[str, str]:
    return {f"k{number}": "v" * size for number in range(count)}


def subnets(count: int) -> dict[str, tuple[str, ...]]:
    return {
        "subnets": tuple(f"10.{n}.0.0/24" for n in range(count)),
        "gateways": tuple(f"10.{n}.0.1" for n in range(count)),
    }


# The most that is taken, and what is not any more.
PAIRS: list[tuple[msgspec.Struct, dict[str, Any], dict[str, Any]]] = [
    (ENDPOINT, {"addresses": (b"\n\1\0\2",) * ADDRESSES_MAX},
     {"addresses": (b"\n\1\0\2",) * (ADDRESSES_MAX + 1)}),
    (ENDPOINT, {"aliases": ("a",) * ALIASES_MAX}, {"aliases": ("a",) * (ALIASES_MAX + 1)}),
    (ENDPOINT, {"labels": labels(LABELS_MAX)}, {"labels": labels(LABELS_MAX + 1)}),
    (ENDPOINT, {"labels": labels(1, LABEL_BYTES_MAX)}, {"labels": labels(1, LABEL_BYTES_MAX + 1)}),
    (ENDPOINT, {"name": "a" * 63}, {"name": "a" * 64}),
    (ENDPOINT, {"name": "one"}, {"name": "One"}),
    (ENDPOINT, {"name": "one"}, {"name": "one\x1b[2J"}),
    (ENDPOINT, {"aliases": ("a-b",)}, {"aliases": ("a.b",)}),
    (ENDPOINT, {"aliases": ("a_b",)}, {"aliases": ("_a",)}),
    (ENDPOINT, {"aliases": ("a_b",)}, {"aliases": ("A_b",)}),
    (ENDPOINT, {"mac": b"\2\0\0\0\0\0"}, {"mac": bytes(6)}),
    (ENDPOINT, {"mac": b"\xfe\0\0\0\0\0"}, {"mac": b"\xff" * 6}),
    (ENDPOINT, {"network": "a" * 64}, {"network": "a" * 65}),
    (ENDPOINT, {"sandbox": "b" * 16}, {"sandbox": "b\n"}),
    (NETWORK, subnets(SUBNETS_MAX), subnets(SUBNETS_MAX + 1)),
    (NETWORK, {"gateways": ("10.1.0.254",)}, {"gateways": ("8.8.8.8",)}),
    (NETWORK, {}, {"subnets": ("127.0.0.0/8",), "gateways": ("127.0.0.1",)}),
    (NETWORK, {"labels": labels(LABELS_MAX)}, {"labels": labels(LABELS_MAX + 1)}),
    (NETWORK, {"options": labels(LABELS_MAX)}, {"options": labels(LABELS_MAX + 1)}),
    (NETWORK, {"lost": (LOSS,) * LOSSES_MAX}, {"lost": (LOSS,) * (LOSSES_MAX + 1)}),
    (NETWORK, {"lost": (Loss("vni", "7", ID),)}, {"lost": (Loss("subnet", "x", ID),)}),
    (NETWORK, {"driver": "d" * TEXT_MAX}, {"driver": "d" * (TEXT_MAX + 1)}),
    (NETWORK, {"ipam": Ipam("p", ("x" * POOL_MAX,), "")},
     {"ipam": Ipam("p", ("x" * (POOL_MAX + 1),), "")}),
    (NETWORK, {"ipam": Ipam("p", ("x",), "s" * POOL_MAX)},
     {"ipam": Ipam("p", ("x",), "s" * (POOL_MAX + 1))}),
    (NETWORK, {"ipam": Ipam("p", ("x",), "", labels(LABELS_MAX))},
     {"ipam": Ipam("p", ("x",), "", labels(LABELS_MAX + 1))}),
    (NETWORK, {"ipam": Ipam("p", ("x",), "")}, {"ipam": Ipam("p\n", ("x",), "")}),
    (NETWORK, {"created": TIME_MAX}, {"created": TIME_MAX * 2}),
    (NETWORK, {"created": 0.0}, {"created": math.nan}),
    (NODE, {"routes": ("10.0.0.0/8",) * ROUTES_MAX},
     {"routes": ("10.0.0.0/8",) * (ROUTES_MAX + 1)}),
    (NODE, {"narrow": NARROW[:-1]}, {"narrow": NARROW}),
    (NODE, {"narrow": (Narrow("n", 576),)}, {"narrow": (Narrow("n", 575),)}),
    (NODE, {"narrow": (Narrow("n", 576),)}, {"narrow": (Narrow("a b", 576),)}),
    (NODE, {"mtu": UNDERLAY_MTU_MIN}, {"mtu": UNDERLAY_MTU_MIN - 1}),
    (NODE, {"mtu": 0}, {"mtu": -1}),
    (NODE, {"mtu": UNDERLAY_MTU_MAX}, {"mtu": UNDERLAY_MTU_MAX + 1}),
    (NODE, {"incarnation": INCARNATION_MAX}, {"incarnation": INCARNATION_MAX + 1}),
    (NODE, {"since": 0.0}, {"since": math.inf}),
    (NODE, {"version": "1.0"}, {"version": "1.0\x1b[31m"}),
    (NODE, {"name": "h1"}, {"name": "h 1"}),
    (REMOVAL, {"when": 1.0}, {"when": -1.0}),
    (REMOVAL, {"by_name": "h2"}, {"by_name": "h2\n"}),
    (REMOVAL, {"by": ID}, {"by": "a b"}),
    (Claims(ID, ()), {"segments": (SEGMENT,) * SEGMENTS_MAX},
     {"segments": (SEGMENT,) * (SEGMENTS_MAX + 1)}),
    (Claims(ID, ()), {"segments": (SEGMENT,)},
     {"segments": (msgspec.structs.replace(SEGMENT, owner="a\x07"),)}),
]  # fmt: skip


@pytest.mark.parametrize(("value", "most", "more"), PAIRS)
def test_a_record_may_hold_that_much_and_no_more(
    value: msgspec.Struct, most: dict[str, Any], more: dict[str, Any]
) -> None:
    check_bounds(msgspec.structs.replace(value, **most))
    with pytest.raises((VxmeshError, ValueError)):
        check_bounds(msgspec.structs.replace(value, **more))


def test_a_time_that_has_no_date_becomes_the_nearest_that_has_one() -> None:
    assert [clip_time(t) for t in (-1.0, 5.0, 1e300, math.inf, math.nan)] == [
        0.0, 5.0, TIME_MAX, 0.0, 0.0,
    ]  # fmt: skip
