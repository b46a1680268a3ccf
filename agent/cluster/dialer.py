"""Channels to other nodes, on which both sides are known by certificate, and what it means for
people when one side does not believe the other.

What stands opposite: front.py of the other node; calls.py, channels.py, consent.py and peers.py
dial by this.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import structlog

from agent.cluster.outside import TOLD, find_refusal, find_removal
from agent.cluster.trust import Keyring
from agent.errors import Unavailable
from agent.model import Node
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc

log = structlog.get_logger()

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.http2.bdp_probe", 1),
]
WHO_WITHIN = 1.0  # s; of a port that has just answered
# A connection that stands is never checked again. So a new one is made to each node with which
# there is one, this often: it shows them our certificate, and us theirs.
CHECK_PARTS = 24  # of a certificate's life: it is renewed at two thirds, so 8 times before its end
CHECK_MOST = 3600.0  # s
TELL_EVERY = 60.0  # s; of one node and kind
TOLD_MOST = 256
# What gRPC's details say when the other side's certificate is not what it should be. There is no
# other way to learn it; tests/unit/cluster/test_front.py sees that it is said so.
_ANOTHER = "Hostname Verification Check failed"
_UNTRUE = "CERTIFICATE_VERIFY_FAILED"


class Denied(Unavailable):
    """The other side is there, and one of the two does not believe the other."""


class Distrusted(Denied):
    """Who answers cannot show that it is the node that is meant."""


def target_of(node: Node) -> str:
    """host:port of a node's agent."""
    host = f"[{node.address}]" if ":" in node.address else node.address
    return f"{host}:{node.port}"


class Dialer:
    """This node as the one who calls."""

    def __init__(self, node: NodeState, keyring: Keyring) -> None:
        self.node = node
        self.keyring = keyring
        self._told: OrderedDict[tuple[str, str], float] = OrderedDict()  # monotonic
        self._life = (-1, 0.0)  # generation of the keyring, and its certificate's life

    @property
    def check_interval(self) -> float:
        """How old a connection may become before another one is made beside it, in s."""
        if self._life[0] != self.keyring.generation:
            self._life = self.keyring.generation, self.keyring.current.life
        return min(CHECK_MOST, self._life[1] / CHECK_PARTS)

    def channel(self, node: Node, options: Sequence[tuple[str, Any]] = OPTIONS) -> grpc.aio.Channel:
        """A channel on which only this node can answer."""
        return self.keyring.channel(target_of(node), node.id, options)

    async def who_is(self, target: str, expected: str = "", within: float = WHO_WITHIN) -> str:
        """The id of the node at host:port, which is one of this cluster, and `expected` if that
        is given; Unavailable if it does not say."""
        channel = self.keyring.channel(target, expected, OPTIONS)
        try:
            stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            reply: pb.WhoIsReply = await stub.WhoIs(pb.WhoIsRequest(), timeout=within)
            return reply.node
        except grpc.aio.AioRpcError as error:
            raise self.heed(error, expected or target) from None
        finally:
            await channel.close()

    def heed(self, error: grpc.aio.AioRpcError, peer: str) -> Unavailable:
        """What it means that a call to `peer` (a node's id, or host:port) ended so, for people.

        What concerns this node as a whole is told: it may be refused, or have been removed.
        """
        name = self.node.node_name(peer) if peer in self.node.nodes else peer
        if removal := find_removal(error, self.node.me):
            self.node.expel(removal)
            by = removal.by_name or removal.by
            return Denied(f"node {name}", f"says that this node was removed by {by}")
        if refusal := find_refusal(error):
            why, fix = TOLD.get(refusal, ("it is not believed", ""))
            self._tell("identity.refused", peer, f"{name} refuses this node: {why}. {fix}".strip())
            return Denied(f"node {name}", f"refuses this node: {why}", fix)
        text = error.details() or ""
        if _ANOTHER in text:
            self._tell("peer.distrusted", peer, f"another node answers at the address of {name}")
            return Distrusted(f"node {name}", "does not answer: another one has its address")
        if _UNTRUE in text:
            why = "has expired" if "expired" in text else "is of another cluster or of a void CA"
            self._tell("peer.distrusted", peer, f"the certificate of {name} {why}")
            return Distrusted(
                f"node {name}",
                f"is not believed: its certificate {why}",
                "See its log, and this node's clock; a node that was away while the CA was changed "
                "needs a new token ('vxmesh cluster token' on another one)",
            )
        return Unavailable(f"node {name}", f"does not answer ({error.code().name})")

    def _tell(self, kind: str, peer: str, message: str) -> None:
        now = time.monotonic()
        when = self._told.pop((kind, peer), now - TELL_EVERY)
        is_due = now - when >= TELL_EVERY
        self._told[kind, peer] = now if is_due else when
        if len(self._told) > TOLD_MOST:
            self._told.popitem(last=False)
        if is_due:
            known = self.node.nodes.get(peer)
            self.node.tell(
                kind, message, node=peer if known else "", name=known.name if known else peer
            )
