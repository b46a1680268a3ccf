"""Getting addresses that this node may hand out: by itself, or donated by their owners.

`node.create_endpoint` raises NeedSpace when the ring says that others own what is needed; here
the owners are asked, best first, and the call is made again.
What stands opposite: cluster/ carries the request, node.donate answers it on the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from agent.core.addresses import Range
from agent.errors import Conflict, Exhausted, Unavailable
from agent.model import Network
from agent.node import NeedSpace, NodeState

T = TypeVar("T")

# Each round moves ownership forward by at least one donation, unless others take it away in
# between; a node that loses this many races is told so instead of trying for ever.
ROUNDS = 16


class Donors(Protocol):
    """Who can ask other nodes."""

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        """Why `owner` did not donate, or nothing if it did; Unavailable if it is silent."""


async def with_space(node: NodeState, donors: Donors, action: Callable[[], T]) -> T:
    """Run `action`, asking owners for addresses whenever it raises NeedSpace.

    Raises what `action` raises, and Exhausted, Conflict or Unavailable that name the owners
    when none of them donates.
    """
    for _ in range(ROUNDS):
        try:
            return action()
        except NeedSpace as need:
            await _ask(node, donors, need)
    raise Exhausted(
        "addresses", "went to others each time some were donated", "Try again, one at a time"
    )


async def _ask(node: NodeState, donors: Donors, need: NeedSpace) -> None:
    refusals: list[str] = []
    silent: list[str] = []
    for owner, ranges in need.owners.items():
        name = node.node_name(owner)
        try:
            refused = await donors.request_space(owner, need.network, need.family, ranges)
        except Unavailable as error:
            silent.append(owner)
            refusals.append(str(error))
            continue
        if not refused:
            return
        refusals.append(f"{name}: {refused}")
    if need.network.id not in node.addresses:
        raise Unavailable(need.label, "is of a network that was just removed")
    why, usage = (
        "; ".join(refusals),
        node.describe_usage(need.network.id, need.family, silent),
    )
    if silent:
        names = sorted(node.node_name(id) for id in silent)
        raise Unavailable(
            need.label,
            f"belongs to {', '.join(names)}, and no other node can donate any: {usage}",
            f"Bring {', '.join(names)} back, or, if that will not be, run "
            f"'vxmesh node rm {' '.join(names)}'",
        )
    if any(need.owners.values()):
        raise Conflict(need.label, f"was not donated ({why})", "Choose another")
    raise Exhausted(
        need.label,
        f"cannot be had ({why}): {usage}",
        "Remove endpoints, or create a network with a larger subnet",
    )
