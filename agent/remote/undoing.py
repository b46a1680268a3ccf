"""What plugins were asked to make is undone once nobody wants it: at once, or when they are back.

Every call that makes something is written down with what undoes it, so that whatever goes wrong,
in the plugin or in this agent, is undone. What is not in the node's records any more is undone in
just the same way. What is made belongs to an owner: `ep:NETWORK:ENDPOINT` a plugin's endpoint,
`addr:NETWORK:ADDRESS` an address that a plugin gave, `net:NETWORK` a plugin's network,
`pool:NETWORK` its subnets, `late:PLUGIN` what was answered when nobody waited any more.
What stands opposite: driver.py and ipam.py make, ledger.py writes down, client.py asks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

import structlog

from agent.errors import VxmeshError
from agent.node import NodeState
from agent.notation import parse_address
from agent.remote.client import Plugins, is_away
from agent.remote.ledger import Ledger, Step
from agent.views import Change

log = structlog.get_logger()

RETRY_EVERY = 5.0  # s between two tries to undo what a plugin did not
# What rests on others goes before them: an endpoint before its address, both before the network.
_KINDS = ("ep:", "addr:", "net:", "pool:", "late:")

OwnStep = Callable[..., Awaitable[None]]


class Undoer:
    """All that plugins made for this node, and the end of it."""

    def __init__(
        self,
        node: NodeState,
        plugins: Plugins,
        ledger: Ledger,
        own_steps: dict[str, OwnStep],
        retry_every: float = RETRY_EVERY,
    ) -> None:
        """`own_steps` are what undoes our own part, by the names that steps call them; OSError."""
        self._node, self._plugins, self._own_steps = node, plugins, own_steps
        self.ledger = ledger
        self._retry_every = retry_every
        self._busy: dict[str, int] = {}  # owner -> by how many it is being made or undone
        self._undoing: set[str] = set()  # those of them that `settle` undoes
        self._freed = asyncio.Event()  # set when an owner is not busy any more
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        node.listeners.append(self._heard)

    def start(self) -> None:
        """Begin to undo what is not wanted any more."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop; what is left is undone by the next agent."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @contextlib.asynccontextmanager
    async def making(self, owner: str) -> AsyncIterator[None]:
        """What is made inside is undone if that fails, or whoever asked goes away."""
        self._hold(owner)
        try:
            yield
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.undo(owner)))
            raise
        finally:
            self._let_go(owner)
            self._wake.set()

    @contextlib.asynccontextmanager
    async def held(self, owner: str) -> AsyncIterator[None]:
        """Nothing of an owner is undone meanwhile."""
        self._hold(owner)
        try:
            yield
        finally:
            self._let_go(owner)

    async def done_with(self, owner: str) -> None:
        """Return when nothing of an owner is being made or undone, and what of it nobody wants is
        undone, if its plugin answers."""
        while owner in self._busy:
            await self._freed.wait()
        if owner in self.ledger.steps and not self._is_wanted(owner, frozenset()):
            async with self.held(owner):
                await self.undo(owner)

    async def undo(self, owner: str) -> bool:
        """Undo an owner's steps, last one first; False if the plugin is away: then the rest
        waits, as it may rest on it."""
        for step in reversed(self.ledger.steps.get(owner, ())):
            if not await self.undo_one(owner, step):
                return False
        return True

    async def undo_one(self, owner: str, step: Step) -> bool:
        """The same of one step."""
        try:
            if step.plugin:
                await self._plugins.call(step.plugin, step.method, step.body)
            elif not self.ledger.is_shared(step):
                await self._own_steps[step.method](**step.body)
        except OSError as error:
            log.warning("plugin.kept", owner=owner, method=step.method, error=str(error))
        except VxmeshError as error:
            log.warning("plugin.undo", owner=owner, method=step.method, error=str(error))
            if is_away(error):
                return False
        await self.ledger.drop(owner, step)
        return True

    async def settle(self) -> None:
        """Undo all that is not wanted, as far as plugins answer; what somebody else is undoing is
        waited for."""
        for number, kind in enumerate(_KINDS):
            owners = [owner for owner in self.ledger.steps if owner.startswith(kind)]
            resting = self._resting(_KINDS[:number]) if owners else set()
            for owner in owners:
                while owner in self._undoing:
                    await self._freed.wait()
                if owner in self._busy or self._is_wanted(owner, resting):
                    continue
                self._undoing.add(owner)
                try:
                    async with self.held(owner):
                        await self.undo(owner)
                finally:
                    self._undoing.discard(owner)

    def wake(self) -> None:
        """Something may be there to undo."""
        self._wake.set()

    def _hold(self, owner: str) -> None:
        self._busy[owner] = self._busy.get(owner, 0) + 1

    def _let_go(self, owner: str) -> None:
        self._busy[owner] -= 1
        if not self._busy[owner]:
            del self._busy[owner]
            self._freed.set()
            self._freed = asyncio.Event()

    def _resting(self, kinds: Sequence[str]) -> set[str]:
        """The networks (ids) of which something of these kinds is left, wanted or not; of the
        first kind what is not wanted, and could not be undone yet."""
        return {
            owner.split(":", 2)[1]
            for owner in self.ledger.steps
            if owner.startswith(tuple(kinds))
            and not (len(kinds) == 1 and self._is_wanted(owner, frozenset()))
        }

    def _is_wanted(self, owner: str, resting: Collection[str]) -> bool:
        """Whether an owner is to stay: it is in the records, or what rests on it is there."""
        kind, network, *rest = owner.split(":", 2)
        if kind == "late":
            return False
        if kind == "ep":
            return self._node.local_endpoint(rest[0]) is not None
        if network in resting:
            return True
        if kind == "addr":
            return self._is_used(network, parse_address(rest[0]))
        return self._node.catalogue.get(network) is not None

    def _is_used(self, network: str, address: bytes) -> bool:
        """Whether an endpoint of this node or a service has an address."""
        if self._node.services.with_address(network, address):
            return True
        members = self._node.members.get(network)
        member = members.with_address(address) if members else None
        return member is not None and member.node == self._node.me

    def _heard(self, change: Change) -> None:
        if change.endpoints or change.networks or change.services:
            self._wake.set()

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            await self.settle()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_every):
                    await self._wake.wait()
