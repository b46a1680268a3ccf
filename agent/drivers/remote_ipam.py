"""The remote driver's other half: what an IPAM plugin is asked, and what its answers must be. PURE.

As in remote.py an answer is somebody else's: what is missing is as if it were empty, what is too
much is passed over, and what cannot be meant is Invalid, which says what the plugin did wrong.
Source: libnetwork's docs/ipam.md, ipams/remote/api.
What stands opposite: agent/remote/ipam.py, which asks.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agent.core.bounds import POOL_MAX
from agent.drivers.remote import Answer, decode_of, parse_host, wrong
from agent.errors import Invalid
from agent.model import AUX, BRIDGE, Ipam, Network
from agent.notation import format_address, format_mac, parse_address, parse_subnet, shorten

GATEWAY = "com.docker.network.gateway"  # libnetwork netlabel.Gateway
ADDRESS_TYPE = "RequestAddressType"  # ipamapi.RequestAddressType
MAC = "com.docker.network.endpoint.macaddress"  # netlabel.MacAddress


class _Capabilities(Answer):
    RequiresMACAddress: bool | None = None
    RequiresRequestReplay: bool | None = None


class _Spaces(Answer):
    LocalDefaultAddressSpace: str | None = None
    GlobalDefaultAddressSpace: str | None = None


class _PoolId(Answer):
    PoolID: str | None = None


class _Pool(Answer):
    Pool: str | None = None
    Data: dict[str, Any] | None = None


class _Address(Answer):
    Address: str | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a plugin wants: a MAC with each request for an address; to be told anew, when it may
    have forgotten, what it gave out."""

    needs_mac: bool = False
    needs_replay: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """A subnet that a plugin gave."""

    id: str
    subnet: str  # CIDR
    gateway: str  # address; empty: the plugin said nothing of it


# -- requests --


def pool_request(
    space: str, subnet: str, part: str, options: dict[str, str], ipv6: bool
) -> dict[str, Any]:
    """The body of RequestPool: for `subnet`, of which `part` is to be used, or any."""
    return {
        "AddressSpace": space,
        "Pool": subnet,
        "SubPool": part,
        "Options": options,
        "V6": ipv6,
    }


def address_request(pool: str, address: str = "", mac: bytes = b"") -> dict[str, Any]:
    """The body of RequestAddress: for `address`, or any."""
    options = {MAC: format_mac(mac)} if mac else {}
    return {"PoolID": pool, "Address": address, "Options": options}


def gateway_request(pool: str, address: str) -> dict[str, Any]:
    """The same for a gateway."""
    return {"PoolID": pool, "Address": address, "Options": {ADDRESS_TYPE: GATEWAY}}


def is_local(network_driver: str, scope: str) -> bool:
    """Whether a network's addresses are one node's own. `scope` is a network plugin's."""
    return network_driver == BRIDGE or scope == "local"


def asked_again(network: Network, ipam: Ipam) -> list[dict[str, Any]]:
    """The bodies of RequestPool that ask for just the pools that a network has."""
    return [
        pool_request(
            ipam.space, subnet, part_of(subnet, network.ranges), ipam.options, ":" in subnet
        )
        for subnet in network.subnets
    ]


def part_of(subnet: str, ranges: Iterable[str]) -> str:
    """The first IP range that is a part of `subnet`, and not all of it; else nothing."""
    if not subnet:
        return ""
    outer = ipaddress.ip_network(subnet)
    for text in ranges:
        inner = ipaddress.ip_network(text)
        fits = inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]
        if fits and inner != outer:
            return text
    return ""


def pools_for(network: Network, ipam: Ipam, address: bytes) -> list[tuple[str, str]]:
    """Pool and subnet in which `address` lies: one, or none."""
    parsed = ipaddress.ip_address(address)
    pairs = zip(ipam.pools, network.subnets, strict=True)
    return [(pool, subnet) for pool, subnet in pairs if parsed in ipaddress.ip_network(subnet)]


def pools_of(network: Network, ipam: Ipam, width: int) -> list[tuple[str, str]]:
    """Pools and subnets of addresses of 4 or 16 bytes, in the order in which they are used."""
    pairs = zip(ipam.pools, network.subnets, strict=True)
    return [(pool, subnet) for pool, subnet in pairs if (":" in subnet) == (width == 16)]


def is_in(subnet: str, address: str) -> bool:
    """Whether an address is in a subnet."""
    return ipaddress.ip_address(address) in ipaddress.ip_network(subnet)


def first_host(subnet: str) -> str:
    """The first address of a subnet that a host can have."""
    return str(ipaddress.ip_network(subnet).network_address + 1)


def aux_names(options: dict[str, str]) -> dict[str, str]:
    """The addresses that are to be kept free, by their names."""
    return {key.removeprefix(AUX): value for key, value in options.items() if key.startswith(AUX)}


# -- answers --


def parse_capabilities(answer: bytes, plugin: str) -> Capabilities:
    """What is missing it does not want."""
    found = decode_of(answer, _Capabilities, plugin, "GetCapabilities")
    return Capabilities(bool(found.RequiresMACAddress), bool(found.RequiresRequestReplay))


def parse_space(answer: bytes, plugin: str, local: bool) -> str:
    """The address space for networks of one node, or for those of all."""
    found = decode_of(answer, _Spaces, plugin, "GetDefaultAddressSpaces")
    space = (found.LocalDefaultAddressSpace if local else found.GlobalDefaultAddressSpace) or ""
    return _bounded(plugin, "an address space", space)


def parse_pool_id(answer: bytes, plugin: str) -> str:
    """What the plugin calls the pool that it gave, to give it back by: whatever else is wrong."""
    id = decode_of(answer, _PoolId, plugin, "RequestPool").PoolID or ""
    if not id:
        raise wrong(plugin, "gave a pool without a PoolID, by which it could be given back")
    return _bounded(plugin, "a PoolID", id)


def parse_pool(answer: bytes, plugin: str, asked: dict[str, Any]) -> Pool:
    """The pool that RequestPool answered; `asked` is the body of the request. Invalid if it is
    not what was asked for."""
    found = decode_of(answer, _Pool, plugin, "RequestPool")
    try:
        subnet = parse_subnet(found.Pool or "")
    except Invalid as error:
        raise wrong(plugin, f"gave {error.what}, which {error.why}") from None
    if (subnet.version == 6) != asked["V6"]:
        raise wrong(plugin, f"gave {subnet}, asked for IPv{6 if asked['V6'] else 4}")
    # Of a pool with a part some give the part, which Docker takes for the network's subnet.
    fitting = {ipaddress.ip_network(text) for text in (asked["Pool"], asked["SubPool"]) if text}
    if fitting and subnet not in fitting:
        raise wrong(plugin, f"gave {subnet}, asked for {asked['Pool']}")
    said = (found.Data or {}).get(GATEWAY) or ""
    if not isinstance(said, str):
        raise wrong(plugin, f"gave {subnet} with a gateway that is no text")
    gateway = parse_host(plugin, said) if said else b""
    return Pool(parse_pool_id(answer, plugin), str(subnet), _host_in(plugin, str(subnet), gateway))


def parse_said(answer: bytes, plugin: str) -> bytes:
    """The address that RequestAddress answered, whatever it is; empty if it gave none."""
    text = decode_of(answer, _Address, plugin, "RequestAddress").Address or ""
    address = parse_host(plugin, text) if text else b""
    return address if any(address) else b""  # 0.0.0.0/0 and ::/0 say that there is none


def parse_given(answer: bytes, plugin: str, subnet: str, asked: str = "") -> bytes:
    """The address that RequestAddress answered, of `subnet`; empty if it gave none. Invalid if it
    is another than was asked for, or outside."""
    address = parse_said(answer, plugin)
    if address and asked and address != parse_address(asked):
        raise wrong(plugin, f"gave {format_address(address)}, asked for {asked}")
    _host_in(plugin, subnet, address)
    return address


def _host_in(plugin: str, subnet: str, address: bytes) -> str:
    if not address or not any(address):
        return ""
    if ipaddress.ip_address(address) not in ipaddress.ip_network(subnet):
        raise wrong(plugin, f"gave {format_address(address)}, which is not in {subnet}")
    return format_address(address)


def _bounded(plugin: str, what: str, text: str) -> str:
    if len(text) > POOL_MAX or not text.isprintable():
        raise wrong(plugin, f"gave {what} {shorten(text)}, which is too long or cannot be shown")
    return text
