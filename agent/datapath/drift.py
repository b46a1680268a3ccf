"""What others did, as what to look at again: events compared with what should be.

Much of what is heard is our own doing: it is as it should be, and that is the end of it. What
differs goes into the backlog, and whoever works that off looks at the kernel before anything
is changed, because an event is old when it is read.
What stands opposite: monitor.py before it, reconciler.py behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Set

from agent.datapath import sandbox
from agent.datapath.backlog import Backlog, add_rows
from agent.datapath.inspection import Inspection
from agent.datapath.linkstate import LinkState
from agent.datapath.monitor import Events
from agent.datapath.networks import Networks
from agent.datapath.uplink import Uplink
from agent.datapath.wireguard import Wireguard
from agent.drivers.base import DEFAULT, DesiredState

CHANGED_MOST = 500  # rows of one network; to compare all of them is then quicker


class Drift:
    """Judges what was seen of one host."""

    def __init__(
        self,
        desired: DesiredState,
        networks: Networks,
        inspection: Inspection,
        uplink: Uplink,
        wireguard: Wireguard,
        port_gone: Callable[[str], None],
    ) -> None:
        """`port_gone` is told the id of an endpoint whose sandbox is there no longer."""
        self._desired, self._networks, self._uplink = desired, networks, uplink
        self._inspection, self._wireguard = inspection, wireguard
        self._port_gone = port_gone

    def note(self, events: Events, backlog: Backlog) -> None:
        """Events of our namespace."""
        for index in events.lost:
            self._suspect(index, backlog)
        for link in events.links:
            name = self._inspection.name_of(link.index)
            backlog.strangers |= name not in ("", link.name)
            carrier = link.carrier or self._is_handed_out(link.index)
            if not (carrier and self._is_right(link)):
                self._suspect(link.index, backlog)
        for index, mac in events.entries:
            self._entry(index, mac, backlog)
        for index, interface, new in events.interfaces:
            if index == self._uplink.index:
                backlog.uplink |= not new
            elif new != self._inspection.wants_address(index, interface):
                self._suspect(index, backlog)
        backlog.uplink |= events.routes
        backlog.sysctls |= events.forwarding
        self._rows(events, backlog)

    def note_host(self, events: Events, backlog: Backlog) -> None:
        """Events of the host's own namespace."""
        backlog.routes |= events.routes
        backlog.sysctls |= events.forwarding
        backlog.uplink |= any(i == self._uplink.host_index for i, _, _ in events.interfaces)
        # A device that dies loses its address first; what we take away ourselves is not ours then.
        made = self._wireguard.indexes.values()
        backlog.tunnels |= events.routes or any(i in made for i, _, _ in events.interfaces)

    def _is_right(self, link: LinkState) -> bool:
        if link.index == self._uplink.index:
            return self._uplink.is_right(link)
        return self._inspection.is_right(link)

    def _is_handed_out(self, index: int) -> bool:
        """Whether the other end of a port is another's to set up and down: its carrier, which goes
        with each container that ends, says nothing of what is ours."""
        vni, endpoint = self._networks.devices.get(index, (0, ""))
        held = self._networks.held.get(vni)
        port, _ = held.ports.get(endpoint, (None, 0)) if held else (None, 0)
        return port is not None and port.is_handed_out

    def _suspect(self, index: int, backlog: Backlog) -> None:
        vni, endpoint = self._networks.devices.get(index, (0, ""))
        if index == self._uplink.index:
            backlog.uplink = True
        elif endpoint:
            self._port(vni, endpoint, backlog)
        elif vni in self._networks.held:  # or it is being removed
            backlog.suspects.setdefault(vni, set()).add("")

    def _port(self, vni: int, endpoint: str, backlog: Backlog) -> None:
        """Something is wrong with a port: that of a sandbox which is gone, or to be mended."""
        bridge = self._desired.bridge(vni)
        port = bridge.ports.get(endpoint) if bridge else None
        if port and not sandbox.alive(port):
            self._networks.forget_port(vni, endpoint)  # so that it is told only once
            self._port_gone(endpoint)
        else:
            backlog.suspects.setdefault(vni, set()).add(endpoint)

    def _entry(self, index: int, mac: bytes, backlog: Backlog) -> None:
        """The bridge leads `mac` to a port: to its own, or one that was led away from there."""
        vni, endpoint = self._networks.devices.get(index, (0, ""))
        held = self._networks.held.get(vni)
        if held is None:
            return
        port, _ = held.ports.get(endpoint, (None, 0))
        if index == held.vxlan:
            if not (held.bridge.flood_rate and self._has_row(vni, mac, backlog)):
                backlog.audits.add(vni)  # the compare of all its rows looks at those
        elif port and mac != port.mac:
            suspects = backlog.suspects.setdefault(vni, set())
            suspects.add(endpoint)
            suspects.update(e for e, (other, _) in held.ports.items() if other.mac == mac)
            if held.bridge.flood_rate:  # it may have led to the VXLAN device
                self._lost(vni, [mac], [], backlog)

    def _has_row(self, vni: int, mac: bytes, backlog: Backlog) -> bool:
        """Whether there is to be a row for `mac`, or one is about to be written or deleted."""
        waiting = backlog.rows.get(vni, (set(), set()))
        return mac in waiting[0] or any(vtep for _, vtep in self._desired.rows(vni, [mac], []).fdb)

    # -- rows --

    def _rows(self, events: Events, backlog: Backlog) -> None:
        devices = self._networks.devices
        for index, seen in events.defaults.items():
            self._networks.note_defaults(index, seen)
        for index in events.macs.keys() | events.addresses.keys():
            vni, endpoint = devices.get(index, (0, ""))
            if endpoint:
                if index in events.macs:  # neighbours of a port are the kernel's own
                    self._port(vni, endpoint, backlog)
            elif vni:
                macs, addresses = events.macs.get(index, []), events.addresses.get(index, [])
                vteps = {v for v, came in events.defaults.get(index, ()) if not came}
                self._lost(vni, macs, addresses, backlog, vteps)
        for index in events.new_macs.keys() | events.new_addresses.keys():
            vni, endpoint = devices.get(index, (0, ""))
            held = None if endpoint else self._networks.held.get(vni)
            if held and index == held.vxlan:
                new = events.new_macs.get(index, []), events.new_addresses.get(index, [])
                self._changed(vni, *new, backlog)

    def _lost(
        self,
        vni: int,
        macs: list[bytes],
        addresses: list[bytes],
        backlog: Backlog,
        vteps: Set[bytes] = frozenset(),
    ) -> None:
        """Rows went; `vteps` are those of default rows among them."""
        rows = self._desired.rows(vni, macs, addresses)
        waiting = backlog.rows.get(vni, (set(), set()))  # those are about to be written anyway
        macs = [mac for mac, vtep in rows.fdb if vtep and mac not in waiting[0]]
        if rows.defaults and rows.defaults & vteps and DEFAULT not in waiting[0]:
            macs.append(DEFAULT)
        addresses = [a for a, mac in rows.neighbours if mac and a not in waiting[1]]
        if macs or addresses:
            add_rows(backlog.lost, vni, macs, addresses)

    def _changed(
        self,
        vni: int,
        fdb: list[tuple[bytes, bytes]],
        neighbours: list[tuple[bytes, bytes]],
        backlog: Backlog,
    ) -> None:
        want = self._desired.rows(vni, [m for m, _ in fdb], [a for a, _ in neighbours])
        waiting = backlog.rows.get(vni, (set(), set()))
        astray = False
        if want.defaults is not None:
            led = {vtep for mac, vtep in fdb if mac == DEFAULT}
            fdb = [row for row in fdb if row[0] != DEFAULT]
            astray = not led <= want.defaults and DEFAULT not in waiting[0]
        unknown = not self._desired.complete()  # then what is not wanted may be right
        macs = [
            mac
            for (mac, vtep), (_, wanted) in zip(fdb, want.fdb, strict=True)
            if vtep != wanted and mac not in waiting[0] and not (unknown and wanted is None)
        ]
        addresses = [
            address
            for (address, mac), (_, wanted) in zip(neighbours, want.neighbours, strict=True)
            if mac != wanted and address not in waiting[1] and not (unknown and wanted is None)
        ]
        if astray and not unknown:
            macs.append(DEFAULT)
        if len(macs) + len(addresses) > CHANGED_MOST:
            backlog.audits.add(vni)
        elif macs or addresses:
            add_rows(backlog.changed, vni, macs, addresses)
