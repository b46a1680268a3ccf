"""A new cluster: its id, its CA, and the certificate of its first node, which issues it itself."""

from __future__ import annotations

import os
import secrets

from agent.cluster.identity import authority as ca
from agent.cluster.identity import requests
from agent.cluster.identity.files import Files, Held
from agent.cluster.identity.requests import Request
from agent.errors import Conflict
from agent.model import Trust

ID_BYTES = 8


def found_cluster(files: Files, node: str, now: float, life: float) -> Held:
    """Make a cluster whose first node is `node` (its id), and write it down.

    `life` of the certificate is in s. Conflict if there is an identity.
    """
    if files.exists():
        held = files.load()
        raise Conflict(
            "this node",
            f"is of a cluster already ({held.cluster if held else '?'})",
            "See 'vxmesh cluster status'; 'vxmesh agent --reset-state' sets it aside",
        )
    cluster = secrets.token_hex(ID_BYTES)
    authority = ca.make_authority(cluster, now)
    # One that a joining which came to nothing has left is as good as a new one.
    record_key = files.read_record_key() or os.urandom(32)
    asked = requests.make(node, record_key)
    certificate = ca.issue(
        authority,
        cluster,
        node,
        requests.public_half(record_key),
        asked.key.public_key(),
        now,
        life,
    )
    trust = Trust(0, 0, cluster, (authority.certificate,), (), node)
    held = Held(cluster, node, certificate, asked.key, record_key, trust, (authority,))
    files.save(held)
    return held


def issue_own(held: Held, asked: Request, now: float, life: float) -> bytes:
    """A certificate (DER) of a keeper for itself."""
    assert held.issuing is not None
    public = requests.public_half(held.record_key)
    key = asked.key.public_key()
    return ca.issue(held.issuing, held.cluster, held.node, public, key, now, life)
