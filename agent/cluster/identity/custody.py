"""The CA's key on its way: to nodes that are to keep it, and away from those that need not.

It goes over TLS to just the node that is meant, which knows the CA already and so what it gets.
What stands opposite: keepers.py says to whom; desk.py of the receiver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import grpc.aio
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.cluster.dialer import OPTIONS, target_of
from agent.cluster.identity import keepers, proof
from agent.cluster.identity.enrol import call_enrol
from agent.cluster.identity.files import Held
from agent.cluster.identity.rotation import STEADY
from agent.cluster.trust import Keyring
from agent.errors import Invalid
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.unreadable import UNREADABLE

log = structlog.get_logger()

HAND_WITHIN = 3.0  # s
HAND_AGAIN = 5.0  # s; after a node did not take the key
SLICE = 8  # certificates that are checked in one go, at some 0.4 ms each
SURPLUS_FOR = 300.0  # s; a node that is back for a moment must not cost another one its key
KEY_MAX = 1024  # bytes of DER; ours have 138


class Owner(Protocol):
    """Who has this node's identity (service.py)."""

    held: Held
    keyring: Keyring
    node: NodeState

    def live_keepers(self) -> list[str]: ...

    def is_away(self, id: str) -> bool: ...

    async def keep(self, held: Held) -> None: ...


class Custody:
    """`given` are the nodes that have been handed the key of the CA that is to come."""

    def __init__(self, owner: Owner) -> None:
        self._owner, self._node = owner, owner.node
        self.given: set[str] = set()
        self._after: dict[str, float] = {}  # node that was handed the key -> not again before
        self._surplus_since: float | None = None
        self._since: dict[str, float] = {}  # by node: when the first certificate seen here begins
        self._keepers: set[str] = set()  # as they were when this was looked at last

    async def look(self) -> bool:
        """See that enough nodes keep the key, and no more; whether there is more to do soon."""
        self._note_lost()
        await self._drop_surplus()
        owner, now = self._owner, time.monotonic()
        held, me = owner.held, self._node.me
        if held.issuing is None:
            return False
        await self._note_members()
        others = {
            n.id: self._since[n.id]
            for n in self._node.nodes.values()
            if n.id != me
            and n.id in self._since
            and not self._node.is_keeper(n)
            and n.trust == held.trust.epoch
            and self._after.get(n.id, 0.0) <= now
            and self._node.condition(n.id).state == "alive"
        }
        heir = keepers.choose_heir(me, owner.live_keepers(), others)
        if heir is None:
            return any(after > now for after in self._after.values())
        if await self._hand(heir, [a.key for a in held.keys]):
            log.info("ca.handed", to=heir, name=self._node.node_name(heir))
        self._after[heir] = now + HAND_AGAIN  # its record says soon that it has it
        return True

    async def spread(self, certificate: bytes) -> None:
        """Give the keepers that trust a CA (its certificate, DER) its key."""
        held = self._owner.held
        authority = held.authority(certificate)
        assert authority is not None
        ready = [
            n.id
            for n in self._node.nodes.values()
            if self._node.is_keeper(n)
            and n.trust == held.trust.epoch
            and n.id not in self.given | {self._node.me}
            and not self._owner.is_away(n.id)
        ]
        done = await asyncio.gather(*(self._hand(id, [authority.key]) for id in ready))
        self.given |= {id for id, taken in zip(ready, done, strict=True) if taken}

    async def _hand(self, id: str, keys: Sequence[ec.EllipticCurvePrivateKey]) -> bool:
        node = self._node.nodes[id]
        channel = self._owner.keyring.channel(target_of(node), id, OPTIONS)
        try:
            for key in keys:
                parcel = pb.KeyParcel(key=_der(key))
                reply = await call_enrol(channel, "HandKey", parcel, pb.KeyTaken, HAND_WITHIN)
                if reply.refused:
                    log.info("ca.not_handed", to=id, name=node.name, error=reply.refused)
                    return False
            return True
        except grpc.aio.AioRpcError as error:
            log.info("ca.not_handed", to=id, name=node.name, error=error.details())
            return False
        finally:
            await channel.close()

    async def _drop_surplus(self) -> None:
        owner = self._owner
        surplus = keepers.is_surplus(self._node.me, owner.live_keepers())
        if not surplus or owner.held.trust.phase != STEADY or owner.held.issuing is None:
            self._surplus_since = None
            return
        now = time.monotonic()
        self._surplus_since = self._surplus_since if self._surplus_since is not None else now
        if now - self._surplus_since >= SURPLUS_FOR:
            await owner.keep(replace(owner.held, keys=()))
            self._node.tell(
                "ca.keeper", "enough others keep the CA's key: this node has dropped it"
            )

    def _note_lost(self) -> None:
        """Tell of keepers that were removed: what they know is not taken from them by that."""
        removed = [id for id in self._keepers if id in self._node.removals]
        for name in sorted(map(self._node.node_name, removed)):
            self._node.tell(
                "ca.exposed",
                f"{name}, which was removed, knows the CA's key; if it may be in the wrong hands, "
                "run 'vxmesh cluster rotate-ca'",
                name=name,
            )
        self._keepers = {n.id for n in self._node.nodes.values() if self._node.is_keeper(n)}

    async def _note_members(self) -> None:
        """Since when each node is a member, as its first certificate tells that this agent saw:
        one is renewed, and only the CA can say when it begins."""
        nodes, authorities = self._node.nodes, self._owner.held.trust.authorities
        for id in self._since.keys() - nodes.keys():
            del self._since[id]
        fresh = [n for n in nodes.values() if n.certificate and n.id not in self._since]
        for count, n in enumerate(fresh, 1):
            since = proof.member_since(n.id, n.certificate, authorities)
            if since is not None:
                self._since[n.id] = since
            if count % SLICE == 0:
                await asyncio.sleep(0)


def read_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    """A CA's key from PKCS #8, DER; Invalid if it is none."""
    try:
        if len(key) > KEY_MAX:
            raise ValueError("too long")
        found = serialization.load_der_private_key(key, password=None)
    except UNREADABLE as error:
        raise Invalid("key", f"is malformed ({error})"[:100]) from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise Invalid("key", "is of no CA")
    return found


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
