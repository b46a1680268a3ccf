"""The ipvlan driver: interfaces on a device of the host that all have its MAC.

They are told apart by their addresses alone, which is for wires that let one MAC a port through.
In mode l2 they take part in the wire's ARP; in mode l3 the host routes for them: whatever they
send goes out by the parent's routes, they see no broadcast, and the wire has to be told of the
way to them.
Source: Linux Documentation/networking/ipvlan.rst.
What stands opposite: datapath/lans.py makes it so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from agent.drivers import macvlan
from agent.drivers.base import Lan, Port
from agent.lanmodel import IPVLAN, L3
from agent.model import Endpoint, Network, Sandbox

UNSPECIFIED = {False: "0.0.0.0", True: "::"}  # as a gateway: everything is on the link


def lan(network: Network, endpoints: Iterable[Endpoint], sandboxes: Mapping[str, Sandbox]) -> Lan:
    """A network on this node, as that of the macvlan driver; the MACs are the parent's."""
    made = macvlan.lan(network, endpoints, sandboxes)
    ports = {id: _port(port, made.mode) for id, port in made.ports.items()}
    host_side = made.host_side and dataclasses.replace(made.host_side, mac=b"")
    return dataclasses.replace(made, kind=IPVLAN, ports=ports, host_side=host_side)


def _port(port: Port, mode: str) -> Port:
    gateways = port.gateways
    if mode == L3:
        gateways = tuple(dict.fromkeys(UNSPECIFIED[":" in gateway] for gateway in gateways))
    return dataclasses.replace(port, kind=IPVLAN, mac=b"", gateways=gateways)
