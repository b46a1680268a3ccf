"""The tunables of failure detection, each with its formula and its price.

Times are seconds. n is how many nodes live, this one included; scale(n) = max(1, log10 n), so
that what must outlast the spreading of news grows as news takes longer to spread.
What stands opposite: core/membership.py lives by them, docs/detection.md explains the choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache


def scale(n: int) -> float:
    """1 up to 10 nodes, 2 at 100, 3 at 1,000."""
    return max(1.0, math.log10(n)) if n > 0 else 1.0


@lru_cache(maxsize=256)
def _transmissions(retransmit: float, n: int) -> int:
    return math.ceil(retransmit * math.log10(n + 1))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a node watches the others. `PRESETS` has values that belong together."""

    probe_interval: float
    """A node probes one other every `probe_interval * (1 + health)`. A silent node is first
    probed after about this long, whatever n. Price: 1/interval probes a node a second."""

    probe_timeout: float
    """Helpers are asked after `probe_timeout * scale(n) * (1 + health)` without an answer. It
    should be several round trips. Price of less: more helpers asked in vain; of more: less time
    for them, since a probe ends with its window."""

    suspicion_min: float
    """A suspicion that enough others confirm ends in DEAD after `suspicion_min * scale(n)`.
    The suspect must hear of it and be heard in that time. Price of more: later detection."""

    suspicion_max_factor: float = 3.0
    """One that nobody confirms ends after this many times the minimum. Price of more: later
    detection where nobody else can see the silent node; of less: one bad observer is believed."""

    confirmations: int = 3
    """K = min(this, ALIVE nodes that could confirm): the timeout falls from maximum to minimum
    as max - (max - min) * log(C + 1) / log(K + 1) with C confirmations; K = 0 is the minimum."""

    indirect_probes: int = 3
    """Helpers that are asked to probe a target that does not answer. Price: as many messages
    four times for each slow answer."""

    lenience: int = 3
    """A member that refuted a suspicion r times gets (1 + r) times the window, r up to this.
    Price: where it does die within the time below, that is found so many windows later."""

    lenience_decay: float = 30.0
    """One refutation is forgotten each so many s."""

    health_max: int = 8
    """Local health: 0 is well. Probe interval and timeout grow by (1 + health), the suspicions
    that we hold by (1 + health / 4). Price of more: an unwell node takes longer to recover."""

    gossip_interval: float = 0.2
    """Streams carry news at most this often; news after a pause leaves at once. Price of less:
    more and smaller messages while there is much news. A quiet cluster sends none."""

    gossip_fanout: int = 4
    """Streams that a turn of gossip goes to, in rotation. Price: as many messages a turn."""

    retransmit: float = 4.0
    """A piece of news is sent `ceil(retransmit * log10(n + 1))` times by each node, which should
    be no less than it has streams. Price: as many bytes; of less: nodes that it passes by."""

    agent_grace: float = 60.0
    """A host that answers without an agent stays REFUSED this long, then it is DEAD. Price of
    more: names of workloads whose host nobody looks after go on resolving."""

    dead_probe_turns: int = 10
    """With every min(this, max(1, n / 5))-th turn one of the DEAD is probed as well, so that two
    halves find each other again. Price: connection attempts that lead nowhere."""

    def timeout(self, n: int) -> float:
        """When helpers are asked."""
        return self.probe_timeout * scale(n)

    def window(self, n: int) -> float:
        """How long one probe may take in all, helpers included, while we are well: at least a
        retransmission of TCP (0.2 s) more in a cluster of hundreds, where a false accusation is
        told to hundreds, and little is lost because another node probes in the meantime."""
        return self.probe_interval * scale(n)

    def minimum(self, n: int) -> float:
        """The shortest that a suspicion lasts."""
        return self.suspicion_min * scale(n)

    def transmissions(self, n: int) -> int:
        """How often a node passes one piece of news on."""
        return _transmissions(self.retransmit, n)

    def dead_turns(self, n: int) -> int:
        """How many turns to probe there are to one that goes to the DEAD as well."""
        return min(self.dead_probe_turns, max(1, n // 5))


PRESETS: dict[str, Tuning] = {
    # Round trips below some 10 ms. Found dead in about 1.3 s by 3 to 5 nodes.
    "lan": Tuning(probe_interval=0.3, probe_timeout=0.1, suspicion_min=0.8),
    # Round trips of 200 ms and more. Found dead in about 5 s.
    "wan": Tuning(
        probe_interval=1.0,
        probe_timeout=0.4,
        suspicion_min=3.0,
        suspicion_max_factor=4.0,
    ),
    # All nodes on one machine: packets are fast, but whole agents wait for a processor.
    "local": Tuning(probe_interval=0.35, probe_timeout=0.12, suspicion_min=0.9),
}
