"""DNS messages: from the bytes of a question to the bytes of its answer, with dnspython.

Nothing here waits or keeps state. Whatever the bytes are, `read` returns: a question, the
refusal to send, or nothing. Sources: RFC 1035, 2181 (truncation), 2308 (negative answers),
3225 and 6891 (EDNS), 8482 (ANY), 9619 (one question a message).
What stands opposite: core/names.py decides what to say; server.py moves the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from agent.core.names import TTL, ZONE, Answer, Kind, Record, Srv
from agent.core.question import SOA, Question

QUESTION_BYTES_MAX = 4096  # a question has some 100; more is not worth the time to parse it
UDP_BYTES = 512  # RFC 1035, section 2.3.4: what any asker takes
UDP_BYTES_MAX = 1232  # passes every path of 1280 bytes unfragmented (DNS flag day 2020)
TCP_BYTES_MAX = 65535

_HEADER = struct.Struct("!HHHHHH")
_HEADER_BYTES = 12
_QR, _OPCODE, _RD, _RA = 0x8000, 0x7800, 0x0100, 0x0080
_META_TYPES = range(128, 255)  # TKEY, TSIG, IXFR, AXFR …; 255 is ANY (RFC 6895, section 3.1)
_OPT = 41
_ADDITIONAL_MAX = 2  # OPT and a signature; reading hundreds of records would take milliseconds
# Server, mailbox, serial, refresh, retry, expire: for those that copy a zone, which nobody does
# here. The last field is how long "no such name" may be remembered (RFC 2308, section 5).
_SOA = dns.rdata.from_text(
    dns.rdataclass.IN, dns.rdatatype.SOA, f"ns.{ZONE}. hostmaster.{ZONE}. 1 3600 600 86400 {TTL}"
)


class Asked(NamedTuple):
    """A sound question: what was asked and what came with it."""

    question: Question
    message: dns.message.Message
    limit: int  # bytes that an answer may have


def read(wire: bytes, udp: bool) -> Asked | bytes | None:
    """A question, or the answer to send at once because it is none, or None to stay silent.

    Silent to what is shorter than a header and to what is itself an answer: to answer those
    could make two servers talk for ever.
    """
    if len(wire) < _HEADER_BYTES:
        return None
    id, flags, questions, answers, authorities, additional = _HEADER.unpack_from(wire)
    if flags & _QR:
        return None
    if (flags & _OPCODE) >> 11 != dns.opcode.QUERY:
        return _bare(id, flags, dns.rcode.NOTIMP)
    records = answers or authorities or additional > _ADDITIONAL_MAX
    if questions != 1 or records or len(wire) > QUESTION_BYTES_MAX:
        return _bare(id, flags, dns.rcode.FORMERR)
    try:
        message = dns.message.from_wire(wire)
    except Exception:
        # Strangers write these bytes, and dnspython has many ways to say that they are wrong.
        return _bare(id, flags, dns.rcode.FORMERR)
    limit = TCP_BYTES_MAX
    if udp:
        limit = UDP_BYTES
        if message.edns >= 0:
            limit = min(max(message.payload, UDP_BYTES), UDP_BYTES_MAX)
    rrset = message.question[0]
    labels = tuple(label.lower().decode("latin-1") for label in rrset.name.labels[:-1])
    asked = Asked(Question(labels, int(rrset.rdtype)), message, limit)
    if message.edns > 0:
        return failure(asked, dns.rcode.BADVERS)
    meta = rrset.rdtype in _META_TYPES or rrset.rdtype == _OPT
    if rrset.rdclass != dns.rdataclass.IN or meta:
        return failure(asked, dns.rcode.REFUSED)
    return asked


def _bare(id: int, flags: int, rcode: int) -> bytes:
    """An answer that is a header only, to something that could not be read."""
    return _HEADER.pack(id, _QR | flags & (_OPCODE | _RD) | _RA | rcode, 0, 0, 0, 0)


def _response(asked: Asked) -> dns.message.Message:
    query = asked.message
    response = dns.message.make_response(
        query, recursion_available=True, our_payload=UDP_BYTES_MAX, pad=0
    )
    if query.edns >= 0:
        response.ednsflags |= query.ednsflags & dns.flags.DO  # RFC 3225, section 3
    return response


def failure(asked: Asked, rcode: int) -> bytes:
    """An answer that says only why there is none."""
    response = _response(asked)
    response.set_rcode(dns.rcode.Rcode(rcode))
    return response.to_wire(max_size=asked.limit)


def build(asked: Asked, answer: Answer) -> bytes:
    """The wire form of an answer of ours, of any kind but FORWARD.

    Addresses that have no room are left out: over UDP with TC set, so that the asker comes
    again by TCP, and those that do not are still served with some.
    """
    if answer.kind is Kind.REFUSED:
        return failure(asked, dns.rcode.REFUSED)
    response = _response(asked)
    response.flags |= dns.flags.AA
    name = asked.message.question[0].name  # as it was written: askers compare (0x20)
    if answer.kind is Kind.ANSWER:
        kept = _fitting(answer.records, name, asked)
        if len(kept) < len(answer.records) and asked.limit < TCP_BYTES_MAX:
            response.flags |= dns.flags.TC
        for type in dict.fromkeys(record.type for record in kept):
            rdatas = [_rdata(record) for record in kept if record.type == type]
            response.answer.append(dns.rrset.from_rdata_list(name, TTL, rdatas))
    else:
        if answer.kind is Kind.NXDOMAIN:
            response.set_rcode(dns.rcode.NXDOMAIN)
        zone = dns.name.from_text(answer.zone)
        response.authority.append(dns.rrset.from_rdata(zone, TTL, _SOA))
    return response.to_wire(max_size=asked.limit, want_shuffle=False)


def _fitting(records: tuple[Record, ...], name: dns.name.Name, asked: Asked) -> tuple[Record, ...]:
    """As many of `records`, from the first, as there is room for.

    A record is a pointer to the name (2 bytes), type, class, TTL and length (10), and the data;
    names and SOA are few and reckoned at their longest.
    """
    room = asked.limit - _HEADER_BYTES - sum(len(label) + 1 for label in name.labels) - 4
    room -= 11 if asked.message.edns >= 0 else 0
    for count, record in enumerate(records):
        room -= 12 + (len(record.data) if isinstance(record.data, bytes) else 255)
        if room < 0:
            return records[: max(count, 1)]
    return records


def _rdata(record: Record) -> dns.rdata.Rdata:
    data = record.data
    type = dns.rdatatype.RdataType(record.type)
    if isinstance(data, bytes):
        return dns.rdata.from_wire(dns.rdataclass.IN, type, data, 0, len(data))
    if isinstance(data, Srv):
        text = f"{data.priority} {data.weight} {data.port} {data.target}."
        return dns.rdata.from_text(dns.rdataclass.IN, type, text)
    return _SOA if type == SOA else dns.rdata.from_text(dns.rdataclass.IN, type, data + ".")


def upstream_query(asked: Asked, id: int) -> dns.message.Message:
    """The question as it is put to a resolver of the host: new id, none of the asker's options.

    EDNS options are between two neighbours (RFC 6891, section 6.1.1); DO and CD are the asker's
    wish about the answer and go on.
    """
    rrset = asked.message.question[0]
    query = dns.message.make_query(
        rrset.name,
        rrset.rdtype,
        use_edns=0,
        ednsflags=asked.message.ednsflags & dns.flags.DO if asked.message.edns >= 0 else 0,
        payload=UDP_BYTES_MAX,
        id=id,
    )
    query.flags |= asked.message.flags & (dns.flags.CD | dns.flags.AD)
    return query


def read_upstream(wire: bytes, query: dns.message.Message) -> dns.message.Message | None:
    """The answer to `query` in these bytes; None if they are anything else."""
    if wire[:2] != query.id.to_bytes(2, "big"):
        return None
    try:
        message = dns.message.from_wire(wire, ignore_trailing=True)
    except Exception:
        # As in `read`: the far side is a stranger too.
        return None
    if not message.flags & dns.flags.QR or message.question != query.question:
        return None
    return message


def relay(asked: Asked, answer: dns.message.Message) -> bytes:
    """The wire form of an upstream's answer as this asker can take it."""
    response = _response(asked)
    response.flags |= answer.flags & (dns.flags.AD | dns.flags.CD)
    response.set_rcode(answer.rcode())
    response.answer = answer.answer
    response.authority = answer.authority
    response.additional = answer.additional
    try:
        return response.to_wire(max_size=asked.limit, prefer_truncation=True, want_shuffle=False)
    except dns.exception.DNSException:
        return failure(asked, dns.rcode.SERVFAIL)


def describe(records: Iterable[Record]) -> list[str]:
    """Records as text for people: `A 10.1.0.2`."""
    return [
        f"{dns.rdatatype.to_text(dns.rdatatype.RdataType(record.type))} {_rdata(record)}"
        for record in records
    ]
