"""Programs at the ingress of devices (tc) as netlink messages, and back. Bytes only.

What stands opposite: shortcuts.py sends them.
Layouts: struct tcmsg (linux/rtnetlink.h), attributes TCA_* of linux/rtnetlink.h and TCA_BPF_* of
linux/pkt_cls.h; Linux net/sched/sch_ingress.c (clsact), net/sched/cls_bpf.c.
"""

from __future__ import annotations

import socket
import struct

from agent.datapath.netlinkmessages import attribute, message, read_attributes
from agent.datapath.packing import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
)

RTM_NEWQDISC, RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 36, 44, 45, 46
_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_KIND, _OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_CLSACT, _INGRESS = 0xFFFFFFF1, 0xFFFFFFF2  # TC_H_CLSACT; with TC_H_MIN_INGRESS
_HANDLE, _PRIORITY = 1, 0x7678  # a priority that nobody else takes by chance
_ETH_P_ALL = 0x0003


def new_place(index: int) -> bytes:
    """Where programs can be on a device; EEXIST if there is one. While it is made, the device drops
    what it is to send: so before it is up (dev_deactivate in qdisc_graft)."""
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    body = _TCMSG.pack(0, index, 0xFFFF0000, _CLSACT, 0) + attribute(_KIND, b"clsact\0")
    return message(RTM_NEWQDISC, flags, body)


def new_program(index: int, program: int, name: str) -> bytes:
    """The program of a descriptor at the ingress of a device, in place of one of ours. EINVAL if it
    has no place for any."""
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE
    options = attribute(_BPF_FD, struct.pack("=I", program))
    options += attribute(_BPF_NAME, name.encode() + b"\0")
    options += attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    body = _head(index, _HANDLE) + attribute(_KIND, b"bpf\0") + attribute(_OPTIONS, options)
    return message(RTM_NEWTFILTER, flags, body)


def no_program(index: int) -> bytes:
    """Take away what `new_program` put there."""
    return message(RTM_DELTFILTER, NLM_F_REQUEST | NLM_F_ACK, _head(index, 0))


def list_programs(index: int) -> bytes:
    """Ask for ours at the ingress of a device."""
    return message(RTM_GETTFILTER, NLM_F_REQUEST | NLM_F_DUMP, _head(index, 0))


def read_program(body: bytes) -> int | None:
    """The id of the program that an RTM_NEWTFILTER is about; None if it is about none."""
    attributes = dict(read_attributes(body, _TCMSG.size))
    if attributes.get(_KIND) != b"bpf\0" or _OPTIONS not in attributes:
        return None
    value = dict(read_attributes(attributes[_OPTIONS])).get(_BPF_ID)
    return int(struct.unpack("=I", value)[0]) if value else None


def _head(index: int, handle: int) -> bytes:
    info = _PRIORITY << 16 | socket.htons(_ETH_P_ALL)
    return _TCMSG.pack(0, index, handle, _INGRESS, info)
