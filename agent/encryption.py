"""Encrypted networks as the whole node sees them: whether it can, its keys, who cannot.

A key is changed make-before-break. First there is a second one, with a device, a port and an
inner address of its own, and all are told; once every live node has it, and those with whom
there is something to talk about hold a session with it, it is the one that is used, by this node
and, as they hear of it, by the others; and when all have heard, the old one goes. What was under
way to the old one until then is still taken. A node that does not answer is waited for `GRACE`
and no longer: it finds the new key when it finds the cluster.

What stands opposite: keys.py keeps the keys, plan.py makes devices of them, datapath/wireguard.py
is the kernel's side.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
import structlog

from agent.errors import Timeout, Unsupported, VxmeshError
from agent.keys import WireguardKeys
from agent.node import NodeState
from agent.views import Change

log = structlog.get_logger()

GRACE = 60.0  # s that each step of a change waits for nodes that do not answer
SESSIONS_WITHIN = 20.0  # s for sessions with the new key; WireGuard tries every 5
LINGER = 5.0  # s after the last node has changed over, for what is under way
RETRY = 60.0  # s after a change that failed
POLL = 0.1  # s
SPREAD = 0.1  # of the interval, by which nodes that began together drift apart


class Kernel(Protocol):
    """What datapath/ offers."""

    async def sessions(self, device: str) -> Mapping[bytes, float]:
        """Public key of a peer -> when the last handshake with it was, 0: never."""


class Plan(Protocol):
    """What plan.py offers."""

    def devices_by_key(self) -> Mapping[bytes, str]:
        """Our public keys and the devices they are on; empty while none is needed."""

    def partners(self) -> set[str]:
        """The nodes that share an encrypted network with this one."""

    def disputed_keys(self) -> set[tuple[str, str]]:
        """Nodes that state a key of another one as their own, and that one (ids)."""


class Encryption:
    """This node's part in encrypted networks."""

    def __init__(
        self,
        node: NodeState,
        keys: WireguardKeys,
        plan: Plan,
        kernel: Kernel,
        check: Callable[[], Awaitable[None]],
        spread: Callable[[float], Awaitable[None]],
        interval: float,
    ) -> None:
        """`check` raises Unsupported if this host has no WireGuard; `spread` returns when what
        was changed last is in the kernel of every live node, or raises Timeout after so many
        seconds; `interval` is that between two changes of the key, in s."""
        self._node, self._keys, self._plan, self._kernel = node, keys, plan, kernel
        self._check, self._spread, self._interval = check, spread, interval
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._told: set[tuple[str, str]] = set()  # network and node, of which was told
        self._disputed: set[tuple[str, str]] = set()  # nodes of which was told, and whose key
        self._jitter = 1 + SPREAD * (node.rng.random() - 0.5)

    def start(self) -> None:
        """Change the key when its time has come, and tell of who cannot take part."""
        self._node.listeners.append(self._changed)
        self._look()
        self._look_for_thieves()
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Leave keys and devices as they are."""
        self._node.listeners.remove(self._changed)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def require(self) -> None:
        """Have a key. Unsupported says why this host cannot; OSError if it cannot be kept.

        It is looked anew each time: what was missing may have been installed since.
        """
        if self._node.nodes[self._node.me].wireguard:
            return
        await self._check()
        async with self._lock:
            await asyncio.to_thread(self._keys.ensure)
            self._publish()

    # -- changing the key --

    async def rotate(self) -> None:
        """Change the key, or bring a change that was begun to its end. Unsupported, OSError."""
        await self.require()
        async with self._lock:
            await self._change()

    async def _change(self) -> None:
        """The same, for who has the lock."""
        await asyncio.to_thread(self._keys.begin)
        if not self._keys.is_flipped:
            self._publish()
            await self._everywhere("told")
            await self._until_sessions()
            await asyncio.to_thread(self._keys.flip)
        self._publish()
        await self._everywhere("used")
        await asyncio.sleep(LINGER)
        await asyncio.to_thread(self._keys.retire)
        self._publish()
        generation = self._keys.records()[0].generation
        self._node.tell(
            "encryption.rotated",
            f"this node's WireGuard key was changed; it is number {generation} now",
            generation=str(generation),
        )

    async def _keep(self) -> None:
        while True:
            wait = self._due_in()
            if not self._node.nodes[self._node.me].wireguard:
                wait = RETRY  # not on this host; somebody may install it
            await asyncio.sleep(min(max(wait, 0.0), RETRY))
            if wait > RETRY or not self._node.nodes[self._node.me].wireguard:
                continue
            try:
                await self.require()
                async with self._lock:  # what is under way now is not a change that was broken off
                    if self._due_in() <= 0:
                        await self._change()
            except (VxmeshError, OSError) as error:
                log.warning("encryption.rotation_failed", error=str(error))
                await asyncio.sleep(RETRY)

    def _due_in(self) -> float:
        """In how many s the key is to be changed; 0 if a change is to be brought to its end."""
        key = self._keys.current
        due = key.created + self._interval * self._jitter if key else 0.0
        return 0.0 if self._keys.is_changing else due - self._node.clock()

    def _publish(self) -> None:
        """Tell the others, and by that our own kernel."""
        me = self._node.nodes[self._node.me]
        self._node.describe(msgspec.structs.replace(me, wireguard=self._keys.records()))

    async def _everywhere(self, what: str) -> None:
        try:
            await self._spread(GRACE)
        except Timeout as error:
            log.warning("encryption.rotation_alone", step=what, error=str(error))

    async def _until_sessions(self) -> None:
        """Wait until the new key has a session with the key that each partner uses."""
        new = self._keys.records()[-1].public
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SESSIONS_WITHIN):
                while missing := await self._without_session(new):
                    log.debug("encryption.sessions", missing=len(missing))
                    await asyncio.sleep(POLL)

    async def _without_session(self, public: bytes) -> list[str]:
        device = self._plan.devices_by_key().get(public)
        if device is None:
            return []
        sessions = await self._kernel.sessions(device)
        nodes = self._node.nodes
        return [
            id
            for id in self._plan.partners() & nodes.keys()
            if id != self._node.me
            and self._node.condition(id).state == "alive"
            and nodes[id].wireguard
            and not sessions.get(nodes[id].wireguard[0].public)
        ]

    # -- who cannot --

    def _changed(self, change: Change) -> None:
        if change.nodes or change.networks or change.endpoints:
            self._look()
        if change.nodes:
            self._look_for_thieves()

    def _look(self) -> None:
        """Tell of each node that is cut off from an encrypted network here, once."""
        standing = {
            (network.id, id)
            for network in self._node.local_networks()
            if network.encrypted
            for id in without_key(self._node, network.id)
        }
        told, self._told = self._told, standing
        for network, id in sorted(standing - told):
            name, where = self._node.catalogue.name(network), self._node.node_name(id)
            self._node.tell(
                "encryption.no_key",
                f"{where} has no WireGuard key, so nothing is sent to its endpoints of the "
                f"encrypted network {name}, nor taken from them",
                network=name,
                node=where,
            )

    def _look_for_thieves(self) -> None:
        """Tell of each node that states another one's key as its own, once of each two."""
        for id, owner in sorted(self._plan.disputed_keys() - self._disputed):
            self._disputed.add((id, owner))
            where, whose = self._node.node_name(id), self._node.node_name(owner)
            self._node.tell(
                "encryption.key_disputed",
                f"{where} states a WireGuard key of {whose} as its own; {whose} was known with it "
                "first and keeps it, and by that key nothing is sent to the other",
                node=where,
                owner=whose,
            )


async def can_encrypt(check: Callable[[], Awaitable[None]]) -> bool:
    """Whether this host has WireGuard, at start; why not is in the log."""
    try:
        await check()
    except (Unsupported, OSError) as error:
        log.info("encryption.unavailable", why=str(error))
        return False
    return True


def without_key(node: NodeState, network: str) -> list[str]:
    """Ids of the nodes with endpoints in an encrypted network (id) and without a key."""
    found, members = node.catalogue.get(network), node.members.get(network)
    if not found or not found.encrypted or not members:
        return []
    return sorted(
        id
        for id, count in members.count.items()
        if count and id in node.nodes and not node.nodes[id].wireguard
    )
