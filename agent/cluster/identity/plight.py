"""Why nobody talks to this node: it may have been away while the cluster got another CA.

Then TLS fails on both sides, which says nothing to a person. Who has nobody to talk to looks at
the certificate that another node shows: one of this cluster, but of a CA that is unknown here,
is the sign. Nothing is believed because of it, but what to do is said.
What stands opposite: rotation.py, which names such nodes on the other side.
"""

from __future__ import annotations

import random
import time
from typing import Protocol

import structlog

from agent.cluster.dialer import target_of
from agent.cluster.identity import authority as ca
from agent.cluster.identity import enrol
from agent.cluster.identity.files import Held
from agent.errors import VxmeshError
from agent.node import NodeState

log = structlog.get_logger()

ALONE_FOR = 5.0  # s; an agent that starts is alone for a moment
EVERY = 30.0  # s


class Owner(Protocol):
    """Who has this node's identity (service.py)."""

    held: Held
    node: NodeState


class Plight:
    """Looks, and tells once."""

    def __init__(self, owner: Owner) -> None:
        self._owner, self._node = owner, owner.node
        self._next: float | None = None  # when to look; None: not alone
        self._told = ""

    async def look(self) -> bool:
        """Look whether this node was left behind, if it is alone and it is time; whether to look
        again soon."""
        others = [n for n in self._node.nodes.values() if n.id != self._node.me]
        if not others or any(self._node.is_alive(n.id) for n in others):
            self._next, self._told = None, ""
            return False
        now = time.monotonic()
        if self._next is None:
            self._next = now + ALONE_FOR
        if now < self._next:
            return not self._told
        self._next = now + EVERY
        other = random.choice(others)
        try:
            leaf, bearer = await enrol.look(target_of(other))
        except VxmeshError:
            return True
        trust = self._owner.held.trust
        if bearer.cluster != trust.cluster or ca.issuer_of(leaf, trust.authorities):
            return True
        if self._told != other.id:
            self._told = other.id
            self._node.tell(
                "ca.left_behind",
                f"{other.name} shows a certificate of a CA that is not known here: the cluster's "
                "was replaced (rotate-ca) while this node was away; run 'vxmesh cluster token' "
                "there, and start this agent with the --join and --token that it prints",
                name=other.name,
            )
        return False
