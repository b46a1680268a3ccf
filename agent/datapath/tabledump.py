"""What chains, sets and rules a table of nftables has, without a look at any element.

libnftables reads the elements of all sets whatever it is asked to list; a set that the kernel
fills by itself may have tens of thousands.
What stands opposite: nftables.py, which compares. Source: linux/netfilter/nf_tables.h, struct
nfgenmsg (linux/netfilter/nfnetlink.h).
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from agent.datapath.packing import (
    ATTRIBUTE,
    HEADER,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    messages,
)
from agent.errors import VxmeshError
from agent.syscalls import socket_in

NETLINK_NETFILTER = 12
GET_CHAIN, GET_RULE, GET_SET = 0x0A04, 0x0A07, 0x0A0A  # NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_*
_TABLE, _SET_NAME, _CHAIN_NAME = 1, 2, 3  # NFTA_*_TABLE, NFTA_SET_NAME, NFTA_CHAIN_NAME
FAMILIES = {"inet": 1, "ip": 2, "netdev": 5, "bridge": 7, "ip6": 10}  # NFPROTO_*
ATTEMPTS = 20  # of a dump that others disturb
TIMEOUT = 5.0  # s, for an answer of the kernel
_BODY = HEADER.size + 4  # where a message's attributes begin: after struct nfgenmsg


class Shape(NamedTuple):
    """A table but for its elements; all empty if it is not there."""

    chains: frozenset[str]
    sets: frozenset[str]  # and maps; without those that have no name
    rules: bytes  # a digest of all rules and their handles: another one after each change


def read(netns: str | Path, table: str) -> Shape:
    """The shape of `table`, family and name, in the namespace at path `netns`.

    VxmeshError if the kernel does not answer. Blocks: for a thread.
    """
    family, name = table.split()
    try:
        with socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
            sock.settimeout(TIMEOUT)
            for _ in range(ATTEMPTS):
                chains, sets, rules = (
                    _dump(sock, kind, FAMILIES[family], name)
                    for kind in (GET_CHAIN, GET_SET, GET_RULE)
                )
                if chains is not None and sets is not None and rules is not None:
                    break
            else:
                raise OSError("its table changes all the time")
    except OSError as error:
        raise VxmeshError("firewall rules", f"could not be read ({error})") from error
    digest = hashlib.sha256()
    for rule in rules:
        digest.update(rule)
    named = {_text(one, _SET_NAME) for one in sets}
    return Shape(
        frozenset(_text(one, _CHAIN_NAME) for one in chains),
        frozenset(name for name in named if not name.startswith("__")),
        digest.digest() if rules else b"",
    )


def _dump(sock: socket.socket, kind: int, family: int, table: str) -> list[bytes] | None:
    """The attributes of each object of a table; None if the dump was disturbed."""
    head = HEADER.pack(_BODY, kind, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
    sock.send(head + struct.pack(">BBH", family, 0, 0))
    found: list[bytes] = []
    whole = True
    for code, flags, message in _messages(sock):
        whole = whole and not flags & NLM_F_DUMP_INTR
        if code == NLMSG_DONE:
            break
        if code == NLMSG_ERROR:
            number = -struct.unpack_from("=i", message, HEADER.size)[0]
            raise OSError(number, os.strerror(number))
        if _text(message[_BODY:], _TABLE) == table:
            found.append(message[_BODY:])
    return found if whole else None


def _messages(sock: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and the whole of each message that comes."""
    while True:
        data = sock.recv(1 << 17)
        for offset, kind in messages(data):
            length, _, flags, _, _ = HEADER.unpack_from(data, offset)
            yield kind, flags, data[offset : offset + length]


def _text(attributes: bytes, kind: int) -> str:
    """An attribute that is a name; empty if there is none."""
    at = 0
    while at + 4 <= len(attributes):
        size, found = ATTRIBUTE.unpack_from(attributes, at)
        if size < 4:
            break
        if found == kind:
            return attributes[at + 4 : at + size].rstrip(b"\0").decode(errors="replace")
        at += (size + 3) & ~3
    return ""
