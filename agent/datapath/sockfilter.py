"""Programs for a socket's filter: classic BPF with labels, so that they can be read.

What stands opposite: monitor.py, which says what may pass. Source: Linux
Documentation/networking/filter.rst, struct sock_filter in linux/filter.h.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from collections.abc import Iterable

SO_ATTACH_FILTER = 26

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, if false, k
_LOAD = {1: 0x30, 2: 0x28, 4: 0x20}  # BPF_LD|BPF_ABS with BPF_B, BPF_H, BPF_W
_JUMP, _RETURN, _WHOLE = 0x15, 0x06, 0xFFFFFFFF  # BPF_JMP|BPF_JEQ|BPF_K; BPF_RET|BPF_K

Line = str | tuple[int, int] | tuple[int, int, str]
"""A label ("name:"), "accept" or "drop"; a load (offset, bytes); or a test (value, bytes, label):
if what was loaded last is `value`, go on at the label, which must come later.
"""


def assemble(lines: Iterable[Line]) -> bytes:
    """The program. Netlink is in the machine's byte order and loads are in the network's: `value`
    is given as the machine has it.
    """
    program: list[tuple[int, int, int, int]] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in lines:
        if isinstance(line, str):
            if line.endswith(":"):
                labels[line[:-1]] = len(program)
            else:
                program.append((_RETURN, 0, 0, _WHOLE if line == "accept" else 0))
        elif len(line) == 2:
            program.append((_LOAD[line[1]], 0, 0, line[0]))
        else:
            value, size, label = line
            swapped = int.from_bytes(value.to_bytes(size, sys.byteorder), "big")
            jumps.append((len(program), label))
            program.append((_JUMP, 0, 0, swapped))
    for at, label in jumps:
        code, _, _, value = program[at]
        program[at] = (code, labels[label] - at - 1, 0, value)
    return b"".join(_INSTRUCTION.pack(*line) for line in program)


def attach(sock: socket.socket, program: bytes) -> None:
    """Let only pass what `program` accepts; it takes the place of an earlier one at once."""
    buffer = ctypes.create_string_buffer(program, len(program))
    length = len(program) // _INSTRUCTION.size
    fprog = struct.pack("@HP", length, ctypes.addressof(buffer))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)
