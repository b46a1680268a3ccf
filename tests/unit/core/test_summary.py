"""A digest in 64 numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.summary import BUCKETS, Summarizer, bucket, differing

ENTRY = st.tuples(st.integers(0, 1 << 60), st.integers(0, 1 << 60))
DIGEST = st.dictionaries(st.text(min_size=1, max_size=8), ENTRY, max_size=40)


@given(st.lists(DIGEST, min_size=1, max_size=5))
def test_what_was_kept_up_to_date_is_as_if_made_anew(
    digests: list[dict[str, tuple[int, int]]],
) -> None:
    kept = Summarizer()
    for digest in digests:
        assert kept.update(digest) == Summarizer().update(digest)


@given(DIGEST, DIGEST)
def test_just_the_buckets_differ_in_which_something_does(
    a: dict[str, tuple[int, int]], b: dict[str, tuple[int, int]]
) -> None:
    wanted = 0
    for origin in {*a, *b}:
        if a.get(origin, (0, 0))[0] != b.get(origin, (0, 0))[0]:
            wanted |= 1 << bucket(origin)
    assert differing(Summarizer().update(a), Summarizer().update(b)) == wanted


def test_origins_spread_over_the_buckets() -> None:
    assert {bucket(f"{n:016x}") for n in range(1000)} == set(range(BUCKETS))
