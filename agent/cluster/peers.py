"""Streams to every other node, kept up: who dials whom, and which of two streams stays.

Every known node is dialled by the one of the pair with the smaller id at once, and by the
other only after a while, for the case that just one of the directions works. Of two streams
between a pair both sides keep the one that the smaller id opened.
What stands opposite: this room on the other node. Failure detection (SWIM) will stand beside.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import structlog

from agent.cluster.codec import Encoder, delta_from_proto
from agent.cluster.consent import Consent, Refused, find_removal
from agent.cluster.link import SILENCE, Link, Write
from agent.cluster.server import SYNC, PeerServer
from agent.core.session import Hello, Message
from agent.errors import Unavailable
from agent.model import Network, Node
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc
from agent.views import Change

log = structlog.get_logger()

CONNECT_WITHIN = 1.0  # s; then the channel is thrown away, with its backed-off TCP timers
RETRY_FIRST, RETRY_MOST = 0.05, 1.0  # s, doubled in between, with full jitter
GRACE = 1.0  # s; how long the larger id leaves dialling to the smaller
STALE = 1.5  # s; a stream silent for this long gives way to a new one
SPACE_WITHIN = 2.0  # s; for an owner to donate addresses

Call = grpc.aio.StreamStreamCall[bytes, bytes]

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.http2.bdp_probe", 1),
]


class Peers:
    """All streams of this node. `store` is the node's state."""

    def __init__(
        self, node: NodeState, me: Node, boot: str, durable: Callable[[], Awaitable[None]]
    ) -> None:
        self.node = node
        self.me = me
        self.hello = Hello(me.id, boot, me.version, me.name)
        self.links: dict[str, Link] = {}
        self.down_since: dict[str, tuple[float, str]] = {}  # node -> (monotonic, why)
        self.on_link: list[Callable[[str], None]] = []  # told a node id at each up and down
        self._encoder = Encoder()
        self._dialers: dict[str, asyncio.Task[None]] = {}  # host:port -> task
        self.consent = Consent(node, boot, durable)
        node.is_linked = lambda id: id in self.links
        self._server = PeerServer(node, self._accept, durable, self.consent.handlers())
        self._progress = asyncio.Event()
        self._started = time.monotonic()
        node.listeners.append(self._changed)

    async def start(self, seeds: list[str]) -> None:
        """Listen, and dial `seeds` (host:port); Conflict if the port is taken."""
        await self._server.start(self.me.address, self.me.port)
        for seed in seeds:
            self.dial(seed)
        for node in list(self.node.nodes.values()):
            self._dial_node(node)

    async def stop(self) -> None:
        """Close every stream and the port."""
        self.node.listeners.remove(self._changed)
        tasks = list(self._dialers.values())
        for task in tasks:
            task.cancel()
        for link in list(self.links.values()):
            link.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.stop()

    def wake(self) -> None:
        """Records were published, or the kernel got further: let sessions look."""
        for link in self.links.values():
            link.wake()

    def state(self, node: str) -> tuple[str, str]:
        """A node's state and the reason, from this node's point of view."""
        if node == self.me.id or node in self.links:
            return "alive", ""
        _, why = self.down_since.get(node, (0.0, "has not been connected yet"))
        return "unreachable", why

    def rtt(self, node: str) -> float:
        """Round trip time of a node's stream in s; 0 if unknown."""
        link = self.links.get(node)
        return (link.session.rtt or 0.0) if link else 0.0

    # -- waiting --

    async def wait_applied(self, version: int, seconds: float) -> list[str]:
        """Wait until every live peer's kernel has our records up to `version`.

        Returns the ids of the nodes that lack it when the time is up.
        """
        deadline = time.monotonic() + seconds

        def lacking() -> list[str]:
            behind = []
            for id in self.node.nodes:
                link = self.links.get(id)
                known = link.session.peer_applied if link else -1
                if id != self.me.id and known < version and (link or self._just_lost(id)):
                    behind.append(id)
            return behind

        while lacking():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                await asyncio.wait_for(self._progress.wait(), left)
            except TimeoutError:
                break
        return lacking()

    async def catch_up(self, seconds: float) -> list[str]:
        """Wait until everything that the nodes known now had written has come.

        Returns the ids of those that have not been heard of when the time is up.
        """
        deadline = time.monotonic() + seconds
        known = [id for id in self.node.nodes if id != self.me.id]

        def behind() -> list[str]:
            links = {id: self.links.get(id) for id in known}
            return [
                id
                for id, link in links.items()
                if link is None or not 0 <= link.session.peer_version <= self.node.version(id)
            ]

        while (left := deadline - time.monotonic()) > 0 and behind():
            try:
                await asyncio.wait_for(self._progress.wait(), left)
            except TimeoutError:
                break
        return behind()

    def _just_lost(self, node: str) -> bool:
        """Whether a node without a stream may well be about to have one."""
        since, _ = self.down_since.get(node, (self._started, ""))
        return time.monotonic() - since < SILENCE

    def _heard(self, message: Message) -> None:
        if not isinstance(message, Hello):
            self._progress.set()
            self._progress = asyncio.Event()

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
        # A channel of its own: that of a stream may be closed for a better one at any moment.
        channel = grpc.aio.insecure_channel(f"{_host(node.address)}:{node.port}", _OPTIONS)
        request = pb.SpaceRequest(
            network=network.id,
            requester=self.me.id,
            family=family,
            ranges=[pb.AddressRange(start=a, end=b) for a, b in ranges],
            known=self.node.version(owner),
        )
        try:
            stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            reply: pb.SpaceReply = await stub.RequestSpace(request, timeout=SPACE_WITHIN)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(
                f"node {self.node.node_name(owner)}", f"does not answer ({error.code().name})"
            ) from None
        finally:
            await channel.close()
        if reply.HasField("delta"):
            self.node.merge(delta_from_proto(reply.delta))
        return reply.refused

    # -- dialling --

    def dial(self, target: str, node: str = "") -> None:
        """Keep a stream to host:port up; `node` is its id where it is known."""
        if target not in self._dialers:
            task = asyncio.ensure_future(self._keep(target, node))
            self._dialers[target] = task
            task.add_done_callback(lambda _: self._dialers.pop(target, None))

    def _dial_node(self, node: Node) -> None:
        if node.id != self.me.id:
            self.dial(f"{_host(node.address)}:{node.port}", node.id)

    def _changed(self, change: Change) -> None:
        for id in change.nodes:
            node = self.node.nodes.get(id)
            if node:
                self._dial_node(node)
            elif id in self.links:
                self.links[id].close()  # it was removed

    async def _keep(self, target: str, node: str) -> None:
        pause = RETRY_FIRST
        if node and node < self.me.id:
            await asyncio.sleep(GRACE)
        while True:
            if node and node not in self.node.nodes:
                return
            link = self.links.get(node) if node else None
            if link:
                await link.ended.wait()
                pause = RETRY_FIRST
                if node < self.me.id:
                    await asyncio.sleep(GRACE)
                continue
            found = await self._dial_once(target)
            if found == self.me.id:
                return  # ourselves, named as a seed
            if found and found != node:
                node = found  # the first time, or another node lives there now
                known = self.node.nodes.get(found)
                if known and f"{_host(known.address)}:{known.port}" != target:
                    return  # its record leads to it
            if found:
                pause = RETRY_FIRST
            await asyncio.sleep(random.uniform(0.3, 1.0) * pause)
            pause = min(RETRY_MOST, pause * 2)

    async def _dial_once(self, target: str) -> str:
        """Run one stream to its end; the node found there, or nothing."""
        # A new channel each time: one that failed would wait by its own backoff.
        channel = grpc.aio.insecure_channel(target, _OPTIONS)
        link: Link | None = None
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_WITHIN)
            call: Call = channel.stream_stream(SYNC)()
            link = Link(self.node, self.hello, self._encoder, self._heard, dialed=True)
            await link.run(_bytes(call), call.write, self._greeted)
            return link.peer
        except grpc.aio.AioRpcError as error:
            removal = find_removal(error, self.me.id)
            if removal:
                self.node.expel(removal)
            return link.peer if link else ""
        except (TimeoutError, grpc.aio.UsageError, OSError):
            return link.peer if link else ""
        except Exception as error:
            # Whatever it is, this peer is to be dialled again.
            log.exception("peer.failed", peer=link.peer if link else target, error=repr(error))
            return link.peer if link else ""
        finally:
            if link:
                self._lost(link)
            await channel.close()

    async def _accept(self, read: AsyncIterator[bytes], write: Write) -> None:
        link = Link(self.node, self.hello, self._encoder, self._heard, dialed=False)
        try:
            await link.run(read, write, self._greeted)
        finally:
            self._lost(link)
        if removal := self.node.removals.get(link.peer):
            raise Refused(removal)

    # -- which stream stays --

    def _greeted(self, link: Link) -> bool:
        peer = link.peer
        if peer == self.me.id or peer in self.node.removals:
            return False
        old = self.links.get(peer)
        if old and not self._replaces(old, link):
            return False
        self.links[peer] = link
        self.down_since.pop(peer, None)
        if old:
            old.close()
        else:
            log.info("peer.up", peer=peer, name=link.session.peer and link.session.peer.name)
        if link.session.peer:
            self.consent.linked(peer, link.session.peer.boot)
        for told in self.on_link:
            told(peer)
        return True

    def _replaces(self, old: Link, new: Link) -> bool:
        before, after = old.session.peer, new.session.peer
        if before and after and before.boot != after.boot:
            return True
        if time.monotonic() - old.session.heard > STALE or old.closed.is_set():
            return True
        return new.dialer == min(self.me.id, new.peer) and old.dialer != new.dialer

    def _lost(self, link: Link) -> None:
        link.ended.set()
        peer = link.peer
        if not peer or self.links.get(peer) is not link:
            return
        del self.links[peer]
        silent = time.monotonic() - link.session.heard
        why = f"silent for {silent:.1f} s" if silent > 1 else "its stream was closed"
        self.down_since[peer] = (time.monotonic(), why)
        log.info("peer.down", peer=peer, name=self.node.node_name(peer), reason=why)
        for told in self.on_link:
            told(peer)


async def _bytes(call: Call) -> AsyncIterator[bytes]:
    async for data in call:
        yield data


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
