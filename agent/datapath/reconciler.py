"""Makes this host's kernel hold what is desired, and keeps it so.

It is told only what to look at again. One task takes all that is noted, pulls the newest
desired values and has them applied. A change costs what it is; at the start, after lost events
and on request everything is compared. What somebody else deletes or sets down is put back.
What stands opposite: drivers/ say what is desired; applier.py changes the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from agent.datapath.applier import Applier, prepare
from agent.datapath.backlog import Backlog, Failures, Key, Passing, add_rows, note_again
from agent.datapath.cleanup import remove_everything
from agent.datapath.concerns import Concerns
from agent.datapath.drift import Drift
from agent.datapath.look import Look
from agent.datapath.monitor import RECEIVE_BUFFER, Events, Monitor
from agent.datapath.mountwatch import MountWatch
from agent.datapath.refusals import Refusal
from agent.datapath.repairs import Repair
from agent.datapath.tablemonitor import TableMonitor
from agent.drivers.balancing import FrontendKey
from agent.drivers.base import DesiredState
from agent.errors import Unavailable, VxmeshError

log = structlog.get_logger()

AUDIT_INTERVAL = 20.0  # s; in which every network is compared whole once, one after the other
REPORT_INTERVAL = 1.0  # s between two reports of repairs
REFUSALS_INTERVAL = 5.0  # s between two looks at what the guards dropped, 1 ms each
PASSES_WITHIN = 3.0  # s; a namespace that is gone is taken apart some tens of ms later
LOOK_INTERVAL = 0.02  # s
HOST = 0  # among VNIs: what there is once a host
DATA_PORT = 4789  # RFC 7348


class Reconciler:
    """The kernel state of one host."""

    def __init__(
        self,
        desired: DesiredState,
        run_dir: Path,
        *,
        on_applied: Callable[[object], None] = lambda mark: None,
        on_withheld: Callable[[dict[str, str]], None] = lambda networks: None,
        on_port_gone: Callable[[str], None] = lambda endpoint: None,
        on_repair: Callable[[Repair], None] = lambda repair: None,
        on_refusal: Callable[[Refusal], None] = lambda refusal: None,
        host_netns: str = "/proc/self/ns/net",
        audit_interval: float = AUDIT_INTERVAL,
        refusals_interval: float = REFUSALS_INTERVAL,
        monitor_buffer: int = RECEIVE_BUFFER,
        data_port: int = DATA_PORT,
        wireguard: str = "auto",
        at_sockets: bool = True,
        has_shortcuts: bool = True,
    ) -> None:
        """Our own namespace is at run_dir/netns, the host's at `host_netns`.

        `on_applied` is given desired.mark() once what it stands for has been attempted, and
        just before it `on_withheld` the networks that lack something all the same, and why;
        `on_port_gone` the id of an endpoint whose sandbox's namespace exists no longer;
        `on_repair` what was put back that nobody asked for, a kind at a time; `on_refusal`,
        every `refusals_interval` s, what a port sent and the guards dropped. `data_port` is
        VXLAN's UDP port, as it is outside WireGuard; `wireguard` whose that is: kernel, go, auto;
        `at_sockets` whether services are balanced at connect(2) where that can be, and
        `has_shortcuts` whether frames between sandboxes and other hosts go past the bridge.
        """
        self._data_port, self._wireguard, self._at_sockets = data_port, wireguard, at_sockets
        self._has_shortcuts = has_shortcuts
        self.netns = run_dir / "netns"
        self.on_applied, self.on_port_gone, self.on_repair = on_applied, on_port_gone, on_repair
        self.on_withheld = on_withheld
        self.on_refusal, self._refusals_interval = on_refusal, refusals_interval
        self._desired = desired
        self._host_netns = host_netns
        self._audit_interval, self._monitor_buffer = audit_interval, monitor_buffer
        self._backlog = Backlog()
        self._failures = Failures(self._retry)
        self._concerns = Concerns(desired, self._failures)
        self._wake = asyncio.Event()
        self._next: list[asyncio.Future[None]] = []  # who waits for what is noted now
        self._current: list[asyncio.Future[None]] = []  # who waits for what is being applied
        self._busy = self._stopped = False
        self._applier: Applier | None = None
        self._drift: Drift | None = None
        self._reporting: asyncio.TimerHandle | None = None
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

    def touch_services(self, keys: Iterable[FrontendKey]) -> None:
        """These frontends."""
        self._backlog.services.update(keys)
        self._wake.set()

    def touch_wireguard(self) -> None:
        """WireGuard's devices and their peers."""
        self._backlog.wireguard = True
        self._wake.set()

    def touch_nothing(self) -> None:
        """Something was taken in that needs nothing here: that it is applied is to be told."""
        self._wake.set()

    def touch_all(self) -> None:
        """Everything."""
        self._backlog.everything = True
        self._wake.set()

    def audit(self) -> None:
        """Compare everything with the kernel, in order to find drift."""
        self._backlog.host()
        if self._applier:
            self._backlog.audits.update(self._applier.networks.held, self._applier.lans.held)
        self._wake.set()

    async def settle(self, endpoint: str | None = None) -> None:
        """Return when all that was touched before this call has been attempted.

        Raises the VxmeshError of `endpoint`'s port, or of the network that it is in, if the
        last attempt at it failed. What is about to pass is waited for, here and not in the one
        task: the next attempts come by themselves.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PASSES_WITHIN
        while True:
            if self._stopped:
                raise _stopping()
            if self._backlog or self._busy:
                future = loop.create_future()
                (self._next if self._backlog else self._current).append(future)
                await future
            error = self._concerns.failure_of(endpoint) if endpoint else None
            if error is None:
                return
            if not isinstance(error, Passing) or loop.time() > deadline:
                raise type(error)(error.what, error.why, error.fix)
            await asyncio.sleep(LOOK_INTERVAL)

    async def sessions(self, device: str) -> dict[bytes, float]:
        """Public key of each peer of a WireGuard device -> when the last handshake with it was
        completed, s since the epoch; 0 if none was."""
        return await self._applier.wireguard.devices.sessions(device) if self._applier else {}

    @property
    def repairs(self) -> Counter[str]:
        """What was put back without being asked for, by kind; see repairs.KINDS."""
        return self._applier.repairs.total if self._applier else Counter()

    @property
    def refused(self) -> Counter[str]:
        """How many frames the guards dropped, by reason; see guardrules.REASONS."""
        return self._applier.refusals.total if self._applier else Counter()

    async def connections(self) -> dict[tuple[str, str], int]:
        """Service and endpoint (ids) -> connections that the one led to the other from this host.
        VxmeshError if they cannot be read now."""
        return await self._applier.serving.tallies.read() if self._applier else {}

    def failures(self) -> list[VxmeshError]:
        """What could not be applied and is being tried again."""
        return list(self._failures.items().values())

    def _note_applied(self, mark: object) -> None:
        """Tell what is in force by now, and of which networks it is not; see Concerns.withheld."""
        applier = self._applier
        held = (applier.networks.held, applier.lans.held) if applier else ({}, {})
        withheld = self._concerns.withheld(*held)
        if withheld is not None:
            self.on_withheld(withheld)
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
            host = Monitor(self._host_netns, self._seen_on_host, self._overrun, host=True)
            stack.callback(host.close)
            for path in (self.netns, self._host_netns):
                stack.callback(TableMonitor(path, self._tables_seen).close)
            stack.callback(MountWatch(self._mounts_seen).close)
            applier = Applier(
                self._desired,
                self.netns,
                self._host_netns,
                self._failures,
                monitor,
                lambda: self._backlog,
                self._data_port,
                self._wireguard,
                self._at_sockets,
                self._has_shortcuts,
            )
            stack.callback(applier.close)
            await asyncio.to_thread(applier.serving.sockets.open)
            await applier.begin_shortcuts()
            self._drift = Drift(
                self._desired,
                applier.networks,
                applier.inspection,
                applier.uplink,
                applier.wireguard.devices,
                lambda endpoint: self.on_port_gone(endpoint),
            )
            self._applier = applier
            # A failure stops no other network; those that are encrypted are not made before.
            await applier.attempt(("tables", 0, ""), applier.wireguard.begin())
            await applier.uplink.ensure()
            await applier.uplink.read_routes()
            self._begin()
            mark = self._desired.mark()
            await applier.attempt(("wireguard", 0, ""), applier.wireguard.extend())
            await applier.compare(interior=True, gone=lambda e: self.on_port_gone(e))
            await applier.attempt(("services", 0, ""), applier.services())
            await applier.attempt(("wireguard-rest", 0, ""), applier.wireguard.shrink())
            await self._rules(applier)
            self._note_applied(mark)
            self._end()
            await applier.attempt(("programs", 0, ""), applier.shortcuts.attach())
            self._stack = stack.pop_all()
        applier.repairs.clear()  # until here it was not drift but the time without an agent
        works = self._work(applier), self._audit(applier), self._look_at_refusals(applier)
        self._tasks = [asyncio.create_task(work) for work in works]

    async def stop(self, remove: bool = False) -> None:
        """End the work. The kernel stays as it is, so that traffic goes on; unless `remove`."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._reporting:
            self._reporting.cancel()
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
                self._report(applier)
            except Exception as error:
                # What the kernel refuses is handled where it happens: this is a fault of ours.
                log.exception("datapath.fault")
                self._failures.failed(("everything", 0, ""), error)
            self._end()
            # Who asked for a port has it by now.
            await applier.attempt(("programs", 0, ""), applier.shortcuts.attach())

    def _report(self, applier: Applier) -> None:
        """Tell what was put back: at once, but of who goes on and on only every now and then."""
        if self._reporting is None and (repairs := applier.repairs.take()):
            loop = asyncio.get_running_loop()
            self._reporting = loop.call_later(REPORT_INTERVAL, self._report_again, applier)
            for repair in repairs:
                self.on_repair(repair)

    def _report_again(self, applier: Applier) -> None:
        self._reporting = None
        self._report(applier)

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
        wireguard = backlog.wireguard or backlog.everything
        if wireguard:
            await applier.attempt(("wireguard", 0, ""), applier.wireguard.extend())
        if backlog.everything:
            await applier.compare(interior=False)
        else:
            for vni in applier.in_turn(backlog.bridges):
                await applier.attempt(("bridge", vni, ""), applier.bridge(vni))
            for vni in applier.in_turn(backlog.again):
                look = Look(interior=True, rows=True, drift=False)
                await applier.attempt(("bridge", vni, ""), applier.bridge(vni, look))
        if backlog.everything or backlog.balancing:
            await applier.attempt(("services", 0, ""), applier.services())
        elif backlog.services or backlog.bridges or backlog.again:
            services = applier.services(backlog.services)
            await applier.attempt(("services", 0, ""), services, whole=False)
        if backlog.forwards or applier.stale_tables:
            await self._rules(applier)
        for vni, (macs, addresses) in backlog.rows.items():
            rows = applier.rows.write(vni, list(macs), list(addresses))
            await applier.attempt(("rows", vni, ""), rows, whole=False)
        if wireguard or applier.wireguard.owes_unsealing:
            await applier.attempt(("wireguard-rest", 0, ""), applier.wireguard.shrink())

    async def _repair(self, applier: Applier, backlog: Backlog) -> None:
        """The part that nobody asked for: whatever has to be changed now is drift."""
        if backlog.overrun:
            log.warning("datapath.events_lost")
            backlog.host()
        if backlog.namespace:
            await applier.attempt(("namespace", 0, ""), applier.check_namespace())
        if backlog.uplink:
            await applier.attempt(("uplink", 0, ""), applier.mend_uplink())
        if backlog.tunnels:
            await applier.attempt(("wireguard", 0, ""), applier.wireguard.check())
        if backlog.sysctls:
            await applier.attempt(("sysctls", 0, ""), applier.check_sysctls())
        if backlog.sockets:
            await applier.attempt(("sockets", 0, ""), applier.check_sockets())
        if backlog.shortcuts:
            await applier.attempt(("shortcuts", 0, ""), applier.check_shortcuts())
        if backlog.strangers:
            await applier.attempt(("strangers", 0, ""), applier.check_strangers())
        if backlog.overrun:
            await applier.compare(interior=False, drift=True)
        for vni in applier.in_turn(backlog.suspects):
            await applier.mend(vni, Look(only=backlog.suspects[vni]))
        for vni in applier.in_turn(backlog.audits):
            await applier.attempt(("audit", vni, ""), applier.audit(vni))
        for vni, (macs, addresses) in backlog.lost.items():
            restore = applier.rows.restore(vni, macs, addresses)
            await applier.attempt(("rows", vni, ""), restore, whole=False)
        for vni, (macs, addresses) in backlog.changed.items():
            correct = applier.rows.correct(vni, macs, addresses)
            await applier.attempt(("rows", vni, ""), correct, whole=False)
        if applier.stale_tables:
            await self._rules(applier)
        if backlog.uplink or backlog.routes:
            await applier.attempt(("routes", 0, ""), applier.check_routes())
        if backlog.tables or backlog.tables_told:
            check = applier.check_tables(backlog.tables_told)
            await applier.attempt(("tables", 0, ""), check)

    async def _rules(self, applier: Applier) -> None:
        await applier.attempt(("tables", 0, ""), applier.tables())
        await applier.attempt(("routes", 0, ""), applier.routes())

    def _retry(self, key: Key) -> None:
        note_again(key, self._backlog, self._failures)
        self._wake.set()

    async def _audit(self, applier: Applier) -> None:
        """Compare one network after the other whole, and the host, for what no event tells of.

        Spread out, and each comes up once in an interval however many there are.
        """
        turn: deque[int] = deque()
        while True:
            await asyncio.sleep(self._audit_interval / max(1, len(turn)))
            held = {HOST, *applier.networks.held, *applier.lans.held}
            turn = deque(vni for vni in turn if vni in held)
            turn.extendleft(sorted(held.difference(turn)))  # before those that had theirs
            turn.rotate(-1)
            if turn[-1] == HOST:
                self._backlog.host()
            else:
                self._backlog.audits.add(turn[-1])
            self._wake.set()

    async def _look_at_refusals(self, applier: Applier) -> None:
        while True:
            await asyncio.sleep(self._refusals_interval)
            try:
                refusals = await applier.refusals.read()
            except VxmeshError as error:
                log.debug("guards.unreadable", error=str(error))  # deleted, and about to be back
                continue
            for refusal in refusals:
                self.on_refusal(refusal)

    # -- what others did --

    def _seen(self, events: Events) -> None:
        if self._drift:
            self._drift.note(events, self._backlog)
            self._look()

    def _seen_on_host(self, events: Events) -> None:
        if self._drift:
            self._drift.note_host(events, self._backlog)
            self._look()

    def _tables_seen(self) -> None:
        self._backlog.tables_told = True
        self._wake.set()

    def _mounts_seen(self) -> None:
        if self._applier and not self._applier.is_bound():
            self._backlog.namespace = True
            self._wake.set()
        for endpoint in self._applier.lans.dead() if self._applier else ():
            self.on_port_gone(endpoint)  # no event of ours tells: it is no pair

    def _overrun(self) -> None:
        self._backlog.overrun = True
        self._wake.set()

    def _look(self) -> None:
        if self._backlog:
            self._wake.set()


def _stopping() -> Unavailable:
    return Unavailable("the kernel's state", "the agent is stopping", "Ask again when it runs")
