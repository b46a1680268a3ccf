"""Many datagrams a system call: questions in, and the answers that are ready out.

recvmmsg(2) and sendmmsg(2) by ctypes, on buffers that are made once. What the kernel wrote about
a question (who sent it, and to which address) is what it wants to be told of the answer, so the
answer's headers point to the question's buffers; its first two bytes are the question's id, the
rest the bytes of a table's entry where they lie. Nothing is copied, and Python does a look-up
a datagram: 2 µs in all, where a recvmsg and a sendmsg each take some 5.
Source: recvmmsg(2), sendmmsg(2), ip(7) IP_PKTINFO, RFC 3542 IPV6_PKTINFO.
What stands opposite: server.py answers what is not ready; table.py is what is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import NamedTuple, Protocol

from agent.resolver.sockets import Ancillary, Peer, answer_from
from agent.resolver.table import IOVEC, POSITIVE, Answers

SLOTS = 64  # datagrams a wake-up: then others of the loop have their turn
_HEAD, _TAIL = 512, 4096  # bytes of a question behind its id: of one that is ready, and of others
_NAME, _CONTROL, _ID = 32, 128, 8  # bytes of a slot
# struct mmsghdr: name, its length, iovec, how many, control, its length, flags; bytes of data
_MMSGHDR = struct.Struct("@PIPNPNi0PI0P")
_RECEIVED = struct.Struct(f"@{struct.calcsize('@PIPNP')}xNi0PI0P")  # of it: what is told back
_CMSGHDR = struct.Struct("@Nii")
_PAYLOAD = socket.CMSG_LEN(0)
_FLAGS_BAD = socket.MSG_TRUNC | socket.MSG_CTRUNC
_NO_INTERFACE = bytes(4)
_ZEROS = bytes(SLOTS)

_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg = _libc.recvmmsg
_recvmmsg.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p
)  # fmt: skip
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


class Ready(Protocol):
    """Answers by the asker's address."""

    def get(self, source: bytes, /) -> Answers | None: ...


class Datagram(NamedTuple):
    """A question that has no answer ready, and what `sendmsg` needs to answer it."""

    wire: bytes
    ancillary: Ancillary
    peer: Peer
    source: bytes


def _at(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _part(start: int, length: int) -> slice:
    return slice(start, start + length)


class Datagrams:
    """The buffers of one UDP socket, IPv4 or IPv6, which gives packet information."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unsent = 0  # answers that the kernel did not take
        six = sock.family == socket.AF_INET6
        name_bytes, info_bytes, self._at_source = (28, 20, 8) if six else (16, 12, 4)
        self._source_bytes = 16 if six else 4
        self._six = six
        self._control = socket.CMSG_SPACE(info_bytes)
        self._at_interface = _PAYLOAD + (16 if six else 0)
        self._names = bytearray(SLOTS * _NAME)
        self._controls = bytearray(SLOTS * _CONTROL)
        self._ids = bytearray(SLOTS * _ID)
        self._heads = bytearray(SLOTS * _HEAD)
        self._tails = bytearray(SLOTS * _TAIL)
        reading = bytearray(SLOTS * 3 * IOVEC.size)
        self._writing = bytearray(SLOTS * 2 * IOVEC.size)
        self._received = bytearray(SLOTS * _MMSGHDR.size)
        self._sent = bytearray(SLOTS * _MMSGHDR.size)
        names, controls, ids = _at(self._names), _at(self._controls), _at(self._ids)
        for slot in range(SLOTS):
            id = ids + slot * _ID
            parts = ((id, 2), (_at(self._heads) + slot * _HEAD, _HEAD))
            parts += ((_at(self._tails) + slot * _TAIL, _TAIL),)  # type: ignore[assignment]
            for number, part in enumerate(parts):
                IOVEC.pack_into(reading, (slot * 3 + number) * IOVEC.size, *part)
            IOVEC.pack_into(self._writing, slot * 2 * IOVEC.size, id, 2)
            name, control = names + slot * _NAME, controls + slot * _CONTROL
            at = slot * _MMSGHDR.size
            vector = _at(reading) + slot * 3 * IOVEC.size
            _MMSGHDR.pack_into(
                self._received, at, name, name_bytes, vector, 3, control, _CONTROL, 0, 0
            )
            vector = _at(self._writing) + slot * 2 * IOVEC.size
            _MMSGHDR.pack_into(
                self._sent, at, name, name_bytes, vector, 2, control, self._control, 0, 0
            )
        self._reading = reading
        self._template = bytes(self._received)
        self._at_received, self._at_sent = _at(self._received), _at(self._sent)
        self._views = [memoryview(b) for b in (self._received, self._names, self._heads)]
        # Of each slot: the asker's address, where the question begins, the iovec of the answer, and
        # the interface in the packet information.
        self._slots = [
            (
                slot,
                _part(slot * _NAME + self._at_source, self._source_bytes),
                slot * _HEAD - 2,
                _part((slot * 2 + 1) * IOVEC.size, IOVEC.size),
                _part(slot * _CONTROL + self._at_interface, len(_NO_INTERFACE)),
            )
            for slot in range(SLOTS)
        ]

    def serve(self, ready: Ready, counts: list[int]) -> tuple[int, list[Datagram]]:
        """Read what is there and send the answers that are ready.

        `ready`: answers by the asker's address. Adds to `counts` by the kind of each answer.
        Returns how many were read, and those that have no answer ready. Raises OSError.
        """
        self._received[:] = self._template
        fd = self.sock.fileno()
        count = _recvmmsg(fd, self._at_received, SLOTS, socket.MSG_DONTWAIT, None)
        if count <= 0:
            number = ctypes.get_errno() if count else errno.EAGAIN
            if number in (errno.EAGAIN, errno.EINTR):
                return 0, []
            raise OSError(number, os.strerror(number))
        received = bytes(self._views[0][: count * _MMSGHDR.size])
        names = bytes(self._views[1][: count * _NAME])
        heads = bytes(self._views[2][: count * _HEAD])
        controls, writing, control, six = self._controls, self._writing, self._control, self._six
        told = b""
        if not six:
            told = bytes(controls)
            # The routes decide, as the sandbox may ask by another interface: of all slots at once.
            for at in range(self._at_interface, self._at_interface + len(_NO_INTERFACE)):
                controls[at::_CONTROL] = _ZEROS
        start = positive = 0
        others: list[Datagram] = []
        for (held, flags, size), (slot, source, head, vector, interface) in zip(
            _RECEIVED.iter_unpack(received), self._slots, strict=False
        ):
            if held == control and size <= _HEAD and not flags & _FLAGS_BAD:
                answers = ready.get(names[source])
                if answers is not None:
                    entry = answers.get(heads[head + 2 : head + size])
                    if entry is not None:
                        if isinstance(entry, bytes):
                            writing[vector] = entry
                            positive += 1
                        else:
                            kind, turns = entry
                            writing[vector] = next(turns)
                            counts[kind] += 1
                        if six and names[source][:2] != b"\xfe\x80":
                            controls[interface] = _NO_INTERFACE
                        continue
            if start < slot:
                self._send(fd, start, slot)
            start = slot + 1
            others.append(self._other(slot, held, size, names, told or controls))
        if start < count:
            self._send(fd, start, count)
        counts[POSITIVE] += positive
        return count, others

    def _send(self, fd: int, start: int, end: int) -> None:
        while start < end:
            at = self._at_sent + start * _MMSGHDR.size
            sent = _sendmmsg(fd, at, end - start, socket.MSG_DONTWAIT)
            if sent > 0:
                start += sent
            elif ctypes.get_errno() != errno.EINTR:
                # A full queue, a gateway that is gone, port 0: a datagram may always be lost.
                self.unsent += 1
                start += 1

    def _other(
        self, slot: int, held: int, size: int, names: bytes, told: bytes | bytearray
    ) -> Datagram:
        head = max(0, min(size - 2, _HEAD))
        tail = max(0, min(size - 2 - _HEAD, _TAIL))
        wire = (
            self._ids[slot * _ID : slot * _ID + min(size, 2)]
            + self._heads[slot * _HEAD : slot * _HEAD + head]
            + self._tails[slot * _TAIL : slot * _TAIL + tail]
        )
        name = names[slot * _NAME : (slot + 1) * _NAME]
        source = name[self._at_source : self._at_source + self._source_bytes]
        host, port = socket.inet_ntop(self.sock.family, source), int.from_bytes(name[2:4], "big")
        peer: Peer = (host, port)
        if self._six:
            scope = int.from_bytes(name[24:28], "little" if _LITTLE else "big")
            peer = (host, port, int.from_bytes(name[4:8], "big"), scope)
        raw, at = told[slot * _CONTROL : slot * _CONTROL + held], 0
        messages = []
        while at + _PAYLOAD <= len(raw):
            length, level, type = _CMSGHDR.unpack_from(raw, at)
            messages.append((level, type, bytes(raw[at + _PAYLOAD : at + length])))
            at += socket.CMSG_SPACE(length - _PAYLOAD)
        size_of_first, ancillary = answer_from(messages)
        return Datagram(bytes(wire[: size_of_first or len(wire)]), ancillary, peer, source)


_LITTLE = struct.pack("=H", 1) == b"\1\0"
