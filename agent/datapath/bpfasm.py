"""An assembler for the few instructions of eBPF that our programs need. Pure.

A program is a list of lines that read as they run: labels, jumps to labels further on, calls of
the kernel's helpers by name, and maps by name, whose descriptors are put in at the end.
What stands opposite: socketprograms.py and shortcutprograms.py, which have the programs; bpf.py,
which loads them.
Source: RFC 9669; linux/bpf.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_INSTRUCTION = struct.Struct("<BBhi")  # struct bpf_insn: code, registers, offset, immediate
SIZE = _INSTRUCTION.size

R0, R1, R2, R3, R4, R5, R6, R7, R8 = range(9)
FP = 10

HELPERS = {  # enum bpf_func_id
    "map_lookup_elem": 1,
    "get_prandom_u32": 7,
    "tail_call": 12,
    "redirect": 23,
    "skb_change_type": 32,
    "setsockopt": 49,
    "sk_storage_get": 107,
    "get_netns_cookie": 122,
    "redirect_peer": 155,
}
_WIDTHS = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}  # BPF_B, BPF_H, BPF_W, BPF_DW
_LOAD, _STORE, _STORE_NUMBER, _ATOMIC = 0x61, 0x63, 0x62, 0xC3
_ALU = {"mov": 0xB0, "add": 0x00, "and": 0x50, "mod": 0x90}  # of 32 bits: | 0x04; of 64: | 0x07
_JUMP = {"=": 0x10, "!=": 0x50}
_PSEUDO_MAP = 1  # BPF_PSEUDO_MAP_FD
HASH, ARRAY, PROG_ARRAY, SK_STORAGE = 1, 2, 3, 24  # enum bpf_map_type


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map as it is made."""

    kind: int
    key: int  # bytes
    value: int  # bytes
    entries: int  # most


class Line(NamedTuple):
    """One instruction; `label` is where a jump leads, or the name of a map."""

    code: int
    target: int = 0  # register
    source: int = 0  # register
    offset: int = 0
    number: int = 0
    label: str = ""


Lines = Iterable[Line | str]  # a text is a label of the next line

EXIT = Line(0x95)  # return what is in R0


def load(target: int, source: int, offset: int, width: int = 4) -> Line:
    """target = *(source + offset)."""
    return Line(_LOAD | _WIDTHS[width], target, source, offset)


def store(target: int, offset: int, source: int, width: int = 4) -> Line:
    """*(target + offset) = source."""
    return Line(_STORE | _WIDTHS[width], target, source, offset)


def store_number(target: int, offset: int, number: int, width: int = 4) -> Line:
    """*(target + offset) = number."""
    return Line(_STORE_NUMBER | _WIDTHS[width], target, 0, offset, _signed(number))


def count(target: int, offset: int, source: int) -> Line:
    """*(target + offset) += source, 64 bits, at once for all processors."""
    return Line(_ATOMIC | _WIDTHS[8], target, source, offset)


def move(target: int, source: int) -> Line:
    """target = source, 64 bits."""
    return Line(_ALU["mov"] | 0x0F, target, source)


def number(target: int, value: int) -> Line:
    """target = value, 32 bits."""
    return Line(_ALU["mov"] | 0x04, target, 0, 0, _signed(value))


def address(target: int, source: int, offset: int) -> list[Line]:
    """target = source + offset, 64 bits."""
    return [move(target, source), Line(_ALU["add"] | 0x07, target, 0, 0, offset)]


def mask(target: int, value: int) -> Line:
    """target &= value, 32 bits."""
    return Line(_ALU["and"] | 0x04, target, 0, 0, _signed(value))


def from_network(target: int) -> Line:
    """target = its lower 16 bits, which are in the network's order, as a number."""
    return Line(0xDC, target, 0, 0, 16)


def modulo(target: int, source: int) -> Line:
    """target %= source, 32 bits; by nought it stays what it is."""
    return Line(_ALU["mod"] | 0x0C, target, source)


def jump_if(target: int, relation: str, value: int, label: str) -> Line:
    """Go on at `label` if target = or != value: a number of 32 bits, or nought of 64."""
    width = 0x06 if value else 0x05
    return Line(_JUMP[relation] | width, target, 0, 0, _signed(value), label)


def jump_unless_same(target: int, source: int, label: str) -> Line:
    """Go on at `label` if the lower halves of two registers differ."""
    return Line(_JUMP["!="] | 0x0E, target, source, 0, 0, label)


def jump_above(target: int, source: int, label: str) -> Line:
    """Go on at `label` if target > source: numbers of 64 bits without a sign, or places."""
    return Line(0x2D, target, source, 0, 0, label)


def jump(label: str) -> Line:
    """Go on at `label`."""
    return Line(0x05, label=label)


def call(helper: str) -> Line:
    """Call a helper of HELPERS: arguments in R1 to R5, which it spoils; its answer in R0."""
    return Line(0x85, 0, 0, 0, HELPERS[helper])


def map_of(target: int, name: str) -> Line:
    """target = the map of that name."""
    return Line(0x18, target, _PSEUDO_MAP, 0, 0, name)


def leave(value: int) -> list[Line]:
    """Return `value`."""
    return [number(R0, value), EXIT]


def assemble(lines: Lines, maps: Mapping[str, int]) -> bytes:
    """The program; `maps` are the descriptors of the maps by name. KeyError names what is
    missing, ValueError a jump back."""
    placed: list[Line] = []
    labels: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(placed)
            continue
        placed.append(line)
        if line.code == 0x18:  # takes two places
            placed.append(Line(0))
    program = []
    for at, line in enumerate(placed):
        offset, value = line.offset, line.number
        if line.code == 0x18:
            value = maps[line.label]
        elif line.label:
            offset = labels[line.label] - at - 1
            if offset < 0:
                raise ValueError(f"{line.label} is behind")
        program.append(_INSTRUCTION.pack(line.code, line.source << 4 | line.target, offset, value))
    return b"".join(program)


def _signed(value: int) -> int:
    """A number of 32 bits as the kernel writes it."""
    return value - (1 << 32) if value >= 1 << 31 else value
