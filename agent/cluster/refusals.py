"""Who is not let in, and why: counted, and told at a rate that nobody outside can drive up.

What stands opposite: front.py and server.py, which refuse; api/metrics.py, which shows the
counts (`vxmesh_peer_refused_total`); docs/events.md, which says what to do about each.
"""

from __future__ import annotations

import enum
import time
from collections import Counter, OrderedDict

from agent.core.ratelimit import Buckets
from agent.node import NodeState

# Of one address and reason an event at once, and then one in so long, with how many there were.
TELL_EVERY = 10.0  # s; who tries by hand sees each try or the next, the history keeps its length
# Of all addresses together: the history has room for 10,000 events, which must not be flushed
# within an hour by somebody with many addresses: 2 a second fill it in 80 minutes.
TELL_RATE, TELL_BURST = 2.0, 30.0
TOLD_MOST = 1024  # addresses and reasons remembered, some 200 bytes each


class Reason(enum.StrEnum):
    """Why; the label of the metric and the field of the event."""

    NO_CERTIFICATE = "no-certificate"
    FOREIGN = "foreign"
    EXPIRED = "expired"
    EARLY = "not-yet-valid"
    REMOVED = "removed"
    NAMELESS = "nameless"
    IMPOSTOR = "impostor"
    ABANDONED = "abandoned"
    NO_TLS = "no-tls"
    SLOW = "slow"
    RATE = "rate"
    BUSY = "busy"


TEXTS = {
    Reason.NO_CERTIFICATE: "it has no certificate",
    Reason.FOREIGN: "its certificate is of another cluster, or of a CA that is void",
    Reason.EXPIRED: "its certificate has expired",
    Reason.EARLY: "its certificate is not valid yet, or a clock is wrong",
    Reason.REMOVED: "it was removed from the cluster",
    Reason.NAMELESS: "its certificate names no node",
    Reason.IMPOSTOR: "it speaks for another node than its certificate names",
    Reason.ABANDONED: "it ended the handshake: it does not believe this node, or gave up",
    Reason.NO_TLS: "it does not speak TLS 1.3",
    Reason.SLOW: "it did not finish the handshake in time",
    Reason.RATE: "it tries too often",
    Reason.BUSY: "too many connections wait to be let in",
}


class Refusals:
    """What was refused since the start of this agent, by reason."""

    def __init__(self, node: NodeState) -> None:
        self.counts: Counter[str] = Counter({reason.value: 0 for reason in Reason})
        self._node = node
        # (address, reason) -> when it was last told (monotonic), and how many came since
        self._told: OrderedDict[tuple[str, Reason], tuple[float, int]] = OrderedDict()
        self._pace = Buckets(TELL_RATE, TELL_BURST)

    def note(
        self, reason: Reason, address: str, node: str = "", detail: str = "", tell: bool = True
    ) -> None:
        """Somebody at `address` was refused; `node` is the id that its certificate names.

        Without `tell` it is only counted.
        """
        self.counts[reason.value] += 1
        if not tell:
            return
        now = time.monotonic()
        when, since = self._told.pop((address, reason), (-TELL_EVERY, 0))
        told = now - when >= TELL_EVERY and self._pace.take("", now)
        self._told[address, reason] = (now, 0) if told else (when, since + 1)
        if len(self._told) > TOLD_MOST:
            self._told.popitem(last=False)
        if told:
            self._tell(reason, address, node, detail, since + 1)

    def _tell(self, reason: Reason, address: str, node: str, detail: str, count: int) -> None:
        name = self._name(node)
        who = f"{address} ({name})" if name else address
        message = f"refused {who}: {TEXTS[reason]}" + (f" ({detail})" if detail else "")
        if count > 1:
            message += f", {count} times"
        self._node.tell(
            "peer.refused",
            message,
            reason=reason.value,
            address=address,
            node=node,
            name=name,
            count=str(count),
        )

    def _name(self, node: str) -> str:
        removal = self._node.removals.get(node)
        return removal.name if removal else self._node.node_name(node) if node else ""
