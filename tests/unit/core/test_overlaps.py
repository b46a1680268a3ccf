"""Overlapping subnets, beside the plain comparison of each with each."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from agent.core.overlaps import Overlaps, block

subnets = st.builds(
    lambda number, prefix: str(ipaddress.ip_network((number << 16, prefix), strict=False)),
    st.integers(0x0A00, 0x0A0F),
    st.integers(10, 30),
) | st.builds(
    lambda number, prefix: str(
        ipaddress.ip_network((0xFD << 120 | number << 60, prefix), strict=False)
    ),
    st.integers(0, 15),
    st.integers(48, 80),
)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), subnets), max_size=20), subnets, st.data())
def test_as_by_comparing_each_with_each(
    taken: list[tuple[str, str]], asked: str, data: st.DataObject
) -> None:
    taken = list(dict.fromkeys(taken))
    overlaps = Overlaps()
    for id, subnet in taken:
        overlaps.add(id, [subnet])
    gone = data.draw(st.lists(st.sampled_from(taken), unique=True)) if taken else []
    for id, subnet in gone:
        overlaps.discard(id, [subnet])
    wanted = ipaddress.ip_network(asked)
    expected = set()
    for id, subnet in taken:
        other = ipaddress.ip_network(subnet)
        met = other.version == wanted.version and other.overlaps(wanted)
        assert block(subnet).meets(block(asked)) == met
        if met and (id, subnet) not in gone:
            expected.add((subnet, id))
    assert overlaps.meeting(asked) == expected
