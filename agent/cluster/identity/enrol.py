"""The joiner's side: from a token and an address to an identity.

Whom it talks to it knows before it says anything. A first connection is to nobody known and
carries nothing of ours: only the certificate that the other end shows is taken from it. A second
one accepts just that certificate, and asks for the CA's; if its fingerprint is the token's, and
it issued the first one, a third connection is made that TLS checks against this CA, and only
that one carries the secret. What is trusted from then on is what the token vouches for, or what
was signed by that. What stands opposite: desk.py of any node of the cluster.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.cluster.dialer import OPTIONS
from agent.cluster.identity import authority as ca
from agent.cluster.identity import requests
from agent.cluster.identity.files import Held
from agent.cluster.identity.statements import read_trust
from agent.cluster.identity.tokens import Token
from agent.cluster.outside import ENROL
from agent.cluster.trust import Bearer, member_name, read_bearer
from agent.errors import Conflict, Invalid, Unavailable, VxmeshError, from_code
from agent.model import Trust
from agent.rpc import peer_pb2 as pb
from agent.unreadable import UNREADABLE

CONNECT_WITHIN = 3.0  # s
ANSWER_WITHIN = 10.0  # s; it may have to be passed on to a second keeper, or a third
GET_TOKEN = "Run 'vxmesh cluster token' on a node of the cluster, and use what it prints"


@dataclass(frozen=True, slots=True)
class Joiner:
    """Who wants to join."""

    node: str  # id
    name: str
    record_key: bytes  # private
    cluster: str = ""  # the one it is of already, if it only needs another certificate


async def join(target: str, token: Token, joiner: Joiner) -> Held:
    """An identity, from the agent at host:port.

    Unavailable if it does not answer, or cannot issue one now; any other VxmeshError is a
    refusal, ours or the cluster's, and trying again does not help.
    """
    leaf, bearer = await look(target)
    offered = await _authorities(target, leaf, bearer)
    trust = _believe(target, token, offered, bearer)
    if ca.issuer_of(leaf, trust.authorities) is None:
        raise _foreign(target, token, offered)
    if joiner.cluster and joiner.cluster != bearer.cluster:
        raise Conflict(
            "token",
            f"is of cluster {bearer.cluster}, and this node is of {joiner.cluster}",
            "Start without --token; or with --reset-state to leave that cluster for this one",
        )
    asked = requests.make(joiner.node, joiner.record_key)
    request = pb.JoinRequest(
        node=joiner.node,
        name=joiner.name,
        secret=token.secret,
        request=asked.request,
        record_key=requests.public_half(joiner.record_key),
        proof=asked.proof,
    )
    roots = b"".join(map(ca.to_pem, trust.authorities))
    issued = await _call(target, roots, bearer.cluster, "Join", request, pb.Issued)
    certificate, trust = read_issued(issued, joiner.node, asked.key, trust)
    return Held(bearer.cluster, joiner.node, certificate, asked.key, joiner.record_key, trust)


def read_issued(
    issued: pb.Issued, node: str, key: ec.EllipticCurvePrivateKey, trust: Trust
) -> tuple[bytes, Trust]:
    """The certificate of an answer, and whom to trust from now on; what was refused is raised.

    Invalid if it is not what was asked for.
    """
    if issued.HasField("refusal"):
        said = issued.refusal
        raise from_code(said.code, said.what, said.why, said.fix)
    if issued.trust:
        told = read_trust(issued.trust, trust.cluster, trust.authorities)
        if (told.epoch, told.stamp) > (trust.epoch, trust.stamp):
            trust = told
    certificate = issued.certificate
    if ca.issuer_of(certificate, trust.authorities) is None:
        raise Invalid("certificate", "is not of the cluster's CA")
    bearer = read_bearer(x509.load_der_x509_certificate(certificate))
    if (bearer.cluster, bearer.node) != (trust.cluster, node) or not ca.belongs(key, certificate):
        raise Invalid("certificate", "is not the one that was asked for")
    return certificate, trust


async def look(target: str) -> tuple[bytes, Bearer]:
    """The certificate (DER) that is shown at host:port, and whose it says it is. Nothing is
    checked, and nothing sent. Unavailable if nobody answers there."""
    host, _, port = target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    writer = None
    try:
        async with asyncio.timeout(CONNECT_WITHIN):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return shown, read_bearer(x509.load_der_x509_certificate(shown))
    except (ssl.SSLError, ConnectionResetError):
        raise Unavailable(
            f"agent at {target}", "does not speak TLS 1.3", "See what listens there"
        ) from None
    except TimeoutError:
        raise Unavailable(f"agent at {target}", "does not answer") from None
    except (OSError, *UNREADABLE) as error:
        raise Unavailable(f"agent at {target}", f"does not answer ({error})") from None
    except Invalid as error:
        raise Invalid(
            f"agent at {target}", f"is none of vxmesh: its certificate {error.why}"
        ) from None
    finally:
        if writer:
            writer.transport.abort()


async def _authorities(target: str, leaf: bytes, bearer: Bearer) -> pb.Authorities:
    """Whom who shows that very certificate says that it trusts."""
    request = pb.AuthoritiesRequest()
    found: pb.Authorities = await _call(
        target, ca.to_pem(leaf), bearer.cluster, "GetAuthorities", request, pb.Authorities
    )
    return found


def _believe(target: str, token: Token, offered: pb.Authorities, bearer: Bearer) -> Trust:
    """What of that the token vouches for."""
    for certificate in offered.authorities:
        if ca.fingerprint(certificate) == token.fingerprint:
            if offered.trust:
                return read_trust(offered.trust, bearer.cluster, [certificate])
            return Trust(0, 0, bearer.cluster, (certificate,), (), bearer.node)
    raise _foreign(target, token, offered)


def _foreign(target: str, token: Token, offered: pb.Authorities) -> VxmeshError:
    if token.fingerprint in map(ca.fingerprint, offered.retired):
        why = "is void: the cluster's CA has been changed since it was made (rotate-ca)"
        return VxmeshError("token", why, GET_TOKEN)
    there = ", ".join(map(ca.fingerprint, offered.authorities[:2])) or "none"
    return VxmeshError(
        "token",
        f"is of another cluster than the one at {target}: it names CA {token.fingerprint}, "
        f"there it is {there}; nothing was sent",
        GET_TOKEN,
    )


async def _call(
    target: str, roots: bytes, cluster: str, method: str, request: Any, reply: Any
) -> Any:
    """One call, without a certificate of ours, of who has one of `cluster` by `roots` (PEM)."""
    named = ("grpc.ssl_target_name_override", member_name(cluster))
    credentials = grpc.ssl_channel_credentials(roots)
    channel = grpc.aio.secure_channel(target, credentials, [*OPTIONS, named])
    try:
        return await call_enrol(channel, method, request, reply, ANSWER_WITHIN)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(
            f"agent at {target}", f"does not answer ({error.code().name}: {error.details()})"[:300]
        ) from None
    finally:
        await channel.close()


async def call_enrol(
    channel: grpc.aio.Channel, method: str, request: Any, reply: Any, seconds: float
) -> Any:
    """A method of the service on a channel that stands; AioRpcError if it fails."""
    unary = channel.unary_unary(
        f"/{ENROL}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=reply.FromString,
    )
    return await unary(request, timeout=seconds)
