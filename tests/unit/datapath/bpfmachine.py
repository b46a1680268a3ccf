"""Runs our eBPF programs without a kernel: the instructions and helpers that they have.

What a program may do wrong in the kernel's eyes is told by loading it (tests/netns); here, what
it does. What stands opposite: agent/datapath/bpfasm.py. Source: RFC 9669.
"""

from __future__ import annotations

import random
import socket
import struct
from dataclasses import dataclass, field

from agent.datapath.bpfasm import FP, HELPERS, R1, SIZE, Line, assemble
from agent.datapath.socketmaps import Elements
from agent.datapath.socketprograms import MAPS, NOTE, TALLY

CONTEXT = struct.Struct("=III16sIIIII")  # struct bpf_sock_addr, up to msg_src_ip4
NUMBERS = {number: name for name, number in HELPERS.items()}
STEPS = 500


@dataclass(frozen=True)
class Pointer:
    """A place in some memory."""

    memory: bytearray
    at: int


@dataclass
class Kernel:
    """Maps, and one socket in one namespace."""

    maps: dict[str, Elements] = field(
        default_factory=lambda: {name: {} for name in ("sandboxes", "frontends", "slots")}
    )
    cookie: int = 1
    mark: int = 0
    device: int = 0
    note: bytearray | None = None
    notes_fail: bool = False
    tallies: bytearray = field(default_factory=lambda: bytearray(TALLY.size * 16))
    random: random.Random = field(default_factory=lambda: random.Random(1))
    _lent: list[bytearray] = field(default_factory=list)  # values of hashes that were looked up

    def run(
        self,
        lines: list[Line | str],
        address: str,
        port: int,
        kind: int = socket.SOCK_STREAM,
        protocol: int = socket.IPPROTO_TCP,
    ) -> tuple[str, int]:
        """Where the program has the socket connect to, or whom it says it is connected to."""
        six = ":" in address
        raw = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, address)
        four = 0 if six else int(struct.unpack("=I", raw)[0])
        context = bytearray(80)
        CONTEXT.pack_into(context, 0, 10 if six else 2, four, 0, b"", 0, 0, 0, 0, 0)
        context[8:24] = raw if six else bytes(16)
        struct.pack_into("=IIII", context, 24, socket.htons(port), 0, kind, protocol)
        assert (
            self._execute(assemble(lines, {name: n for n, name in enumerate(MAPS)}), context) == 1
        )
        found = socket.inet_ntop(
            socket.AF_INET6 if six else socket.AF_INET,
            bytes(context[8:24] if six else context[4:8]),
        )
        return found, socket.ntohs(struct.unpack_from("=I", context, 24)[0])

    def _execute(self, program: bytes, context: bytearray) -> int:
        code = [struct.unpack_from("<BBhi", program, at) for at in range(0, len(program), SIZE)]
        self.sock = bytearray(struct.pack("=IIIII", self.device, 2, 1, 6, self.mark))
        stack = Pointer(bytearray(512), 512)
        registers: list[object] = [None] * 11
        registers[R1], registers[FP] = Pointer(context, 0), stack
        at = 0
        for _ in range(STEPS):
            operation, both, offset, number = code[at]
            to, source = both & 15, both >> 4
            a, b = registers[to], registers[source]
            at += 1
            if operation == 0x95:
                assert isinstance(registers[0], int)
                return registers[0]
            if operation == 0x18:
                registers[to], at = list(MAPS)[number], at + 1
            elif operation == 0x85:
                registers[0] = self._call(NUMBERS[number], registers, context)
                registers[1:6] = [None] * 5  # spoilt
            elif operation in (0x61, 0x79):
                assert isinstance(b, Pointer)
                if b.memory is context and b.at + offset == 64:
                    registers[to] = Pointer(self.sock, 0)
                else:
                    width = 4 if operation == 0x61 else 8
                    start = b.at + offset
                    registers[to] = int.from_bytes(b.memory[start : start + width], "little")
            elif operation in (0x63, 0x7B, 0x62, 0x7A):
                assert isinstance(a, Pointer)
                width = 4 if operation in (0x63, 0x62) else 8
                value = b if operation in (0x63, 0x7B) else number
                assert isinstance(value, int)
                raw = (value % (1 << 8 * width)).to_bytes(width, "little")
                start = a.at + offset
                assert 0 <= start <= len(a.memory) - width
                a.memory[start : start + width] = raw
            elif operation == 0xDB:
                assert isinstance(a, Pointer) and isinstance(b, int)
                (value,) = struct.unpack_from("=Q", a.memory, a.at + offset)
                struct.pack_into("=Q", a.memory, a.at + offset, value + b)
            elif operation in (0xBF, 0xB4):
                registers[to] = b if operation == 0xBF else number % (1 << 32)
            elif operation == 0x07:
                assert isinstance(a, Pointer)
                registers[to] = Pointer(a.memory, a.at + number)
            elif operation == 0x54:
                assert isinstance(a, int)
                registers[to] = a & number % (1 << 32)
            elif operation == 0x9C:
                assert isinstance(a, int) and isinstance(b, int)
                registers[to] = a % (1 << 32) % b
            elif operation == 0x05:
                at += offset
            else:
                other = b if operation == 0x5E else number % (1 << 32)
                assert operation in (0x15, 0x16, 0x55, 0x56, 0x5E), hex(operation)
                same = a == other
                at += offset if same == (operation & 0xF0 == 0x10) else 0
        raise AssertionError("it does not end")

    def _call(self, helper: str, registers: list[object], context: bytearray) -> object:
        # What others took out of a hash may by now be another element.
        for value in self._lent:
            value[:] = b"\xee" * len(value)
        self._lent.clear()
        if helper == "get_netns_cookie":
            return self.cookie
        if helper == "get_prandom_u32":
            return self.random.getrandbits(32)
        _, one, two, three, four, five, *_ = registers
        if helper == "setsockopt":
            assert isinstance(one, Pointer) and one.memory is context
            assert (two, three, five) == (socket.SOL_SOCKET, 36, 4) and isinstance(four, Pointer)
            (self.mark,) = struct.unpack_from("=I", four.memory, four.at)
            return 0
        if helper == "sk_storage_get":
            assert one == "notes" and isinstance(two, Pointer) and two.memory is self.sock
            if four == 1 and self.note is None and not self.notes_fail:
                self.note = bytearray(NOTE.size)
            return Pointer(self.note, 0) if self.note is not None else 0
        assert helper == "map_lookup_elem" and isinstance(one, str) and isinstance(two, Pointer)
        key = bytes(two.memory[two.at : two.at + MAPS[one].key])
        if one == "tallies":
            (number,) = struct.unpack("=I", key)
            there = (number + 1) * TALLY.size <= len(self.tallies)
            return Pointer(self.tallies, number * TALLY.size) if there else 0
        found = self.maps[one].get(key)
        if found is None:
            return 0
        self._lent.append(bytearray(found))
        return Pointer(self._lent[-1], 0)
