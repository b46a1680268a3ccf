"""Tells operators whose frames the guards dropped: which sandbox, how many, and why.

Of one who goes on and on it is told once a minute, so that what a sandbox does cannot fill the
events of a host.
What stands opposite: datapath/refusals.py, which reads the kernel's counters; docs/guards.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.node import NodeState

TELL_EVERY = 60.0  # s between two notices of one endpoint


@dataclass(slots=True)
class _Record:
    """What came of an endpoint since it was last told of."""

    told: float = float("-inf")
    spoofed: int = 0
    flooded: int = 0
    groups: int = 0
    reasons: set[str] = field(default_factory=set)


class Offences:
    """Of this node's endpoints."""

    def __init__(self, node: NodeState) -> None:
        self._node = node
        self._records: dict[str, _Record] = {}

    def note(
        self, endpoint: str, spoofed: int, flooded: int, reasons: Iterable[str], groups: int = 0
    ) -> None:
        """Take in how many frames of an endpoint were dropped, and why any were on this host.

        Of all, `flooded` were to its gateway and `groups` broadcast and multicast, beyond limits.
        """
        self._forget_gone()
        record = self._records.setdefault(endpoint, _Record())
        record.spoofed += spoofed
        record.flooded += flooded
        record.groups += groups
        record.reasons.update(reasons)
        now = self._node.clock()
        if now - record.told < TELL_EVERY:
            return
        self._tell(endpoint, record)
        self._records[endpoint] = _Record(told=now)

    def _tell(self, id: str, record: _Record) -> None:
        endpoint = self._node.local_endpoint(id)
        if endpoint is None:
            return  # it went, and everything of it
        sandbox = self._node.sandboxes.get(endpoint.sandbox)
        name = sandbox.name if sandbox else endpoint.name
        network = self._node.catalogue.name(endpoint.network)
        who = {"sandbox": name, "endpoint": id, "network": network}
        if record.spoofed:
            reasons = ",".join(sorted(record.reasons - {"gateway", "flood"}))
            self._node.tell(
                "guard.refused",
                f"sandbox {name} sent {record.spoofed} frames in network {network} that are not "
                f"its own to send; they were dropped ({reasons})",
                **who,
                count=str(record.spoofed),
                reasons=reasons,
            )
        if record.flooded:
            self._node.tell(
                "guard.flood",
                f"sandbox {name} asks its gateway in network {network} more than its share; "
                f"{record.flooded} packets were dropped",
                **who,
                count=str(record.flooded),
            )
        if record.groups:
            self._node.tell(
                "guard.broadcast",
                f"sandbox {name} sends more broadcast and multicast in network {network} than its "
                f"share; {record.groups} packets were dropped",
                **who,
                count=str(record.groups),
            )

    def _forget_gone(self) -> None:
        for id in [id for id in self._records if self._node.local_endpoint(id) is None]:
            del self._records[id]
