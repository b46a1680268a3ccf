"""A node's identity while its agent runs: it takes what is stated, renews, keeps, and hands on.

One task looks at everything in turn, whenever a record that matters has come and when a time has:
whom to trust (statements.py), whether the certificate is to be renewed (renewal.py), who is to
keep the CA's key (custody.py), and how far a change of the CA is (rotation.py). Whatever changes
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

import msgspec
import structlog

from agent.cluster.identity import authority as ca
from agent.cluster.identity import proof, renewal, requests, rotation, statements
from agent.cluster.identity.custody import Custody, read_key
from agent.cluster.identity.desk import Desk, ask_keepers
from agent.cluster.identity.enrol import read_issued
from agent.cluster.identity.files import Files, Held, with_keys
from agent.cluster.identity.founding import issue_own
from agent.cluster.identity.plight import Plight
from agent.cluster.identity.rotation import INTRODUCING, STEADY, Member
from agent.cluster.trust import Keyring
from agent.errors import Invalid, VxmeshError
from agent.model import Node, Trust
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.views import Change

log = structlog.get_logger()

LOOK_EVERY = 30.0  # s; clocks are set, and a node can be gone without a record that says so
BUSY_EVERY = 1.0  # s; while something is under way
SPREAD = 0.01  # s a node; over which all ask for another certificate when the CA has changed
SPREAD_MOST = 10.0  # s
SLICE = 8  # signatures of certificates that are checked in one go, at some 0.4 ms each


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
        self._proof = b"", b""  # the CA whose key is proven to be here, and the proof

    def describe(self, node: Node) -> Node:
        """A node's record with what others are to know of its identity."""
        return msgspec.structs.replace(
            node,
            certificate=self.held.certificate,
            keeper=self.held.issuing is not None,
            keeper_proof=self._prove(),
            trust=self.held.trust.epoch,
        )

    def _prove(self) -> bytes:
        """The proof that this node keeps the key, the same until the CA is another one."""
        issuing = self.held.issuing
        if issuing is None:
            return b""
        if self._proof[0] != issuing.certificate:
            made = proof.make(issuing, self.held.cluster, self.held.node)
            self._proof = issuing.certificate, made
        return self._proof[1]

    def is_keeper(self, node: Node) -> bool:
        """Whether a node says that it keeps the CA's key, and can."""
        return proof.is_keeper(node, self.held.cluster, self.held.trust.authorities)

    def attach(self, node: NodeState) -> None:
        """The node whose identity this is; before anything else is called."""
        self.node = node
        node.is_keeper = self.is_keeper
        self.desk = Desk(self, node)
        self.custody = Custody(self)
        self._plight = Plight(self)
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
        at = max(self._due(), self._retry_at)
        most = BUSY_EVERY if busy else self._look_every
        return min(max(at - self.now(), 0.02), most)

    async def _look(self) -> bool:
        """Do what is to be done; whether something is under way that nobody will tell us of."""
        await self._adopt()
        self._repeat()
        await self._renew()
        busy = await self.custody.look()
        busy = await self._advance() or busy
        return await self._plight.look() or busy

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
            self.custody.given.clear()
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

    def _is_of_issuer(self) -> bool:
        """Whether this node's certificate is of the CA that issues now."""
        authorities = self.held.trust.authorities
        return ca.issuer_of(self.held.certificate, authorities) == authorities[0]

    def _due(self) -> float:
        return renewal.due(self.held.certificate) if self._is_of_issuer() else 0.0

    async def _renew(self) -> None:
        held, now = self.held, self.now()
        if now < max(self._due(), self._retry_at):
            return
        if not self._is_of_issuer() and held.issuing is None and not self._retry_at:
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

    async def take_key(self, key: bytes) -> None:
        """A keeper hands us the key (PKCS #8, DER) of a CA; Invalid if it is of none that is
        trusted here."""
        found = read_key(key)
        async with self._changing:
            before = self.held
            held = with_keys(before, [*(a.key for a in before.keys), found])
            if not any(a.key.public_key() == found.public_key() for a in held.keys):
                raise Invalid("key", "is of no CA that is trusted here")
            if len(held.keys) == len(before.keys):
                return
            await self.keep(held)
            self._repeat()
        if before.issuing is None and held.issuing:
            self.node.tell("ca.keeper", "this node keeps the CA's key from now on")

    async def keep(self, held: Held) -> None:
        """Let other keys of CAs be on disk, and hold."""
        await asyncio.to_thread(self._files.save_keys, held.keys)
        await self._take(held)

    def live_keepers(self) -> list[str]:
        """Those that keep the key and are there, or may be back in a moment."""
        nodes = self.node.nodes.values()
        return [n.id for n in nodes if self.is_keeper(n) and not self.is_away(n.id)]

    def is_away(self, id: str) -> bool:
        """Whether another node has left or counts as gone."""
        if id == self.node.me:
            return False
        return id in self.node.withdrawn or self.node.condition(id).state == "left"

    # -- a change of the CA --

    async def members(self) -> list[Member]:
        """All nodes, as rotation.py wants to see them: those that there are when it returns."""
        authorities = self.held.trust.authorities
        issuers: dict[bytes, bytes | None] = {}
        for count, n in enumerate(list(self.node.nodes.values()), 1):
            issuers[n.certificate] = ca.issuer_of(n.certificate, authorities)
            if count % SLICE == 0:
                await asyncio.sleep(0)
        return [
            Member(
                n.id,
                self.is_away(n.id),
                n.trust,
                issuers[n.certificate]
                if n.certificate in issuers
                else ca.issuer_of(n.certificate, authorities),
                self.is_keeper(n),
                n.id in self.custody.given or n.id == self.node.me,
            )
            for n in self.node.nodes.values()
        ]

    def drives(self) -> bool:
        """Whether it is for this node to take the next step."""
        held, me = self.held, self.node.me
        if held.trust.phase == STEADY or len(held.keys) < len(held.trust.authorities):
            return False
        by = held.trust.by
        gone = by not in self.node.nodes or self.is_away(by)
        return by == me or (gone and me == min(self.live_keepers(), default=""))

    async def _advance(self) -> bool:
        if not self.drives():
            return False
        trust = self.held.trust
        if trust.phase == INTRODUCING:
            await self.custody.spread(trust.authorities[1])
        following = rotation.advance(trust, await self.members(), self._stamp())
        if following:
            await self._state(following)
        return self.held.trust.phase != STEADY

    async def state_next(self, authority: ca.Authority) -> None:
        """Begin a change to another CA; under `changing`."""
        held = replace(self.held, keys=(*self.held.keys[:1], authority))
        # Before anybody hears of it: who states that a CA is to be trusted must have its key.
        await asyncio.to_thread(self._files.save_keys, held.keys)
        self.held = held
        self.custody.given.clear()
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
        return [id for id in self.node.nodes if self.is_away(id)]

    def _names(self, ids: Sequence[str]) -> str:
        return ", ".join(sorted(self.node.node_name(id) for id in ids))


def _text(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
