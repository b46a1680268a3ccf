"""Keeps the engine's networks those of the cluster: what one host's user makes is on all hosts.

Who makes a network by one engine does so for all: its name goes into ours as a label, and every
other agent has its own engine make one that stands for it. A removal takes the same way. What is
to be done follows from comparing (comparing.py) whenever something happened on either side, so
engines and agents that were away catch up. It also tidies up after an engine that was killed.
What stands opposite: engine.py asks the engine; driver.py is asked by it; naming.py does names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from agent.api.docker.bindings import Bindings
from agent.api.docker.comparing import NAME, PLUGIN, Steps, body_of, compare, labels_of
from agent.api.docker.driver import LABEL
from agent.api.docker.engine import Engine, Event, Refused
from agent.api.docker.keeping import Keeper
from agent.api.docker.naming import Naming, label_from
from agent.errors import Conflict, InUse, NotFound, Unavailable, VxmeshError
from agent.model import Network
from agent.operations import Operations
from agent.views import Change

log = structlog.get_logger()

AGAIN = (
    0.5  # s until an engine that is away is looked for again, and until a failure is tried again
)
PERIOD = 30.0  # s; everything is compared so often, whatever was told
SURELY = 2.0  # s; what an engine does not list twice, so far apart, it does not have
REMEMBERED = 1000  # ids of networks that the engine says it removed


class Mirror:
    """One engine's networks."""

    def __init__(
        self,
        operations: Operations,
        bindings: Bindings,
        engine: Engine,
        keeper: Keeper,
        is_complete: Callable[[], bool],
        let_through: Callable[[], object],
    ) -> None:
        """`is_complete`: whether this node has heard of all that the others know; `let_through`
        opens the firewall that the engine may have made, and may block."""
        self._node, self._operations = operations.node, operations
        self._bindings, self._engine = bindings, engine
        self._is_complete, self._let_through = is_complete, let_through
        self._keeper = keeper
        self._naming = Naming(operations, bindings, engine, keeper)
        self._settled = set(bindings.all())  # what the engine has had time to list
        self._destroyed: dict[str, None] = {}  # Docker's ids
        self._is_there = False
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._told: set[str] = set()  # failures, so that each is logged once

    def start(self) -> None:
        """Look for the engine from now on; whether it runs is no matter."""
        self._node.listeners.append(self._changed)
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._mend())]

    async def stop(self) -> None:
        """Leave everything as it is."""
        self._node.listeners.remove(self._changed)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._naming.stop()
        await self._keeper.close()

    def _changed(self, change: Change) -> None:
        if change.networks:
            self._woken.set()

    # -- what the engine tells --

    async def _watch(self) -> None:
        was_there = False
        while True:
            try:
                async for event in self._engine.events():
                    if event is None:
                        log.info("docker.engine", socket=str(self._engine.path))
                        await self._found(again=was_there)
                        was_there = True
                    else:
                        self._heard(event)
            except VxmeshError as error:
                if self._is_there:
                    log.warning("docker.engine_gone", error=str(error))
            except Exception:
                log.exception("docker.fault")
            self._is_there = False
            self._keeper.all_ended()
            await asyncio.sleep(AGAIN)

    async def _found(self, again: bool) -> None:
        """The engine answers: it may be another one than before, and what it had begun is void."""
        self._is_there = True
        if again:
            self._node.let_all_go()
        self._settled = set(self._bindings.all())
        for id in await self._engine.containers():
            self._keeper.started(id)
            self._naming.look_at(id)
        self._keeper.only(await self._engine.containers(every=True))
        sweeping = asyncio.create_task(self._sweep())
        self._tasks = [t for t in self._tasks if not t.done()] + [sweeping]
        self._woken.set()

    def _heard(self, event: Event) -> None:
        if event.kind == "network" and event.action in ("create", "destroy"):
            if event.action == "destroy":
                self._destroyed[event.id] = None
                for id in list(self._destroyed)[:-REMEMBERED]:
                    del self._destroyed[id]
            self._woken.set()
        elif event.kind == "network" and event.action == "connect":
            self._naming.look_at(event.attributes.get("container", ""))
        elif event.kind == "container":
            if event.action.startswith(("rename", "health_status")):
                self._naming.look_at(event.id)
            elif event.action == "start":
                self._keeper.started(event.id)
            elif event.action == "die":
                self._keeper.ended(event.id)
            elif event.action == "destroy":
                self._keeper.forget(event.id)

    # -- what is to be done --

    async def _mend(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), PERIOD)
            self._woken.clear()
            if not self._is_there:
                continue
            try:
                again = not await self._once()
            except Exception as error:
                again = True
                if not isinstance(error, VxmeshError):
                    log.exception("docker.fault")
            if again:
                await asyncio.sleep(AGAIN)
                self._woken.set()

    async def _once(self) -> bool:
        """Compare, and do what is to be done; whether all of it could be."""
        await asyncio.to_thread(self._let_through)
        complete = self._is_complete()
        listed = await self._engine.networks()
        self._settled.update(str(n["Id"]) for n in listed)
        bound = self._bindings.all()
        steps = compare(
            listed,
            bound,
            {n.id: n for n in self._node.catalogue.all()},
            me=self._node.me,
            settled=self._settled,
            destroyed=self._destroyed,
            complete=complete,
        )
        for id in steps.forget:
            await self._bindings.drop(id)
            self._destroyed.pop(id, None)
        for id, meant in steps.bind.items():
            await self._bindings.put(id, meant)
        done = [await self._try(f"remove {id}", self._remove_ours(id)) for id in steps.gone]
        for id, made in steps.stale.items():
            done.append(await self._try(f"remove {made}", self._remove_stale(id, made)))
        done += [await self._try(f"remove {id[:12]}", self._remove(id)) for id in steps.remove]
        self._name_ours(steps)
        for network, name in steps.create:
            done.append(await self._try(f"make {name}", self._create(network, name)))
        return all(done) and complete and not steps.gone

    async def _try(self, what: str, work: object) -> bool:
        try:
            await work  # type: ignore[misc]
        except VxmeshError as error:
            if what not in self._told:
                self._told.add(what)
                log.warning("docker.failed", what=what, error=str(error))
            return False
        self._told.discard(what)
        return True

    async def _remove_ours(self, id: str) -> None:
        """The engine's user removed a network while we were away."""
        with contextlib.suppress(InUse, NotFound):  # it comes back where it is in use
            await self._operations.remove_networks([id])

    async def _remove_stale(self, docker: str, made: str) -> None:
        """A network that was made for one of the engine's which never came to be."""
        if docker in self._bindings.making or docker in self._bindings.all():
            return  # the engine has asked again meanwhile
        with contextlib.suppress(InUse, NotFound):
            await self._operations.remove_networks([made])
            log.info("docker.network_swept", network=made)

    async def _remove(self, id: str) -> None:
        """A network of the engine's stands for nothing any more."""
        for container in (await self._engine.network(id)).get("Containers") or {}:
            if not container.startswith("ep-"):
                await self._engine.disconnect(id, container)
        await self._engine.remove_network(id)
        log.info("docker.network_removed", id=id[:12])

    def _name_ours(self, steps: Steps) -> None:
        """The engine's user made a network: it is to be on all hosts, by that name."""
        for id, network in steps.tell.items():
            if not self._node.catalogue.get(id):
                continue  # removed by a step before
            labels = labels_of(network)
            try:
                self._node.amend_network(id, label_from(labels[NAME]), labels)
            except (Conflict, VxmeshError):
                old = self._node.find_network(id).name
                with contextlib.suppress(NotFound):
                    self._node.amend_network(id, old, labels)

    async def _create(self, network: Network, name: str) -> None:
        if self._node.catalogue.get(network.id):
            id = await self._engine.create_network(body_of(network, name))
            log.info("docker.network_made", id=id[:12], name=name, network=network.id)

    async def _sweep(self) -> None:
        """Remove endpoints that the engine, which was killed, knows nothing of."""
        while not await self._try("sweep", self._sweep_once()) and self._is_there:
            await asyncio.sleep(SURELY)

    async def _sweep_once(self) -> None:
        try:
            stale = await self._unlisted()
            if stale:
                await asyncio.sleep(SURELY)
                stale &= await self._unlisted()
        except Unavailable:
            return  # it will be back, and looked at anew
        for id in stale:
            with contextlib.suppress(NotFound):
                await self._operations.remove_endpoints([id])
        if stale:
            log.info("docker.endpoints_swept", count=len(stale))

    async def _unlisted(self) -> set[str]:
        """Our endpoints of the engine's containers (ids) that it does not list."""
        found: dict[str, str] = {}  # the engine's id -> ours
        for members in self._node.members.values():
            for id, endpoint in members.local.items():
                if LABEL in endpoint.labels:
                    found[endpoint.labels[LABEL]] = id
        if not found:
            return set()
        listed = {str(n["Id"]) for n in await self._engine.networks() if n["Driver"] == PLUGIN}
        for id in {*listed, *self._bindings.all()}:  # bindings may be lost
            try:
                network = await self._engine.network(id)
            except Refused as error:
                if error.status != 404:  # of what it does not tell nothing is known
                    raise
                continue
            for attached in (network.get("Containers") or {}).values():
                found.pop(str(attached.get("EndpointID")), None)
        return set(found.values())
