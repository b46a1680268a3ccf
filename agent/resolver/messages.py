"""DNS messages: what may come by the wire, and what goes to and comes from upstreams.

Nothing here waits or keeps state. Whatever the bytes are, `read` returns: a question, the
refusal to send, or nothing. dnspython reads what is unusual. Sources: RFC 1035, 5452 (answers that
are none), 6891 (EDNS), 8482 (ANY), 9619 (one question a message).
What stands opposite: wire.py reads the usual and writes answers of ours; server.py moves the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype

from agent.core.names import Record
from agent.core.question import Question
from agent.resolver import wire as plain
from agent.resolver.wire import (
    DO,
    HEADER,
    HEADER_BYTES,
    IN,
    META_TYPES,
    OPCODE,
    OPT,
    QR,
    TCP_BYTES_MAX,
    UDP_BYTES,
    UDP_BYTES_MAX,
    Asked,
    bare,
    failure,
    read_plain,
    records,
    udp_limit,
)

QUESTION_BYTES_MAX = 4096  # a question has some 100; more is not worth the time to parse it
_ADDITIONAL_MAX = 2  # OPT and a signature; reading hundreds of records would take milliseconds
_SIGNATURES = (dns.rdatatype.SIG, dns.rdatatype.TSIG)  # RFC 2931, 8945; both have class ANY


def read(wire: bytes, udp: bool) -> Asked | bytes | None:
    """A question, or the answer to send at once because it is none, or None to stay silent.

    Silent to what is shorter than a header and to what is itself an answer: to answer those
    could make two servers talk for ever.
    """
    found = read_plain(wire, udp)
    if found is not None:
        return found
    if len(wire) < HEADER_BYTES:
        return None
    _, flags, questions, answers, authorities, additional = HEADER.unpack_from(wire)
    if flags & QR:
        return None
    if (flags & OPCODE) >> 11 != dns.opcode.QUERY:
        return bare(wire, dns.rcode.NOTIMP)
    too_many = answers or authorities or additional > _ADDITIONAL_MAX
    if questions != 1 or too_many or len(wire) > QUESTION_BYTES_MAX:
        return bare(wire, dns.rcode.FORMERR)
    try:
        if not all(_belongs_to_question(*record[:2]) for record in records(wire)):
            return bare(wire, dns.rcode.FORMERR)
        message = dns.message.from_wire(wire)
        rrset = message.question[0]
        section = rrset.name.to_wire()
    except Exception:
        # Strangers write these bytes, and dnspython has many ways to say that they are wrong.
        return bare(wire, dns.rcode.FORMERR)
    assert section is not None
    limit = TCP_BYTES_MAX
    if udp:
        limit = udp_limit(message.payload) if message.edns >= 0 else UDP_BYTES
    labels = tuple(label.lower().decode("latin-1") for label in rrset.name.labels[:-1])
    type = int(rrset.rdtype)
    asked = Asked(
        Question(labels, type),
        wire,
        section + type.to_bytes(2, "big") + int(rrset.rdclass).to_bytes(2, "big"),
        limit,
        flags,
        edns=message.edns >= 0,
        do=bool(message.edns >= 0 and message.ednsflags & DO),
        _message=message,
    )
    if message.edns > 0:
        return failure(asked, dns.rcode.BADVERS)
    if rrset.rdclass != dns.rdataclass.IN or type in META_TYPES or type == OPT:
        return failure(asked, dns.rcode.REFUSED)
    return asked


def _belongs_to_question(type: int, class_: int) -> bool:
    # dnspython keeps, for as long as it runs, how each pair of these that it meets is read. A
    # stranger could fill memory with pairs, and by class ANY have it read a type of IN as unknown
    # bytes. So it is not shown what we have no use for, here and in `read_upstream`.
    return type == OPT or (type in _SIGNATURES and class_ == dns.rdataclass.ANY)


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
        if not all(type == OPT or class_ == IN for type, class_, *_ in records(wire)):
            return None
        message = dns.message.from_wire(wire, ignore_trailing=True)
    except Exception:
        # As in `read`: the far side is a stranger too.
        return None
    if not message.flags & dns.flags.QR or message.question != query.question:
        return None
    return message


def relay(asked: Asked, answer: dns.message.Message) -> bytes:
    """The wire form of an upstream's answer as this asker can take it."""
    response = dns.message.make_response(
        asked.message, recursion_available=True, our_payload=UDP_BYTES_MAX, pad=0
    )
    if asked.do:
        response.ednsflags |= dns.flags.DO  # RFC 3225, section 3
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
        f"{dns.rdatatype.to_text(dns.rdatatype.RdataType(record.type))} {_text(record)}"
        for record in records
    ]


def _text(record: Record) -> str:
    type = dns.rdatatype.RdataType(record.type)
    data = plain.record_data(record)
    return dns.rdata.from_wire(dns.rdataclass.IN, type, data, 0, len(data)).to_text()
