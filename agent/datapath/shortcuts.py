"""Shortcuts of one host: frames between its sandboxes and other hosts go past the bridge, by eBPF.

An accelerator, and nothing that others rely on: bridge, rows and the guards of ports hold the same
in any case, and what the programs do not take goes there. They end with the agent, however that
ends; where the kernel refuses them there are none, which is told once.

What is in the maps follows from the networks as they are held, and is written at once, before a
port that comes can be reached and after one that goes cannot. That programs are at a device's
ingress comes later (`attach`), when nobody waits: until then frames go by the bridge.
What stands opposite: shortcutprograms.py; applier.py and reconciler.py, which say when.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from errno import EINVAL, ENODEV, ENOENT, EOPNOTSUPP, EPERM
from pathlib import Path
from typing import NamedTuple

import structlog

from agent.datapath import bpf, filterpacking, shortcutprograms
from agent.datapath.bpfasm import Line
from agent.datapath.maker import Requests
from agent.datapath.networks import Held
from agent.datapath.shortcutprograms import (
    INWARDS,
    IPV4,
    IPV6,
    MAPPED,
    MAPS,
    OUTWARDS,
    PORT,
    PROGRAM,
    SLOT,
    SOURCE,
    STATION,
    WAY,
)
from agent.drivers.base import Bridge, Port
from agent.notation import parse_address

log = structlog.get_logger()

Elements = dict[bytes, bytes]
PROGRAMS: dict[int, Callable[[], list[Line | str]]] = {
    INWARDS: shortcutprograms.inwards,
    OUTWARDS: shortcutprograms.outwards,
}
NAMES = {INWARDS: "vxmesh_inwards", OUTWARDS: "vxmesh_outwards"}
LOOPBACK = 1  # its index in each namespace
IMPOSSIBLE = (ENOENT, EOPNOTSUPP, EPERM)  # what a kernel says that has no programs at devices


class _Head(NamedTuple):
    """What all shortcuts of a network follow from."""

    vxlan: int
    router: bytes
    outwards: bool


class _Made(NamedTuple):
    """A port, and what it has in the maps."""

    port: Port
    device: int  # index of our end
    stations: Elements
    sources: Elements


@dataclass(slots=True)
class _InMaps:
    """A network as it is in the maps."""

    head: _Head
    stations: Elements = field(default_factory=dict)
    sources: Elements = field(default_factory=dict)
    ports: dict[str, _Made] = field(default_factory=dict)  # by endpoint
    bridge: Bridge | None = None  # that and the ports it follows from
    held: dict[str, tuple[Port, int]] = field(default_factory=dict)
    devices: dict[int, int] = field(default_factory=dict)  # index -> which program

    def is_of(self, held: Held, bridge: Bridge) -> bool:
        """Whether it follows from just that."""
        same = self.head == _head_of(held) and self.bridge is bridge
        return same and self.held == held.ports


class Shortcuts:
    """The programs and maps of one agent."""

    def __init__(self, netns: str | Path, held: Mapping[int, Held], wanted: bool = True) -> None:
        """In our namespace at path `netns`; `held` are the networks as they are; not `wanted`:
        there are none."""
        self._netns, self._held, self._wanted = netns, held, wanted
        self._written: dict[int, _InMaps] = {}  # by VNI
        self._attached: dict[int, int] = {}  # index of a device -> which program
        self._maps: dict[str, bpf.Map] = {}
        self._entries: dict[int, int] = {}  # which program -> descriptor of what leads to it
        self._programs: dict[int, int] = {}
        self._requests: Requests | None = None
        self._stack = contextlib.ExitStack()
        self._full: set[int] = set()  # VNIs of networks that have no room
        # A thread goes on when who waits for it is cancelled: descriptors are to live as long.
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether there are any."""
        return bool(self._programs)

    def open(self) -> None:
        """Make maps and programs, if this kernel lets us: they are nowhere yet. Blocks."""
        if not self._wanted:
            return
        with self._lock, contextlib.ExitStack() as stack:
            try:
                self._requests = stack.enter_context(contextlib.closing(Requests(self._netns)))
                for name, spec in MAPS.items():
                    self._maps[name] = bpf.Map(name, spec)
                    stack.callback(self._maps[name].close)
                maps = {name: each.fd for name, each in self._maps.items()}
                programs = {}
                for slot, lines in PROGRAMS.items():
                    entry = shortcutprograms.entry(slot)
                    self._entries[slot] = bpf.load("vxmesh_entry", entry, maps, bpf.SCHED_CLS)
                    stack.callback(os.close, self._entries[slot])
                    programs[slot] = bpf.load(NAMES[slot], lines(), maps, bpf.SCHED_CLS)
                    stack.callback(os.close, programs[slot])
                self._try()
                self._programs = programs
                self._lead()
            except OSError as error:
                self._programs = {}
                _warn(error)
                return
            self._stack = stack.pop_all()

    def _try(self) -> None:
        """OSError if this kernel has no programs at devices. Our loopback has one for a moment."""
        assert self._requests
        with contextlib.suppress(FileExistsError):
            self._requests.ask(filterpacking.new_place(LOOPBACK))
        entry = self._entries[INWARDS]
        self._requests.ask(filterpacking.new_program(LOOPBACK, entry, NAMES[INWARDS]))
        self._requests.ask(filterpacking.no_program(LOOPBACK))

    def close(self) -> None:
        """From here on all goes by the bridge."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._programs:
            # The kernel does so by itself a moment after the last descriptor is closed.
            for slot in self._programs:
                with contextlib.suppress(OSError):
                    self._maps["programs"].drop(SLOT.pack(slot))
        self._programs, self._attached, self._written = {}, {}, {}
        self._stack.close()

    def _lead(self) -> None:
        """Have what is at the devices lead to the programs. OSError."""
        for slot, program in self._programs.items():
            self._maps["programs"].put(SLOT.pack(slot), PROGRAM.pack(program))

    # -- what is in the maps --

    def note(self, vni: int, wanted: Bridge | None = None) -> None:
        """A network is as it is held now, and about to be as `wanted`; or it is no more.

        To be called before a port of it is made, so that no frame for that is taken to another
        host, and before the guard forbids a port what it may send; and afterwards.
        """
        held, old = self._held.get(vni), self._written.get(vni)
        if not self.is_on or (old is None and held is None):
            return
        bridge = wanted or (held.bridge if held else None)
        if old and held and bridge and old.is_of(held, bridge) and vni not in self._full:
            return
        head = _head_of(held) if held else old.head if old else None
        assert head
        new = _InMaps(head)
        if held and bridge and held.vxlan:
            new = _in_maps(head, held, bridge, old)
        self._replace(vni, old or _InMaps(head), new)

    def note_port(self, vni: int, endpoint: str) -> None:
        """The same when one port of it has been made, or looked at."""
        held, old = self._held.get(vni), self._written.get(vni)
        if held is None or old is None or old.head != _head_of(held) or vni in self._full:
            self.note(vni)
            return
        port, device = held.ports.get(endpoint, (None, 0))
        made = old.ports.get(endpoint)
        if port is None or (made and made.port is port and made.device == device):
            return
        now = _Made(port, device, *of_port(old.head, port, device))
        kept, devices = dict(old.sources), dict(old.devices)
        if made:
            for key in made.sources:
                kept.pop(key, None)
            devices.pop(made.device, None)
        if now.sources:
            devices[device] = OUTWARDS
        new = replace(
            old,
            stations=old.stations | now.stations,
            sources=kept | now.sources,
            ports={**old.ports, endpoint: now},
            held={**old.held, endpoint: (port, device)},
            devices=devices,
        )
        self._replace(vni, old, new)

    def _replace(self, vni: int, old: _InMaps, new: _InMaps) -> None:
        """What is in the maps of a network is to be `new`."""
        self._written.pop(vni, None)
        if new.devices:
            self._written[vni] = new
        try:
            self._write(old, new)
        except OSError as error:
            if vni not in self._full:
                log.warning(
                    "shortcuts.full",
                    why=str(error),
                    effect="what has no room goes by the bridge, which is slower",
                )
            self._full.add(vni)
            self._clear(old.stations.keys() | new.stations, old.sources.keys() | new.sources)
            new.stations, new.sources, new.ports = {}, {}, {}
        else:
            self._full.discard(vni)

    def forget(self, vni: int) -> None:
        """A network's ports are about to be moved to another one."""
        noted = self._written.pop(vni, None)
        if noted and self.is_on:
            self._clear(noted.stations, noted.sources)

    def _write(self, old: _InMaps, new: _InMaps) -> None:
        """OSError, and then some of it is written."""
        come = {k: v for k, v in new.stations.items() if old.stations.get(k) != v}
        sources = {k: v for k, v in new.sources.items() if old.sources.get(k) != v}
        # Nobody goes past the bridge who may not, and nothing that is for somebody here.
        self._maps["sources"].delete(old.sources.keys() - new.sources.keys())
        self._maps["stations"].update(come)
        self._maps["sources"].update(sources)
        self._maps["stations"].delete(old.stations.keys() - new.stations.keys())

    def _clear(self, stations: Collection[bytes], sources: Collection[bytes]) -> None:
        """Take these out. Or all that there is, rather than have some lead where it should not."""
        try:
            self._maps["sources"].delete(sources)
            self._maps["stations"].delete(stations)
        except OSError as error:
            _warn(error)
            self.close()

    # -- where the programs are --

    @property
    def is_due(self) -> bool:
        """Whether there is something for `attach` to do."""
        return self.is_on and self._wanted_at() != self._attached

    def _wanted_at(self) -> dict[int, int]:
        wanted: dict[int, int] = {}
        for noted in self._written.values():
            wanted |= noted.devices
        return wanted

    async def attach(self) -> None:
        """Put the programs where they are missing."""
        if self.is_due:
            await asyncio.to_thread(self._attach, self._wanted_at())

    def _attach(self, wanted: Mapping[int, int]) -> None:
        with self._lock:
            for index in self._attached.keys() - wanted.keys():
                del self._attached[index]  # gone with its device, or it leads nobody on
            for index, slot in wanted.items():
                if self.is_on and self._attached.get(index) != slot:
                    self._attach_to(index, slot)

    def _attach_to(self, index: int, slot: int) -> bool:
        """Whether it is there now. All ends if this kernel cannot."""
        assert self._requests
        self._attached[index] = slot  # as far as can be: else the next audit tries again
        try:
            self._requests.ask(filterpacking.new_program(index, self._entries[slot], NAMES[slot]))
        except OSError as error:
            # It has gone meanwhile, or was made without a place for programs (maker.py).
            if error.errno in IMPOSSIBLE:
                _warn(error)
                self._end()
            elif error.errno not in (ENODEV, EINVAL):
                log.warning("shortcuts.missing", device=index, why=str(error))
            return False
        return True

    async def audit(self) -> int:
        """Compare maps and devices with what they should be, and put right what is not; how many
        elements and programs others had changed. OSError."""
        if not self.is_on:
            return 0
        for vni in list(self._full):
            self.note(vni)  # others may have gone
        wanted: dict[str, Elements] = {"stations": {}, "sources": {}}
        for noted in self._written.values():
            wanted["stations"] |= noted.stations
            wanted["sources"] |= noted.sources
        here = self._wanted_at()
        attached = {index: slot for index, slot in self._attached.items() if index in here}
        return await asyncio.to_thread(self._audit, wanted, attached)

    def _audit(self, wanted: Mapping[str, Elements], attached: Mapping[int, int]) -> int:
        found = 0
        with self._lock:
            if not self.is_on:
                return 0
            for name, elements in wanted.items():
                there = self._maps[name].read()
                wrong = {k: v for k, v in elements.items() if there.get(k) != v}
                self._maps[name].delete(there.keys() - elements.keys())
                self._maps[name].update(wrong)
                found += len(there.keys() - elements.keys()) + len(wrong)
            self._lead()
            ids = {slot: bpf.id_of(entry) for slot, entry in self._entries.items()}
            for index, slot in attached.items():
                if self.is_on and ids[slot] not in self._programs_at(index):
                    found += self._attach_to(index, slot)
        return found

    def _programs_at(self, index: int) -> set[int | None]:
        """The ids of the programs at the ingress of a device."""
        assert self._requests
        try:
            listed = self._requests.list(filterpacking.list_programs(index))
        except OSError:  # there is no place for any, or no device
            return set()
        return {filterpacking.read_program(body) for _, body in listed}


def _head_of(held: Held) -> _Head:
    bridge = held.bridge
    return _Head(held.vxlan, bridge.router_mac, bridge.hands_on_unknown)


def _in_maps(head: _Head, held: Held, bridge: Bridge, before: _InMaps | None) -> _InMaps:
    """How a network is to be in the maps; what did not change is as it was `before`."""
    now = _InMaps(head, bridge=bridge, held=dict(held.ports), devices={head.vxlan: INWARDS})
    # Those of ports that are about to be made, or to be others, too: frames for them stay on the
    # bridge.
    macs = [head.router, *(port.mac for port in bridge.ports.values())]
    macs += [port.mac for port, _ in held.ports.values()]  # and of those that go
    now.stations = {STATION.pack(head.vxlan, mac): PORT.pack(0) for mac in macs if mac}
    known = before.ports if before and before.head == head else {}
    wanted = bridge.ports
    for endpoint, (port, index) in held.ports.items():
        other = wanted.get(endpoint)
        if other is not port and other != port:
            continue
        made = known.get(endpoint)
        if made is None or made.port is not port or made.device != index:
            made = _Made(port, index, *of_port(head, port, index))
        now.ports[endpoint] = made
        now.stations |= made.stations
        now.sources |= made.sources
        if made.sources:
            now.devices[index] = OUTWARDS
    return now


def of_port(head: _Head, port: Port, index: int) -> tuple[Elements, Elements]:
    """What a port, with its index, has in the maps: stations and sources.

    The sources are those that its guard lets pass without a further look (guardrules.py).
    """
    if not port.mac:
        return {}, {}
    stations = {STATION.pack(head.vxlan, port.mac): PORT.pack(index)}
    if not head.outwards:
        return stations, {}
    way = WAY.pack(head.vxlan)
    sources = {}
    for text in port.addresses:
        address = parse_address(text.partition("/")[0])
        kind, full = (IPV4, MAPPED + address) if len(address) == 4 else (IPV6, address)
        sources[SOURCE.pack(index, port.mac, kind, full)] = way
    return stations, sources


def _warn(error: OSError) -> None:
    log.warning(
        "shortcuts.off",
        why=str(error),
        effect="frames between sandboxes and other hosts go by the bridge, which is slower",
    )
