"""WireGuard on one host, and the seal: nothing that is for its inside gets out in the clear, nor
in from outside, at no moment between what was and what is to be.

What stands opposite: applier.py, which makes no encrypted network before `seal`; wireguard.py
makes the devices, nft.py has the seal's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agent.datapath import nft
from agent.datapath.backlog import Key
from agent.datapath.networks import Held
from agent.datapath.nftables import Nftables
from agent.datapath.repairs import Repairs
from agent.datapath.wireguard import Wireguard
from agent.drivers import wireguard
from agent.drivers.base import DesiredState


class WireguardApplier:
    """That of one host."""

    def __init__(
        self,
        desired: DesiredState,
        devices: Wireguard,
        table: Nftables,
        held: Mapping[int, Held],
        failures: Callable[[], Iterable[Key]],
        repairs: Repairs,
        has_ipv6: Callable[[], bool],
        data_port: int,
    ) -> None:
        """`table` is the seal's in the host's namespace, `held` are the networks as they are,
        `failures` says what is still to be tried again; `data_port` is VXLAN's UDP port outside
        WireGuard. Where the kernel has no IPv6 there is no inside, and no encrypted network."""
        self._desired, self.devices, self.table = desired, devices, table
        self._held, self._failures, self._repairs = held, failures, repairs
        self._has_ipv6 = has_ipv6
        self._rules = nft.sealed(wireguard.data_port(data_port))
        self.is_sealed = False
        self.owes_unsealing = False  # it waits until everything encrypted has gone

    async def seal(self) -> None:
        """Before anything else that speaks to the inside. VxmeshError, OSError."""
        if self._has_ipv6():
            await self.devices.guard()
            await self.table.load(self._rules)
        self.is_sealed = True

    async def begin(self) -> None:
        """At the start: seal, if anything here is encrypted. If not, the route is enough: nothing
        speaks to the inside, and each packet of the host would be looked at for nothing."""
        if self._has_inside():
            await self.seal()
        elif self._has_ipv6():
            await self.devices.guard()

    async def keep_rules(self) -> None:
        """Load the seal's rules, if they are to be there."""
        if self._has_ipv6() and (self.is_sealed or self._has_inside()):
            await self.table.load(self._rules)

    async def extend(self, drift: bool = False) -> None:
        """The devices, peers and routes that are to be there; before rows lead to them.

        Of a network that is encrypted nothing is made before its packets can go nowhere else.
        """
        devices = self._desired.wireguard()
        if not devices:
            return
        await self.seal()
        changes = await self.devices.extend(devices)
        for kind, count in changes.items() if drift else ():
            self._repairs.add(kind, count)

    async def shrink(self) -> None:
        """Those that are not; after rows lead to them no more.

        Not before all is known that peers wrote while this agent was away: a key that is not
        known may be one that all use by now.
        """
        if not self._desired.complete():
            return
        await self.devices.shrink(self._desired.wireguard())
        if self._has_inside() or any(held.bridge.encrypted for held in self._held.values()):
            return
        # What could not be taken away yet may still speak to the inside.
        self.owes_unsealing = any(
            kind in ("wireguard", "strangers") or (kind == "bridge" and vni not in self._held)
            for kind, vni, _ in self._failures()
        )
        if not self.owes_unsealing:
            self.is_sealed = False
            await self.table.remove()  # the route stays

    async def check(self) -> None:
        """The devices and routes, and the route that keeps the inside apart, against drift."""
        if self._has_ipv6():
            self._repairs.add("route", await self.devices.guard())
        await self.extend(drift=True)

    def _has_inside(self) -> bool:
        """Whether anything is to be here that speaks to the inside of WireGuard."""
        encrypted = any(bridge.encrypted for bridge in self._desired.bridges().values())
        return encrypted or bool(self._desired.wireguard())
