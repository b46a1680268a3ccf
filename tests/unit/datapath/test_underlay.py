"""What a host tells of its routes, however many it has."""

from __future__ import annotations

from agent.core.bounds import ROUTES_MAX
from agent.datapath.underlay import widest


def test_of_a_routers_many_routes_the_widest_are_told_and_no_more_than_others_take() -> None:
    few = ["10.0.0.0/8", "fd00::/8", "192.168.7.0/24"]
    assert widest(few) == tuple(sorted(few))
    many = [f"10.{n // 256}.{n % 256}.0/24" for n in range(5000)]
    told = widest([*many, *few])
    assert len(told) == ROUTES_MAX and {"10.0.0.0/8", "fd00::/8"} <= set(told)
    assert list(told) == sorted(told)
