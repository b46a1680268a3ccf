"""The programs that lead a TCP socket straight to a backend when it connects to a VIP. Pure.

They run in connect(2) and getpeername(2) of every process of the host, and do something for
sockets of this agent's own sandboxes only. Whatever is not in the maps goes on as it is, and is
balanced by the rules of nftables (balancerules.py) like everything else:

    connect      a VIP and port -> one slot of it by chance -> the backend's address and port.
                 The socket gets a mark that tells which VIP it was led by, and notes that VIP
    getpeername  of a socket that notes one: the VIP, so that the client sees whom it asked

IPv4 addresses stand in maps and notes as IPv6 has them (::ffff:a.b.c.d), so that a socket of
either family finds them. Numbers are the machine's, addresses and ports the network's.
What stands opposite: socketmaps.py says what is in the maps, bpf.py loads this.
Source: linux/bpf.h, struct bpf_sock_addr and bpf_sock; bpf-helpers(7).
"""

from __future__ import annotations

import socket
import struct

from agent.datapath import bpfasm as asm
from agent.datapath.bpfasm import (
    ARRAY,
    FP,
    HASH,
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    SK_STORAGE,
    Line,
    MapSpec,
)
from agent.drivers.marks import LED, LED_MASK

INET4_CONNECT, INET6_CONNECT = 10, 11  # enum bpf_attach_type
INET4_GETPEERNAME, INET6_GETPEERNAME = 29, 30
SO_MARK = 36

# struct bpf_sock_addr
_USER_IP4, _USER_IP6, _USER_PORT, _TYPE, _PROTOCOL, _SK = 4, 8, 24, 32, 36, 64
_SK_DEVICE, _SK_MARK = 0, 16  # struct bpf_sock

SANDBOX = struct.Struct("=QII")  # cookie of a namespace, VNI; with VNI 0: whether it is ours
ENTRY = struct.Struct("=16sI")  # address and port
FRONTEND = struct.Struct("=IIII")  # VNI, number, how many slots, mark
SLOT = struct.Struct("=II")  # number of the frontend, number of the slot
NUMBER = struct.Struct("=I")
TARGET = struct.Struct("=16sII")  # address and port of a backend, and its NUMBER in the tallies
TALLY = struct.Struct("=Q")  # connections
FLAG = struct.Struct("=I")
NOTE = struct.Struct("=16sI16sI")  # of a socket: the VIP that it asked for, the backend

MAPS = {
    "sandboxes": MapSpec(HASH, SANDBOX.size, FLAG.size, 1 << 14),
    "frontends": MapSpec(HASH, ENTRY.size, FRONTEND.size, 1 << 16),
    "slots": MapSpec(HASH, SLOT.size, TARGET.size, 1 << 18),
    "tallies": MapSpec(ARRAY, 4, TALLY.size, 1 << 16),
    "notes": MapSpec(SK_STORAGE, 4, NOTE.size, 0),
}

# Where things are on the stack.
_SANDBOX, _VNI, _ENTRY, _SLOT, _BEFORE, _MARK, _TARGET = -16, -8, -40, -48, -52, -56, -80
_NOTE_BACKEND, _NOTE_PORT = 20, 36  # where in a NOTE the backend and its port are


def _lookup(name: str, key: int, otherwise: str) -> list[Line]:
    """R0 = where the value of the key at FP + `key` is."""
    return [
        asm.map_of(R1, name),
        *asm.address(R2, FP, key),
        asm.call("map_lookup_elem"),
        asm.jump_if(R0, "=", 0, otherwise),
    ]


def _set_mark(at: int) -> list[Line]:
    return [
        asm.move(R1, R6),
        asm.number(R2, socket.SOL_SOCKET),
        asm.number(R3, SO_MARK),
        *asm.address(R4, FP, at),
        asm.number(R5, 4),
        asm.call("setsockopt"),
    ]


def _note(create: bool = False) -> list[Line]:
    """R0 = where the note of the socket in R8 is; 0: there is none."""
    return [
        asm.map_of(R1, "notes"),
        asm.move(R2, R8),
        asm.number(R3, 0),
        asm.number(R4, int(create)),  # BPF_SK_STORAGE_GET_F_CREATE
        asm.call("sk_storage_get"),
    ]


def _is_tcp() -> list[Line]:
    return [
        asm.load(R1, R6, _TYPE),
        asm.jump_if(R1, "!=", socket.SOCK_STREAM, "out"),
        asm.load(R1, R6, _PROTOCOL),
        asm.jump_if(R1, "!=", socket.IPPROTO_TCP, "out"),
    ]


def _words(version: int) -> list[tuple[int, int]]:
    """Where each four bytes of the address are in the context, and in an entry."""
    if version == 4:
        return [(_USER_IP4, 12)]
    return [(_USER_IP6 + at, at) for at in (0, 4, 8, 12)]


def _copy(pairs: list[tuple[int, int]], target: int, source: int) -> list[Line]:
    """(offset in target, offset in source), four bytes each."""
    return [
        line for to, at in pairs for line in (asm.load(R1, source, at), asm.store(target, to, R1))
    ]


def connect(version: int) -> list[Line | str]:
    """What a socket connects to is a backend, if it was a VIP that its sandbox may reach."""
    entry = [(_ENTRY + inside, at) for at, inside in _words(version)]
    mapped = [
        asm.store_number(FP, _ENTRY, 0, 8),
        asm.store_number(FP, _ENTRY + 8, socket.htonl(0xFFFF)),
    ]
    whole = [0, 4, 8, 12, 16]
    return [
        asm.move(R6, R1),
        *_is_tcp(),
        # Is it of a sandbox of ours?
        asm.move(R1, R6),
        asm.call("get_netns_cookie"),
        asm.store(FP, _SANDBOX, R0, 8),
        asm.store_number(FP, _VNI, 0, 8),
        *_lookup("sandboxes", _SANDBOX, "out"),
        # A socket with a mark of its user's, or bound to a device, is left alone.
        asm.load(R8, R6, _SK, 8),
        asm.load(R1, R8, _SK_DEVICE),
        asm.jump_if(R1, "!=", 0, "out"),
        asm.load(R1, R8, _SK_MARK),
        asm.store(FP, _BEFORE, R1),
        asm.jump_if(R1, "=", 0, "free"),
        asm.mask(R1, LED_MASK),
        asm.jump_if(R1, "!=", LED, "out"),
        "free",
        *(mapped if version == 4 else []),
        *_copy([*entry, (_ENTRY + 16, _USER_PORT)], FP, R6),
        # What an element says is copied at once: one that is taken out may become another one
        # under our eyes (Linux 6.1).
        *_lookup("frontends", _ENTRY, "none"),
        *_copy([(_VNI, 0), (_SLOT, 4), (_MARK, 12)], FP, R0),
        asm.load(R7, R0, 8),
        *_lookup("sandboxes", _SANDBOX, "none"),
        # One of its slots.
        asm.jump_if(R7, "=", 0, "none"),
        asm.call("get_prandom_u32"),
        asm.modulo(R0, R7),
        asm.store(FP, _SLOT + 4, R0),
        *_lookup("slots", _SLOT, "none"),
        *_copy([(_TARGET + at, at) for at in (*whole, 20)], FP, R0),
        # By which VIP it was led, for us and for its user.
        *_set_mark(_MARK),
        asm.jump_if(R0, "!=", 0, "none"),
        *_note(create=True),
        asm.jump_if(R0, "=", 0, "undo"),
        *_copy([(at, _ENTRY + at) for at in whole], R0, FP),
        *_copy([(_NOTE_BACKEND + at, _TARGET + at) for at in whole], R0, FP),
        *_lookup("tallies", _TARGET + 20, "lead"),
        asm.number(R1, 1),
        asm.count(R0, 0, R1),
        "lead",
        *_copy([(to, _TARGET + at) for to, at in (*_words(version), (_USER_PORT, 16))], R6, FP),
        asm.jump("out"),
        # What is led no longer is not to look as if it was. A mark without a note is its user's.
        "none",
        *_note(),
        asm.jump_if(R0, "=", 0, "out"),
        asm.load(R1, R0, _NOTE_PORT),
        asm.jump_if(R1, "=", 0, "out"),
        asm.store_number(R0, _NOTE_PORT, 0),
        asm.load(R1, FP, _BEFORE),
        asm.jump_if(R1, "=", 0, "out"),
        "undo",
        asm.store_number(FP, _MARK, 0),
        *_set_mark(_MARK),
        "out",
        *asm.leave(1),
    ]


def getpeername(version: int) -> list[Line | str]:
    """Whom a socket talks to is the VIP that it asked for, if it was led and has not connected
    elsewhere since."""
    same = [
        line
        for at, inside in [*_words(version), (_USER_PORT, 16)]
        for line in (
            asm.load(R1, R6, at),
            asm.load(R2, R0, _NOTE_BACKEND + inside),
            asm.jump_unless_same(R1, R2, "out"),
        )
    ]
    return [
        asm.move(R6, R1),
        *_is_tcp(),
        asm.load(R8, R6, _SK, 8),
        *_note(),
        asm.jump_if(R0, "=", 0, "out"),
        *same,
        *_copy([*_words(version), (_USER_PORT, 16)], R6, R0),
        "out",
        *asm.leave(1),
    ]


PROGRAMS = {
    INET4_CONNECT: connect(4),
    INET6_CONNECT: connect(6),
    INET4_GETPEERNAME: getpeername(4),
    INET6_GETPEERNAME: getpeername(6),
}
