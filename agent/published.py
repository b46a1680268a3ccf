"""The published ports of this node's sandboxes, and where each leads: kept as the node changes.

What stands opposite: plan.py, which has the rules loaded anew when one leads elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.drivers.base import Forward
from agent.lanmodel import is_bridged
from agent.model import Sandbox
from agent.node import NodeState
from agent.notation import format_address, holds
from agent.views import Change

Apart = Mapping[str, frozenset[str]]  # network -> those of its subnets that lead to another here


class Published:
    """Those of one node."""

    def __init__(self, node: NodeState, apart: Apart) -> None:
        self._node = node
        self._forwards: dict[str, tuple[Forward, ...]] = {}  # by sandbox
        self.changed(Change(sandboxes=set(node.sandboxes)), apart)

    def changed(self, change: Change, apart: Apart, all: bool = False) -> bool:
        """Take in a change of the node, or look at `all`; whether any port leads elsewhere now."""
        sandboxes = self._node.sandboxes
        looked_at: set[str] = set(change.sandboxes)
        if all or change.networks:
            looked_at = sandboxes.keys() | self._forwards.keys()
        looked_at.update(endpoint.sandbox for endpoint in change.inhabited(self._node.me))
        is_other = False
        for id in looked_at:
            sandbox = sandboxes.get(id)
            found = self._find(sandbox, apart) if sandbox else ()
            if found != self._forwards.pop(id, ()):
                is_other = True
            if found:
                self._forwards[id] = found
        return is_other

    def all(self) -> tuple[Forward, ...]:
        """To the addresses of the endpoints that have the default routes, by which the answers
        go; in the order of the sandboxes, as of two that publish one port the first has it."""
        forwards = self._forwards
        if not forwards:
            return ()
        return tuple(f for id in self._node.sandboxes for f in forwards.get(id, ()))

    def _find(self, sandbox: Sandbox, apart: Apart) -> tuple[Forward, ...]:
        if not sandbox.publishes:
            return ()
        addresses = [
            *self._addresses(sandbox.default, 4, apart),
            *self._addresses(sandbox.default6, 16, apart),
        ]
        return tuple(
            Forward(publish, text)
            for publish in sandbox.publishes
            for text in addresses
            if not publish.host_address or (":" in publish.host_address) == (":" in text)
        )

    def _addresses(self, id: str, width: int, apart: Apart) -> list[str]:
        """An endpoint's addresses of `width` bytes to which published ports can lead."""
        endpoint = self._node.local_endpoint(id)
        held = self._node.catalogue.get(endpoint.network) if endpoint else None
        if endpoint is None or held is None or not is_bridged(held):
            return []  # a plugin publishes ports itself, and a LAN needs none
        elsewhere = apart.get(endpoint.network, ())  # here these lead to another network
        return [
            format_address(address)
            for address in endpoint.addresses
            if len(address) == width and not (elsewhere and holds(elsewhere, address))
        ]
