"""How many connections each service has led to each of its backends from this host.

The kernel counts, an element for each service and backend; it is read when somebody asks. A
counter begins at nought again when the table is loaded anew, so what is kept here is how much
each rose. What was led at connect(2) has counters of its own, which are added.
What stands opposite: balancerules.py, whose set `counted` it is; socketbalancer.py; api/metrics.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from agent.datapath import balancerules
from agent.datapath.balancer import Balancer
from agent.datapath.socketbalancer import SocketBalancer

Pair = tuple[str, str]  # ids of a service and of an endpoint


class Tallies:
    """Those of one host."""

    def __init__(self, balancer: Balancer, sockets: SocketBalancer) -> None:
        self._balancer, self._sockets = balancer, sockets
        self._before: dict[int, Mapping[str, int]] = {}  # by IP version: element -> packets
        self._total: dict[tuple[int, str], int] = {}

    async def read(self) -> dict[Pair, int]:
        """Connections since the backend came, or this agent started. VxmeshError if the table is
        not there."""
        if self._balancer.is_idle:  # then there is no table
            self._before, self._total = {}, {}
        for version in () if self._balancer.is_idle else (4, 6):
            reading = await self._balancer.table.counted(f"counted{version}")
            before = self._before.get(version, {})
            self._before[version] = reading
            for element, value in reading.items():
                last, key = before.get(element, 0), (version, element)
                rise = value - last if value >= last else value
                self._total[key] = self._total.get(key, 0) + rise
        return self._by_pair()

    def _by_pair(self) -> dict[Pair, int]:
        elements: dict[Pair, set[tuple[int, str]]] = {}
        for frontend in self._balancer.frontends():
            for backend in frontend.backends:
                element = balancerules.counted(frontend.service, backend.address)
                pair = (frontend.service, backend.key)
                elements.setdefault(pair, set()).add((frontend.version, element))
        wanted = set().union(*elements.values())
        self._total = {key: count for key, count in self._total.items() if key in wanted}
        found: Counter[Pair] = Counter()
        led = self._sockets.counts()
        for pair, keys in elements.items():
            found[pair] = led[pair] + sum(self._total.get(key, 0) for key in keys)
        return dict(found)
