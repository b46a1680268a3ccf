"""What operators ask of a node's identity: the join token, another CA, how it stands.

What stands opposite: api/control.py, which calls it; service.py, which does what takes time.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Awaitable, Callable

import structlog

from agent.cluster.dialer import target_of
from agent.cluster.identity import authority as ca
from agent.cluster.identity import rotation, statements, tokens
from agent.cluster.identity.rotation import INTRODUCING, STEADY
from agent.cluster.identity.service import Identity
from agent.cluster.identity.tokens import Token
from agent.errors import Conflict, InUse, Unavailable
from agent.model import VOID_MAX, TokenState
from agent.rpc import control_pb2 as pb
from agent.unreadable import UNREADABLE

log = structlog.get_logger()


class Administration:
    """The calls. `spread` returns when what this node has stated is on its disk and with all
    live nodes, or gives the ids of those that lack it after a while."""

    def __init__(self, identity: Identity, spread: Callable[[], Awaitable[list[str]]]) -> None:
        self.identity, self.node = identity, identity.node
        self._spread = spread

    async def join_token(self, rotate: bool) -> pb.JoinToken:
        """What another machine needs to join; with `rotate` a new one, and the old one is void.

        Unavailable on a node that does not keep the CA's key: it cannot tell.
        """
        self._check_keeper("the join token", "is told only by nodes that keep the CA's key")
        if rotate:
            async with self.identity.changing():
                self._rotate_token()
            if lacking := await self._spread():
                log.warning("token.not_everywhere", nodes=lacking)
        held = self.identity.held
        assert held.issuing is not None
        secret = tokens.derive(held.issuing.key, self._nonce())
        token = Token(ca.fingerprint(held.issuing.certificate), secret)
        address = target_of(self.node.nodes[self.node.me])
        return pb.JoinToken(
            token=str(token),
            address=address,
            command=f"vxmesh agent --join {address} --token {token}",
            fingerprint=token.fingerprint,
        )

    def _state_of_token(self) -> TokenState | None:
        held = self.identity.held
        authority = held.trust.authorities[0]
        return statements.newest_token(self.node.tokens.values(), held.cluster, authority)

    def _nonce(self) -> bytes:
        state = self._state_of_token()
        return state.nonce if state else b""

    def _rotate_token(self) -> None:
        held, before = self.identity.held, self._state_of_token()
        assert held.issuing is not None
        old = tokens.hashed(tokens.derive(held.issuing.key, self._nonce()))
        state = TokenState(
            self.identity.stamp(),
            held.cluster,
            os.urandom(tokens.NONCE_BYTES),
            (old, *(before.void if before else ()))[:VOID_MAX],
            self.node.me,
            self.identity.now(),
        )
        self.node.state_token(statements.sign_token(state, held.issuing))
        self.node.tell("token.rotated", "the join token was replaced: the one before is void")

    # -- another CA --

    async def rotate_authority(self, force: bool) -> pb.Cluster:
        """Begin to change the CA, or let what is under way go on; how it stands.

        InUse names the nodes that are away, which would be left behind, unless `force` is given.
        """
        self._check_keeper("the CA", "can be changed only by nodes that keep its key")
        identity = self.identity
        async with identity.changing():
            trust = identity.held.trust
            if trust.phase == STEADY or self._is_abandoned():
                if not force:
                    self._check_nobody_away()
                authority = ca.make_authority(identity.held.cluster, identity.now())
                await identity.state_next(authority)
            elif trust.phase == INTRODUCING and not identity.drives():
                raise Conflict(
                    "the CA",
                    f"is being changed already, by {self.node.node_name(trust.by)}",
                    "See 'vxmesh cluster status'",
                )
        return await self.cluster()

    def _is_abandoned(self) -> bool:
        """Whether a change was begun by a node that is away, and no other has the new key."""
        held = self.identity.held
        by = held.trust.by
        gone = by not in self.node.nodes or by in self.identity.away()
        return held.trust.phase == INTRODUCING and gone and len(held.keys) < 2

    def _check_nobody_away(self) -> None:
        if away := self.identity.away():
            names = ", ".join(sorted(map(self.node.node_name, away)))
            raise InUse(
                "the CA",
                f"is not changed while nodes are away: {names} would need a new token to come back",
                "Bring them back, remove them ('vxmesh node rm'), or leave them behind with "
                "--force",
            )

    def _check_keeper(self, what: str, why: str) -> None:
        if self.identity.held.issuing is None:
            names = ", ".join(
                sorted(n.name for n in self.node.nodes.values() if self.node.is_keeper(n))
            )
            raise Unavailable(
                what, f"{why}, and this one does not", f"Run it on one of {names or 'those'}"
            )

    # -- how it stands --

    async def cluster(self) -> pb.Cluster:
        """Whom the cluster trusts, who keeps the key, whose certificates end when."""
        members = await self.identity.members()
        held, node = self.identity.held, self.node
        trust = held.trust
        shown = pb.Cluster(
            id=held.cluster,
            node=node.node_name(node.me),
            keepers=sorted(n.name for n in node.nodes.values() if node.is_keeper(n)),
            trust=trust.epoch,
            rotation=pb.Rotation(
                phase=rotation.PHASES[trust.phase] if trust.epoch else "",
                waiting=self._names(rotation.waiting(trust, members)),
                left_behind=self._names(trust.left_behind),
            ),
        )
        for n, certificate in enumerate((*trust.authorities, *trust.retired)):
            state = "retired" if n >= len(trust.authorities) else "trusted" if n else "issuing"
            shown.authorities.add(
                fingerprint=ca.fingerprint(certificate), ends=_text(certificate), state=state
            )
        issuers = {m.node: m.issuer for m in members}
        for known in sorted(node.nodes.values(), key=lambda n: n.name):
            issuer = issuers.get(known.id)
            shown.certificates.add(
                node=known.name,
                ends=_text(known.certificate),
                fingerprint=ca.fingerprint(issuer) if issuer else "",
                trust=known.trust,
                keeper=node.is_keeper(known),
            )
        return shown

    def _names(self, ids: list[str] | tuple[str, ...]) -> list[str]:
        return sorted(map(self.node.node_name, ids))


def _text(certificate: bytes) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(ca.ends(certificate), datetime.UTC)
    except UNREADABLE:
        return ""
    return moment.isoformat().replace("+00:00", "Z")
