"""What two nodes wrote at once: one verdict everywhere, whatever came first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.catalogue import VNI_MIN_CHOSEN, Catalogue, Conflict, free_vni, give_way
from agent.model import VNI_MAX, Loss, Network

WRITERS = ("1" * 16, "2" * 16, "3" * 16)


def network(id: str, name: str = "web", vni: int = 500, **fields: object) -> Network:
    values: dict[str, object] = {"subnets": (f"10.{int(id[:2], 16)}.0.0/24",), "born": 1}
    values |= fields
    subnets: tuple[str, ...] = values.pop("subnets")  # type: ignore[assignment]
    gateways = tuple("10.0.0.1" for _ in subnets)
    return Network(id * (16 // len(id)), name, "overlay", subnets, gateways, "", vni, 0, False,
                   False, {}, {}, 0.0, WRITERS[0], **values)  # type: ignore[arg-type]  # fmt: skip


def view(catalogue: Catalogue) -> object:
    return (
        {n.id: n for n in catalogue.all()},
        {n.name: catalogue.named(n.name) for n in catalogue.all()},
        catalogue.conflicts(),
        sorted(catalogue.overlapping()),
        list(catalogue.unsettled()),
    )


records = st.builds(
    lambda id, name, vni, subnet, born, stamp, deleted: network(
        id,
        name,
        vni,
        subnets=(subnet,),
        born=born,
        stamp=stamp,
        deleted=deleted,
    ),
    st.sampled_from(["0a", "0b", "0c", "0d"]),
    st.sampled_from(["web", "db", "web-0b0b0b"]),
    st.sampled_from([500, 600, free_vni("0b" * 8, ())]),
    st.sampled_from(["10.0.0.0/16", "10.0.1.0/24", "10.0.1.128/25", "10.9.0.0/24"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([False, False, False, True]),
)
writes = st.tuples(st.sampled_from(WRITERS), records)


@settings(max_examples=200)
@given(st.lists(writes, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_order_in_which_records_come_never_matters(
    written: list[tuple[str, Network]], rng: random.Random
) -> None:
    # Of one origin and id the later write replaces the earlier: that order is the replica's.
    last = {(origin, n.id): n for origin, n in written}
    catalogues = []
    for _ in range(3):
        items = list(last.items())
        rng.shuffle(items)
        catalogue = Catalogue()
        for (origin, id), found in items:
            if rng.random() < 0.5:  # something else of that origin came first
                catalogue.put(origin, network(id[:2], "other", 7, born=rng.randint(1, 3)))
            if rng.random() < 0.2:
                catalogue.drop(origin, id)
            changed = catalogue.put(origin, found)
            for each in changed:
                assert catalogue.get(each) != changed[each]
        catalogues.append(catalogue)
    first = view(catalogues[0])
    for other in catalogues[1:]:
        assert view(other) == first
    living = list(catalogues[0].all())
    assert len({n.name for n in living}) == len({n.vni for n in living}) == len(living)


def test_the_older_keeps_name_and_vni_and_the_other_goes_on_with_its_own() -> None:
    catalogue = Catalogue()
    old, young = network("0b", born=1), network("0a", born=2)
    assert catalogue.put(WRITERS[0], young) == {young.id: None}
    assert catalogue.put(WRITERS[1], old) == {old.id: None, young.id: young}
    assert catalogue.named("web") == catalogue.get(old.id) == old
    shown = catalogue.get(young.id)
    assert shown and shown.name == "web-0a0a0a" and shown.vni == free_vni(young.id, {500})
    assert shown.vni >= VNI_MIN_CHOSEN
    assert shown.lost == (Loss("name", "web", old.id), Loss("vni", "500", old.id))
    assert catalogue.conflicts() == {
        Conflict(young.id, old.id, "name", "web"),
        Conflict(young.id, old.id, "vni", "500"),
    }
    # As its creator then writes it, it looks the same, and is the same when the winner is gone.
    assert catalogue.put(WRITERS[0], shown) == {}
    assert list(catalogue.unsettled()) == []
    assert catalogue.drop(WRITERS[1], old.id) == {old.id: old}
    assert catalogue.get(young.id) == shown
    assert catalogue.conflicts() == set()


def test_of_equally_old_ones_the_smaller_id_wins() -> None:
    catalogue = Catalogue()
    catalogue.put(WRITERS[0], network("0b"))
    catalogue.put(WRITERS[0], network("0a"))
    found = catalogue.named("web")
    assert found and found.id == "0a" * 8


def test_records_without_a_birth_are_as_old_as_their_wall_clock_says() -> None:
    catalogue = Catalogue()
    catalogue.put(WRITERS[0], network("0a", born=(5 << 16) + 1))  # 5 ms after the epoch
    catalogue.put(WRITERS[0], network("0b", born=0))  # created at 0.0
    found = catalogue.named("web")
    assert found and found.id == "0b" * 8


@pytest.mark.parametrize("stamp", [0, 1, 1 << 60])
def test_a_deletion_is_final_whatever_its_stamp(stamp: int) -> None:
    catalogue = Catalogue()
    catalogue.put(WRITERS[0], network("0a", stamp=1))
    catalogue.put(WRITERS[1], network("0a", stamp=stamp, deleted=True))
    assert list(catalogue.all()) == []
    assert catalogue.put(WRITERS[0], network("0a", "renamed", stamp=1 << 61)) == {}
    assert list(catalogue.all()) == []


def test_a_name_that_looks_like_a_losers_is_its_owners() -> None:
    catalogue = Catalogue()
    catalogue.put(WRITERS[0], network("0b", born=1))
    catalogue.put(WRITERS[0], network("0a", born=2, vni=501))
    catalogue.put(WRITERS[0], network("0c", "web-0a0a0a", born=3, vni=502))
    assert catalogue.name("0c" * 8) == "web-0a0a0a"
    assert catalogue.name("0a" * 8) == "web-0a0a0a0a"


def test_a_long_name_stays_a_dns_label() -> None:
    catalogue = Catalogue()
    for id in ("0a", "0b"):
        catalogue.put(WRITERS[0], network(id, "n" * 63, vni=int(id, 16)))
    assert sorted(len(n.name) for n in catalogue.all()) == [63, 63]


def test_a_search_for_a_free_vni_goes_round() -> None:
    id = next(id for id in map(str, range(100_000)) if free_vni(id, ()) > VNI_MAX - 5000)
    first = free_vni(id, ())
    assert free_vni(id, range(first, first + 10)) == first + 10
    assert free_vni(id, range(first, VNI_MAX + 1)) == VNI_MIN_CHOSEN


def test_overlaps_are_told_of_both_sides() -> None:
    catalogue = Catalogue()
    wide = network("0a", "wide", 1, subnets=("10.1.0.0/16",), born=1)
    part = network("0b", "part", 2, subnets=("10.1.7.0/24", "fd00::/64"), born=2)
    catalogue.put(WRITERS[0], part)
    catalogue.put(WRITERS[0], wide)
    conflict = Conflict(part.id, wide.id, "subnet", "10.1.7.0/24")
    assert catalogue.conflicts_of(wide.id) == catalogue.conflicts_of(part.id) == [conflict]
    assert catalogue.get(part.id) == part, "nothing about the network itself changes"
    catalogue.drop(WRITERS[0], wide.id)
    assert not catalogue.overlap(part.id)
    assert catalogue.conflicts() == set()


def test_on_one_host_the_oldest_of_overlapping_networks_has_the_way_out() -> None:
    oldest = network("0a", subnets=("10.1.0.0/24",), born=1)
    wide = network("0b", subnets=("10.1.0.0/16", "fd00::/64"), born=2)
    other = network("0c", subnets=("10.1.7.0/24",), born=3)
    assert give_way([other, wide, oldest]) == {wide.id: frozenset({"10.1.0.0/16"})}
    assert give_way([other, wide]) == {other.id: frozenset({"10.1.7.0/24"})}
    assert give_way([wide]) == give_way([]) == {}
