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
from agent.drivers.base import Bridge, Closed
from agent.errors import VxmeshError


class _Held(NamedTuple):
    """What an endpoint has in the sets."""

    vni: int
    what: object  # from which the elements follow
    device: str
    keys: Keys


class Guard:
    """The table `bridge vxmesh` of our namespace."""

    def __init__(self, netns: str | Path, library: str = LIBRARY) -> None:
        """For the namespace at path `netns`."""
        self.table = Nftables(netns, library, GUARD_TABLE)
        self._held: dict[str, _Held] = {}  # by endpoint id
        self._closed: Keys = {}
        self._loaded = False

    async def load(self, bridges: Iterable[Bridge], closed: Closed) -> None:
        """Make it that of these networks and their ports, and of no other. VxmeshError."""
        self._held = {}
        for bridge in bridges:
            self._held.update(self._wanted(bridge))
        self._closed = nft.closed_elements(closed)
        self._loaded = False
        await self._load()

    async def admit(self, bridge: Bridge) -> None:
        """Let a network's ports send what is theirs; nothing is taken away. VxmeshError."""
        come: dict[str, frozenset[str]] = {}
        gone: dict[str, frozenset[str]] = {}
        for endpoint, wanted in self._wanted(bridge).items():
            held = self._held.get(endpoint)
            before: Keys = held.keys if held else {}
            self._held[endpoint] = wanted
            if wanted.keys is not before:
                _add(come, wanted.keys, before)
                _add(gone, before, wanted.keys)
        await self._alter(come, gone)

    async def release(self, vni: int, keep: Collection[str] = ()) -> None:
        """Take out the ports of a VNI but for the endpoints in `keep`. VxmeshError."""
        gone: dict[str, frozenset[str]] = {}
        for endpoint in [e for e, h in self._held.items() if h.vni == vni and e not in keep]:
            _add(gone, self._held.pop(endpoint).keys, {})
        if gone:
            await self._alter({}, gone)

    async def close_off(self, closed: Closed) -> None:
        """What no sandbox may reach by the way out is now this. VxmeshError."""
        before, self._closed = self._closed, nft.closed_elements(closed)
        come: dict[str, frozenset[str]] = {}
        gone: dict[str, frozenset[str]] = {}
        _add(come, self._closed, before)
        _add(gone, before, self._closed)
        await self._alter(come, gone)

    def endpoints(self) -> dict[str, str]:
        """Device -> endpoint id of all ports."""
        return {held.device: endpoint for endpoint, held in self._held.items()}

    def close(self) -> None:
        """End the thread. The table stays."""
        self.table.close()

    def _wanted(self, bridge: Bridge) -> dict[str, _Held]:
        wanted = {}
        for endpoint, port in bridge.ports.items():
            held, what = (
                self._held.get(endpoint),
                (port, bridge.spoof, bridge.gateways, bridge.asked),
            )
            if held and held.what == what:
                wanted[endpoint] = held._replace(vni=bridge.vni)
            else:
                keys = guardrules.of_port(bridge, port)
                wanted[endpoint] = _Held(bridge.vni, what, port.device, keys)
        return wanted

    async def _alter(self, come: Keys, gone: Keys) -> None:
        if not self._loaded:
            await self._load()
        elif come or gone:
            self._loaded = False  # whatever becomes of it
            await self.table.alter(come, gone)
            self._loaded = True

    async def _load(self) -> None:
        keys = [held.keys for held in self._held.values()]
        try:
            await self.table.load(guardrules.ruleset([*keys, self._closed]))
        except VxmeshError as error:
            raise type(error)(
                "the guard of sandboxes' ports",
                error.why,
                "Without it no sandbox is let in: see whether this kernel has nftables for "
                "bridges (CONFIG_NF_TABLES_BRIDGE)",
            ) from error
        self._loaded = True


def _add(to: dict[str, frozenset[str]], keys: Keys, without: Keys) -> None:
    """Add to `to` the elements of `keys` that are not in `without`."""
    for name, elements in keys.items():
        new = elements - without.get(name, frozenset())
        if new:
            to[name] = to.get(name, frozenset()) | new
