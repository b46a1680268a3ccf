"""Whether the devices of our networks are as they were made.

All of it by a few requests a network, read by hand in a thread: for what an event tells of, and
for the background, where as a rule everything is right. What is not, networks.py mends.
What stands opposite: drift.py and applier.py, which ask.
"""

from __future__ import annotations

from agent.datapath.bulk import Bulk
from agent.datapath.linkstate import LinkState
from agent.datapath.networks import Networks, addresses_of
from agent.datapath.sandbox import ENDPOINT_MARK, NETWORK_MARK


class Inspection:
    """Compares what the kernel says with what `networks` made."""

    def __init__(self, networks: Networks, bulk: Bulk) -> None:
        self._networks, self._bulk = networks, bulk

    def name_of(self, index: int) -> str:
        """What a device of ours is called; empty if it is being made or is not ours."""
        vni, endpoint = self._networks.devices.get(index, (0, ""))
        held = self._networks.held.get(vni)
        if held is None:
            return ""
        if endpoint:
            port, _ = held.ports.get(endpoint, (None, 0))
            return port.device if port else ""
        return held.bridge.device if index == held.index else held.bridge.vxlan

    def is_right(self, link: LinkState) -> bool:
        """Whether a device is as it was made, as far as `link` tells; True if it is not ours.

        Its carrier is not looked at: a sandbox may set its own end down.
        """
        vni, endpoint = self._networks.devices.get(link.index, (0, ""))
        held = self._networks.held.get(vni)
        if held is None or (endpoint and endpoint not in held.ports):
            return True
        bridge = held.bridge
        mark = f"{ENDPOINT_MARK}{endpoint}" if endpoint else f"{NETWORK_MARK}{bridge.network}"
        sound = link.up and link.mtu == bridge.mtu and link.alias in (mark, None)
        sound = sound and link.name == self.name_of(link.index)
        if link.index == held.index:
            in_group = link.group in (bridge.group, None)
            return sound and in_group and link.mac == bridge.router_mac
        flood = link.index == held.vxlan and bridge.hands_on_unknown
        return (
            sound
            and link.master == held.index
            and link.learning in (False, None)
            and link.flood in (flood, None)
            and link.groups in (True, None)
            and not link.vxlan_learning
            and link.vxlan_proxy in (True, None)
        )

    def wants_address(self, index: int, interface: str) -> bool:
        """Whether a device of ours should have an address, in interface notation."""
        vni, _ = self._networks.devices.get(index, (0, ""))
        held = self._networks.held.get(vni)
        return held is not None and index == held.index and interface in addresses_of(held.bridge)

    async def audit(self, vni: int) -> bool:
        """Whether a network's devices, addresses and entries are as they were made."""
        held = self._networks.held[vni]
        links = {link.index: link for link in await self._bulk.links(held.index)}
        ports = dict(held.ports.values())
        if {held.index, held.vxlan, *ports.values()} - links.keys() - {0}:
            return False
        if not all(self.is_right(link) for link in links.values()):
            return False
        if await self._bulk.addresses(held.index) != set(addresses_of(held.bridge)):
            return False
        return not await self._bulk.misled({index: port.mac for port, index in ports.items()})

    async def has_strangers(self) -> bool:
        """Whether there are devices with our mark that we did not make, or not by that name."""
        return any(
            (link.alias or "").startswith((NETWORK_MARK, ENDPOINT_MARK))
            and (link.index not in self._networks.devices or link.name != self.name_of(link.index))
            for link in await self._bulk.links(0)
        )
