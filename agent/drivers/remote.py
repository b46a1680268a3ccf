"""The remote driver: what a plugin is asked, and what its answers must be. PURE.

An answer is somebody else's: wrong types, addresses that were changed and overlong values are
Invalid, which says what the plugin did wrong; what is missing is as if it were empty and what is
too much is passed over, as Docker does both.
Source: libnetwork's docs/remote.md.
What stands opposite: agent/remote/, which asks.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from agent.errors import Invalid
from agent.model import AUX, Endpoint, Network, Publish, Sandbox
from agent.notation import format_address, format_mac, parse_address, parse_mac, shorten

T = TypeVar("T")
ROUTES_MAX = 256  # static routes of one endpoint
PREFIX_MAX = 11  # of an interface's name, so that its number has room in the kernel's 15
KEYS = "/var/run/docker/netns"  # libnetwork, osl/namespace_linux.go: where sandboxes are found
GENERIC = "com.docker.network.generic"
_PROTOCOLS = {"tcp": 6, "udp": 17}  # IANA's numbers


class Answer(msgspec.Struct, rename="lower"):
    """A part of what a plugin answers; see `decode`."""


class _Capabilities(Answer):
    Scope: str | None = None


class _Interface(Answer):
    Address: str | None = None
    AddressIPv6: str | None = None
    MacAddress: str | None = None


class _Created(Answer):
    Interface: _Interface | None = None


class _Name(Answer):
    SrcName: str | None = None
    DstPrefix: str | None = None


class _Route(Answer):
    Destination: str | None = None
    RouteType: int | None = None  # 0: by NextHop, 1: on the link
    NextHop: str | None = None


class _Join(Answer):
    InterfaceName: _Name | None = None
    Gateway: str | None = None
    GatewayIPv6: str | None = None
    StaticRoutes: list[_Route] | None = None
    DisableGatewayService: bool | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """What a plugin says of the interface that it has made for an endpoint."""

    source: str  # the interface's name in the host's namespace; empty: there is none to move
    prefix: str  # of its name in the sandbox
    gateways: tuple[str, ...]
    routes: tuple[tuple[str, str], ...]  # CIDR, next hop; "" as next hop: on the link


# -- requests --


def wire_id(id: str) -> str:
    """An id of ours in the length of Docker's, 64 hexadecimal digits: plugins cut pieces off."""
    return (id * 4)[:64]


def sandbox_key(sandbox: Sandbox) -> str:
    """The path of a sandbox's namespace in the form of Docker's, which some plugins insist on."""
    return f"{KEYS}/{sandbox.id[:12]}"


def network_request(network: Network) -> dict[str, Any]:
    """The body of CreateNetwork."""
    options: dict[str, Any] = {
        "com.docker.network.enable_ipv6": any(":" in s for s in network.subnets),
        GENERIC: dict(network.options),
    }
    if network.internal:
        options["com.docker.network.internal"] = True
    data: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for subnet, gateway in zip(network.subnets, network.gateways, strict=True):
        length = subnet.partition("/")[2]
        inside = ipaddress.ip_network(subnet)
        data[":" in subnet].append(
            {
                "AddressSpace": network.ipam.space if network.ipam else "vxmesh",
                "Pool": subnet,
                "Gateway": f"{gateway}/{length}",
                "AuxAddresses": {
                    key.removeprefix(AUX): f"{value}/{length}"
                    for key, value in network.options.items()
                    if key.startswith(AUX) and ipaddress.ip_address(value) in inside
                },
            }
        )
    return {
        "NetworkID": wire_id(network.id),
        "Options": options,
        "IPv4Data": data[False],
        "IPv6Data": data[True],
    }


def ids(network: str, endpoint: str = "") -> dict[str, Any]:
    """The body of calls that only name a network, or an endpoint in one."""
    body = {"NetworkID": wire_id(network)}
    if endpoint:
        body["EndpointID"] = wire_id(endpoint)
    return body


def endpoint_request(network: Network, endpoint: Endpoint, mac: bytes) -> dict[str, Any]:
    """The body of CreateEndpoint. `mac` is the one that was asked for: empty leaves the choice
    to the plugin, which as in Docker must not answer with another than it was given."""
    interface = {"Address": "", "AddressIPv6": "", "MacAddress": format_mac(mac) if mac else ""}
    for address in endpoint.addresses:
        key = "Address" if len(address) == 4 else "AddressIPv6"
        interface[key] = with_prefix(network, address)
    options: dict[str, Any] = {
        "com.docker.network.endpoint.exposedports": [],
        "com.docker.network.portmap": [],
    }
    return {**ids(network.id, endpoint.id), "Interface": interface, "Options": options}


def connectivity_options(publishes: Sequence[Publish]) -> dict[str, Any]:
    """The options of ProgramExternalConnectivity: the ports to publish."""
    exposed = [{"Proto": _PROTOCOLS[p.protocol], "Port": p.target_port} for p in publishes]
    mapped = [
        {
            "Proto": _PROTOCOLS[p.protocol],
            "IP": "",
            "Port": p.target_port,
            "HostIP": p.host_address,
            "HostPort": p.host_port,
            "HostPortEnd": p.host_port,
        }
        for p in publishes
    ]
    return {
        "com.docker.network.endpoint.exposedports": exposed,
        "com.docker.network.portmap": mapped,
    }


def with_prefix(network: Network, address: bytes) -> str:
    """An address with the prefix length of the subnet of the network that it is in."""
    parsed = ipaddress.ip_address(address)
    for text in network.subnets:
        subnet = ipaddress.ip_network(text)
        if parsed in subnet:
            return f"{parsed}/{subnet.prefixlen}"
    return f"{parsed}/{parsed.max_prefixlen}"


def free_name(sandbox: Sandbox, prefix: str) -> str:
    """`prefix` and the lowest number that no interface of the sandbox has."""
    number = 0
    while f"{prefix}{number}" in sandbox.ifnames:
        number += 1
    return f"{prefix}{number}"


# -- answers --


def parse_scope(answer: bytes, plugin: str) -> str:
    """local or global; Invalid if it is neither."""
    scope = (decode_of(answer, _Capabilities, plugin, "GetCapabilities").Scope or "").lower()
    if scope not in ("local", "global"):
        raise wrong(plugin, f"has scope {shorten(scope)}, which is neither local nor global")
    return scope


def parse_created(answer: bytes, plugin: str, network: Network, asked: Mapping[str, Any]) -> bytes:
    """The MAC that CreateEndpoint answered, empty if none.

    `asked` is the Interface of the request. Invalid if the plugin changes what it was given.
    """
    interface = decode_of(answer, _Created, plugin, "CreateEndpoint").Interface or _Interface()
    for key in ("Address", "AddressIPv6", "MacAddress"):
        value = getattr(interface, key) or ""
        if not value or value.lower() == str(asked[key]).lower():
            continue
        if asked[key]:
            raise wrong(plugin, f"answered {key} {shorten(value)}, but was given {asked[key]}")
        if key != "MacAddress":
            raise wrong(plugin, f"answered {key} {shorten(value)}, of which there is no subnet")
    if not interface.MacAddress:
        return b""
    try:
        return parse_mac(interface.MacAddress)
    except Invalid as error:
        raise wrong(plugin, f"answered {error.what}, which {error.why}") from None


def parse_join(answer: bytes, plugin: str) -> Joined:
    """What Join answered; Invalid if it cannot be meant."""
    join = decode_of(answer, _Join, plugin, "Join")
    name = join.InterfaceName or _Name()
    source, prefix = name.SrcName or "", name.DstPrefix or "eth"
    if len(source) > 15 or "/" in source or not source.isprintable():
        raise wrong(plugin, f"named an interface {shorten(source)}, which none can be called")
    if not (prefix.isascii() and prefix.isalnum()) or len(prefix) > PREFIX_MAX:
        raise wrong(plugin, f"wants interfaces called {shorten(prefix)}, which none can be")
    gateways = []
    for text, is_ipv6 in ((join.Gateway, False), (join.GatewayIPv6, True)):
        if not text:
            continue
        address = parse_host(plugin, text)
        if (len(address) == 16) != is_ipv6:
            raise wrong(plugin, f"answered a gateway of the wrong family, {shorten(text)}")
        gateways.append(format_address(address))
    found = join.StaticRoutes or []
    if len(found) > ROUTES_MAX:
        raise wrong(plugin, f"answered {len(found)} static routes, of which {ROUTES_MAX} may be")
    routes = []
    for route in found:
        try:
            destination = ipaddress.ip_network(route.Destination or "", strict=False)
        except ValueError:
            text = shorten(route.Destination or "")
            raise wrong(plugin, f"answered a route to {text}, which is no subnet") from None
        hop = ""
        if (route.RouteType or 0) == 0:
            hop = format_address(parse_host(plugin, route.NextHop or ""))
            if (":" in hop) != (destination.version == 6):
                raise wrong(plugin, f"answered a route to {destination} by {hop}")
        routes.append((str(destination), hop))
    return Joined(source, prefix, tuple(gateways), tuple(routes))


def parse_host(plugin: str, text: str) -> bytes:
    """An address, with or without a prefix length."""
    try:
        return parse_address(text.partition("/")[0])
    except Invalid as error:
        raise wrong(plugin, f"answered {error.what}, which {error.why}") from None


def decode(answer: bytes, kind: type[T]) -> T:
    """An Answer out of JSON, whose keys may be written in any case: so does Docker read them
    (encoding/json of Go). MsgspecError or UnicodeDecodeError if it is none."""
    try:
        return msgspec.convert(_fold(msgspec.json.decode(answer or b"{}")), kind)
    except RecursionError:
        raise msgspec.ValidationError("it is nested too deeply") from None


def _fold(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.lower(): _fold(item) for key, item in value.items()}
    return list(map(_fold, value)) if isinstance(value, list) else value


def decode_of(answer: bytes, kind: type[T], plugin: str, method: str) -> T:
    try:
        return decode(answer, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise wrong(plugin, f"answered {method} with what it cannot be: {error}") from None


def wrong(plugin: str, why: str) -> Invalid:
    return Invalid(f"plugin {plugin}", why, "Tell its maker; what was begun is undone")
