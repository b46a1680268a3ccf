"""Questions off the wire and answers of ours onto it, by hand: some 10 µs each.

dnspython takes 160 µs for the same. It still reads what is unusual (messages.py): here are the
questions that C libraries send, with at most an EDNS record without options. Answers of ours
are few in kind, so all of them are written here.
Sources: RFC 1035, section 4.1; 2181, section 9 (truncation); 2308, section 3; 2782 (no compression
of SRV's target); 3225 and 6891 (EDNS).
What stands opposite: core/names.py decides what to say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import dns.message

from agent.core.names import TTL, ZONE, Answer, Kind, Record, Srv
from agent.core.question import SOA, Question

IN = 1
UDP_BYTES = 512  # RFC 1035, section 2.3.4: what any asker takes
UDP_BYTES_MAX = 1232  # passes every path of 1280 bytes unfragmented (DNS flag day 2020)
TCP_BYTES_MAX = 65535
OPT = 41
META_TYPES = range(128, 255)  # TKEY, TSIG, IXFR, AXFR …; 255 is ANY (RFC 6895, section 3.1)

HEADER = struct.Struct("!HHHHHH")
HEADER_BYTES = 12
QR, OPCODE, AA, TC, RD, RA, AD, CD = (
    0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010,
)  # fmt: skip
NXDOMAIN = 3
DO = 0x8000  # of EDNS flags

_NAME_BYTES_MAX = 255  # with lengths and the root
_OPT_BYTES = 11
_OPT_RECORD = struct.Struct("!BHHBBHH")  # root, type, payload, high rcode, version, flags, length
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length
_SRV = struct.Struct("!HHH")
_ASKED_NAME = b"\xc0\x0c"  # a pointer to the question's


@dataclass(slots=True)
class Asked:
    """A sound question and what came with it."""

    question: Question
    wire: bytes
    section: bytes  # the question as it was written: askers compare (0x20)
    limit: int  # bytes that an answer may have
    flags: int
    edns: bool = False
    do: bool = False
    plain: bool = False  # nothing about it but its bytes matters: the answer may be kept
    _message: dns.message.Message | None = field(default=None, compare=False)

    @property
    def message(self) -> dns.message.Message:
        """As dnspython has it. It can be read: that was tried, or it is plain."""
        if self._message is None:
            self._message = dns.message.from_wire(self.wire)
        return self._message


def udp_limit(payload: int) -> int:
    """How long an answer by UDP may be, for one whose EDNS record says `payload` bytes."""
    return min(max(payload, UDP_BYTES), UDP_BYTES_MAX)


def read_plain(wire: bytes, udp: bool) -> Asked | None:
    """A question as nearly all are; None if it is any different."""
    if len(wire) < HEADER_BYTES + 5:
        return None
    _, flags, questions, answers, authorities, additional = HEADER.unpack_from(wire)
    if flags & ~(RD | AD | CD) or questions != 1 or answers or authorities or additional > 1:
        return None
    at = HEADER_BYTES
    labels = []
    last = len(wire) - 5
    while length := wire[at]:
        if length > 63 or (end := at + 1 + length) > last:
            return None
        labels.append(wire[at + 1 : end].lower().decode("latin-1"))
        at = end
    at += 5
    if at - HEADER_BYTES - 4 > _NAME_BYTES_MAX:
        return None
    type = wire[at - 4] << 8 | wire[at - 3]
    if wire[at - 2] or wire[at - 1] != IN or type in META_TYPES or type == OPT:
        return None
    limit = UDP_BYTES if udp else TCP_BYTES_MAX
    edns_flags = 0
    if additional:
        if len(wire) != at + _OPT_BYTES:
            return None
        root, kind, payload, high, version, edns_flags, length = _OPT_RECORD.unpack_from(wire, at)
        if root or kind != OPT or high or version or edns_flags & ~DO or length:
            return None
        if udp:
            limit = udp_limit(payload)
    elif len(wire) != at:
        return None
    return Asked(
        Question(tuple(labels), type),
        wire,
        wire[HEADER_BYTES:at],
        limit,
        flags,
        edns=additional == 1,
        do=edns_flags == DO,
        plain=True,
    )


def records(wire: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of each record after the questions its type, class and TTL, and where the TTL stands.

    Raises IndexError or struct.error if the bytes end too soon.
    """
    questions, *counts = HEADER.unpack_from(wire)[2:]
    at = HEADER_BYTES
    for _ in range(questions):
        at = _after_name(wire, at) + 4
    for _ in range(sum(counts)):
        at = _after_name(wire, at)
        type, class_, ttl, length = _RECORD.unpack_from(wire, at)
        yield type, class_, ttl, at + 4
        at += _RECORD.size + length


def _after_name(wire: bytes, at: int) -> int:
    while length := wire[at]:
        if length >= 0xC0:  # a pointer ends a name, RFC 1035, section 4.1.4
            return at + 2
        at += 1 + length
    return at + 1


def bare(wire: bytes, rcode: int) -> bytes:
    """An answer that is a header only, to something that could not be read."""
    id, flags = HEADER.unpack_from(wire)[:2]
    return HEADER.pack(id, QR | flags & (OPCODE | RD) | RA | rcode, 0, 0, 0, 0)


def failure(asked: Asked, rcode: int) -> bytes:
    """An answer that says only why there is none."""
    return _message(asked, 0, rcode, [], [], [])


def build(asked: Asked, answer: Answer) -> bytes:
    """An answer of ours, of any kind but FORWARD and REFUSED.

    Records that have no room are left out: over UDP with TC set, so that the asker comes again
    by TCP, and those that do not are still served with some. Additional ones are left out
    without it, RFC 2181, section 9.
    """
    room = asked.limit - HEADER_BYTES - len(asked.section) - (_OPT_BYTES if asked.edns else 0)
    flags = AA
    if answer.kind is not Kind.ANSWER:
        rcode = NXDOMAIN if answer.kind is Kind.NXDOMAIN else 0
        zone = answer.zone
        owner = b"\0"
        if zone:
            # The zone is the end of the name that was asked, whatever the case it was asked in.
            above = len(asked.question.labels) - zone.count(".") - 1
            at = HEADER_BYTES + sum(len(s) + 1 for s in asked.question.labels[:above])
            owner = (0xC000 | at).to_bytes(2, "big")
        return _message(asked, flags, rcode, [], [owner + _SOA_RECORD], [])
    records = answer.records
    if len({record.type for record in records}) > 1:  # a set of each type, RFC 2181, section 5
        order = list(dict.fromkeys(record.type for record in records))
        records = tuple(sorted(records, key=lambda record: order.index(record.type)))
    kept: list[bytes] = []
    for record in records:
        data = record_data(record)
        if (room := room - 12 - len(data)) < 0 and kept:
            if asked.limit < TCP_BYTES_MAX:
                flags |= TC
            break
        kept.append(_ASKED_NAME + _RECORD.pack(record.type, IN, TTL, len(data)) + data)
    more: list[bytes] = []
    for name, record in answer.additional if room > 0 else ():
        owner, data = name_wire(name), record_data(record)
        if (room := room - len(owner) - 10 - len(data)) < 0:
            break
        more.append(owner + _RECORD.pack(record.type, IN, TTL, len(data)) + data)
    return _message(asked, flags, 0, kept, [], more)


def opt_record(asked: Asked, rcode: int) -> bytes:
    """The EDNS record of an answer with this code."""
    edns_flags = DO if asked.do else 0  # RFC 3225, section 3
    return _OPT_RECORD.pack(0, OPT, UDP_BYTES_MAX, rcode >> 4, 0, edns_flags, 0)


def name_wire(name: str) -> bytes:
    """The wire form of a name without its final dot, of labels that are sound."""
    encoded = name.encode("latin-1").split(b".") if name else []
    return b"".join([bytes((len(label),)) + label for label in encoded]) + b"\0"


def record_data(record: Record) -> bytes:
    """What follows a record's length on the wire."""
    data = record.data
    if isinstance(data, bytes):
        return data
    if isinstance(data, Srv):
        return _SRV.pack(data.priority, data.weight, data.port) + name_wire(data.target)
    return SOA_DATA if record.type == SOA else name_wire(data)


def _message(
    asked: Asked,
    flags: int,
    rcode: int,
    answers: list[bytes],
    authority: list[bytes],
    additional: Iterable[bytes],
) -> bytes:
    more = [*additional]
    if asked.edns:
        more.append(opt_record(asked, rcode))
    flags |= QR | asked.flags & RD | RA | rcode & 0xF
    head = HEADER.pack(0, flags, 1, len(answers), len(authority), len(more))[2:]
    return b"".join((asked.wire[:2], head, asked.section, *answers, *authority, *more))


# Server, mailbox, serial, refresh, retry, expire: for those that copy a zone, which nobody does
# here. The last field is how long "no such name" may be remembered (RFC 2308, section 5).
SOA_DATA = (
    name_wire(f"ns.{ZONE}")
    + name_wire(f"hostmaster.{ZONE}")
    + struct.pack("!IIIII", 1, 3600, 600, 86400, TTL)
)
_SOA_RECORD = _RECORD.pack(SOA, IN, TTL, len(SOA_DATA)) + SOA_DATA
