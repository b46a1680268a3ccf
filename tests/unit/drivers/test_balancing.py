"""Which backend each slot leads to: shares as the weights say, and few that move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.balancing import (
    DEVIATION,
    SPREAD_SIZES,
    STICKY_SIZES,
    Backend,
    Frontend,
    FrontendKey,
    assign,
    eligible,
    tokens,
)
from agent.drivers.marks import ASKED, UNTRACKED


def backends(*weights: int) -> list[Backend]:
    return [
        Backend(bytes([10, 0, i // 250, i % 250 + 2]), 80, weight, f"{i:016x}")
        for i, weight in enumerate(weights)
    ]


WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@pytest.mark.parametrize("count", [1, 3, 10, 16])
def test_a_few_equal_backends_have_one_slot_each(count: int) -> None:
    assert Counter(assign(backends(*[1] * count))) == {b.key: 1 for b in backends(*[1] * count)}


@given(WEIGHTS)
def test_shares_are_as_the_weights_say(weights: list[int]) -> None:
    able = backends(*weights)
    slots = assign(able)
    assert len(slots) in SPREAD_SIZES
    counts = Counter(slots)
    for backend in able:
        fair = len(slots) * backend.weight / sum(weights)
        assert abs(counts[backend.key] - fair) <= DEVIATION * fair + 1e-9


def test_with_very_unequal_weights_everybody_has_a_slot_of_the_largest_size() -> None:
    slots = assign(backends(1, *[1000] * 500))
    assert len(slots) == SPREAD_SIZES[-1]
    assert set(Counter(slots).values()) <= {0, 1, 8, 9}


@given(WEIGHTS, st.data())
def test_a_backend_that_goes_moves_its_own_slots_only(
    weights: list[int], data: st.DataObject
) -> None:
    able = backends(*weights, 1)
    gone = data.draw(st.sampled_from(able))
    before = assign(able)
    after = assign([b for b in able if b is not gone], before=before)
    if len(after) >= len(before):
        assert all(b == gone.key or a == b for a, b in zip(after, before, strict=False))
    else:  # and those that there are no longer
        lost = len(before) - len(after)
        moved = sum(a != b and b != gone.key for a, b in zip(after, before, strict=False))
        assert moved <= lost


@given(WEIGHTS)
def test_with_affinity_the_choice_does_not_depend_on_what_was_before(weights: list[int]) -> None:
    able = backends(*weights, 5)
    slots = assign(able, affinity=True)
    assert len(slots) in STICKY_SIZES
    assert slots == assign(list(reversed(able)), affinity=True, before=slots[::-1])
    without = assign(able[1:], affinity=True)
    if len(without) == len(slots):
        assert all(a == b or b == able[0].key for a, b in zip(without, slots, strict=True))


def test_with_affinity_shares_are_about_as_the_weights_say() -> None:
    counts = Counter(assign(backends(*[1] * 20, *[3] * 10), affinity=True))
    heavy = sum(counts[f"{i:016x}"] for i in range(20, 30))
    assert 0.5 < heavy / counts.total() < 0.7  # 0.6 is fair


def test_a_backends_token_is_its_own_and_the_same_whoever_else_is_there() -> None:
    many = backends(*[1] * 300)
    found = tokens(many)
    assert len({0, *found.values()}) == 301
    assert tokens(many[7:8]) == {many[7].key: found[many[7].key]}
    assert tokens(many[::-1]) == found


def test_two_backends_whose_hashes_are_one_have_tokens_of_their_own() -> None:
    keys = ("plumless", "buckeroo", "")  # the same CRC32; and that of nothing is 0
    assert crc32(b"plumless") == crc32(b"buckeroo") and crc32(b"") == 0
    found = tokens([Backend(b"", 80, 1, key) for key in keys])
    assert len({0, *found.values()}) == 4


@pytest.mark.parametrize("mark", [0, ASKED, UNTRACKED, 2**32 - 1])
def test_no_token_is_a_mark_of_ours(mark: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.drivers.balancing.zlib.crc32", lambda key: mark)
    found = set(tokens(backends(1, 1, 1)).values())
    assert len(found) == 3 and not found & {0, ASKED, UNTRACKED}


def test_who_drains_or_has_no_weight_gets_no_slot() -> None:
    one, two, three = backends(1, 1, 0)
    slots = assign([one, replace(two, draining=True), three])
    assert slots == (one.key,)
    assert assign([]) == assign([three]) == ()


def test_a_local_backend_is_preferred_only_where_that_is_asked_for_and_it_can() -> None:
    one, two = backends(1, 1)
    service = Frontend("s", "n", 7, "tcp", b"", 80, (one, two))
    local = frozenset({one.key})
    assert eligible(service, local) == (one, two)
    preferring = replace(service, prefer_local=True)
    assert eligible(preferring, local) == (one,)
    assert eligible(preferring) == (one, two)
    drains = replace(preferring, backends=(replace(one, draining=True), two))
    assert eligible(drains, local) == (two,)


def test_a_frontend_is_told_by_service_protocol_port_and_family() -> None:
    assert Frontend("s", "n", 7, "udp", b"", 53, ()).id == FrontendKey("s", "udp", 53, 4)
