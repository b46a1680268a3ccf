"""What belongs into the maps of the programs at connect(2), and what a change of it costs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from agent.datapath import socketmaps
from agent.datapath.balancerules import Placed
from agent.datapath.bpfasm import MapSpec
from agent.datapath.socketmaps import (
    WRITTEN,
    Changes,
    Contents,
    Elements,
    count,
    difference,
    mark,
    shape,
)
from agent.datapath.socketprograms import FRONTEND, MAPS, SLOT
from agent.drivers.balancing import Backend, Frontend, FrontendKey, assign, eligible
from agent.drivers.marks import ASKED, LED, LED_MASK, UNTRACKED
from agent.notation import parse_address

BACKENDS = tuple(Backend(parse_address(f"10.1.0.{n}"), 8080, 1, f"{n:016x}") for n in range(2, 12))
ONE, TWO = BACKENDS[:2]
HTTP = Frontend("a", "n", 7, "tcp", parse_address("10.1.0.100"), 80, (ONE, TWO))
SUBNETS = ("10.1.0.0/24", "10.2.0.0/24", "fd00:1::/64")


def place(frontend: Frontend, before: Iterable[str] = (), **options: frozenset[str]) -> Placed:
    able = eligible(frontend, options.get("local", frozenset()))
    return Placed(frontend, assign(able, frontend.affinity > 0, tuple(before)))


class Maps:
    """Maps of a kernel that has been told what changed."""

    def __init__(self) -> None:
        self.there: dict[str, Elements] = {name: {} for name in WRITTEN}

    def take(self, changes: Changes) -> None:
        for name in WRITTEN:
            self.there[name] |= changes.come[name]
            self.sound()
        for name in reversed(WRITTEN):
            for key in changes.gone[name]:
                self.there[name].pop(key, None)  # one that came and went at once never was there
            self.sound()

    def sound(self) -> None:
        """No frontend leads to a slot that is not there, whatever has been told so far."""
        for value in self.there["frontends"].values():
            _, number, size, _ = FRONTEND.unpack(value)
            assert size and all(SLOT.pack(number, s) in self.there["slots"] for s in range(size))


@pytest.mark.parametrize(
    "frontend",
    [
        replace(HTTP, protocol="udp"),
        replace(HTTP, address=b"", published=((b"", 80),)),
        replace(HTTP, affinity=60.0),
        replace(HTTP, backends=()),
        replace(HTTP, backends=(replace(ONE, draining=True), replace(TWO, weight=0))),
        replace(HTTP, backends=(ONE, replace(TWO, outside=True))),
        replace(HTTP, backends=(ONE, replace(TWO, address=parse_address("10.2.0.3")))),
        replace(HTTP, address=parse_address("10.9.0.100")),
    ],
)
def test_what_is_left_to_the_rules(frontend: Frontend) -> None:
    contents = Contents()
    changes = contents.alter({frontend.id: shape(place(frontend), SUBNETS)})
    assert not changes.come["frontends"] and not changes.come["slots"]


def test_a_subnet_that_leads_elsewhere_on_this_host_is_left_to_the_rules() -> None:
    made = shape(place(HTTP), SUBNETS[1:])
    assert made and not made.slots


def test_drains_weights_and_prefer_local_are_those_of_the_rules() -> None:
    for frontend in (
        replace(HTTP, backends=(replace(ONE, draining=True), TWO)),
        replace(HTTP, backends=(ONE, replace(TWO, weight=3))),
        replace(HTTP, prefer_local=True),
    ):
        placed = place(frontend, local=frozenset([TWO.key]))
        made = shape(placed, SUBNETS)
        assert made and tuple(key for key, _ in made.slots) == placed.slots
        assert made.backends == (ONE.key, TWO.key), "those that drain are counted too"


def test_one_backend_changed_costs_its_own_slots() -> None:
    contents, maps = Contents(), Maps()
    ten = replace(HTTP, backends=BACKENDS)
    before = place(ten)
    maps.take(contents.alter({ten.id: shape(before, SUBNETS)}))
    moved = (replace(ONE, port=9090), *BACKENDS[1:])
    after = place(replace(ten, backends=moved), before.slots)
    changes = contents.alter({ten.id: shape(after, SUBNETS)})
    assert (len(changes.come["slots"]), changes.come["frontends"]) == (1, {})
    assert not any(changes.gone.values()) and not changes.counted_anew
    maps.take(changes)
    assert maps.there == contents.wanted
    told_twice = contents.alter({ten.id: shape(after, SUBNETS)})
    assert not count(told_twice)


def test_who_claims_one_vip_and_port_by_mistake_waits_for_the_other() -> None:
    contents, maps = Contents(), Maps()
    second = replace(HTTP, service="b", backends=(TWO,))
    both = {f.id: shape(place(f), SUBNETS) for f in (second, HTTP)}
    maps.take(contents.alter(both))
    (value,) = maps.there["frontends"].values()
    assert FRONTEND.unpack(value)[2] == 2, "that of the lower key"
    sticky = replace(HTTP, affinity=60.0)
    maps.take(contents.alter({HTTP.id: shape(place(sticky), SUBNETS)}))
    assert maps.there["frontends"] == {}, "the rules lead to it too"
    maps.take(contents.alter({HTTP.id: None}))
    (value,) = maps.there["frontends"].values()
    assert FRONTEND.unpack(value)[2] == 1


def test_sandboxes_come_and_go_by_network() -> None:
    contents, maps = Contents(), Maps()
    maps.take(contents.admit([(1, 7), (1, 8), (2, 7)]))
    assert len(maps.there["sandboxes"]) == 5  # each network, and that they are ours
    changes = contents.admit([(1, 7)])
    maps.take(changes)
    assert len(maps.there["sandboxes"]) == 2
    assert not count(contents.admit([(1, 7), (1, 7)]))


def test_numbers_are_not_used_again_but_those_of_tallies_which_begin_anew() -> None:
    contents = Contents()
    contents.alter({HTTP.id: shape(place(HTTP), SUBNETS)})
    numbers = contents.numbers()
    (first,) = contents.wanted["frontends"].values()
    contents.alter({HTTP.id: None})
    assert not contents.numbers() and not any(contents.wanted.values())
    changes = contents.alter({HTTP.id: shape(place(HTTP), SUBNETS)})
    (second,) = contents.wanted["frontends"].values()
    assert FRONTEND.unpack(first)[1] != FRONTEND.unpack(second)[1]
    assert contents.numbers().keys() == numbers.keys() == set(changes.counted_anew)


def test_what_has_no_room_is_left_to_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"slots": 3, "frontends": 9, "tallies": 1, "sandboxes": 4}
    maps = {n: MapSpec(s.kind, s.key, s.value, small.get(n, 0)) for n, s in MAPS.items()}
    monkeypatch.setattr(socketmaps, "MAPS", maps)
    contents = Contents()
    second = replace(HTTP, service="b", address=parse_address("10.1.0.101"))
    contents.alter({f.id: shape(place(f), SUBNETS) for f in (HTTP, second)})
    assert len(contents.wanted["frontends"]) == 1 and contents.is_full
    assert len(contents.numbers()) == 1
    contents.admit([(n, 7) for n in range(9)])
    assert len(contents.wanted["sandboxes"]) == 4
    one = replace(second, backends=(ONE,))
    contents.alter({second.id: shape(place(one), SUBNETS)})
    assert len(contents.wanted["frontends"]) == 2


def test_marks_are_ours_and_no_others() -> None:
    marks = {mark(parse_address(f"10.1.{n // 250}.{n % 250}"), 80) for n in range(1000)}
    assert len(marks) > 990
    assert all(m & LED_MASK == LED and not m & 0x80000000 for m in marks)
    assert {UNTRACKED & LED_MASK, ASKED & LED_MASK}.isdisjoint({LED})
    assert mark(parse_address("10.1.0.1"), 80) != mark(parse_address("10.1.0.1"), 81)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_in_whatever_order_the_maps_are_as_if_told_at_once(seed: int) -> None:
    chance = random.Random(seed)
    contents, maps = Contents(), Maps()
    known: dict[FrontendKey, Placed] = {}
    for _ in range(60):
        shapes: dict[FrontendKey, socketmaps.Shape | None] = {}
        for service in chance.sample("abcdef", chance.randint(1, 3)):
            backends = chance.sample(BACKENDS, chance.randint(0, 10))
            frontend = replace(
                HTTP,
                service=service,
                address=parse_address(f"10.1.0.{chance.choice((100, 101, 102))}"),
                affinity=chance.choice((0.0, 0.0, 0.0, 60.0)),
                backends=tuple(
                    sorted(
                        (replace(b, weight=chance.randint(0, 3), draining=chance.random() < 0.2)
                         for b in backends),
                        key=lambda b: b.key,
                    )
                ),
            )  # fmt: skip
            old = known.pop(frontend.id, None)
            if chance.random() < 0.8:
                known[frontend.id] = place(frontend, old.slots if old else ())
            shapes[frontend.id] = (
                shape(known[frontend.id], SUBNETS) if frontend.id in known else None
            )
        maps.take(contents.alter(shapes))
        maps.take(contents.admit((chance.randint(1, 5), chance.choice((7, 8))) for _ in range(3)))
        assert maps.there == contents.wanted
        damaged = {name: dict(held) for name, held in maps.there.items()}
        for name, held in damaged.items():
            for key in chance.sample(sorted(held), min(2, len(held))):
                held[key] = bytes(len(held[key]))
            held[bytes(MAPS[name].key)] = bytes(MAPS[name].value)
        again = Maps()
        again.there = damaged
        mending = difference(contents.wanted, damaged)
        for name in WRITTEN:
            again.there[name] |= mending.come[name]
        for name in WRITTEN:
            for key in mending.gone[name]:
                del again.there[name][key]
        assert again.there == contents.wanted
    for entry in {s.entry for p in known.values() if (s := shape(p, SUBNETS))}:
        claims = {k: s for k, p in known.items() if (s := shape(p, SUBNETS)) and s.entry == entry}
        assert (entry in contents.wanted["frontends"]) == bool(claims[min(claims)].slots)
