"""FDB and neighbour rows as netlink messages, and back: bytes only, no sockets.

A message a row, everything but the row's own bytes constant, so that packing is joining.
Layouts: struct nlmsghdr (linux/netlink.h, 16 bytes), struct ndmsg (linux/neighbour.h, 12
bytes), then attributes padded to four bytes; all in the machine's byte order.
What stands opposite: bulk.py sends and receives them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence

from agent.drivers.base import DEFAULT
from agent.notation import format_address, format_mac

AF_INET, AF_INET6, AF_BRIDGE = 2, 10, 7
RTM_DELLINK = 17
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_DUMP_INTR = 0x10  # the kernel's word that a dump was disturbed and may lack rows
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF, NTF_MASTER = 0x02, 0x04
NDA_DST, NDA_LLADDR, NDA_PORT, NDA_VNI, NDA_IFINDEX = 1, 2, 6, 7, 8
IFA_ADDRESS, IFA_LOCAL = 1, 2

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, ifindex
ATTRIBUTE = struct.Struct("=HH")  # length, type
CODE = struct.Struct("=i")  # of NLMSG_ERROR: a negative errno, 0 acknowledges

BATCH_ROWS = 1000  # a row is 60 bytes at most, so a batch is 60 kB

Row = tuple[bytes, bytes | None]  # MAC -> VTEP, or address -> MAC; None: there should be none
# Of default rows: VTEP and whether it came, in turn. One that came by a port, VNI or device that
# is none of ours has b"".
Defaults = list[tuple[bytes, bool]]
Batch = tuple[bytes, int]  # messages, how many

_MAC_HEAD = ATTRIBUTE.pack(10, NDA_LLADDR)
_DST_HEADS = {n: ATTRIBUTE.pack(4 + n, NDA_DST) for n in (4, 16)}
_PAD = b"\0\0"  # after a MAC, to a multiple of four


def _head(kind: int, flags: int, length: int, family: int, ifindex: int, self_: bool) -> bytes:
    state = NUD_PERMANENT | NUD_NOARP if self_ else NUD_PERMANENT
    return HEADER.pack(length, kind, NLM_F_REQUEST | flags, 0, 0) + NDMSG.pack(
        family, ifindex, state, NTF_SELF if self_ else 0, 0
    )


def _batch(pieces: list[bytes], last: int, rows: int) -> Batch:
    """The pieces joined, the message that begins at pieces[last] asking for an answer.

    One acknowledgement a batch is enough: of a *failure* the kernel tells unasked.
    """
    head = bytearray(pieces[last])
    head[6 if sys.byteorder == "little" else 7] |= NLM_F_ACK
    pieces[last] = bytes(head)
    return b"".join(pieces), rows


def pack_fdb(ifindex: int, rows: Sequence[Row], exclusive: bool = False) -> Iterator[Batch]:
    """Batches that make MAC -> VTEP so on a VXLAN device; with `exclusive` only what is not there.

    A value of None deletes the row.
    """
    flags = NLM_F_CREATE | (NLM_F_EXCL if exclusive else NLM_F_REPLACE)
    delete = _head(RTM_DELNEIGH, 0, 40, AF_BRIDGE, ifindex, True) + _MAC_HEAD
    # Many rows, few VTEPs: what comes before and after a MAC is made once for each VTEP.
    around: dict[bytes | None, tuple[bytes, bytes]] = {None: (delete, _PAD)}
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        pieces: list[bytes] = []
        for mac, vtep in part:
            sides = around.get(vtep)
            if sides is None:
                assert vtep is not None
                n = len(vtep)
                head = _head(RTM_NEWNEIGH, flags, 44 + n, AF_BRIDGE, ifindex, True)
                sides = (head + _MAC_HEAD, _PAD + _DST_HEADS[n] + vtep)
                around[vtep] = sides
            pieces += (sides[0], mac, sides[1])
        yield _batch(pieces, len(pieces) - 3, len(part))


def pack_neighbours(ifindex: int, rows: Sequence[Row], exclusive: bool = False) -> Iterator[Batch]:
    """Batches that make address -> MAC so, IPv4 and IPv6 mixed; see pack_fdb."""
    flags = NLM_F_CREATE | (NLM_F_EXCL if exclusive else NLM_F_REPLACE)
    put, drop = {}, {}
    for family, n in ((AF_INET, 4), (AF_INET6, 16)):
        head = _head(RTM_NEWNEIGH, flags, 44 + n, family, ifindex, False)
        put[n] = head + _DST_HEADS[n]
        drop[n] = _head(RTM_DELNEIGH, 0, 32 + n, family, ifindex, False) + _DST_HEADS[n]
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        pieces: list[bytes] = []
        last = 0
        for address, mac in part:
            last = len(pieces)
            if mac is None:
                pieces += (drop[len(address)], address)
            else:
                pieces += (put[len(address)], address, _MAC_HEAD, mac, _PAD)
        yield _batch(pieces, last, len(part))


def pack_entries(ifindex: int, rows: Sequence[Row], exclusive: bool = False) -> Iterator[Batch]:
    """Batches that have the bridge of port `ifindex` lead there what is for each row's MAC, or
    with a value of None no longer; see pack_fdb and pack_static."""
    flags = NLM_F_REQUEST | NLM_F_CREATE | (NLM_F_EXCL if exclusive else NLM_F_REPLACE)
    heads = [
        HEADER.pack(40, kind, with_flags, 0, 0)
        + NDMSG.pack(AF_BRIDGE, ifindex, state, NTF_MASTER, 0)
        + _MAC_HEAD
        for kind, with_flags, state in (
            (RTM_DELNEIGH, NLM_F_REQUEST, 0),
            (RTM_NEWNEIGH, flags, NUD_NOARP),
        )
    ]
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        pieces: list[bytes] = []
        for mac, value in part:
            pieces += (heads[value is not None], mac, _PAD)
        yield _batch(pieces, len(pieces) - 3, len(part))


def pack_default(ifindex: int, vtep: bytes, present: bool) -> bytes:
    """One acknowledged message: a VXLAN device sends what no other row is for to `vtep` as well,
    or no longer."""
    n = len(vtep)
    kind, flags = (RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_APPEND) if present else (RTM_DELNEIGH, 0)
    head = _head(kind, NLM_F_ACK | flags, 44 + n, AF_BRIDGE, ifindex, True)
    return head + _MAC_HEAD + DEFAULT + _PAD + _DST_HEADS[n] + vtep


def pack_static(ifindex: int, mac: bytes) -> bytes:
    """One acknowledged message: the bridge that port `ifindex` is on leads `mac` to that port.

    NUD_NOARP alone is what `bridge fdb … static` says; NUD_PERMANENT would mean the bridge itself.
    """
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE
    header = HEADER.pack(40, RTM_NEWNEIGH, flags, 0, 0)
    return (
        header + NDMSG.pack(AF_BRIDGE, ifindex, NUD_NOARP, NTF_MASTER, 0) + _MAC_HEAD + mac + _PAD
    )


def pack_drop_static(ifindex: int, mac: bytes) -> bytes:
    """One acknowledged message: the bridge leads `mac` to port `ifindex` no longer."""
    header = HEADER.pack(40, RTM_DELNEIGH, NLM_F_REQUEST | NLM_F_ACK, 0, 0)
    return header + NDMSG.pack(AF_BRIDGE, ifindex, 0, NTF_MASTER, 0) + _MAC_HEAD + mac + _PAD


def pack_get(ifindex: int, mac: bytes) -> bytes:
    """A request for one FDB row of a VXLAN device, answered with it or with ENOENT."""
    header = HEADER.pack(40, RTM_GETNEIGH, NLM_F_REQUEST, 0, 0)
    return header + NDMSG.pack(AF_BRIDGE, ifindex, 0, NTF_SELF, 0) + _MAC_HEAD + mac + _PAD


def pack_get_neighbour(ifindex: int, address: bytes) -> bytes:
    """A request for one neighbour row; see pack_get."""
    n = len(address)
    family = AF_INET if n == 4 else AF_INET6
    header = HEADER.pack(32 + n, RTM_GETNEIGH, NLM_F_REQUEST, 0, 0)
    return header + NDMSG.pack(family, ifindex, 0, 0, 0) + _DST_HEADS[n] + address


def pack_delete_link(ifindex: int) -> bytes:
    """One acknowledged message: delete a device."""
    flags = NLM_F_REQUEST | NLM_F_ACK
    return HEADER.pack(32, RTM_DELLINK, flags, 0, 0) + struct.pack("=BxHiII", 0, 0, ifindex, 0, 0)


def pack_dump(family: int, ifindex: int) -> bytes:
    """A request for all rows of one device. The socket must have NETLINK_GET_STRICT_CHK on.

    Where the device is named differs: rtnl_valid_fdb_dump and neigh_valid_dump_req in Linux
    net/core/{rtnetlink,neighbour}.c.
    """
    flags = NLM_F_REQUEST | NLM_F_DUMP
    if family == AF_BRIDGE:
        return HEADER.pack(28, RTM_GETNEIGH, flags, 0, 0) + NDMSG.pack(family, ifindex, 0, 0, 0)
    return (
        HEADER.pack(36, RTM_GETNEIGH, flags, 0, 0)
        + NDMSG.pack(family, 0, 0, 0, 0)
        + ATTRIBUTE.pack(8, NDA_IFINDEX)
        + struct.pack("=I", ifindex)
    )


def pack_dump_addresses(ifindex: int) -> bytes:
    """A request for the addresses of one device; see pack_dump."""
    head = HEADER.pack(24, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
    return head + IFADDRMSG.pack(0, 0, 0, 0, ifindex)


def read_address(data: bytes, offset: int = 0) -> tuple[int, str]:
    """Of RTM_NEWADDR or RTM_DELADDR: the device, and the address in interface notation."""
    length = HEADER.unpack_from(data, offset)[0]
    _, prefix, _, _, ifindex = IFADDRMSG.unpack_from(data, offset + 16)
    values = {}
    at = offset + 24
    while at + 4 <= offset + length:
        size, name = ATTRIBUTE.unpack_from(data, at)
        values[name] = data[at + 4 : at + size]
        at += max(4, (size + 3) & ~3)
    # Of a point-to-point link IFA_ADDRESS is the other end's; of IPv6 it is the only one.
    return ifindex, f"{format_address(values.get(IFA_LOCAL) or values[IFA_ADDRESS])}/{prefix}"


def read_addresses(data: bytes, found: set[str]) -> bool:
    """Take one datagram of such a dump; True when it was the last."""
    for offset, kind in messages(data):
        if kind in (NLMSG_DONE, NLMSG_ERROR):
            return True
        if kind == RTM_NEWADDR:
            found.add(read_address(data, offset)[1])
    return False


def messages(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each message of a datagram begins, and its type."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, offset)
        yield offset, kind
        offset += max(16, (length + 3) & ~3)


class DumpReader:
    """Takes datagrams of a dump and collects (MAC, destination, flags, state) of each row.

    The rows of one dump are laid out alike, so the offsets found in one are tried on the next.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, bytes, int, int]] = []  # b"" where an attribute is missing
        self.disturbed = False
        self.error = 0
        self._mac_at = self._dst_at = 0
        self._dst_head = b""

    def feed(self, data: bytes) -> bool:
        """Take one datagram; True when it was the last."""
        offset, end = 0, len(data)
        mac_at, dst_at, dst_head = self._mac_at, self._dst_at, self._dst_head
        append = self.rows.append
        while offset + 16 <= end:
            length, kind, flags, _, _ = HEADER.unpack_from(data, offset)
            if flags & NLM_F_DUMP_INTR:
                self.disturbed = True
            if kind == RTM_NEWNEIGH:
                mac, dst = offset + mac_at, offset + dst_at
                if (
                    mac_at
                    and data[mac : mac + 4] == _MAC_HEAD
                    and data[dst : dst + 4] == dst_head
                    and max(mac_at + 10, dst_at + len(dst_head)) <= length
                ):
                    size = dst_head[0] if sys.byteorder == "little" else dst_head[1]
                    append(
                        (
                            data[mac + 4 : mac + 10],
                            data[dst + 4 : dst + size],
                            data[offset + 26],
                            data[offset + 24] if sys.byteorder == "little" else data[offset + 25],
                        )
                    )
                else:
                    self._slow(data, offset, length)
                    mac_at, dst_at, dst_head = self._mac_at, self._dst_at, self._dst_head
            elif kind == NLMSG_DONE:
                return True
            elif kind == NLMSG_ERROR:
                self.error = -int.from_bytes(
                    data[offset + 16 : offset + 20], sys.byteorder, signed=True
                )
                return True
            offset += (length + 3) & ~3
        return False

    def _slow(self, data: bytes, offset: int, length: int) -> None:
        values = {}
        at = offset + 28
        while at + 4 <= offset + length:
            size, kind = ATTRIBUTE.unpack_from(data, at)
            if size < 4:
                break
            values[kind] = data[at + 4 : at + size]
            if kind == NDA_LLADDR and size == 10:
                self._mac_at = at - offset
            elif kind == NDA_DST:
                self._dst_at, self._dst_head = at - offset, data[at : at + 4]
            at += (size + 3) & ~3
        if not (NDA_LLADDR in values and NDA_DST in values):
            self._mac_at = 0
        _, _, state, flags, _ = NDMSG.unpack_from(data, offset + 16)
        self.rows.append((values.get(NDA_LLADDR, b""), values.get(NDA_DST, b""), flags, state))


def answers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Of every NLMSG_ERROR in `data`: errno (0 acknowledges) and the message that it answers."""
    offset = 0
    while offset + 20 <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, offset)
        if kind == NLMSG_ERROR:
            code = -int.from_bytes(data[offset + 16 : offset + 20], sys.byteorder, signed=True)
            yield code, data[offset + 20 : offset + length]
        offset += (length + 3) & ~3


def is_last(message: bytes) -> bool:
    """Whether an answered message was the last of its batch: the one that asked for an answer."""
    return bool(HEADER.unpack_from(message)[2] & NLM_F_ACK)


def describe(message: bytes) -> str:
    """What a row's message is about, for people: a MAC or an address."""
    if len(message) < 38:
        return message.hex()
    if message[16] == AF_BRIDGE:
        return format_mac(message[32:38])
    return format_address(message[32 : 36 if message[16] == AF_INET else 48])
