"""The bodies of the plugin's calls, and how they are read: JSON with the protocol's names.

Source: libnetwork docs/remote.md and docs/ipam.md, drivers/remote/api, ipams/remote/api.
What stands opposite: driver.py and ipam.py, which do what they ask.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from agent.errors import Invalid

GENERIC = "com.docker.network.generic"  # libnetwork netlabel: what -o gave
INTERNAL = "com.docker.network.internal"
IPV6 = "com.docker.network.enable_ipv6"
PORTS = "com.docker.network.portmap"
MTU = "com.docker.network.driver.mtu"
GATEWAY = "com.docker.network.gateway"
ADDRESS_TYPE = "RequestAddressType"
NETWORK = "vxmesh.network"  # -o, --ipam-opt: the network of ours that is meant
# -o: it stands for one that was made on another host, and goes from all hosts if it is removed.
FOLLOWS = "vxmesh.follows"
ID = "docker.id"  # label of our networks: the id of the engine's that each was made for
# Labels of containers.
SERVICE, SERVICE_PORT, SERVICE_PUBLISH = "vxmesh.service", "vxmesh.port", "vxmesh.publish"

T = TypeVar("T")


class Pool(msgspec.Struct, rename="pascal"):
    """One subnet of a network, as an IPAM driver chose it."""

    pool: str = ""
    gateway: str = ""
    address_space: str = ""
    aux: dict[str, str] | None = msgspec.field(default=None, name="AuxAddresses")  # CIDR by name


class CreateNetwork(msgspec.Struct, rename={"id": "NetworkID", "options": "Options",
                                            "ipv4": "IPv4Data", "ipv6": "IPv6Data"}):  # fmt: skip
    """A network of the engine's."""

    id: str
    options: dict[str, Any] | None = None
    ipv4: list[Pool] | None = None
    ipv6: list[Pool] | None = None


class OfNetwork(msgspec.Struct, rename={"id": "NetworkID"}):
    """A call about one network."""

    id: str


class Interface(msgspec.Struct, rename={"address": "Address", "address6": "AddressIPv6",
                                        "mac": "MacAddress"}):  # fmt: skip
    """What an endpoint's interface is to have; empty: ours to choose."""

    address: str = ""
    address6: str = ""
    mac: str = ""


class OfEndpoint(msgspec.Struct, rename={"network": "NetworkID", "id": "EndpointID",
                                         "interface": "Interface", "options": "Options",
                                         "sandbox": "SandboxKey"}):  # fmt: skip
    """A call about one endpoint; `sandbox` is the path of its container's network namespace."""

    network: str
    id: str
    interface: Interface | None = None
    options: dict[str, Any] | None = None
    sandbox: str = ""


class RequestPool(msgspec.Struct, rename={"space": "AddressSpace", "pool": "Pool",
                                          "part": "SubPool", "options": "Options",
                                          "ipv6": "V6"}):  # fmt: skip
    """A subnet for a network; empty: ours to choose. `part` is what addresses are chosen from."""

    space: str = ""
    pool: str = ""
    part: str = ""
    options: dict[str, str] | None = None
    ipv6: bool = False


class OfPool(msgspec.Struct, rename={"id": "PoolID"}):
    """A call about one subnet."""

    id: str


class OfAddress(msgspec.Struct, rename={"pool": "PoolID", "address": "Address",
                                        "options": "Options"}):  # fmt: skip
    """A call about one address of a subnet; empty: ours to choose."""

    pool: str
    address: str = ""
    options: dict[str, str] | None = None


def read(body: bytes, kind: type[T]) -> T:
    """Invalid if it is no such body."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise Invalid("the request", f"is malformed ({error})") from None
