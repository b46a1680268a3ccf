"""vxmesh.v1.Enrol: who gets a certificate. All that a stranger can reach of an agent.

Any node takes a request. A keeper of the CA's key judges it; another node passes it on to one.
A refusal is an answer, not a failed call: it carries what a person needs. What is refused is
told as an event by the node that was asked, which knows from where.
What stands opposite: enrol.py for those that join, service.py for those that renew.
"""

from __future__ import annotations

import random
import re
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog
from cryptography import x509

from agent.cluster.callers import caller_of
from agent.cluster.dialer import OPTIONS, target_of
from agent.cluster.identity import authority as ca
from agent.cluster.identity import requests, statements, tokens
from agent.cluster.identity.enrol import call_enrol
from agent.cluster.identity.files import Held
from agent.cluster.trust import Keyring, read_bearer
from agent.core.ratelimit import Buckets
from agent.errors import Invalid, Unavailable, VxmeshError
from agent.model import Node, encode
from agent.node import NodeState
from agent.notation import shorten
from agent.rpc import peer_pb2 as pb
from agent.unreadable import UNREADABLE

log = structlog.get_logger()

PASS_ON_WITHIN = 3.0  # s; for one keeper
TELL_RATE, TELL_BURST = 1.0, 30.0  # events a second, and at once
ISSUED_MAX = 1024  # nodes that got a certificate and have not been heard of since
REJOIN = "Run 'vxmesh cluster token' there, and start the agent with what it prints"
_ID = re.compile(r"[0-9a-f]{16}\Z")
_NAME = re.compile(r"[a-z0-9-]{1,63}\Z")
Context = grpc.aio.ServicerContext[Any, Any]


class Refused(VxmeshError):
    """No certificate. `reason` is one word: wrong, void, removed, taken, expired, malformed."""

    code = "PERMISSION_DENIED"

    def __init__(self, reason: str, what: str, why: str, fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.reason = reason


class Holder(Protocol):
    """Who has this node's identity (service.py)."""

    held: Held
    keyring: Keyring
    life: float

    def now(self) -> float: ...

    async def take_key(self, key: bytes) -> None: ...


class Desk:
    """Both kinds of requests, judged or passed on."""

    def __init__(self, holder: Holder, node: NodeState) -> None:
        self.holder, self.node = holder, node
        self._pace = Buckets(TELL_RATE, TELL_BURST)
        self._untold: Counter[str] = Counter()  # by reason, since one was told
        self._issued: OrderedDict[str, bytes] = OrderedDict()  # node -> its record key

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """For the peer port: the methods of the service."""
        return {
            "GetAuthorities": _handler(self._authorities, pb.AuthoritiesRequest, pb.Authorities),
            "Join": _handler(self._join, pb.JoinRequest, pb.Issued),
            "Renew": _handler(self._renew, pb.RenewRequest, pb.Issued),
            "HandKey": _handler(self._take_key, pb.KeyParcel, pb.KeyTaken),
        }

    # -- judging --

    def join(self, request: pb.JoinRequest) -> pb.Issued:
        """Issue to who has the token; Refused says why not. Only for a keeper."""
        self._check_secret(request.secret)
        id, record_key = request.node, request.record_key
        if not _ID.match(id) or len(record_key) != 32:
            raise Refused("malformed", "join request", "names no node")
        name = request.name if _NAME.match(request.name) else id
        self._check_stays(id)
        if self._record_key_of(id) not in (None, record_key):
            raise Refused(
                "taken",
                f"node {id}",
                "is known, and has another record key",
                "Restore its tls directory from a backup, or start it with --reset-state to join "
                "as a new node",
            )
        issued = self._issue(id, record_key, request.request, request.proof)
        self._issued[id] = record_key
        while len(self._issued) > ISSUED_MAX:
            self._issued.popitem(last=False)
        self.node.tell("join.accepted", f"{name} got a certificate", node=id, name=name)
        return issued

    def renew(self, request: pb.RenewRequest) -> pb.Issued:
        """Issue to who has a certificate that is valid still; Refused says why not."""
        held, certificate = self.holder.held, request.certificate
        what = "certificate"
        if ca.find_issuer(certificate, held.trust.authorities) is None:
            if ca.find_issuer(certificate, held.trust.retired) is None:
                raise Refused("foreign", what, "is of another cluster", REJOIN)
            why = "is of a CA that was replaced (rotate-ca) while its node was away"
            raise Refused("retired", what, why, REJOIN)
        bearer = read_bearer(x509.load_der_x509_certificate(certificate))
        self._check_stays(bearer.node)
        if ca.ends(certificate) <= self.holder.now():
            raise Refused("expired", what, "has ended", REJOIN)
        return self._issue(bearer.node, bearer.record_key, request.request, request.proof)

    def _check_secret(self, secret: str) -> None:
        held, verdict = self.holder.held, "wrong"
        for authority in held.keys:
            state = statements.newest_token(
                self.node.tokens.values(), held.cluster, authority.certificate
            )
            found = tokens.judge(secret, authority.key, state)
            if found == "valid":
                return
            if found == "void":
                verdict = found
        if verdict == "void":
            why = "is void: it was replaced by 'vxmesh cluster token --rotate'"
            raise Refused("void", "token", why, REJOIN)
        why = "is wrong: it is for this cluster, but its secret is none that ever held here"
        raise Refused("wrong", "token", why, REJOIN)

    def _check_stays(self, id: str) -> None:
        removal = self.node.removals.get(id)
        if removal:
            raise Refused(
                "removed",
                f"node {removal.name}",
                f"was removed from the cluster by {removal.by_name or removal.by}",
                "Start it with --reset-state to join as a new one",
            )

    def _record_key_of(self, id: str) -> bytes | None:
        """The record key of a node that is known, empty if it told none; None if it is not."""
        known = self.node.nodes.get(id)
        if known is None:
            return self._issued.get(id)
        try:
            return read_bearer(x509.load_der_x509_certificate(known.certificate)).record_key
        except (Invalid, *UNREADABLE):
            return b""

    def _issue(self, id: str, record_key: bytes, request: bytes, proof: bytes) -> pb.Issued:
        held = self.holder.held
        issuing = held.issuing
        if issuing is None:
            raise Unavailable("this node", "does not keep the CA's key")
        try:
            public_key = requests.check(id, record_key, request, proof)
        except Invalid as error:
            raise Refused("malformed", error.what, error.why) from None
        now, life = self.holder.now(), self.holder.life
        certificate = ca.issue(issuing, held.cluster, id, record_key, public_key, now, life)
        return pb.Issued(certificate=certificate, trust=encode_trust(held))

    # -- the calls --

    async def _authorities(
        self, request: pb.AuthoritiesRequest, context: Context
    ) -> pb.Authorities:
        held = self.holder.held
        return pb.Authorities(
            authorities=held.trust.authorities,
            retired=held.trust.retired,
            trust=encode_trust(held),
        )

    async def _join(self, request: pb.JoinRequest, context: Context) -> pb.Issued:
        return await self._answer("Join", request, self.join, context, request.node)

    async def _renew(self, request: pb.RenewRequest, context: Context) -> pb.Issued:
        return await self._answer("Renew", request, self.renew, context, "")

    async def _take_key(self, request: pb.KeyParcel, context: Context) -> pb.KeyTaken:
        if not caller_of(context).is_member:
            return pb.KeyTaken(refused="only a node of this cluster can hand it on")
        try:
            await self.holder.take_key(request.key)
        except VxmeshError as error:
            return pb.KeyTaken(refused=str(error))
        return pb.KeyTaken()

    async def _answer(
        self,
        method: str,
        request: Any,
        judge: Callable[[Any], pb.Issued],
        context: Context,
        asker: str,
    ) -> pb.Issued:
        try:
            if self.holder.held.issuing:
                return judge(request)
            if request.hops:
                raise Unavailable("this node", "does not keep the CA's key")
            issued = await self._pass_on(method, request)
        except VxmeshError as error:
            reason = error.reason if isinstance(error, Refused) else "unavailable"
            refusal = pb.Refusal(
                code=error.code, what=error.what, why=error.why, fix=error.fix, reason=reason
            )
            issued = pb.Issued(refusal=refusal)
        caller = caller_of(context)
        # What a member passed on it tells itself: it knows from where it came.
        if issued.HasField("refusal") and not (request.hops and caller.is_member):
            self._tell(issued.refusal, caller.address, asker)
        return issued

    async def _pass_on(self, method: str, request: Any) -> pb.Issued:
        passed = type(request)()
        passed.CopyFrom(request)
        passed.hops = 1
        return await ask_keepers(self.node, self.holder.keyring, method, passed)

    def _tell(self, refusal: pb.Refusal, where: str, asker: str) -> None:
        """Tell of a refusal, of very many together: strangers must not flush the history."""
        self._untold[refusal.reason] += 1
        if not self._pace.take("", self.holder.now()):
            return
        self.node.tell(
            "join.refused",
            f"no certificate for {shorten(asker) if asker else 'a node'} at {where}: "
            f"{refusal.what} {refusal.why}"[:300],
            reason=refusal.reason,
            node=asker[:16],
            address=where,
            count=str(self._untold.pop(refusal.reason)),
        )


async def ask_keepers(node: NodeState, keyring: Keyring, method: str, request: Any) -> pb.Issued:
    """The answer of a keeper that lives; Unavailable if none answers.

    Only who has shown that it keeps the key is asked: a token's secret is in what joiners send.
    """
    keepers = [n for n in node.nodes.values() if node.is_keeper(n) and n.id != node.me]
    random.shuffle(keepers)
    keepers.sort(key=lambda n: not node.is_alive(n.id))
    for keeper in keepers:
        try:
            issued = await ask_keeper(keeper, keyring, method, request)
        except Unavailable as error:
            log.info("keeper.silent", keeper=keeper.name, error=error.why)
            continue
        if issued.refusal.reason != "unavailable":
            return issued
    names = ", ".join(sorted(n.name for n in keepers)) or "none is known"
    raise Unavailable(
        "certificate",
        f"cannot be issued: no node that keeps the CA's key answers ({names})",
        "Bring one of them back; see 'vxmesh cluster status'",
    )


async def ask_keeper(keeper: Node, keyring: Keyring, method: str, request: Any) -> pb.Issued:
    """One keeper's answer; Unavailable if there is none."""
    channel = keyring.channel(target_of(keeper), keeper.id, OPTIONS)
    try:
        issued: pb.Issued = await call_enrol(channel, method, request, pb.Issued, PASS_ON_WITHIN)
        return issued
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"node {keeper.name}", f"does not answer ({error.code().name})") from None
    finally:
        await channel.close()


def encode_trust(held: Held) -> bytes:
    """Whom this cluster trusts, as signed; empty if nobody has changed it since its beginning."""
    return encode(held.trust) if held.trust.epoch else b""


def _handler(
    method: Callable[[Any, Context], Awaitable[Any]], request: Any, reply: Any
) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=request.FromString,
        response_serializer=reply.SerializeToString,
    )
