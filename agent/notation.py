"""How names, MACs, addresses, subnets and labels are written: text that is parsed, and made. Pure.

Parse and check once, at the edge: past this module a MAC is six bytes, an address four or sixteen,
a name is a DNS label. Subnets stay text (CIDR), and what is asked of them is here too.
What stands opposite: model.py, whose values are made of these.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any

from agent.errors import Invalid

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

LABEL_BYTES_MAX = 255  # one label, key or value; a thing to select by, not a place for files
LABELS_MAX = 64
WIDTHS = frozenset((4, 16))  # bytes of an address
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?:([:-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4}\Z")
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?\Z")


def shorten(text: str, limit: int = 40) -> str:
    """`text` fit for a message: quoted, and cut where it is long."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def parse_name(text: str, what: str) -> str:
    """A DNS label (RFC 1123, section 2.1) in lower case; Invalid if it is none."""
    name = text.lower()
    bare = name.replace("-", "")  # three times as fast as a regular expression
    whole = bare.isascii() and bare.isalnum() and len(name) <= 63
    if not whole or name[0] == "-" or name[-1] == "-":
        raise Invalid(
            f"{what} name {shorten(text)}",
            "is not a DNS label",
            "Use 1 to 63 letters, digits and hyphens, not a hyphen first or last",
        )
    return name


def parse_alias(text: str) -> str:
    """A name that may have underscores inside as well, as those of Compose have; Invalid if
    it is none."""
    try:
        parse_name(text.replace("_", "x"), "alias")
        if text[0] != "_":
            return text.lower()
    except Invalid:
        pass
    raise Invalid(
        f"alias name {shorten(text)}",
        "is no label of a name",
        "Use 1 to 63 letters, digits, hyphens and underscores, beginning with a letter or digit",
    )


def parse_mac(text: str) -> bytes:
    """Six bytes from aa:bb:cc:dd:ee:ff; Invalid if malformed, multicast or zero."""
    if not _MAC.match(text):
        raise Invalid(
            f"MAC {shorten(text)}", "is malformed", "Write six bytes as 02:00:5e:00:53:01"
        )
    mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    if mac[0] & 1 or not any(mac):
        raise Invalid(
            f"MAC {text}", "is no station's address", "Use one whose first byte is even, not all 0"
        )
    return mac


def format_mac(mac: bytes) -> str:
    """aa:bb:cc:dd:ee:ff."""
    return mac.hex(":")


def parse_address(text: str) -> bytes:
    """Four or sixteen bytes; Invalid if `text` is no address."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise Invalid(
            f"address {shorten(text)}", "is malformed", "Write it as 10.1.2.3 or fd00::3"
        ) from None


def format_address(address: bytes) -> str:
    """Text of four or sixteen bytes."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def parse_subnet(text: str) -> IPNetwork:
    """A subnet that a network can have; Invalid if malformed, with host bits, or unusable."""
    try:
        subnet = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Invalid(
            f"subnet {shorten(text)}", "is malformed", "Write it as 10.1.0.0/24 or fd00:1::/64"
        ) from None
    if str(ipaddress.ip_interface(text).ip) != str(subnet.network_address):
        raise Invalid(f"subnet {shorten(text)}", "has host bits set", f"Write it as {subnet}")
    if subnet.num_addresses < 4:
        raise Invalid(
            f"subnet {subnet}",
            "has no room for a gateway and a workload",
            f"Use a prefix of /{subnet.max_prefixlen - 2} or shorter",
        )
    if subnet.is_multicast or subnet.is_loopback or subnet.is_unspecified or subnet.is_link_local:
        raise Invalid(
            f"subnet {subnet}", "is reserved", "Use a private range, such as one in 10.0.0.0/8"
        )
    return subnet


def parse_labels(pairs: dict[str, str], what: str = "label") -> dict[str, str]:
    """Labels or options with bounded keys and values; Invalid if one is malformed or too long."""
    if len(pairs) > LABELS_MAX:
        raise Invalid(f"{what}s", f"{len(pairs)} are too many", f"Give at most {LABELS_MAX}")
    for key, value in pairs.items():
        try:
            sizes = len(key.encode()), len(value.encode())
        except UnicodeEncodeError:
            raise Invalid(f"{what} {shorten(key)}", "is not UTF-8", "Write it in UTF-8") from None
        if max(sizes) > LABEL_BYTES_MAX:
            raise Invalid(
                f"{what} {shorten(key)}",
                f"is too long ({sizes[0]} bytes of key, {sizes[1]} of value)",
                f"Use at most {LABEL_BYTES_MAX} bytes each",
            )
        if not _LABEL_KEY.match(key):
            raise Invalid(
                f"{what} key {shorten(key)}",
                "is malformed",
                "Use letters, digits, dots, hyphens, slashes and underscores",
            )
    return dict(pairs)


def holds(subnets: Iterable[str], address: bytes) -> bool:
    """Whether `address` (4 or 16 bytes) lies in one of `subnets` (CIDR)."""
    parsed = ipaddress.ip_address(address)
    return any(parsed in ipaddress.ip_network(subnet) for subnet in subnets)


def masked(subnet: str) -> tuple[int, int, int]:
    """Of a subnet (CIDR) the width of its addresses in bytes, its mask and its first address: for
    who looks at many addresses, as numbers."""
    net = ipaddress.ip_network(subnet)
    return net.max_prefixlen // 8, int(net.netmask), int(net.network_address)


def find_overlap(subnet: IPNetwork, others: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The first (name, CIDR) of `others` that overlaps `subnet`, if any."""
    for name, cidr in others:
        other: Any = ipaddress.ip_network(cidr, strict=False)
        if other.version == subnet.version and subnet.overlaps(other):
            return name, cidr
    return None
