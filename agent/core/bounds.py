"""How much one record of another node may hold, and which of its values can be.

PURE. `model.check_sound` says what can be worked with at all; here is what a hostile member could
otherwise make every node of the cluster store, compute with or show on an operator's terminal.
The bounds on messages are in cluster/codec.py, those on a whole origin in core/replica.py, and
docs/security.md lists all of them.
What stands opposite: agent/views.py, which asks before a record becomes a part of the views.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Sequence

import msgspec

from agent.errors import Invalid
from agent.model import (
    ALIASES_MAX,
    BARRED_DATA_PORTS,
    Claims,
    Endpoint,
    Network,
    Node,
    Removal,
)
from agent.notation import (
    LABELS_MAX,
    WIDTHS,
    parse_address,
    parse_alias,
    parse_labels,
    parse_name,
    parse_subnet,
    shorten,
)

ID_BYTES_MAX = 64  # ours have 16; longer ones would be paid for in every digest and index
ADDRESSES_MAX = 64  # of one endpoint: each is a row in every kernel and a record in an answer
SUBNETS_MAX = 16  # of one network; each is an address of a bridge, and is compared with all others
ROUTES_MAX = 1024  # that a node says its host has: a new subnet is compared with each of them
TEXT_MAX = 128  # characters of what is only shown: versions, drivers, names of removed nodes
POOL_MAX = 512  # characters of what a plugin calls a subnet, and an address space
LOSSES_MAX = 2  # of a network: its name and its VNI
# Pieces of a network's addresses that one record states: some 60 bytes each with IPv6, so that
# the record stays below the 256 KiB that peers take (cluster/codec.py).
SEGMENTS_MAX = 4000
# s since the epoch: the year 9999. What is later has no date that could be shown.
TIME_MAX = 253_402_300_799.0
UNDERLAY_MTU_MIN = 576  # every host takes datagrams of this size (RFC 791)
UNDERLAY_MTU_MAX = 65536  # of a loopback device
NARROW_MAX = 2000  # narrow paths that one node states; a cluster has fewer nodes
# A node counts it up at each start and refutation. Far below what a peer's codec takes, so that
# there is room above every claim for the node to refute it.
INCARNATION_MAX = 1 << 61
LOSABLE = ("name", "vni")

_NO_MAC = bytes(6)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}\Z")


def check_bounds(value: msgspec.Struct) -> None:
    """Invalid or ValueError unless a record of another node is within the bounds."""
    if isinstance(value, Endpoint):
        check_endpoint(value)
    elif isinstance(value, Network):
        _check_network(value)
    elif isinstance(value, Node):
        _check_node(value)
    elif isinstance(value, Claims):
        if len(value.segments) > SEGMENTS_MAX:
            raise Invalid("record", f"has {len(value.segments)} segments")
        check_ids(value.network, *{segment.owner for segment in value.segments})
    elif isinstance(value, Removal):
        check_ids(value.node, value.by)
        check_texts(value.name, value.by_name)
        check_times(value.when)


def check_endpoint(value: Endpoint) -> None:
    """The same as `check_bounds`, of what there is 100,000 of."""
    if len(value.addresses) > ADDRESSES_MAX or len(value.aliases) > ALIASES_MAX:
        raise Invalid("record", f"has {len(value.addresses)} addresses, {len(value.aliases)} names")
    for id in (value.id, value.network):
        if not (len(id) == 16 and id.isascii() and id.isalnum()) and not _ID.match(id):
            raise Invalid("record", f"has the id {shorten(value.id)} in {shorten(value.network)}")
    if value.mac[0] & 1 or value.mac == _NO_MAC:
        # A row for "all zeros" would take what has no row, one for a group what is for all.
        raise Invalid("record", f"has the MAC {value.mac.hex(':')}, which is no station's")
    check_name(value.name)
    for alias in value.aliases:
        if parse_alias(alias) != alias:
            raise Invalid("record", f"has the alias {shorten(alias)}, which is not in lower case")
    if value.labels:
        parse_labels(value.labels)
    if value.sandbox:
        check_ids(value.sandbox)


def are_plain(values: Sequence[Endpoint], ids: Sequence[str]) -> bool:
    """Whether all of a bulk, of one network, are sound and within the bounds: what
    `model.check_endpoint` and `check_endpoint` say of each, by looking at them together.

    `ids` are those of their keys. False says only that each has to be looked at by itself.
    """
    names = [value.name for value in values]
    macs = [value.mac for value in values]
    text = "".join(names)
    return (
        [value.id for value in values] == ids
        and set(map(len, ids)) == {16}
        and _is_alphanumeric("".join(ids))
        and len({value.network for value in values}) == 1
        and bool(_ID.match(values[0].network))
        and not any(value.aliases or value.labels or value.sandbox for value in values)
        and text == text.lower()
        and are_labels(names)
        and are_stations(macs)
        and max([len(value.addresses) for value in values]) <= ADDRESSES_MAX
        and WIDTHS.issuperset([len(one) for value in values for one in value.addresses])
    )


def are_labels(names: Sequence[str]) -> bool:
    """Whether all are DNS labels, in whatever case; see `model.parse_name`."""
    lengths, text = list(map(len, names)), "".join(names)
    bare = text.replace("-", "")
    if not (min(lengths) > 0 and max(lengths) <= 63 and _is_alphanumeric(bare)):
        return False
    return len(bare) == len(text) or not any(n[0] == "-" or n[-1] == "-" for n in names)


def _is_alphanumeric(text: str) -> bool:
    """Whether it has letters and digits of ASCII alone; of bytes that takes an eighth as long."""
    return text.isascii() and text.encode().isalnum()


def are_stations(macs: Sequence[bytes]) -> bool:
    """Whether all are MACs that an interface can have."""
    if set(map(len, macs)) != {len(_NO_MAC)}:
        return False
    firsts = set(b"".join(macs)[:: len(_NO_MAC)])
    return not any(first & 1 for first in firsts) and _NO_MAC not in macs


def _check_network(value: Network) -> None:
    check_ids(value.id, value.creator)
    check_name(value.name)
    check_texts(value.driver, value.ip_range, *value.more_ranges)
    check_times(value.created)
    if len(value.more_ranges) > SUBNETS_MAX:
        raise Invalid("record", f"has {len(value.more_ranges)} IP ranges")
    if len(value.subnets) > SUBNETS_MAX or max(len(value.options), len(value.labels)) > LABELS_MAX:
        raise Invalid("record", f"has {len(value.subnets)} subnets, or too many labels")
    for subnet, gateway in zip(value.subnets, value.gateways, strict=True):
        # Every host with the network gets the gateway's address: it must lead nowhere else.
        if ipaddress.ip_address(parse_address(gateway)) not in parse_subnet(subnet):
            raise Invalid("record", f"has the gateway {gateway}, which is not in {subnet}")
    parse_labels(value.options, "option")
    parse_labels(value.labels)
    if len(value.lost) > LOSSES_MAX or any(loss.what not in LOSABLE for loss in value.lost):
        raise Invalid("record", "has lost what cannot be lost")
    for loss in value.lost:
        check_ids(loss.winner)
        check_texts(loss.value)
    if value.ipam:
        check_texts(value.ipam.plugin)
        parse_labels(value.ipam.options, "option")
        for text in (value.ipam.space, *value.ipam.pools):
            if len(text) > POOL_MAX:
                raise Invalid("record", f"has the pool {shorten(text)}")


def _check_node(value: Node) -> None:
    check_ids(value.id)
    check_name(value.name)
    check_texts(value.version)
    check_times(value.since)
    if len(value.routes) > ROUTES_MAX:
        raise Invalid("record", f"has {len(value.routes)} routes")
    if value.data_port in BARRED_DATA_PORTS:
        raise Invalid(
            "record", f"takes VXLAN at port {value.data_port}, so name servers are cut off"
        )
    if value.mtu and not UNDERLAY_MTU_MIN <= value.mtu <= UNDERLAY_MTU_MAX:
        raise Invalid("record", f"has an MTU of {value.mtu}")
    if len(value.narrow) > NARROW_MAX:
        raise Invalid("record", f"has {len(value.narrow)} narrow paths")
    for path in value.narrow:
        check_ids(path.node)
        if not UNDERLAY_MTU_MIN <= path.mtu <= UNDERLAY_MTU_MAX:
            raise Invalid("record", f"has a path of {path.mtu} bytes")
    if not 0 <= value.incarnation <= INCARNATION_MAX:
        raise Invalid("record", f"has the incarnation {value.incarnation}")


def check_ids(*ids: str) -> None:
    """Invalid if one of them is no id."""
    for id in ids:
        if not _ID.match(id):
            raise Invalid("record", f"has the id {shorten(id)}")


def check_name(name: str) -> None:
    """Invalid if it is no DNS label in lower case."""
    if parse_name(name, "record's") != name:
        raise Invalid("record", f"has the name {shorten(name)}, which is not in lower case")


def check_texts(*texts: str) -> None:
    """Invalid if one of them is not fit to be shown."""
    for text in texts:
        if len(text) > TEXT_MAX or not text.isprintable():
            raise Invalid("record", f"has the text {shorten(text)}")


def check_times(*times: float) -> None:
    """Invalid if one of them (seconds since the epoch) has no date."""
    for seconds in times:
        if not math.isfinite(seconds) or not 0 <= seconds <= TIME_MAX:
            raise Invalid("record", f"has the time {seconds}")


def clip_time(seconds: float) -> float:
    """A time that has a date, whatever was written: the nearest one, 0 for what is no number."""
    return min(max(seconds, 0.0), TIME_MAX) if math.isfinite(seconds) else 0.0
