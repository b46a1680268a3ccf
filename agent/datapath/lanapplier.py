"""Applies networks that are straight on a wire of the host's: the parent first, then what is on it.

What stands opposite: applier.py does the same for bridges, and calls this; lans.py knows how.
"""

from __future__ import annotations

from agent.datapath import sandbox
from agent.datapath.backlog import Attempt, Failures
from agent.datapath.lans import Lans
from agent.datapath.look import Look
from agent.datapath.repairs import Repairs
from agent.drivers.base import DesiredState


class LanApplier:
    """Those of one host."""

    def __init__(
        self,
        desired: DesiredState,
        lans: Lans,
        failures: Failures,
        repairs: Repairs,
        attempt: Attempt,
    ) -> None:
        """`attempt` notes what fails."""
        self._desired, self._lans = desired, lans
        self._failures, self._repairs, self._attempt = failures, repairs, attempt

    async def sweep(self) -> None:
        """Delete what of ours on the host serves none of them any more."""
        await self._lans.sweep(self._desired.lans().values())

    async def compare(self, look: Look, drift: bool) -> None:
        """All of them; with `drift` what has to be changed is that."""
        there = self._lans.held.keys() | self._lans.asked.keys()
        for vni in sorted(there | self._desired.lans().keys()):
            if drift:
                await self.mend(vni, look)
            else:
                await self._attempt(("bridge", vni, ""), self.apply(vni, look))

    async def apply(self, vni: int, look: Look | None = None) -> None:
        """A network and its interfaces; only what is to change, unless there is a `look`."""
        lan, held = self._desired.lan(vni), self._lans.held.get(vni)
        if look is None and self._failures.stands(("bridge", vni, "")):
            look = Look(interior=True, drift=False)
        if held and (lan is None or held.lan.network != lan.network):
            others = self._desired.lans().values()
            now = next((o.vni for o in others if o.network == held.lan.network), vni)
            if now != vni and now not in self._lans.held:
                self._lans.renumber(vni, now)
            else:
                await self._lans.remove(vni)
            held = None
        if lan is None:
            await self._lans.prune(vni, ())
            self._failures.forget(vni)
            await self.sweep()
            return
        before = dict(held.ports) if held else {}
        asked = held is None or held.lan != lan
        self._lans.note(lan)
        await self._lans.prune(vni, lan.ports)
        if asked or look:
            await self._lans.ensure(lan)
        held = self._lans.held[vni]
        self._failures.forget(vni, lan.ports)
        for endpoint, port in lan.ports.items():
            failed = self._failures.stands(("port", vni, endpoint))
            if look is None and held.ports.get(endpoint) == port and not failed:
                continue
            if look and look.gone and not sandbox.alive(port):
                look.gone(endpoint)
                continue
            fixed = self._lans.fixed.copy()
            await self._attempt(("port", vni, endpoint), self._lans.attach(vni, port))
            if before.get(endpoint) != port:
                self._lans.fixed = fixed  # it was asked for
        if look and look.interior:
            every = {e for other in self._desired.lans().values() for e in other.ports}
            await self._lans.sweep_sandboxes(vni, every)
        if asked:
            self._lans.fixed.clear()

    async def mend(self, vni: int, look: Look) -> None:
        """The same, where whatever has to be changed is drift."""
        self._lans.fixed.clear()
        await self._attempt(("bridge", vni, ""), self.apply(vni, look))
        held = self._lans.held.get(vni)
        for kind, count in self._lans.fixed.items() if held else ():
            self._repairs.add(kind, count, held.lan.network if held else "")
