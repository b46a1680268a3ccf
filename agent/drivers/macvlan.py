"""The macvlan driver: interfaces with MACs of their own on a device of the host, the parent.

Nothing of ours is in between: workloads are on the parent's wire like any other machine there,
in mode bridge with each other without it, in mode vepa by way of its switch, in mode private not
at all on one host; in mode passthru one workload has the parent whole. By the kernel's doing
the host itself reaches none of them through the parent: for that it can have an interface of its
own beside theirs.
Source: Linux drivers/net/macvlan.c.
What stands opposite: datapath/lans.py makes it so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent.drivers import overlay
from agent.drivers.base import HostSide, Lan, Port
from agent.lanmodel import MACVLAN, is_host_side, parse_lan
from agent.model import Endpoint, Network, Sandbox
from agent.notation import format_address


def lan(network: Network, endpoints: Iterable[Endpoint], sandboxes: Mapping[str, Sandbox]) -> Lan:
    """A network on this node, with a port for each of `endpoints` that is in a sandbox.

    `endpoints` are those of this node; that of the host's own interface may be among them.
    """
    options = parse_lan(network.driver, network.options)
    ports: dict[str, Port] = {}
    host_side = None
    for endpoint in endpoints:
        sandbox = sandboxes.get(endpoint.sandbox)
        if is_host_side(endpoint) and options.has_host_interface:
            host_side = HostSide(
                endpoint.id,
                f"vxh{endpoint.id[:12]}",
                endpoint.mac,
                tuple(map(format_address, endpoint.addresses)),
            )
        elif sandbox and endpoint.id in sandbox.endpoints:
            ports[endpoint.id] = overlay.port(network, endpoint, sandbox, kind=MACVLAN)
    return Lan(
        network=network.id,
        name=network.name,
        vni=network.vni,
        kind=MACVLAN,
        mode=options.mode,
        parent=options.parent,
        trunk=options.trunk,
        vlan=options.vlan,
        mtu=network.mtu,
        ports=ports,
        host_side=host_side,
    )
