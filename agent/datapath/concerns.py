"""Whom it concerns that something failed: which caller, which network, or all.

What stands opposite: backlog.py holds what failed; reconciler.py tells.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.datapath.backlog import Failures
from agent.datapath.lans import HeldLan
from agent.datapath.networks import Held
from agent.drivers.base import DesiredState
from agent.errors import VxmeshError

HOLDS = ("tables", "wireguard", "everything")  # failures after which nothing is in force
WITHHOLDS = ("bridge", "rows")  # and those after which all but one network is


class Concerns:
    """The failures of one host, looked at from those who wait."""

    def __init__(self, desired: DesiredState, failures: Failures) -> None:
        self._desired, self._failures = desired, failures

    def failure_of(self, endpoint: str) -> VxmeshError | None:
        """What keeps an endpoint's port, or the network that it is in, from being there."""
        for (kind, vni, port), error in self._failures.items().items():
            whole = kind in WITHHOLDS
            network = (self._desired.bridge(vni) or self._desired.lan(vni)) if whole else None
            if port == endpoint or (network and endpoint in network.ports):
                return error
            if kind == "wireguard" and self._is_encrypted(endpoint):
                return error
        return None

    def withheld(
        self, held: Mapping[int, Held], lans: Mapping[int, HeldLan]
    ) -> dict[str, str] | None:
        """The networks (ids) that lack something, and why; None if what failed concerns all.

        `held` and `lans` are what there is by now. What is in one network's way (a device of
        somebody else's with its VNI) holds up just that one. A port that failed is its caller's
        to know, who asked `settle` for it. What concerns the host alone (a route of somebody
        else's in our way) holds up nobody; the rules hold up all, until a retry succeeds.
        """
        failures = self._failures.items()
        if any(kind in HOLDS for kind, _, _ in failures):
            return None
        withheld: dict[str, str] = {}
        for (kind, vni, _), error in failures.items():
            if kind not in WITHHOLDS:
                continue
            there, lan = held.get(vni), lans.get(vni)
            found = (
                self._desired.bridge(vni),
                self._desired.lan(vni),
                there.bridge if there else None,
                lan.lan if lan else None,
            )
            networks = {network.network for network in found if network}
            if not networks:
                return None  # nobody can tell whom it concerns: all
            for network in networks:
                withheld[network] = f"{error.what} {error.why}"
        return withheld

    def _is_encrypted(self, endpoint: str) -> bool:
        return any(
            bridge.encrypted and endpoint in bridge.ports
            for bridge in self._desired.bridges().values()
        )
