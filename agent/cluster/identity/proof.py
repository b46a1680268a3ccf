"""Who keeps the CA's key, and who has been a member how long: what a node can show, not claim.

A keeper signs its own id with the CA's key and has the signature in its record (`keeper_proof` of
model.Node). Nobody else can make one, and one of another node or cluster is no good. It says that
its bearer has had the key, not that it still has: `keeper`, beside it, says that.
What stands opposite: service.py makes this node's own, and asks this of all the others.
"""

from __future__ import annotations

import functools

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent.cluster.identity import authority as ca
from agent.cluster.trust import read_bearer
from agent.errors import Invalid
from agent.model import KEEPER_PROOF_MAX, Node
from agent.unreadable import UNREADABLE


def make(authority: ca.Authority, cluster: str, node: str) -> bytes:
    """The proof that `node` (its id) has the key of `authority`: ECDSA, DER."""
    return authority.key.sign(_message(cluster, node), ec.ECDSA(hashes.SHA256()))


def is_keeper(node: Node, cluster: str, authorities: tuple[bytes, ...]) -> bool:
    """Whether a node that says it keeps the CA's key has had that of one of `authorities` (DER)."""
    proof = node.keeper_proof
    if not node.keeper or not proof or len(proof) > KEEPER_PROOF_MAX:
        return False
    return _is_signed(proof, cluster, node.id, authorities)


@functools.lru_cache(maxsize=4096)  # it is asked of every node again and again
def _is_signed(proof: bytes, cluster: str, node: str, authorities: tuple[bytes, ...]) -> bool:
    for authority in authorities:
        try:
            key = ca.public_key_of(authority)
            key.verify(proof, _message(cluster, node), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, Invalid):
            continue
        return True
    return False


def _message(cluster: str, node: str) -> bytes:
    # msgpack has the lengths, so that no two pairs give the same bytes.
    return b"vxmesh keeper 1\0" + msgspec.msgpack.encode((cluster, node))


def member_since(node: str, certificate: bytes, authorities: tuple[bytes, ...]) -> float | None:
    """When a node's certificate (DER) begins, in s since the epoch; None if it is not of one of
    `authorities`, or is another node's."""
    if ca.issuer_of(certificate, authorities) is None:
        return None
    try:
        if read_bearer(x509.load_der_x509_certificate(certificate)).node != node:
            return None
        return ca.begins(certificate)
    except (Invalid, *UNREADABLE):
        return None
