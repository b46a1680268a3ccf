"""What was put back without being asked for, counted by kind.

What stands opposite: reconciler.py tells of it once a pass; docs/datapath.md explains the kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# kind -> one and several of it, for people
KINDS = {
    "namespace": ("place of our namespace", "places of our namespace"),
    "bridge": ("bridge or VXLAN device", "bridges or VXLAN devices"),  # made anew
    "port": ("port", "ports"),  # made anew, or what the bridge does with it
    "link": ("device setting", "device settings"),  # up, MTU, master, MAC
    "address": ("address", "addresses"),  # of a bridge or of the uplink
    "route": ("route", "routes"),
    "fdb": ("FDB row", "FDB rows"),
    "neighbour": ("neighbour row", "neighbour rows"),
    "nft": ("nftables table", "nftables tables"),
    "bpf": ("eBPF program or map element", "eBPF programs or map elements"),
    "sysctl": ("sysctl", "sysctls"),
    "wireguard": ("WireGuard device", "WireGuard devices"),  # made anew, or its peers
}


@dataclass(frozen=True, slots=True)
class Repair:
    """What one pass put back of one kind."""

    kind: str
    count: int
    networks: frozenset[str]  # ids; empty: of the host as a whole

    def describe(self, names: Sequence[str]) -> str:
        """A sentence for people; `names` are those of the networks."""
        what = KINDS[self.kind][self.count != 1]
        where = f" of network {names[0]}" if len(names) == 1 else ""
        if len(names) > 1:
            where = f" of {len(names)} networks"
        return f"{self.count} {what}{where} put back"


class Repairs:
    """Counts, since the start and since they were last taken."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._new: Counter[str] = Counter()
        self._networks: dict[str, set[str]] = {}

    def add(self, kind: str, count: int = 1, network: str = "") -> None:
        """So many of a kind of KINDS, of the network with this id."""
        assert kind in KINDS, kind
        if count:
            self.total[kind] += count
            self._new[kind] += count
            held = self._networks.setdefault(kind, set())
            held.update([network] if network else [])

    def take(self) -> list[Repair]:
        """What came since the last time."""
        found = [Repair(k, n, frozenset(self._networks[k])) for k, n in self._new.items()]
        self._new.clear()
        self._networks.clear()
        return found

    def clear(self) -> None:
        """Forget all: it was not drift."""
        self.total.clear()
        self.take()
