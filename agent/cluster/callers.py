"""Who calls, for the handlers behind the front: read from the name that their connection bears.

A handler never sees the TLS connection: front.py does, and hands its bytes on over a unix socket
whose client end it binds to such a name (agent/splice.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc.aio

from agent import splice
from agent.cluster.refusals import Reason

_NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Caller:
    """By certificate, not by what it says."""

    node: str  # id; empty: it has shown no certificate that names one
    address: str  # without a port
    refused: Reason | None = None  # why it is no member all the same, if it is not

    @property
    def is_member(self) -> bool:
        """Whether it is a node of this cluster."""
        return self.refused is None

    @property
    def name(self) -> str:
        """As a name for `splice.connect`."""
        kind = self.refused.value if self.refused else "node"
        # Without the scope of a link-local address, and so that 107 bytes are enough.
        address = self.address.partition("%")[0]
        return f"{kind},{self.node or _NOBODY},{address}"


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Who calls. LookupError if it did not come by the front: nothing else may connect there."""
    name = splice.caller(context.peer())
    if name is None:
        raise LookupError(f"a caller without a name: {context.peer()}")
    kind, node, address = name.split(",")
    refused = None if kind == "node" else Reason(kind)
    return Caller("" if node == _NOBODY else node, address, refused)
