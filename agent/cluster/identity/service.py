"""A node's identity while its agent runs: it takes what is stated, renews, keeps, and hands on.

One task looks at everything in turn, whenever a record that matters has come and when a time has:
whom to trust (statements.py), whether the certificate is to be renewed (renewal.py), who is to
keep the CA's key (keepers.py), and how far a change of the CA is (rotation.py). Whatever changes
is on disk first, then in the keyring, then told in the node's record.
What stands opposite: this file on the other nodes; desk.py, which is asked by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import grpc.aio
import msgspec
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.cluster.dialer import OPTIONS, target_of
from agent.cluster.identity import authority as ca
from agent.cluster.identity import keepers, renewal, requests, rotation, statements
from agent.cluster.identity.desk import Desk, ask_keepers
from agent.cluster.identity.enrol import call_enrol, read_issued
from agent.cluster.identity.files import Files, Held, with_keys
from agent.cluster.identity.founding import issue_own
from agent.cluster.identity.rotation import INTRODUCING, STEADY, Member
from agent.cluster.trust import Keyring
from agent.errors import Invalid, Unavailable, VxmeshError
from agent.model import Node, Trust
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.unreadable import UNREADABLE
from agent.views import Change

log = structlog.get_logger()

LOOK_EVERY = 30.0  # s; clocks are set, and a node can be gone without a record that says so
BUSY_EVERY = 1.0  # s; while something is under way
HAND_WITHIN = 3.0  # s
HAND_AGAIN = 5.0  # s; after a node did not take the key
SURPLUS_FOR = 300.0  # s; a node that is back for a moment must not cost another one its key
SPREAD = 0.01  # s a node; over which all ask for another certificate when the CA has changed
SPREAD_MOST = 10.0  # s
KEY_MAX = 1024  # bytes of DER; ours have 138


class Identity:
    """What this node is. `life` (s) is that of the certificates which it issues."""

    def __init__(
        self,
        files: Files,
        held: Held,
        life: float,
        now: Callable[[], float] = time.time,
        look_every: float = LOOK_EVERY,
    ) -> None:
        self.held, self.life, self.now = held, life, now
        self.keyring = Keyring(held.credentials())
        self._files = files
        self._look_every = look_every
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._ended = ""  # the certificate whose end was told
        self._given: set[str] = set()  # who has been handed the key of the CA that is to come
        self._hand_after: dict[str, float] = {}  # node that did not take it -> monotonic
        self._surplus_since: float | None = None
        self._said_behind = False

    def describe(self, node: Node) -> Node:
        """A node's record with what others are to know of its identity."""
        return msgspec.structs.replace(
            node,
            certificate=self.held.certificate,
            keeper=self.held.issuing is not None,
            trust=self.held.trust.epoch,
        )

    def attach(self, node: NodeState) -> None:
        """The node whose identity this is; before anything else is called."""
        self.node = node
        self.desk = Desk(self, node)
        node.listeners.append(self._changed)

    async def start(self) -> None:
        """Begin to look after it."""
        self._task = asyncio.create_task(self._run(), name="identity")

    async def stop(self) -> None:
        """Stop looking."""
        self.node.listeners.remove(self._changed)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _changed(self, change: Change) -> None:
        if change.trust or change.nodes or change.statuses:
            self._wake.set()

    # -- the task --

    async def _run(self) -> None:
        while True:
            try:
                async with self._changing:
                    busy = await self._look()
            except VxmeshError as error:
                log.warning("identity.failed", error=str(error))
                busy = True
            except Exception as error:
                log.exception("identity.failed", error=repr(error))
                busy = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause(busy)):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(0.02)  # what comes together is looked at together

    def _pause(self, busy: bool) -> float:
        at = max(renewal.due(self.held.certificate), self._retry_at)
        most = BUSY_EVERY if busy else self._look_every
        return min(max(at - self.now(), 0.02), most)

    async def _look(self) -> bool:
        """Do what is to be done; whether something is under way that nobody will tell us of."""
        await self._adopt()
        self._repeat()
        await self._renew()
        busy = await self._hand_on()
        await self._drop_surplus()
        return await self._advance() or busy

    async def _take(self, held: Held) -> None:
        """Let an identity hold that is on disk already."""
        self.held = held
        self.keyring.replace(held.credentials())
        known = self.node.nodes[self.node.me]
        told = self.describe(known)
        if told != known:
            self.node.describe(told)

    # -- whom to trust --

    async def _adopt(self) -> None:
        trust = statements.newest_trust(self.node.trusts.values(), self.held.trust)
        if trust:
            await self._follow(trust)

    async def _follow(self, trust: Trust) -> None:
        before = self.held
        held = with_keys(replace(before, trust=trust), [a.key for a in before.keys])
        await asyncio.to_thread(self._files.save_trust, held.cluster, trust)
        if held.keys != before.keys:
            await asyncio.to_thread(self._files.save_keys, held.keys)
        if trust.phase == STEADY:
            self._given.clear()
        await self._take(held)
        self._tell_phase(trust)

    def _tell_phase(self, trust: Trust) -> None:
        names = self._names(trust.left_behind)
        text = {
            rotation.INTRODUCING: "a new CA is made known to all nodes",
            rotation.RENEWING: "all nodes get certificates of the new CA",
            rotation.STEADY: "the new CA alone is trusted from now on",
        }[trust.phase]
        behind = f"; left behind: {names}, which need a new token to come back" if names else ""
        self.node.tell(
            "ca.rotation",
            text + behind,
            phase=rotation.PHASES[trust.phase],
            trust=str(trust.epoch),
            left_behind=names,
        )

    def _repeat(self) -> None:
        """A keeper repeats what holds, so that it outlives who stated it."""
        held, node = self.held, self.node
        if held.issuing is None:
            return
        if held.trust.epoch and node.trusts.get(node.me) != held.trust:
            node.state_trust(held.trust)
        state = statements.newest_token(
            node.tokens.values(), held.cluster, held.issuing.certificate
        )
        if state and node.tokens.get(node.me) != state:
            node.state_token(state)

    # -- the certificate --

    async def _renew(self) -> None:
        held, now = self.held, self.now()
        other = ca.issuer_of(held.certificate, held.trust.authorities) != held.trust.authorities[0]
        if now < self._retry_at or (now < renewal.due(held.certificate) and not other):
            return
        if other and held.issuing is None and not self._retry_at:
            # All nodes come to know of it at once, and the keepers are few.
            self._retry_at = now + random.random() * min(SPREAD_MOST, SPREAD * len(self.node.nodes))
            return
        try:
            asked = requests.make(held.node, held.record_key)
            certificate, trust = await self._ask(asked)
        except VxmeshError as error:
            self._retry_at = now + renewal.pause(held.certificate, now)
            self._tell_failure(error)
            return
        self._retry_at = 0.0
        await asyncio.to_thread(self._files.save_certificate, certificate, asked.key)
        await self._take(replace(held, certificate=certificate, key=asked.key))
        if trust.epoch > held.trust.epoch:
            await self._follow(trust)
        self.node.tell(
            "certificate.renewed",
            f"this node has a new certificate, until {_text(ca.ends(certificate))}",
            ends=_text(ca.ends(certificate)),
        )

    async def _ask(self, asked: requests.Request) -> tuple[bytes, Trust]:
        held = self.held
        if held.issuing:
            return issue_own(held, asked, self.now(), self.life), held.trust
        request = pb.RenewRequest(
            certificate=held.certificate, request=asked.request, proof=asked.proof
        )
        issued = await ask_keepers(self.node, self.keyring, "Renew", request)
        return read_issued(issued, held.node, asked.key, held.trust)

    def _tell_failure(self, error: VxmeshError) -> None:
        left = ca.ends(self.held.certificate) - self.now()
        if left > 0:
            self.node.tell(
                "certificate.renewal_failed",
                f"no new certificate for this node ({error}); its own holds for {left:.0f} s yet",
                left=f"{left:.0f}",
                error=str(error),
            )
        elif self._ended != _text(ca.ends(self.held.certificate)):
            self._ended = _text(ca.ends(self.held.certificate))
            self.node.tell(
                "certificate.expired",
                f"this node's certificate ended at {self._ended}: no node talks to it any more; "
                "start its agent with --token (see 'vxmesh cluster token' on another node)",
                ends=self._ended,
            )

    # -- the CA's key --

    def _live_keepers(self) -> list[str]:
        """Those that keep the key and are there, or may be back in a moment."""
        return [n.id for n in self.node.nodes.values() if n.keeper and not self._away(n.id)]

    def _away(self, id: str) -> bool:
        if id == self.node.me:
            return False
        return id in self.node.withdrawn or self.node.condition(id).state == "left"

    async def _hand_on(self) -> bool:
        """See that enough nodes keep the key; whether there is more to do soon."""
        held, now = self.held, time.monotonic()
        if held.issuing is None:
            return False
        others = [
            n.id
            for n in self.node.nodes.values()
            if n.certificate
            and not n.keeper
            and n.trust == held.trust.epoch
            and self._hand_after.get(n.id, 0.0) <= now
            and self.node.condition(n.id).state == "alive"
            and n.id != self.node.me
        ]
        heir = keepers.choose_heir(self.node.me, self._live_keepers(), others)
        if heir is None:
            return any(after > now for after in self._hand_after.values())
        if await self._hand_to(heir, [a.key for a in held.keys]):
            log.info("ca.handed", to=heir, name=self.node.node_name(heir))
        self._hand_after[heir] = now + HAND_AGAIN  # its record says soon that it has it
        return True

    async def _hand_to(self, id: str, keys: Sequence[ec.EllipticCurvePrivateKey]) -> bool:
        node = self.node.nodes[id]
        channel = self.keyring.channel(target_of(node), id, OPTIONS)
        try:
            async with asyncio.timeout(HAND_WITHIN):
                await channel.channel_ready()
                for key in keys:
                    parcel = pb.KeyParcel(key=_der(key))
                    reply = await call_enrol(channel, "HandKey", parcel, pb.KeyTaken, HAND_WITHIN)
                    if reply.refused:
                        raise Unavailable(f"node {node.name}", f"refuses it: {reply.refused}")
            return True
        except (TimeoutError, grpc.aio.AioRpcError, Unavailable) as error:
            log.info("ca.not_handed", to=id, name=node.name, error=str(error) or "timeout")
            return False
        finally:
            await channel.close()

    async def take_key(self, key: bytes) -> None:
        """A keeper hands us the key (PKCS #8, DER) of a CA; Invalid if it is of none that is
        trusted here."""
        try:
            if len(key) > KEY_MAX:
                raise ValueError("too long")
            found = serialization.load_der_private_key(key, password=None)
        except UNREADABLE as error:
            raise Invalid("key", f"is malformed ({error})"[:100]) from None
        if not isinstance(found, ec.EllipticCurvePrivateKey):
            raise Invalid("key", "is of no CA")
        async with self._changing:
            before = self.held
            held = with_keys(before, [*(a.key for a in before.keys), found])
            if not any(a.key.public_key() == found.public_key() for a in held.keys):
                raise Invalid("key", "is of no CA that is trusted here")
            if len(held.keys) == len(before.keys):
                return
            await asyncio.to_thread(self._files.save_keys, held.keys)
            await self._take(held)
            self._repeat()
        if before.issuing is None and held.issuing:
            self.node.tell("ca.keeper", "this node keeps the CA's key from now on")

    async def _drop_surplus(self) -> None:
        surplus = keepers.is_surplus(self.node.me, self._live_keepers())
        if not surplus or self.held.trust.phase != STEADY or self.held.issuing is None:
            self._surplus_since = None
            return
        now = time.monotonic()
        self._surplus_since = self._surplus_since if self._surplus_since is not None else now
        if now - self._surplus_since >= SURPLUS_FOR:
            held = replace(self.held, keys=())
            await asyncio.to_thread(self._files.save_keys, ())
            await self._take(held)
            self.node.tell("ca.keeper", "enough others keep the CA's key: this node has dropped it")

    # -- a change of the CA --

    def members(self) -> list[Member]:
        """All nodes, as rotation.py wants to see them."""
        authorities = self.held.trust.authorities
        return [
            Member(
                n.id,
                self._away(n.id),
                n.trust,
                ca.issuer_of(n.certificate, authorities) if n.certificate else None,
                n.keeper,
                n.id in self._given or n.id == self.node.me,
            )
            for n in self.node.nodes.values()
        ]

    def drives(self) -> bool:
        """Whether it is for this node to take the next step."""
        held, me = self.held, self.node.me
        if held.trust.phase == STEADY or len(held.keys) < len(held.trust.authorities):
            return False
        by = held.trust.by
        gone = by not in self.node.nodes or self._away(by)
        return by == me or (gone and me == min(self._live_keepers(), default=""))

    async def _advance(self) -> bool:
        if not self.drives():
            return False
        trust = self.held.trust
        if trust.phase == INTRODUCING:
            await self._spread_key()
        following = rotation.advance(trust, self.members(), self._stamp())
        if following:
            await self._state(following)
        return self.held.trust.phase != STEADY

    async def _spread_key(self) -> None:
        """Give the keepers that trust the new CA its key."""
        held = self.held
        new = held.authority(held.trust.authorities[1])
        assert new is not None
        ready = [
            n.id
            for n in self.node.nodes.values()
            if n.keeper
            and n.trust == held.trust.epoch
            and n.id not in self._given | {self.node.me}
            and not self._away(n.id)
        ]
        done = await asyncio.gather(*(self._hand_to(id, [new.key]) for id in ready))
        self._given |= {id for id, taken in zip(ready, done, strict=True) if taken}

    async def state_next(self, authority: ca.Authority) -> None:
        """Begin a change to another CA; under `changing`."""
        held = replace(self.held, keys=(*self.held.keys[:1], authority))
        # Before anybody hears of it: who states that a CA is to be trusted must have its key.
        await asyncio.to_thread(self._files.save_keys, held.keys)
        self.held = held
        self._given.clear()
        trust = self.held.trust
        await self._state(
            rotation.introduce(trust, authority.certificate, self.node.me, self._stamp())
        )

    async def _state(self, trust: Trust) -> None:
        signed = statements.sign_trust(trust, self.held.keys)
        self.node.state_trust(signed)
        await self._follow(signed)

    def _stamp(self) -> int:
        seen = [t.stamp for t in self.node.trusts.values()]
        seen += [t.stamp for t in self.node.tokens.values()]
        return self.node.hybrid.next(self.now(), max(seen, default=0))

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Meanwhile nothing else changes it; afterwards all is looked at."""
        async with self._changing:
            yield
        self._wake.set()

    def stamp(self) -> int:
        """A stamp above all that was stated."""
        return self._stamp()

    def away(self) -> list[str]:
        """The other nodes that are away, by id."""
        return [id for id in self.node.nodes if self._away(id)]

    def _names(self, ids: Sequence[str]) -> str:
        return ", ".join(sorted(self.node.node_name(id) for id in ids))


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _text(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
