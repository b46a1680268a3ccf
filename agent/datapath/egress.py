"""The one table that nft's language cannot say: a router's MAC, out of a packet's mark.

    table netdev NAME { chain leaving { type filter hook egress device "eth0" priority 0;
        meta mark & 0x80000000 == 0x80000000 @ll,0,16 set 0x0a76 @ll,16,32 set meta mark } }

nft(8) refuses to set a payload from a mark, which the kernel has no objection to, so the table
is made by hand: four messages in one transaction.
What stands opposite: replies.py, which gives packets their marks. Layouts: struct nfgenmsg
(linux/netfilter/nfnetlink.h), linux/netfilter/nf_tables.h; numbers big-endian in attributes.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from agent.datapath.netlinkmessages import answers, attribute, check, message
from agent.datapath.packing import NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST
from agent.drivers.overlay import ROUTER_PREFIX

FLAG = 0x80000000  # in each mark of ours, and in no other's, we hope
NETLINK_NETFILTER, SUBSYSTEM = 12, 10
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NEWTABLE, DELTABLE, NEWCHAIN, NEWRULE = 0, 2, 3, 6
NFPROTO_NETDEV, NF_NETDEV_EGRESS = 5, 1
NLM_F_APPEND = 0x800
_NESTED = 0x8000
_REGISTER, _MARK, _EQUAL, _LINK_LAYER = 1, 3, 0, 0  # NFT_REG_1, NFT_META_MARK, NFT_CMP_EQ


def load(name: str, device: str) -> None:
    """Make the table of the calling thread's namespace, in place of one of that name.

    `device` is that whose packets are changed. OSError if the kernel refuses: one without
    netfilter at egress (before Linux 5.16, or without CONFIG_NETFILTER_EGRESS) does.
    """
    table = _string(1, name)
    hook = _number(1, NF_NETDEV_EGRESS) + _number(2, 0) + _string(3, device)
    chain = table + _string(3, "leaving") + _nested(4, hook) + _string(7, "filter")
    _send(
        [
            (NEWTABLE, NLM_F_CREATE, table),
            (DELTABLE, 0, table),  # whatever it is like
            (NEWTABLE, NLM_F_CREATE, table),
            (NEWCHAIN, NLM_F_CREATE, chain),
            (NEWRULE, NLM_F_CREATE | NLM_F_APPEND, table + _string(2, "leaving") + _rule()),
        ]
    )


def _rule() -> bytes:
    """The expressions, in the words of `nft --debug=netlink`."""
    load = _number(2, _MARK) + _number(1, _REGISTER)
    flag = _data(struct.pack("=I", FLAG))
    masked = _number(1, _REGISTER) + _number(2, _REGISTER) + _number(3, 4)
    masked += _nested(4, flag) + _nested(5, _data(bytes(4)))
    compared = _number(1, _REGISTER) + _number(2, _EQUAL) + _nested(3, flag)
    prefix = _number(1, _REGISTER) + _nested(2, _data(ROUTER_PREFIX))
    expressions = [
        ("meta", load),  # [ meta load mark => reg 1 ]
        ("bitwise", masked),  # [ bitwise reg 1 = ( reg 1 & 0x80000000 ) ^ 0x00000000 ]
        ("cmp", compared),  # [ cmp eq reg 1 0x80000000 ]
        ("immediate", prefix),  # [ immediate reg 1 0x0000760a ]
        ("payload", _write(0, 2)),  # [ payload write reg 1 => 2b @ link header + 0 ]
        ("meta", load),
        ("payload", _write(2, 4)),  # [ payload write reg 1 => 4b @ link header + 2 ]
    ]
    return _nested(4, b"".join(_nested(1, _string(1, n) + _nested(2, d)) for n, d in expressions))


def _write(offset: int, length: int) -> bytes:
    """Into the link layer's header; there is no checksum to mend."""
    where = _number(2, _LINK_LAYER) + _number(3, offset) + _number(4, length)
    return _number(5, _REGISTER) + where + _number(6, 0) + _number(7, 0)


def _send(messages: Iterable[tuple[int, int, bytes]]) -> None:
    batch = [_message(BATCH_BEGIN, 0, b"", 0, SUBSYSTEM)]
    for kind, flags, body in messages:
        batch.append(_message(SUBSYSTEM << 8 | kind, flags | NLM_F_ACK, body, NFPROTO_NETDEV))
    expected = len(batch) - 1
    batch.append(_message(BATCH_END, 0, b"", 0, SUBSYSTEM))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.settimeout(5.0)
        sock.sendto(b"".join(batch), (0, 0))
        said = answers(sock)
        for _ in range(expected):
            check(next(said)[1], "netfilter at egress")


def _message(kind: int, flags: int, body: bytes, family: int, resource: int = 0) -> bytes:
    general = struct.pack(">BBH", family, 0, resource)
    return message(kind, flags | NLM_F_REQUEST, general + body)


def _nested(kind: int, value: bytes) -> bytes:
    return attribute(kind | _NESTED, value)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _string(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _data(value: bytes) -> bytes:
    return attribute(1, value)


def is_missing(error: OSError) -> bool:
    """Whether the kernel has no netfilter at egress."""
    return error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)
