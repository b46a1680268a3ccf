"""Makes this host's kernel hold what is desired, and keeps it so.

It is told only what to look at again. One task takes all that is noted, pulls the newest
desired values and has them applied. A change costs what it is; at the start, after lost events
and on request everything is compared. What somebody else deletes or sets down is put back.
What stands opposite: drivers/ say what is desired; applier.py changes the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from agent.datapath import sandbox
from agent.datapath.applier import Applier, Look, prepare
from agent.datapath.backlog import Backlog, Failures, Key, add_rows
from agent.datapath.cleanup import remove_everything
from agent.datapath.monitor import RECEIVE_BUFFER, Events, Monitor, TableMonitor
from agent.drivers.base import DesiredState
from agent.errors import Unavailable, VxmeshError

log = structlog.get_logger()

AUDIT_INTERVAL = 60.0  # s; one network in turn is compared whole: 50 ms for 10,000 endpoints


class Reconciler:
    """The kernel state of one host."""

    def __init__(
        self,
        desired: DesiredState,
        run_dir: Path,
        *,
        on_applied: Callable[[object], None] = lambda mark: None,
        on_port_gone: Callable[[str], None] = lambda endpoint: None,
        host_netns: str = "/proc/self/ns/net",
        audit_interval: float = AUDIT_INTERVAL,
        monitor_buffer: int = RECEIVE_BUFFER,
    ) -> None:
        """Our own namespace is at run_dir/netns, the host's at `host_netns`.

        `on_applied` is given desired.mark() once what it stands for has been attempted;
        `on_port_gone` the id of an endpoint whose sandbox's namespace exists no longer.
        """
        self.netns = run_dir / "netns"
        self.on_applied, self.on_port_gone = on_applied, on_port_gone
        self._desired = desired
        self._host_netns = host_netns
        self._audit_interval, self._monitor_buffer = audit_interval, monitor_buffer
        self._backlog = Backlog()
        self._failures = Failures(self._retry)
        self._wake = asyncio.Event()
        self._next: list[asyncio.Future[None]] = []  # who waits for what is noted now
        self._current: list[asyncio.Future[None]] = []  # who waits for what is being applied
        self._busy = self._stopped = False
        self._applier: Applier | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = contextlib.ExitStack()

    # -- what to look at again --

    def touch_bridge(self, vni: int) -> None:
        """A network's bridge, or one of its ports."""
        self._backlog.bridges.add(vni)
        self._wake.set()

    def touch_rows(self, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None:
        """The rows of these keys."""
        add_rows(self._backlog.rows, vni, macs, addresses)
        self._wake.set()

    def touch_forwards(self) -> None:
        """The published ports."""
        self._backlog.forwards = True
        self._wake.set()

    def touch_nothing(self) -> None:
        """Something was taken in that needs nothing here: that it is applied is to be told."""
        self._wake.set()

    def touch_all(self) -> None:
        """Everything."""
        self._backlog.everything = True
        self._wake.set()

    async def settle(self, endpoint: str | None = None) -> None:
        """Return when all that was touched before this call has been attempted.

        Raises the VxmeshError of `endpoint`'s port, or of the network that it is in, if the
        last attempt at it failed.
        """
        if self._stopped:
            raise _stopping()
        if self._backlog or self._busy:
            future = asyncio.get_running_loop().create_future()
            (self._next if self._backlog else self._current).append(future)
            await future
        if endpoint is None:
            return
        for (kind, vni, port), error in self._failures.items().items():
            bridge = self._desired.bridge(vni) if kind in ("bridge", "rows") else None
            if port == endpoint or (bridge and endpoint in bridge.ports):
                raise type(error)(error.what, error.why, error.fix)

    @property
    def repairs(self) -> Counter[str]:
        """What was put back without being asked for, by kind: fdb, neighbour, link, port, …"""
        return self._applier.repairs if self._applier else Counter()

    def failures(self) -> list[VxmeshError]:
        """What could not be applied and is being tried again."""
        return list(self._failures.items().values())

    def _note_applied(self, mark: object) -> None:
        """Tell, unless a network or its rows failed: a retry that succeeds tells then.

        A port that failed is its caller's to know, who asked `settle` for it.
        """
        if not any(kind != "port" for kind, _, _ in self._failures.items()):
            self.on_applied(mark)

    # -- life --

    async def start(self) -> None:
        """Make our namespace and the way out, take over what is there, and begin to work.

        VxmeshError or OSError if this host cannot be prepared. What fails of single networks
        and ports is tried again later.
        """
        await asyncio.to_thread(prepare, self.netns)
        with contextlib.ExitStack() as stack:
            # Before anything is looked at, so that nothing is lost in between.
            monitor = Monitor(self.netns, self._seen, self._overrun, self._monitor_buffer)
            stack.callback(monitor.close)
            for path in (self.netns, self._host_netns):
                stack.callback(TableMonitor(path, self._tables_seen).close)
            applier = Applier(self._desired, self.netns, self._host_netns, self._failures, monitor)
            stack.callback(applier.close)
            self._applier = applier
            await applier.uplink.ensure()
            await applier.uplink.read_routes()
            self._begin()
            mark = self._desired.mark()
            await applier.compare(interior=True, gone=lambda e: self.on_port_gone(e))
            await self._rules(applier)
            self._note_applied(mark)
            self._end()
            self._stack = stack.pop_all()
        applier.repairs.clear()  # until here it was not drift but the time without an agent
        work, audit = self._work(applier), self._audit(applier)
        self._tasks = [asyncio.create_task(work), asyncio.create_task(audit)]

    async def stop(self, remove: bool = False) -> None:
        """End the work. The kernel stays as it is, so that traffic goes on; unless `remove`."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._failures.clear()
        for future in self._next + self._current:
            if not future.done():
                future.set_exception(_stopping())
        self._next, self._current = [], []
        self._stack.close()
        if remove:
            await remove_everything(self.netns, self._host_netns)

    async def remove_all(self) -> None:
        """End the work and delete all that bears our mark: devices, rules, routes, namespace."""
        await self.stop(remove=True)

    # -- the one task --

    async def _work(self, applier: Applier) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            backlog = self._begin()
            mark = self._desired.mark()
            try:
                await self._apply(applier, backlog)
                await self._repair(applier, backlog)
                self._note_applied(mark)
            except Exception as error:
                # What the kernel refuses is handled where it happens: this is a fault of ours.
                log.exception("datapath.fault")
                self._failures.failed(("everything", 0, ""), error)
            self._end()

    def _begin(self) -> Backlog:
        """Take all that is noted, and those who wait for it."""
        backlog, self._backlog = self._backlog, Backlog()
        self._current, self._next = self._next, []
        self._busy = True
        return backlog

    def _end(self) -> None:
        self._busy = False
        for future in self._current:
            if not future.done():
                future.set_result(None)
        self._current = []

    async def _apply(self, applier: Applier, backlog: Backlog) -> None:
        """The part of a backlog that was asked for."""
        if backlog.everything:
            await applier.compare(interior=False)
        else:
            for vni in applier.in_turn(backlog.bridges):
                await applier.attempt(("bridge", vni, ""), applier.bridge(vni))
            for vni in applier.in_turn(backlog.again):
                look = Look(interior=True, rows=True, drift=False)
                await applier.attempt(("bridge", vni, ""), applier.bridge(vni, look))
        if backlog.forwards or applier.stale_tables:
            await self._rules(applier)
        for vni, (macs, addresses) in backlog.rows.items():
            rows = applier.rows(vni, list(macs), list(addresses))
            await applier.attempt(("rows", vni, ""), rows, whole=False)

    async def _repair(self, applier: Applier, backlog: Backlog) -> None:
        """The part that nobody asked for: whatever has to be changed now is drift."""
        if backlog.uplink or backlog.overrun:
            await applier.attempt(("uplink", 0, ""), applier.mend_uplink())
            await applier.attempt(("routes", 0, ""), applier.check_routes())
        with applier.counting_repairs():
            if backlog.overrun:
                log.warning("datapath.events_lost")
                await applier.compare(interior=False, drift=True)
            for vni in applier.in_turn(backlog.suspects | backlog.audits):
                look = Look(rows=vni in backlog.audits)
                await applier.attempt(("bridge", vni, ""), applier.bridge(vni, look))
        for vni, (macs, addresses) in backlog.lost.items():
            restore = applier.restore(vni, macs, addresses)
            await applier.attempt(("rows", vni, ""), restore, whole=False)
        if applier.stale_tables:
            await self._rules(applier)
        if backlog.tables or backlog.overrun:
            await applier.attempt(("tables", 0, ""), applier.check_tables())

    async def _rules(self, applier: Applier) -> None:
        await applier.attempt(("tables", 0, ""), applier.tables())
        await applier.attempt(("routes", 0, ""), applier.routes())

    def _retry(self, key: Key) -> None:
        kind, vni, _ = key
        if kind == "port":
            self._backlog.bridges.add(vni)
        elif kind in ("bridge", "rows"):
            self._backlog.again.add(vni)
        elif kind in ("tables", "routes"):
            self._backlog.forwards = True
        elif kind == "uplink":
            self._backlog.uplink = True
        else:
            self._failures.succeeded(key)
            self._backlog.everything = True
        self._wake.set()

    async def _audit(self, applier: Applier) -> None:
        """Compare one network after the other whole, for what no event tells of."""
        done: set[int] = set()
        while True:
            await asyncio.sleep(self._audit_interval)
            waiting = applier.networks.held.keys() - done
            if not waiting:
                done.clear()
                waiting = set(applier.networks.held)
            if waiting:
                vni = min(waiting)
                done.add(vni)
                self._backlog.audits.add(vni)
            self._backlog.uplink = self._backlog.tables = True
            self._wake.set()

    # -- what others did --

    def _seen(self, events: Events) -> None:
        applier = self._applier
        if applier is None:
            return
        devices = applier.networks.devices
        rows = events.macs.keys() | events.addresses.keys()
        for index in events.lost | events.down | rows:
            vni, endpoint = devices.get(index, (0, ""))
            if index == applier.uplink.index:
                self._backlog.uplink = True
            elif endpoint:
                self._port_suspected(applier, vni, endpoint)
            elif vni:
                if index in events.lost or index in events.down:
                    self._backlog.suspects.add(vni)
                macs, addresses = events.macs.get(index, []), events.addresses.get(index, [])
                self._rows_lost(vni, macs, addresses)
        if self._backlog:
            self._wake.set()

    def _port_suspected(self, applier: Applier, vni: int, endpoint: str) -> None:
        """Something is wrong with a port: that of a sandbox which is gone, or to be mended."""
        bridge = self._desired.bridge(vni)
        port = bridge.ports.get(endpoint) if bridge else None
        if port and not sandbox.alive(port):
            applier.networks.forget_port(vni, endpoint)  # so that it is told only once
            self.on_port_gone(endpoint)
        else:
            self._backlog.suspects.add(vni)

    def _rows_lost(self, vni: int, macs: list[bytes], addresses: list[bytes]) -> None:
        rows = self._desired.rows(vni, macs, addresses)
        macs = [mac for mac, vtep in rows.fdb if vtep]
        addresses = [address for address, mac in rows.neighbours if mac]
        if macs or addresses:
            add_rows(self._backlog.lost, vni, macs, addresses)

    def _tables_seen(self) -> None:
        self._backlog.tables = True
        self._wake.set()

    def _overrun(self) -> None:
        self._backlog.overrun = True
        self._wake.set()


def _stopping() -> Unavailable:
    return Unavailable("the kernel's state", "the agent is stopping", "Ask again when it runs")
