"""The networks of the cluster, which any node may write, as one view that all nodes share.

Each node keeps what it wrote under its own origin; of one network's records the one with the
highest (stamp, node id) counts, stamps being hybrid logical clocks (Kulkarni et al., 2014), so
all nodes that have the same records see the same networks. Of two networks that bear one name
the older keeps it; the other is shown with a piece of its id until somebody renames it.
What stands opposite: node.py writes the records, core/replica.py carries them.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.model import Network


def next_stamp(now: float, last: int) -> int:
    """A hybrid logical clock: milliseconds since the epoch, 16 bits to count within one.

    Never at or below `last`, the highest stamp written or seen here, even if the clock was
    set back.
    """
    return max(int(now * 1000) << 16, last + 1)


class Catalogue:
    """Every origin's network records, and the view that follows from them."""

    def __init__(self) -> None:
        self._written: dict[str, dict[str, Network]] = {}  # id -> origin -> what it wrote
        self._networks: dict[str, Network] = {}
        self._names: dict[str, str] = {}  # shown name -> id
        self._shown: dict[str, str] = {}  # id -> shown name
        self.stamp = 0  # the highest seen

    def put(self, origin: str, network: Network) -> set[str]:
        """Take a record; the ids of networks that look different now."""
        self.stamp = max(self.stamp, network.stamp)
        self._written.setdefault(network.id, {})[origin] = network
        return self._judge(network.id)

    def drop(self, origin: str, id: str) -> set[str]:
        """An origin withdrew its record; the ids of networks that look different now."""
        records = self._written.get(id, {})
        records.pop(origin, None)
        if not records:
            self._written.pop(id, None)
        return self._judge(id)

    def writers(self, id: str) -> set[str]:
        """The origins that have a record about this network."""
        return set(self._written.get(id, ()))

    def written(self, id: str) -> dict[str, Network]:
        """Origin -> what it wrote of this network, dead or alive."""
        return dict(self._written.get(id, {}))

    def get(self, id: str) -> Network | None:
        """A living network by its whole id."""
        return self._networks.get(id)

    def named(self, name: str) -> Network | None:
        """A living network by the name that it is shown under."""
        id = self._names.get(name)
        return self._networks[id] if id else None

    def name(self, id: str) -> str:
        """The name that a network is shown under; its id if it is not known."""
        return self._shown.get(id, id)

    def all(self) -> Iterable[Network]:
        """The living networks."""
        return self._networks.values()

    def vni_holders(self) -> dict[int, str]:
        """VNI -> id of the network that has it: of several, the oldest."""
        holders: dict[int, str] = {}
        for network in sorted(self._networks.values(), key=lambda n: (n.created, n.id)):
            holders.setdefault(network.vni, network.id)
        return holders

    def _judge(self, id: str) -> set[str]:
        records = self._written.get(id)
        best = max(records.items(), key=lambda r: (r[1].stamp, r[0]))[1] if records else None
        if best is not None and best.deleted:
            best = None
        old = self._networks.get(id)
        if best == old:
            return set()
        if best is None:
            del self._networks[id]
        else:
            self._networks[id] = best
        return {id} | self._rename({n.name for n in (old, best) if n})

    def _rename(self, names: set[str]) -> set[str]:
        changed = set()
        for name in names:
            same = [n for n in self._networks.values() if n.name == name]
            same.sort(key=lambda n: (n.created, n.id))
            for rank, network in enumerate(same):
                shown = name if rank == 0 else f"{name[:56]}-{network.id[:6]}"
                if self._shown.get(network.id) != shown:
                    changed.add(network.id)
                    self._shown[network.id] = shown
        for id in [id for id in self._shown if id not in self._networks]:
            del self._shown[id]
        self._names = {shown: id for id, shown in self._shown.items()}
        return changed
