"""The guard of the sandboxes' ports, in the kernel: what guardrules.py says, kept so.

A port is put in before its device is made and taken out after that is gone. The table outlives
the agent; the next one replaces it whole, in one transaction, with all the ports that there are
to be, so that no frame passes unseen in between and none is lost.
What stands opposite: applier.py, which says when; refusals.py, which reads what was dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from agent.datapath import guardrules, nft
from agent.datapath.guardrules import GUARD_TABLE, Keys
from agent.datapath.nftables import LIBRARY, Nftables
from agent.drivers.base import Bridge, Closed, Port
from agent.errors import VxmeshError


class _Held(NamedTuple):
    """What an endpoint has in the sets."""

    vni: int
    port: Port
    of: object  # what else the elements follow from, of its bridge
    keys: Keys


class _Admitted(NamedTuple):
    """What was let in of a network."""

    of: object
    ports: dict[str, Port]  # by endpoint


class Guard:
    """The table `bridge vxmesh` of our namespace."""

    def __init__(self, netns: str | Path, library: str = LIBRARY) -> None:
        """For the namespace at path `netns`."""
        self.table = Nftables(netns, library, GUARD_TABLE)
        self._held: dict[str, _Held] = {}  # by endpoint id
        self._admitted: dict[int, _Admitted] = {}  # the same by VNI
        self._closed: Keys = {}
        self._flooding: set[int] = set()  # the VNIs of those that flood
        self._loaded = False
        self._has_groups = False  # whether the chains for those are there

    async def load(self, bridges: Iterable[Bridge], closed: Closed) -> None:
        """Make it that of these networks and their ports, and of no other. VxmeshError."""
        self._held, self._admitted, self._flooding = {}, {}, set()
        for bridge in bridges:
            self._admit(bridge)
        self._closed = nft.closed_elements(closed)
        self._loaded = False
        await self._load()

    async def admit(self, bridge: Bridge) -> None:
        """Let a network's ports send what is theirs; nothing is taken away. VxmeshError."""
        come: dict[str, set[str]] = {}
        gone: dict[str, set[str]] = {}
        for before, wanted in self._admit(bridge):
            _add(come, wanted, before)
            _add(gone, before, wanted)
        await self._alter(come, gone)

    async def release(self, vni: int, keep: Collection[str] = ()) -> None:
        """Take out the ports of a VNI but for the endpoints in `keep`. VxmeshError."""
        admitted = self._admitted.get(vni)
        if admitted is None:
            return
        gone: dict[str, set[str]] = {}
        for endpoint in admitted.ports.keys() - keep:
            del admitted.ports[endpoint]
            _add(gone, self._held.pop(endpoint).keys, {})
        if not admitted.ports:
            self._forget(vni)
        if gone:
            await self._alter({}, gone)

    async def close_off(self, closed: Closed) -> None:
        """What no sandbox may reach by the way out is now this. VxmeshError."""
        before, self._closed = self._closed, nft.closed_elements(closed)
        come: dict[str, set[str]] = {}
        gone: dict[str, set[str]] = {}
        _add(come, self._closed, before)
        _add(gone, before, self._closed)
        await self._alter(come, gone)

    def endpoints(self) -> dict[str, str]:
        """Device -> endpoint id of all ports."""
        return {held.port.device: endpoint for endpoint, held in self._held.items()}

    def close(self) -> None:
        """End the thread. The table stays."""
        self.table.close()

    def _admit(self, bridge: Bridge) -> list[tuple[Keys, Keys]]:
        """Take in a network's ports; of those that are not as before, the elements then and now.

        Who is asked again and again hands on the same objects for what did not change.
        """
        vni, of = bridge.vni, (bridge.spoof, bridge.gateways, bridge.asked, bridge.flood_rate)
        admitted = self._admitted.get(vni)
        # Without a port there is nothing to limit; and those that go are there until `release`.
        limited = bridge.flood_rate and (bridge.ports or (admitted and admitted.ports))
        (self._flooding.add if limited else self._flooding.discard)(vni)
        if admitted is None or admitted.of != of:
            admitted = self._admitted[vni] = _Admitted(of, admitted.ports if admitted else {})
            looked_at = list(bridge.ports.items())
        else:
            known = admitted.ports.get
            looked_at = [(e, port) for e, port in bridge.ports.items() if known(e) is not port]
        changes: list[tuple[Keys, Keys]] = []
        for endpoint, port in looked_at:
            held = self._held.get(endpoint)
            if held and held.vni != vni:
                self._disown(held.vni, endpoint)
            if held and (held.port, held.of) == (port, of):
                keys = held.keys
            else:
                keys = guardrules.of_port(bridge, port)
                changes.append((held.keys if held else {}, keys))
            self._held[endpoint] = _Held(vni, port, of, keys)
            admitted.ports[endpoint] = port
        return changes

    def _disown(self, vni: int, endpoint: str) -> None:
        """An endpoint is in a network with another VNI now."""
        ports = self._admitted[vni].ports
        del ports[endpoint]
        if not ports:
            self._forget(vni)

    def _forget(self, vni: int) -> None:
        del self._admitted[vni]
        self._flooding.discard(vni)

    async def _alter(self, come: dict[str, set[str]], gone: dict[str, set[str]]) -> None:
        if not self._loaded or self._has_groups != bool(self._flooding):
            await self._load()  # other chains, too
        elif come or gone:
            self._loaded = False  # whatever becomes of it
            await self.table.alter(_frozen(come), _frozen(gone))
            self._loaded = True

    async def _load(self) -> None:
        keys = [held.keys for held in self._held.values()]
        self._loaded, floods = False, bool(self._flooding)
        try:
            rules = guardrules.ruleset([*keys, self._closed], floods=floods)
            await self.table.load(rules)
        except VxmeshError as error:
            raise type(error)(
                "the guard of sandboxes' ports",
                error.why,
                "Without it no sandbox is let in: see whether this kernel has nftables for "
                "bridges (CONFIG_NF_TABLES_BRIDGE)",
            ) from error
        self._loaded, self._has_groups = True, floods


def _add(to: dict[str, set[str]], keys: Keys, without: Keys) -> None:
    """Add to `to` the elements of `keys` that are not in `without`."""
    for name, elements in keys.items():
        new = elements - without.get(name, frozenset())
        if new:
            to.setdefault(name, set()).update(new)


def _frozen(keys: dict[str, set[str]]) -> Keys:
    return {name: frozenset(elements) for name, elements in keys.items()}
