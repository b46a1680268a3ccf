"""What callers ask for, parsed and checked once: past here every field is sound by itself.

Whether it fits what exists (names, MACs and addresses taken, subnets that overlap) is
node.py's to say. What stands opposite: proto/control.proto, and the lines of an announce file.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from agent import model, notation
from agent.core.bounds import ADDRESSES_MAX, SUBNETS_MAX, are_labels, are_stations
from agent.errors import Invalid
from agent.floodmodel import parse_flood
from agent.lanmodel import LAN_DRIVERS, parse_lan

DRIVERS = (model.OVERLAY, model.BRIDGE, *LAN_DRIVERS)
MTU_MIN_V4 = 68  # RFC 791
MTU_MIN_V6 = 1280  # RFC 8200, section 5
MTU_MAX = 65535 - model.VXLAN_OVERHEAD_V6
IPAM_OURS = "default"  # as Docker calls the driver that is its own
PRIORITY_MAX = 32767  # of an interface, for its sandbox's default routes
_PLUGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_IFNAME = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """A network to create."""

    name: str
    driver: str = model.OVERLAY
    subnets: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    ip_ranges: tuple[str, ...] = ()
    internal: bool = False
    mtu: int = 0
    vni: int = 0
    ipv6: bool = False
    options: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    encrypted: bool = False
    ipv4: bool = True  # without subnets: choose one of IPv4
    # Who gives out the addresses, if not we; without pools yet where it has not been asked.
    ipam: model.Ipam | None = None


class EndpointSpec(msgspec.Struct, frozen=True, gc=False):
    """An endpoint to create. No MAC or address: one is chosen."""

    name: str
    addresses: tuple[bytes, ...] = ()
    mac: bytes = b""
    aliases: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    priority: int = 0  # for its sandbox's default routes; the highest has them
    held: bool = False  # its addresses are held for it (NodeState.hold_address)


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    mac: str
    addresses: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    labels: dict[str, str] = {}


_lines = msgspec.json.Decoder(_Line)


def parse_network(
    name: str,
    *,
    driver: str = "",
    subnets: Sequence[str] = (),
    gateways: Sequence[str] = (),
    ip_ranges: Sequence[str] = (),
    internal: bool = False,
    mtu: int = 0,
    vni: int = 0,
    encrypted: bool = False,
    ipv6: bool = False,
    ipv6_only: bool = False,
    options: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    ipam_driver: str = "",
    ipam_options: dict[str, str] | None = None,
) -> NetworkSpec:
    """Check each field of a network; Invalid or Unsupported names the first that is wrong."""
    name = notation.parse_name(name, "network")
    driver = driver or model.OVERLAY
    if name in model.PREDEFINED:
        raise Invalid(
            f"network {name}", "is there by itself on each node", "Use it, or choose another name"
        )
    if driver in model.PREDEFINED:
        raise Invalid(
            f"driver {driver}",
            "has one network, which is there by itself",
            f"Use it: vxmesh run --network {driver}",
        )
    if driver.startswith(model.REMOTE):
        _parse_plugin(driver, "driver")
    elif driver not in DRIVERS:
        raise Invalid(
            f"driver {notation.shorten(driver)}", "is unknown", f"Use one of {', '.join(DRIVERS)}"
        )
    if len(subnets) > SUBNETS_MAX:
        raise Invalid(
            f"network {name}", f"has {len(subnets)} subnets", f"Give at most {SUBNETS_MAX}"
        )
    parsed = [notation.parse_subnet(s) for s in subnets]
    for i, subnet in enumerate(parsed):
        clash = notation.find_overlap(subnet, [(str(s), str(s)) for s in parsed[:i]])
        if clash:
            raise Invalid(f"subnet {subnet}", f"overlaps {clash[0]}", "Give separate subnets")
    for gateway in gateways:
        address = ipaddress.ip_address(notation.parse_address(gateway))
        home = next((s for s in parsed if address in s), None)
        if home is None:
            raise Invalid(
                f"gateway {gateway}", "is in none of the subnets", "Give its --subnet as well"
            )
        if address == home.network_address or (
            home.version == 4 and address == home.broadcast_address
        ):
            raise Invalid(f"gateway {gateway}", f"is no host's address in {home}", "Use another")
    ranges = [_parse_range(text, parsed) for text in ip_ranges if text]
    for i, part in enumerate(ranges):
        if clash := notation.find_overlap(part, [(str(r), str(r)) for r in ranges[:i]]):
            raise Invalid(f"IP range {part}", f"overlaps {clash[0]}", "Give separate ones")
    if driver != model.OVERLAY and (encrypted or vni):
        raise Invalid(
            f"network {name}",
            f"of driver {driver} has no VXLAN: it has no {'encryption' if encrypted else 'VNI'}",
            f"Leave --{'encrypted' if encrypted else 'vni'} out, or use the overlay driver",
        )
    if driver in LAN_DRIVERS:
        parse_lan(driver, options or {})
    if not driver.startswith(model.REMOTE):  # whose options are the plugin's
        parse_flood(driver, options or {})
    spoof = (options or {}).get(model.SPOOF, "deny")
    if spoof not in ("allow", "deny"):
        raise Invalid(f"option spoof={notation.shorten(spoof)}", "is unknown", "Use allow or deny")
    for key, value in (options or {}).items():
        if key.startswith(model.AUX) and not notation.holds(
            [str(s) for s in parsed], notation.parse_address(value)
        ):
            raise Invalid(
                f"option {notation.shorten(key)}={value}",
                "is in none of the subnets",
                "Give the --subnet that it is to be kept free in",
            )
    if ipv6_only and (subnets or ipv6):
        raise Invalid(
            "--ipv6-only",
            "chooses the subnet, and none of IPv4"
            if subnets
            else "leaves no IPv4 beside which IPv6 could be",
            "Give the --subnet of IPv6 alone" if subnets else "Give one of --ipv6 and --ipv6-only",
        )
    ipv6 = ipv6 or ipv6_only
    lowest = MTU_MIN_V6 if ipv6 or any(s.version == 6 for s in parsed) else MTU_MIN_V4
    if mtu and not lowest <= mtu <= MTU_MAX:
        raise Invalid(f"MTU {mtu}", "is out of range", f"Use {lowest} to {MTU_MAX}")
    if vni and not 1 <= vni <= model.VNI_MAX:
        raise Invalid(f"VNI {vni}", "is out of range", f"Use 1 to {model.VNI_MAX}")
    return NetworkSpec(
        name,
        driver,
        tuple(str(s) for s in parsed),
        tuple(gateways),
        tuple(map(str, ranges)),
        internal,
        mtu,
        vni,
        ipv6,
        notation.parse_labels(options or {}, "option"),
        notation.parse_labels(labels or {}),
        encrypted,
        ipv4=not ipv6_only,
        ipam=_parse_ipam(ipam_driver, ipam_options or {}),
    )


def _parse_range(text: str, subnets: Sequence[notation.IPNetwork]) -> notation.IPNetwork:
    """A part of one of `subnets`; Invalid if it is none."""
    part = notation.parse_subnet(text) if "/" in text else None
    if part is None or not any(
        part.version == s.version and part.subnet_of(s)  # type: ignore[arg-type]
        for s in subnets
    ):
        raise Invalid(
            f"IP range {notation.shorten(text)}",
            "lies in none of the subnets",
            "Write it as 10.1.0.64/26, with the --subnet that it is a part of",
        )
    return part


def _parse_ipam(driver: str, options: dict[str, str]) -> model.Ipam | None:
    if driver in ("", IPAM_OURS):
        if options:
            raise Invalid(
                "--ipam-opt", "is for a plugin, and none is given", "Give --ipam-driver as well"
            )
        return None
    _parse_plugin(driver, "IPAM driver")
    found = notation.parse_labels(options, "IPAM option")
    return model.Ipam(driver.removeprefix(model.REMOTE), (), "", found)


def _parse_plugin(driver: str, what: str) -> None:
    """Invalid unless it is remote: and what can be a plugin's name."""
    name = driver.removeprefix(model.REMOTE)
    if name == driver or not _PLUGIN.match(name):
        raise Invalid(
            f"{what} {notation.shorten(driver)}",
            "names no plugin",
            "Write it as remote:NAME, where NAME.sock or NAME.spec is in /run/docker/plugins",
        )


def parse_endpoint(
    name: str,
    *,
    addresses: Sequence[str] = (),
    mac: str = "",
    aliases: Sequence[str] = (),
    labels: dict[str, str] | None = None,
    priority: int = 0,
) -> EndpointSpec:
    """Check each field of an endpoint; Invalid names the first that is wrong."""
    if abs(priority) > PRIORITY_MAX:
        raise Invalid(
            f"priority {priority}", "is out of range", f"Use -{PRIORITY_MAX} to {PRIORITY_MAX}"
        )
    if len(aliases) > model.ALIASES_MAX:
        raise Invalid(
            f"endpoint {notation.shorten(name)}",
            f"has {len(aliases)} aliases",
            f"Give at most {model.ALIASES_MAX}",
        )
    if len(addresses) > ADDRESSES_MAX:
        raise Invalid(
            f"endpoint {notation.shorten(name)}",
            f"has {len(addresses)} addresses",
            f"Give at most {ADDRESSES_MAX}",
        )
    return EndpointSpec(
        notation.parse_name(name, "endpoint"),
        tuple(dict.fromkeys(notation.parse_address(a) for a in addresses)),
        notation.parse_mac(mac) if mac else b"",
        tuple(dict.fromkeys(notation.parse_alias(a) for a in aliases)),
        notation.parse_labels(labels) if labels else {},
        priority,
    )


def parse_lines(lines: Sequence[bytes], first: int) -> list[EndpointSpec]:
    """Endpoints out of JSON lines; `first` is the number of the first line, for messages.

    Invalid names the line. Blank lines are passed over.
    """
    try:
        return _plain(_lines.decode_lines(b"\n".join(lines)))
    except (msgspec.MsgspecError, ValueError, OSError, Invalid):
        pass  # a blank line, or one that is wrong: which one, and how, is found one by one
    specs = []
    for number, text in enumerate(lines, first):
        if not text.strip():
            continue
        try:
            line = _lines.decode(text)
            specs.append(
                parse_endpoint(
                    line.name,
                    addresses=line.addresses,
                    mac=line.mac,
                    aliases=line.aliases,
                    labels=line.labels,
                )
            )
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Invalid(
                f"line {number}",
                f"is no endpoint ({error})",
                'Write {"name": …, "mac": …, "addresses": […]}',
            ) from None
        except Invalid as error:
            raise Invalid(f"line {number}, {error.what}", error.why, error.fix) from None
        if not line.addresses or not line.mac:
            raise Invalid(
                f"line {number}", "lacks a MAC or an address", "Announce what the interface has"
            )
    return specs


def _plain(lines: Sequence[_Line]) -> list[EndpointSpec]:
    """The endpoints of lines in the plain form, looked at together; ValueError, OSError or Invalid
    if one needs a closer look.

    One by one, each check would cost a second's hundredth of 100,000 lines.
    """
    names, macs = [line.name for line in lines], "".join([line.mac for line in lines])
    counts = [len(line.addresses) for line in lines]
    colons = ":" * len(lines)
    if (
        not lines
        or any(line.aliases or line.labels for line in lines)
        or not 0 < min(counts) <= max(counts) <= ADDRESSES_MAX
        or not are_labels(names)
        or {len(line.mac) for line in lines} != {17}
        or any(macs[place::17] != colons for place in range(2, 17, 3))
    ):
        raise ValueError
    digits = bytes.fromhex(macs.replace(":", ""))
    packed = [digits[at : at + 6] for at in range(0, 6 * len(lines), 6)]
    if len(digits) != 6 * len(lines) or not are_stations(packed):
        raise ValueError
    if max(counts) == 1:
        pton, four, six = socket.inet_pton, socket.AF_INET, socket.AF_INET6
        texts = [line.addresses[0] for line in lines]
        found: list[tuple[bytes, ...]] = [
            (pton(six if ":" in text else four, text),) for text in texts
        ]
    else:
        found = [tuple(dict.fromkeys(map(notation.parse_address, x.addresses))) for x in lines]
    return [
        EndpointSpec(name, addresses, mac)
        for name, addresses, mac in zip(map(str.lower, names), found, packed, strict=True)
    ]


def parse_ifname(name: str) -> str:
    """An interface name as the kernel takes it (dev_valid_name); Invalid otherwise."""
    if not _IFNAME.match(name) or name in (".", ".."):
        raise Invalid(
            f"interface name {notation.shorten(name)}",
            "is malformed",
            "Use 1 to 15 letters, digits, dots, hyphens and underscores",
        )
    return name


def parse_publish(
    host_port: int, target_port: int, protocol: str = "tcp", host_address: str = ""
) -> model.Publish:
    """A published port; Invalid if a port or the protocol is out of range."""
    for port in (host_port, target_port):
        if not 1 <= port <= 65535:
            raise Invalid(f"port {port}", "is out of range", "Use 1 to 65535")
    if protocol not in ("tcp", "udp"):
        raise Invalid(f"protocol {notation.shorten(protocol)}", "is unknown", "Use tcp or udp")
    if host_address:
        notation.parse_address(host_address)
    return model.Publish(host_port, target_port, protocol, host_address)
