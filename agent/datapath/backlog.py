"""What the reconciler has still to look at, and what failed and is to be tried again.

What stands opposite: reconciler.py, which works it off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import structlog

from agent.drivers.balancing import FrontendKey
from agent.errors import Conflict, VxmeshError

log = structlog.get_logger()

RETRY_FIRST, RETRY_MOST = 0.5, 30.0  # s; doubled with every failure in between
RETRY_PASSING = 0.02  # s, the first one after a failure that is about to pass

Key = tuple[
    str, int, str
]  # kind (bridge, port, rows, tables, routes, uplink, …), VNI or 0, endpoint or ""
Rows = dict[int, tuple[set[bytes], set[bytes]]]  # VNI -> MACs, addresses


class Passing(Conflict):
    """What is in the way is about to go by itself, within tens of milliseconds as a rule."""


@dataclass(slots=True)
class Backlog:
    """Things to look at again. Sets, so that however often one is named it is looked at once."""

    bridges: set[int] = field(default_factory=set)
    rows: Rows = field(default_factory=dict)
    forwards: bool = False
    everything: bool = False
    services: set[FrontendKey] = field(default_factory=set)
    balancing: bool = False  # all services, and the ways back in sandboxes
    again: set[int] = field(default_factory=set)  # bridges of which something failed
    wireguard: bool = False
    # Of what follows nobody asked for a change: what is found wrong there is drift.
    # VNI -> endpoints whose ports are not as they were; "" for the bridge and VXLAN device
    suspects: dict[int, set[str]] = field(default_factory=dict)
    audits: set[int] = field(default_factory=set)  # bridges to compare whole, rows and all
    lost: Rows = field(default_factory=dict)  # rows that were deleted
    changed: Rows = field(default_factory=dict)  # rows that came or became others
    strangers: bool = False  # devices with our mark under names that are not ours
    namespace: bool = False  # whether it is at its path
    uplink: bool = False
    routes: bool = False
    sysctls: bool = False
    tables: bool = False
    tables_told: bool = False  # the kernel says that somebody changed them
    overrun: bool = False  # everything, because events were lost
    tunnels: bool = False  # WireGuard's devices and routes
    sockets: bool = False  # programs and maps that balance at connect(2)
    shortcuts: bool = False  # those of ways past the bridge

    def __bool__(self) -> bool:
        return any(getattr(self, part.name) for part in fields(self))

    def awaits(self, vni: int) -> bool:
        """Whether all of a network is to be written anew, so that a difference is no drift."""
        return self.everything or vni in self.bridges or vni in self.again

    def host(self) -> None:
        """Note what there is once a host, whatever its networks."""
        self.namespace = self.uplink = self.routes = True
        self.sysctls = self.tables = self.strangers = self.tunnels = True
        self.sockets = self.shortcuts = True


def add_rows(rows: Rows, vni: int, macs: Iterable[bytes], addresses: Iterable[bytes]) -> None:
    """Note keys of a network."""
    held = rows.get(vni)
    if held is None:
        held = rows[vni] = (set(), set())
    held[0].update(macs)
    held[1].update(addresses)


@dataclass(slots=True)
class _Failure:
    error: VxmeshError
    times: int
    timer: asyncio.TimerHandle


class Attempt(Protocol):
    """See Applier.attempt."""

    async def __call__(
        self, key: Key, work: Coroutine[Any, Any, None], whole: bool = True
    ) -> None: ...


class Failures:
    """What failed last time, each with the time of its next attempt."""

    def __init__(self, retry: Callable[[Key], None]) -> None:
        """`retry` is called with the key when its time has come."""
        self._retry = retry
        self._failures: dict[Key, _Failure] = {}

    def failed(self, key: Key, error: Exception) -> None:
        """Note a failure; the next attempt is later each time, and no other waits for it."""
        before = self._failures.get(key)
        times = before.times + 1 if before else 1
        if before:
            before.timer.cancel()
        if not isinstance(error, VxmeshError):
            why = str(error) or type(error).__name__
            error = VxmeshError(_text(key), why, "It is tried again by itself")
        first = RETRY_PASSING if isinstance(error, Passing) else RETRY_FIRST
        delay = min(first * 2 ** min(times - 1, 16), RETRY_MOST)
        timer = asyncio.get_running_loop().call_later(delay, self._retry, key)
        self._failures[key] = _Failure(error, times, timer)
        log.warning("datapath.failed", what=_text(key), error=str(error), again_in=delay)

    def succeeded(self, key: Key) -> None:
        """Forget a failure, if there was one."""
        failure = self._failures.pop(key, None)
        if failure:
            failure.timer.cancel()

    def stands(self, key: Key) -> bool:
        """Whether the last attempt failed."""
        return key in self._failures

    def forget(self, vni: int, endpoints: Iterable[str] | None = None) -> bool:
        """Forget the failures of a network that is gone, or of all its ports but `endpoints`.

        True if there was any.
        """
        if not self._failures:
            return False
        keep = None if endpoints is None else set(endpoints)
        gone = [
            key
            for key in self._failures
            if key[1] == vni and (keep is None or (key[0] == "port" and key[2] not in keep))
        ]
        for key in gone:
            self.succeeded(key)
        return bool(gone)

    def items(self) -> dict[Key, VxmeshError]:
        """All that stands."""
        return {key: failure.error for key, failure in self._failures.items()}

    def clear(self) -> None:
        """Forget all, and try nothing again."""
        for key in list(self._failures):
            self.succeeded(key)


def note_again(key: Key, backlog: Backlog, failures: Failures) -> None:
    """Note what failed and whose time has come, to be looked at again."""
    kind, vni, _ = key
    if kind == "port":
        backlog.bridges.add(vni)
    elif kind in ("bridge", "rows"):
        backlog.again.add(vni)
    elif kind in ("tables", "routes"):
        backlog.forwards = True
    elif kind == "services":
        backlog.balancing = True
    elif kind == "replies":
        failures.succeeded(key)  # a port that is gone by now would stand for ever
        backlog.balancing = True
    elif kind in ("wireguard", "wireguard-rest"):
        backlog.wireguard = True
    elif kind == "guard":
        backlog.everything = True
    elif kind == "audit":
        failures.succeeded(key)  # a network that is gone by now would stand for ever
        backlog.audits.add(vni)
    elif kind in ("uplink", "namespace", "sysctls", "strangers", "sockets", "shortcuts"):
        setattr(backlog, kind, True)
    elif kind == "programs":
        pass  # they are attached after each pass
    else:
        failures.succeeded(key)
        backlog.everything = True


def _text(key: Key) -> str:
    kind, vni, endpoint = key
    of = f" of endpoint {endpoint}" if endpoint else f" of VNI {vni}" if vni else ""
    return f"{kind}{of}"
