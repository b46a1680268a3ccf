"""What names a node or a user, and how one comes by it: tokens, certificates, requests for them,
statements of trust, and the files that hold an identity."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError

from agent.clienttls import Bundle
from agent.cluster.callers import Caller
from agent.cluster.identity import authority as ca
from agent.cluster.identity import enrol, requests, statements, tokens
from agent.cluster.identity.desk import Desk
from agent.cluster.identity.files import CLUSTER, KEYS, NODE, RECORD, Files, Held
from agent.cluster.identity.founding import found_cluster
from agent.cluster.refusals import Reason
from agent.cluster.trust import check_issued, read_bearer
from agent.errors import Invalid, VxmeshError
from agent.model import TokenState, Trust, encode
from agent.rpc import peer_pb2 as pb
from agent.unreadable import UNREADABLE
from agent.users import User, read_user
from tests.fuzz import world
from tests.fuzz.engine import Target, scratch
from tests.fuzz.inputs import frame, mutate, text, unframe
from tests.fuzz.shapes import Known, message, struct
from tests.fuzz.targets.unary import LOOP, Aborted, Context
from tests.identities import Authority

_FILES = scratch()
LIFE = 86400.0
STRANGER = Caller("", "192.0.2.7", Reason.NO_CERTIFICATE)


def _found() -> Held:
    return found_cluster(Files(Path(_FILES.name, "sound")), world.ME, time.time(), LIFE)


HELD = _found()
OTHER = Authority()
AUTHORITY = HELD.keys[0]
ASKED = requests.make(world.PEER, bytes(range(32)))
RECORD_KEY = requests.public_half(bytes(range(32)))
PEER_CERTIFICATE = ca.issue(
    AUTHORITY, HELD.cluster, world.PEER, RECORD_KEY, ASKED.key.public_key(), time.time(), LIFE
)
SECRET = tokens.derive(AUTHORITY.key, b"")


def parse_token(data: bytes) -> None:
    """A join token as typed."""
    token = tokens.parse(data.decode(errors="surrogateescape"))
    assert tokens.parse(str(token)) == token
    assert token.secret not in repr(token)


def make_token(rng: random.Random) -> bytes:
    """For `parse_token`."""
    token = tokens.Token(ca.fingerprint(AUTHORITY.certificate), SECRET)
    return rng.choice((str(token), str(token).lower(), f" {token}\n", text(rng))).encode(
        errors="surrogateescape"
    )


def read_certificate(data: bytes) -> None:
    """A certificate (DER) that somebody has shown, whoever signed it."""
    ca.issuer_of(data, (AUTHORITY.certificate,))
    try:
        certificate = x509.load_der_x509_certificate(data)
    except UNREADABLE:
        return  # as front.py takes it
    for read in (read_bearer, read_user):
        try:
            found = read(certificate)
        except Invalid:
            continue
        if not isinstance(found, User):
            assert len(found.record_key) in (0, 32)
    try:
        check_issued(certificate, [OTHER.pem])
    except Invalid:
        pass
    ca.public_key_of(data)


CERTIFICATES = [
    PEER_CERTIFICATE,
    HELD.certificate,
    AUTHORITY.certificate,
    x509.load_pem_x509_certificate(
        OTHER.credentials(
            "x", names=["a.node.b.vxmesh.internal", "x.node.y.vxmesh.internal"]
        ).certificate
    ).public_bytes(Encoding.DER),
]


def make_certificate(rng: random.Random) -> bytes:
    """For `read_certificate`."""
    made = rng.choice(CERTIFICATES)
    return made if rng.random() < 0.1 else mutate(made, rng, CERTIFICATES, NAMES)


NAMES = (b"vxmesh:record-key:", b".node.", b"vxmesh.internal", b"vxmesh:user:a", b"\x82", b"\x86",
         b"\x06\x03U\x1d\x11", b"\x30\x82", b" " * 64)  # fmt: skip


@dataclass
class Holder:
    """As desk.Holder: a keeper."""

    held: Held = HELD
    keyring: Any = None
    life: float = LIFE

    def now(self) -> float:
        """The time."""
        return time.time()

    async def take_key(self, key: bytes) -> None:
        """No key is wanted."""
        raise Invalid("key", "is not wanted")


def enrol_stranger(data: bytes) -> None:
    """Requests of one that is no member, at a keeper: the first byte chooses the call.

    Nobody gets a certificate who has neither the token nor a certificate, and none for
    anybody else's name.
    """
    if not data:
        return
    kind = (pb.JoinRequest, pb.RenewRequest)[data[0] % 2]
    try:
        request: Any = kind.FromString(data[1:])
    except DecodeError:
        return
    state = world.make(networks=0)
    desk = Desk(Holder(), state)

    async def run() -> None:
        call = desk._join if kind is pb.JoinRequest else desk._renew
        try:
            issued = await call(request, cast(Any, Named()))
        except Aborted:
            return
        issued.SerializeToString()
        if issued.certificate:
            bearer = read_bearer(x509.load_der_x509_certificate(issued.certificate))
            if kind is pb.JoinRequest:
                assert request.secret == SECRET and bearer.node == request.node
            else:
                shown = x509.load_der_x509_certificate(request.certificate)
                assert bearer == read_bearer(shown)
                assert ca.issuer_of(request.certificate, (AUTHORITY.certificate,))

    LOOP.run_until_complete(run())


class Named(Context):
    """A call over a connection with an address."""

    def peer(self) -> str:
        """As gRPC tells it."""
        caller = Caller("", "192.0.2.7", Reason.NO_CERTIFICATE)
        return f"unix-abstract:vxmesh/{caller.name}/1-2"


ENROL = Known({
    "node": (world.PEER, "e" * 16), "name": ("h2", "h9"), "secret": (SECRET,), "hops": (0, 1),
    "request": (ASKED.request,), "record_key": (RECORD_KEY,), "proof": (ASKED.proof,),
    "certificate": (PEER_CERTIFICATE, HELD.certificate),
    "authorities": (AUTHORITY.certificate,), "retired": (AUTHORITY.certificate,),
})  # fmt: skip


def make_enrolment(rng: random.Random) -> bytes:
    """For `enrol_stranger`."""
    number = rng.randrange(2)
    made: Any = message((pb.JoinRequest, pb.RenewRequest)[number], rng, ENROL)
    if rng.random() < 0.5:
        field = rng.choice(("request", "proof"))
        setattr(made, field, mutate(getattr(made, field), rng))
    return bytes([number]) + bytes(made.SerializeToString())


def hear_statement(data: bytes) -> None:
    """Statements of trust and of tokens that come as bytes, or in records of a member.

    None is believed: whoever wrote these has no key of the CA.
    """
    try:
        statements.read_trust(data, HELD.cluster, [AUTHORITY.certificate])
    except Invalid:
        pass
    else:
        raise AssertionError("a statement that nobody signed")
    found: list[Any] = []
    for each in unframe(data):
        for kind in (Trust, TokenState):
            try:
                found.append(msgspec.msgpack.decode(each, type=kind))
            except (msgspec.MsgspecError, ValueError):
                continue
    trusts = [each for each in found if isinstance(each, Trust)]
    states = [each for each in found if isinstance(each, TokenState)]
    assert statements.newest_trust(trusts, HELD.trust) is None
    assert statements.newest_token(states, HELD.cluster, AUTHORITY.certificate) is None


STATED = Known({
    "cluster": (HELD.cluster,), "epoch": (1, 2, 1 << 31), "stamp": (1, 1 << 61),
    "authorities": ((AUTHORITY.certificate,), (OTHER.pem,)), "retired": ((),),
    "signatures": ((b"x" * 70,), ()), "signature": (b"x" * 70, b""), "by": world.NODES,
})  # fmt: skip


def make_statement(rng: random.Random) -> bytes:
    """For `hear_statement`."""
    made = []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.choice((Trust, TokenState))
        try:
            made.append(encode(struct(kind, rng, STATED)))
        except (OverflowError, UnicodeEncodeError):
            continue
    return made[0] if made and rng.random() < 0.5 else frame(made)


SOUND = {
    name: Path(_FILES.name, "sound", "tls", name).read_bytes()
    for name in (CLUSTER, NODE, RECORD, KEYS)
}


def load_identity(data: bytes) -> None:
    """The files of an identity, a frame each; an empty one is a file that is not there."""
    directory = Path(_FILES.name, "damaged", "tls")
    directory.mkdir(parents=True, exist_ok=True)
    pieces = unframe(data)
    for name, content in zip(SOUND, [*pieces, b"", b"", b"", b""], strict=False):
        path = directory / name
        if content:
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)
    held = Files(directory.parent).load()
    if held is not None:
        # Taken, so it is the identity that was made: nothing else fits together.
        assert (held.cluster, held.node) == (HELD.cluster, HELD.node)
        assert held.certificate == HELD.certificate and held.record_key == HELD.record_key
        held.credentials()


def make_identity(rng: random.Random) -> bytes:
    """For `load_identity`."""
    files = list(SOUND.values())
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        which = rng.randrange(len(files))
        files[which] = rng.choice(
            (mutate(files[which], rng, list(SOUND.values())), b"", rng.choice(list(SOUND.values())))
        )
    return frame(files)


def open_bundle(data: bytes) -> None:
    """The file that a user shows an agent over TCP."""
    path = Path(_FILES.name, "user.pem")
    path.write_bytes(data)
    Bundle(path)


def make_bundle(rng: random.Random) -> bytes:
    """For `open_bundle`."""
    parts = [SOUND[NODE], SOUND[KEYS], SOUND[RECORD], OTHER.pem, b"", b"\n"]
    return b"".join(rng.choice(parts) for _ in range(rng.randrange(1, 4)))


def hear_offer(data: bytes) -> None:
    """What a node that is joined offers to who joins: only the token's CA is believed."""
    try:
        offered = pb.Authorities.FromString(data)
    except DecodeError:
        return
    token = tokens.Token(ca.fingerprint(AUTHORITY.certificate), SECRET)
    bearer = read_bearer(x509.load_der_x509_certificate(PEER_CERTIFICATE))
    trust = enrol._believe("h1:7946", token, offered, bearer)
    assert AUTHORITY.certificate in trust.authorities


def make_offer(rng: random.Random) -> bytes:
    """For `hear_offer`."""
    made = message(pb.Authorities, rng, ENROL)
    if rng.random() < 0.5:
        made.trust = make_statement(rng)
    return made.SerializeToString()


TARGETS = [
    Target("identity.token", parse_token, make_token, weight=4),
    Target("identity.certificate", read_certificate, make_certificate, (VxmeshError,), weight=2),
    Target("identity.enrolment", enrol_stranger, make_enrolment, ()),
    Target("identity.statement", hear_statement, make_statement, ()),
    Target("identity.files", load_identity, make_identity, weight=0.5),
    Target("identity.bundle", open_bundle, make_bundle, weight=0.5),
    Target("identity.offer", hear_offer, make_offer, (VxmeshError,)),
]
