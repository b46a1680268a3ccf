"""Which of a sandbox's interfaces has its default route, for IPv4 and for IPv6 each.

Of those that lead outside in a family the one with the highest priority has it, and of equals the
one that was connected first, so that what is connected later changes nothing unless it is meant
to. PURE. What stands opposite: agent/lookups.py, which says what leads outside;
drivers/overlay.py makes routes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from agent.model import Endpoint, Network, Sandbox
from agent.notation import holds


class Way(NamedTuple):
    """An interface of a sandbox."""

    endpoint: str  # id
    priority: int
    families: frozenset[int]  # 4, 6: in which it leads outside


def lead(ways: Iterable[Way], family: int) -> str:
    """The endpoint with the default route of a family; empty if none leads outside.

    `ways` in the order in which they were connected.
    """
    able = [way for way in ways if family in way.families]
    return max(able, key=lambda way: way.priority).endpoint if able else ""


def expected(network: Network, priority: int) -> Way:
    """The way out by a network, named by its id, while there is no interface in it yet."""
    led = {6 if ":" in gateway else 4 for gateway in network.gateways}
    return Way(network.id, priority, frozenset(() if network.internal else led))


def priorities(sandbox: Sandbox) -> tuple[int, ...]:
    """Those of all its endpoints: a sandbox that an older agent wrote has none."""
    given = sandbox.priorities[: len(sandbox.endpoints)]
    return given + (0,) * (len(sandbox.endpoints) - len(given))


def with_interface(sandbox: Sandbox, endpoint: str, ifname: str, priority: int) -> Sandbox:
    """A sandbox with one interface more."""
    return msgspec.structs.replace(
        sandbox,
        endpoints=(*sandbox.endpoints, endpoint),
        ifnames=(*sandbox.ifnames, ifname),
        priorities=(*priorities(sandbox), priority),
    )


def without(sandbox: Sandbox, endpoints: Collection[str]) -> Sandbox:
    """A sandbox without some of its interfaces; itself if it has none of them."""
    rows = zip(sandbox.endpoints, sandbox.ifnames, priorities(sandbox), strict=True)
    kept = [row for row in rows if row[0] not in endpoints]
    if len(kept) == len(sandbox.endpoints):
        return sandbox
    return msgspec.structs.replace(
        sandbox,
        endpoints=tuple(endpoint for endpoint, _, _ in kept),
        ifnames=tuple(ifname for _, ifname, _ in kept),
        priorities=tuple(priority for _, _, priority in kept),
        lent={id: ways for id, ways in sandbox.lent.items() if id not in endpoints},
    )


def reached(network: Network, endpoint: Endpoint) -> tuple[str, ...]:
    """The gateways of the subnets that an endpoint has addresses in, one a family: of those of
    other subnets it could not ask who they are."""
    found: dict[bool, str] = {}
    has = {len(address) == 16 for address in endpoint.addresses}
    families = [":" in subnet for subnet in network.subnets]
    for gateway, subnet, family in zip(network.gateways, network.subnets, families, strict=True):
        if family not in has or family in found:
            continue
        # As a rule there is one subnet of a family, and nothing to look at.
        if families.count(family) == 1 or any(holds([subnet], a) for a in endpoint.addresses):
            found[family] = gateway
    return tuple(found.values())


def led_by(sandbox: Sandbox, endpoint: str, gateways: Sequence[str]) -> tuple[str, ...]:
    """Those of an endpoint's gateways by which the sandbox's default routes go."""
    return tuple(
        gateway
        for gateway in gateways
        if endpoint == (sandbox.default6 if ":" in gateway else sandbox.default)
    )


def renewed(sandbox: Sandbox) -> Sandbox:
    """A sandbox as it was stored; by an agent that did not tell the families apart, too."""
    if sandbox.priorities or not sandbox.default:
        return sandbox
    return msgspec.structs.replace(
        sandbox, default6=sandbox.default, priorities=priorities(sandbox)
    )
