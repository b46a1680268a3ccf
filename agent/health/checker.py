"""When to look at which backend of this node, and what comes of it.

A task for each backend and service whose check looks (tcp, http). What is found goes to the node
only when it is something new; after a restart of the agent the last states hold until a look
says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import NamedTuple

import structlog

from agent.core.checking import Streak
from agent.errors import VxmeshError
from agent.health.probes import Prober, Target, Vanished
from agent.model import HANDED_OUT
from agent.node import NodeState
from agent.servicemodel import HTTP, REASON_MAX, TCP, UNKNOWN, Check, Service, Verdict
from agent.views import Change

log = structlog.get_logger()

AT_ONCE = 128  # looks under way; each is a socket and, for 0.2 ms, two threads


class _Wanted(NamedTuple):
    """What makes a check what it is: with another one of these it begins anew."""

    check: Check
    target: Target


class HealthChecker:
    """All checks of this node."""

    def __init__(self, node: NodeState, prober: Prober | None = None) -> None:
        self.node = node
        self._prober = prober or Prober()
        self._slots = asyncio.Semaphore(AT_ONCE)
        # Endpoint -> service -> what is looked at, and the task that does it.
        self._checks: dict[str, dict[str, tuple[_Wanted, asyncio.Task[None]]]] = {}
        self._verdicts: dict[str, dict[str, Verdict]] = {}

    def start(self) -> None:
        """Begin to look."""
        for members in self.node.members.values():
            for member in list(members.all.values()):
                health = self.node.health_of(member) if member.node == self.node.me else None
                if health and health.verdicts:
                    found = {verdict.service: verdict for verdict in health.verdicts}
                    self._verdicts[member.endpoint.id] = found
        self.node.listeners.append(self._changed)
        for service in self.node.services.all():
            self._refresh(service.id)
        for endpoint in list(self._verdicts):
            self._drop_stale(endpoint)

    async def stop(self) -> None:
        """End all checks; what they found stays."""
        self.node.listeners.remove(self._changed)
        tasks = [task for held in self._checks.values() for _, task in held.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._checks.clear()
        self._prober.close()

    @property
    def count(self) -> int:
        """How many checks there are."""
        return sum(map(len, self._checks.values()))

    # -- what to look at --

    def _changed(self, change: Change) -> None:
        led = set(change.led)
        for id in change.sandboxes:
            sandbox = self.node.sandboxes.get(id)
            for endpoint in sandbox.endpoints if sandbox else ():
                led |= self.node.selection.services_of(endpoint)
        for each in change.endpoints:
            if each.old and each.new is None:
                self._forget(each.old.endpoint.id)
        for id in led:
            self._refresh(id)

    def _refresh(self, id: str) -> None:
        """Begin, change and end the checks of one service."""
        service = self.node.services.get(id)
        wanted = self._wanted(service) if service else {}
        for endpoint in [e for e, held in self._checks.items() if id in held and e not in wanted]:
            self._end(endpoint, id)
        for endpoint, want in wanted.items():
            held = self._checks.get(endpoint, {}).get(id)
            if held and held[0] == want:
                continue
            if held:
                self._end(endpoint, id, keep=True)
            task = asyncio.create_task(self._watch(endpoint, id, want), name="health")
            self._checks.setdefault(endpoint, {})[id] = want, task

    def _wanted(self, service: Service) -> dict[str, _Wanted]:
        check, found = service.health, {}
        port = service.check_port()
        if check.kind not in (TCP, HTTP) or not port:
            return {}
        for id in self.node.selection.endpoints_of(service.id):
            endpoint = self.node.local_endpoint(id)
            sandbox = self.node.sandboxes.get(endpoint.sandbox) if endpoint else None
            if endpoint is None or sandbox is None or not endpoint.addresses:
                continue
            if sandbox.netns == HANDED_OUT and not sandbox.moved_to:
                continue  # nobody has said where to look from
            found[id] = _Wanted(
                check,
                Target(
                    sandbox.moved_to or sandbox.netns,
                    sandbox.moved_inode or sandbox.inode,
                    endpoint.addresses[0],
                    port,
                    check.kind,
                    check.path,
                    service.name,
                    check.timeout,
                ),
            )
        return found

    def _end(self, endpoint: str, service: str, keep: bool = False) -> None:
        """End a check; with `keep`, what it said holds until the next one says something."""
        held = self._checks[endpoint]
        held.pop(service)[1].cancel()
        if not held:
            del self._checks[endpoint]
        verdicts = self._verdicts.get(endpoint, {})
        if not keep and service in verdicts:
            del verdicts[service]
            # Not now: whoever listens to the change that this follows from hears of that first.
            asyncio.get_running_loop().call_soon(self._tell, endpoint)

    def _drop_stale(self, endpoint: str) -> None:
        """Take back what checks said that there are no longer."""
        verdicts, held = self._verdicts[endpoint], self._checks.get(endpoint, {})
        for service in [service for service in verdicts if service not in held]:
            del verdicts[service]
        self._tell(endpoint)

    def _forget(self, endpoint: str) -> None:
        """An endpoint is gone."""
        for _, task in self._checks.pop(endpoint, {}).values():
            task.cancel()
        self._verdicts.pop(endpoint, None)

    # -- looking --

    async def _watch(self, endpoint: str, service: str, want: _Wanted) -> None:
        loop = asyncio.get_running_loop()
        known = self._verdicts.get(endpoint, {}).get(service)
        streak = Streak(want.check, loop.time(), known.state if known else UNKNOWN)
        if known:  # after a start all begin at once: spread them
            await asyncio.sleep(random.uniform(0, want.check.interval))
        while True:
            began = loop.time()
            async with self._slots:
                try:
                    why = await self._prober.look(want.target)
                except Vanished:
                    why = None  # the sandbox ends, or is not there yet after a start
                except Exception as error:
                    log.exception("health.failed", endpoint=endpoint, error=repr(error))
                    why = None
            if why is not None and streak.note(not why, loop.time()):
                verdict = Verdict(service, streak.state, self.node.clock(), why[:REASON_MAX])
                self._verdicts.setdefault(endpoint, {})[service] = verdict
                self._tell(endpoint)
            now = loop.time()
            await asyncio.sleep(max(0.0, began + streak.pause(now) - now))

    def _tell(self, endpoint: str) -> None:
        with contextlib.suppress(VxmeshError):  # it has just gone
            self.node.note_verdicts(endpoint, self._verdicts.get(endpoint, {}).values())
