"""Streams to other nodes, kept up: to whom, who dials whom, and which of two streams stays.

Whom a node wants streams to is core/topology.py's to say: of the live nodes, and of all known,
so that parts of a cluster that hold each other for dead find together again. Of a pair that both
want a stream the smaller id dials at once, the other only after a while, for the case that just
one of the directions works; of two streams between them both keep the one that the smaller id
opened. A stream that nobody wants any more is closed by its dialer after `KEEP_UNWANTED`.
What stands opposite: this room on the other node. detector.py says who lives; waiting.py waits
for what comes by the streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from agent.cluster import calls
from agent.cluster.callers import Caller
from agent.cluster.claims import Claims
from agent.cluster.codec import Encoder, Rumours, delta_from_proto
from agent.cluster.consent import Consent
from agent.cluster.dialer import OPTIONS, Denied, Dialer, target_of
from agent.cluster.link import Impostor, Link, Write
from agent.cluster.outside import Handlers
from agent.cluster.ports import PortCheck
from agent.cluster.reach import Reach
from agent.cluster.recheck import Recheck
from agent.cluster.refusals import Reason, Refusals
from agent.cluster.server import RANGES_MAX, SYNC, PeerServer
from agent.cluster.trust import Keyring
from agent.cluster.waiting import Waiting
from agent.core.plumtree import Mesh
from agent.core.replica import Delta
from agent.core.session import Hello, Message
from agent.core.topology import EVERYBODY, Topology
from agent.errors import Unavailable
from agent.model import Network, Node, Publish
from agent.node import NodeState
from agent.ports import Taken
from agent.rpc import peer_pb2 as pb
from agent.views import Change

log = structlog.get_logger()

CONNECT_WITHIN = 1.0  # s; for a channel to a port that has just answered
PAUSE = 0.1  # s; after a stream that ended, so that one that always ends at once costs little
ELSEWHERE = 5.0  # s; where another node answered, or one side does not believe the other
GRACE = 1.0  # s; how long the larger id leaves dialling to the smaller
HEAD_START = 0.1  # s; and how long when a port answers again, to both at about the same time
SETTLE = 0.1  # s; where nodes are many, their comings and goings are looked at together
KEEP_UNWANTED = 30.0  # s; longer than a node flaps, or streams would be closed and opened again
SPACE_TRIES = 3  # of an owner that counts as there
TIDY_INTERVAL = 5.0  # s; how late beyond that

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class Peers:
    """All streams of this node.

    `live` may be set to a callable of the ids of the nodes that count as members (this node may
    be among them or not), and `membership_changed` is to be called when it has changed. Without
    it all known nodes are dialled, and those take part in a wait that have a stream.
    """

    def __init__(
        self,
        node: NodeState,
        me: Node,
        boot: str,
        durable: Callable[[], Awaitable[None]],
        keyring: Keyring,
        run_dir: Path,
        everybody: int = EVERYBODY,
        enrol: Handlers | None = None,
    ) -> None:
        """`run_dir` and `enrol`: see PeerServer."""
        self.node = node
        self.me = me
        self.hello = Hello(me.id, boot, me.version, me.name)
        self.links: dict[str, Link] = {}
        self.down_since: dict[str, float] = {}  # node -> monotonic
        self.on_rumours: Callable[[str, Rumours], None] = lambda peer, rumours: None
        self.on_link: list[Callable[[str], None]] = []  # told a node id at each up and down
        self.live: Callable[[], Iterable[str]] | None = None
        self.mesh = Mesh(me.id, lambda: self._topology.is_bounded, self._members)
        self._everybody = everybody  # nodes up to which all have streams to all
        self._encoder = Encoder()
        self._reach = Reach()
        self._topology = Topology([me.id])  # of the live nodes
        self._everyone = Topology([me.id])  # of all known
        self._wanted: set[str] = set()
        self._unwanted: dict[str, float] = {}  # node whose stream nobody wants -> since when
        self._dialers: dict[str, tuple[str, asyncio.Task[None]]] = {}  # node -> host:port, task
        self._seeds: dict[str, asyncio.Task[None]] = {}  # host:port -> task
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._stopped = False
        self.dialer = Dialer(node, keyring)
        self.refusals = Refusals(node)
        claims = Claims(node, self.refusals)
        self.consent = Consent(node, durable, self.dialer, claims)
        self.ports = PortCheck(node, self.dialer, claims)
        node.is_linked = self._is_linked
        self.server = PeerServer(
            node,
            self._accept,
            durable,
            self.dialer,
            self.refusals,
            run_dir,
            enrol,
            {**self.consent.handlers(), **self.ports.handlers()},
        )
        self._recheck = Recheck(node, self.dialer, self.links.values)
        self._waiting = Waiting(
            node,
            self.dialer,
            self.links,
            self.down_since,
            self._members,
            lambda: self._wanted,
            lambda: self.live is not None,
        )
        node.listeners.append(self._changed)

    async def start(self, seeds: list[str]) -> None:
        """Listen, and dial `seeds` (host:port); Conflict if the port is taken."""
        await self.server.start(self.me.address, self.me.port)
        for seed in seeds:
            self.dial(seed)
        self._look()
        self._start(self._tidy())
        self._start(self.consent.settle())
        self._start(self._recheck.run())
        self.dialer.keyring.on_change.append(self._keys_changed)

    async def stop(self) -> None:
        """Close every stream and the port."""
        self._stopped = True
        self.node.listeners.remove(self._changed)
        if self._keys_changed in self.dialer.keyring.on_change:
            self.dialer.keyring.on_change.remove(self._keys_changed)
        if self._looking:
            self._looking.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for link in list(self.links.values()):
            link.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.server.stop()

    def wake(self) -> None:
        """Records were published, or the kernel got further: let sessions look."""
        self.server.kernel_moved()
        for link in self.links.values():
            link.wake()

    def redial(self) -> None:
        """Try all nodes at once, those too with whom a stream seems to stand: the underlay's
        carrier is back."""
        for link in self.links.values():
            link.doubt()
        self._reach.redial()

    def _keys_changed(self) -> None:
        self._recheck.hasten()
        self._reach.redial()  # who was refused may not be any more

    def membership_changed(self) -> None:
        """`live`, or what is known of nodes, has changed: look anew whom to hold streams to."""
        if self._looking is None and not self._stopped:
            many = len(self.node.nodes) > self._everybody
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(SETTLE if many else 0.0, self._look)

    def _look(self) -> None:
        self._looking = None
        nodes = self.node.nodes
        self._topology = Topology({self.me.id, *self._members()}, self._everybody)
        # A cluster in two parts has two topologies. What follows from all nodes joins them.
        self._everyone = Topology({self.me.id, *nodes}, self._everybody)
        self._wanted = self._topology.neighbours(self.me.id)
        self._wanted |= self._everyone.neighbours(self.me.id)
        self._wanted |= self.node.replica.doubted
        self._wanted &= set(nodes)
        for id, (target, task) in list(self._dialers.items()):
            moved = id in nodes and target_of(nodes[id]) != target
            over = (moved or id not in self._wanted) and id not in self.links
            if over or task.done():  # of a node that was not wanted for a while
                task.cancel()
                del self._dialers[id]
        for id in sorted(self._wanted):
            if id not in self._dialers or self._dialers[id][1].done():
                target = target_of(nodes[id])
                self._dialers[id] = target, self._start(self._keep(id, target))

    def _is_linked(self, node: str) -> bool:
        link = self.links.get(node)
        return link is not None and not link.is_stale

    def rtt(self, node: str) -> float:
        """Round trip time of a node's stream in s; 0 if unknown."""
        link = self.links.get(node)
        return (link.session.rtt or 0.0) if link else 0.0

    # -- waiting --

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        """See Waiting.wait_applied."""
        return await self._waiting.wait_applied(version, seconds, networks)

    async def catch_up(self, seconds: float) -> list[str]:
        """See Waiting.catch_up."""
        return await self._waiting.catch_up(seconds)

    def missing(self) -> int:
        """Versions that the peers had when their streams opened and that are not here yet."""
        return max((link.session.missing for link in self.links.values()), default=0)

    def live_nodes(self) -> list[str]:
        """The other nodes (ids) that count as members."""
        return [id for id in self._members() if id in self.node.nodes]

    async def check_ports(self, node: str, ports: Sequence[Publish]) -> list[Taken]:
        """Which of these ports cannot be published there; VxmeshError if it does not answer."""
        return await self.ports.ask(node, ports)

    def _members(self) -> list[str]:
        """The other nodes that count as members."""
        found = self.node.nodes if self.live is None else self.live()
        return [id for id in found if id != self.me.id]

    def _heard(self, peer: str, message: Message | Rumours) -> None:
        if isinstance(message, Rumours):
            # Of a stream that was given up for another one: that one has told it too.
            if peer in self.links:
                self.on_rumours(peer, message)
        elif not isinstance(message, Hello):
            self._waiting.moved()
        if isinstance(message, Delta):
            self._pass_on()

    def _pass_on(self) -> None:
        """What came on one stream may have to go on by others, or be asked of its origin."""
        if not self.node.replica.doubted <= self._wanted:
            self.membership_changed()
        for link in self.links.values():
            if link.session.pending:
                link.wake()

    # -- addresses of others --

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[tuple[bytes, bytes]]
    ) -> str:
        """Ask `owner` to donate addresses; why it did not, or nothing if it did.

        Unavailable if it does not answer. What was donated is merged before this returns.
        """
        node = self.node.nodes.get(owner)
        if node is None:
            raise Unavailable(f"node {owner}", "is not known here")
        request = pb.SpaceRequest(
            network=network.id,
            requester=self.me.id,
            family=family,
            ranges=[pb.AddressRange(start=a, end=b) for a, b in ranges[:RANGES_MAX]],
            known=self.node.version(owner),
        )
        is_there = self.live is None or owner in set(self.live())
        reply = await calls.request_space(
            self.dialer, node, request, SPACE_TRIES if is_there else 1
        )
        if reply.HasField("delta"):
            self.node.merge(delta_from_proto(reply.delta), owner)
            self.mesh.spread(owner, None, time.monotonic())
            self._pass_on()
        return reply.refused

    # -- dialling --

    def dial(self, target: str) -> None:
        """Find the node that answers at host:port (a seed, or one seen on the LAN)."""
        if target not in self._seeds:
            task = self._seeds[target] = self._start(self._find(target))
            task.add_done_callback(lambda _: self._seeds.pop(target, None))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _changed(self, change: Change) -> None:
        for id in change.nodes:
            if id not in self.node.nodes and id in self.links:
                self.links[id].close()  # it was removed
        if change.nodes:
            self.membership_changed()

    async def _find(self, target: str) -> None:
        """Dial a seed until the node there is known: then its record leads to it."""
        while True:
            await self._reach.answers(target)
            try:
                found = await self.dialer.who_is(target)
            except Unavailable as error:
                log.info("peer.unknown", target=target, error=str(error))
                await self._reach.wait(ELSEWHERE if isinstance(error, Denied) else PAUSE)
                continue
            if found == self.me.id:
                return
            if self.node.is_removed(found):  # another may take its place there
                await self._reach.wait(ELSEWHERE)
                continue
            pause = await self._dial_once(found, target)
            if found in self.node.nodes:
                return
            await self._reach.wait(pause)

    async def _keep(self, id: str, target: str) -> None:
        """Keep a stream to a node up for as long as one is wanted."""
        if self._leaves_it_to(id):
            await self._reach.wait(GRACE)
        while id in self._wanted:
            link = self.links.get(id)
            if link and not link.is_stale:
                await link.until_stale()
                if link.ended.is_set() and self._leaves_it_to(id):
                    await self._reach.wait(GRACE)
                continue
            # A stream that is merely silent stays: TCP may get through again, but only when
            # its timer, which has doubled with each try, says so. A new one is faster.
            await self._reach.answers(target)
            if self._leaves_it_to(id):
                await asyncio.sleep(HEAD_START)
            link = self.links.get(id)
            if link is None or link.is_stale:
                await self._reach.wait(await self._dial_once(id, target))

    def _leaves_it_to(self, id: str) -> bool:
        """Whether a node is the one of the pair to dial first."""
        return id < self.me.id and self._topology.opens(id, self.me.id)

    async def _tidy(self) -> None:
        """Close the streams that we opened and that neither end wants any more."""
        while True:
            await asyncio.sleep(TIDY_INTERVAL)
            now = time.monotonic()
            unwanted = [id for id in self.links if not self._is_wanted(id)]
            self._unwanted = {id: self._unwanted.get(id, now) for id in unwanted}
            for id, since in self._unwanted.items():
                if self.links[id].dialed and now - since >= KEEP_UNWANTED:
                    self.links[id].close()

    def _is_wanted(self, id: str) -> bool:
        return id in self.node.replica.doubted or any(
            topology.opens(self.me.id, id) or topology.opens(id, self.me.id)
            for topology in (self._topology, self._everyone)
        )

    async def _dial_once(self, id: str, target: str) -> float:
        """Run one stream to a node to its end; how long to wait until the next try, in s."""
        # A new channel each time: one that failed would wait by its own backoff.
        channel = self.dialer.keyring.channel(target, id, OPTIONS)
        link: Link | None = None
        try:
            # Not `channel_ready`, which does not tell why there is none.
            call: Call = channel.stream_stream(SYNC)(wait_for_ready=False)
            async with asyncio.timeout(CONNECT_WITHIN):
                await call.wait_for_connection()
            link = self._link(True, id)
            await link.run(_bytes(call), writer_to(call), self._greeted)
            return PAUSE
        except grpc.aio.AioRpcError as error:
            denied = isinstance(self.dialer.heed(error, id), Denied)
            return ELSEWHERE if denied else PAUSE
        except Impostor as error:
            log.warning("peer.refused", peer=id, error=str(error))
            self.refusals.note(Reason.IMPOSTOR, target, id)
            return ELSEWHERE
        except (TimeoutError, grpc.aio.UsageError, OSError):
            return PAUSE
        except Exception as error:
            # Whatever it is, this peer is to be dialled again.
            log.exception("peer.failed", peer=id, error=repr(error))
            return PAUSE
        finally:
            if link:
                self._lost(link)
            await channel.close()

    def _link(self, dialed: bool, expected: str) -> Link:
        return Link(self.node, self.hello, self._encoder, self.mesh, self._heard, dialed, expected)

    async def _accept(self, read: AsyncIterator[bytes], write: Write, caller: Caller) -> None:
        link = self._link(False, caller.node)
        try:
            await link.run(read, write, self._greeted)
        finally:
            self._lost(link)

    # -- which stream stays --

    def _greeted(self, link: Link) -> bool:
        peer = link.peer
        if peer == self.me.id or peer in self.node.removals:
            return False
        old = self.links.get(peer)
        if old and not self._replaces(old, link):
            return False
        self.links[peer] = link
        self.mesh.up(link.session)
        self.down_since.pop(peer, None)
        if old:
            old.close()
        else:
            log.info("peer.up", peer=peer, name=link.session.peer and link.session.peer.name)
        for told in self.on_link:
            told(peer)
        return True

    def _replaces(self, old: Link, new: Link) -> bool:
        before, after = old.session.peer, new.session.peer
        if before and after and before.boot != after.boot:
            return True
        if old.is_stale or old.closed.is_set() or old.dialer == new.dialer:
            return True  # who opened both has given the old one up
        return new.dialer == min(self.me.id, new.peer)

    def _lost(self, link: Link) -> None:
        link.ended.set()
        link.stale.set()
        peer = link.peer
        if not peer or self.links.get(peer) is not link:
            return
        del self.links[peer]
        self.mesh.down(link.session)
        silent = time.monotonic() - link.session.heard
        why = f"silent for {silent:.1f} s" if silent > 1 else "its stream was closed"
        self.down_since[peer] = time.monotonic()
        log.info("peer.down", peer=peer, name=self.node.node_name(peer), reason=why)
        for told in self.on_link:
            told(peer)


def writer_to(call: Call) -> Write:
    """Writes to a call; one that has ended never takes anything, and its reader tells why.

    gRPC raises an error of its own kind from a write that comes too late, which says only that.
    """

    async def write(data: bytes) -> None:
        try:
            await call.write(data)
        except asyncio.InvalidStateError:
            await asyncio.get_running_loop().create_future()  # until the reader ends us all

    return write


async def _bytes(call: Call) -> AsyncIterator[bytes]:
    async for data in call:
        yield data
