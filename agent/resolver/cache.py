"""Answers of upstreams, kept no longer than they may be. Pure: the time is an argument.

An answer is kept as bytes, without what was between us and the upstream (id, EDNS), and with its
TTLs counted down when it is given again. What may not be kept is not: failures, truncated ones,
a TTL of 0, a negative answer without the SOA that says for how long (RFC 2308, section 5).
What stands opposite: forward.py.
Sources: RFC 1034, section 3.6 and 5.3.3; 2181, section 5.2; 2308; 8767, section 4 (a longest TTL).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype

from agent.core.question import Question
from agent.resolver.wire import AD, CD, HEADER_BYTES, OPT, RA, RD, Asked, opt_record, records

ENTRIES_MAX = 4096
ENTRY_BYTES_MAX = 2048  # 8 MiB in all; what is longer is asked for again
TTL_MAX = 3600  # seconds; whoever changes a name waits no longer for us

Key = tuple[Question, bool, int]


class _Kept(NamedTuple):
    wire: bytes  # with RA, without OPT
    ttls: tuple[tuple[int, int], ...]  # where each is in it, and what it was
    at: float
    until: float


def key_of(asked: Asked) -> Key:
    """What makes two questions to an upstream the same."""
    return asked.question, asked.do, asked.flags & (AD | CD)


class Cache:
    """Answers by question; of too many the one that was used least recently goes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all, such as when others are asked."""
        self._kept.clear()

    def put(self, asked: Asked, answer: dns.message.Message, now: float) -> None:
        """Keep an upstream's answer from `now` (seconds, any clock) if it may be kept."""
        seconds = min(_lifetime(answer), TTL_MAX)
        if seconds <= 0:
            return
        response = dns.message.Message(id=0)
        response.flags = dns.flags.QR | RA | answer.flags & (AD | CD)
        response.set_rcode(answer.rcode())
        response.question = answer.question
        response.answer, response.authority = answer.answer, answer.authority
        response.additional = answer.additional
        try:
            wire = response.to_wire(max_size=ENTRY_BYTES_MAX, want_shuffle=False)
        except dns.exception.DNSException:
            return
        places = tuple((at, ttl) for _, _, ttl, at in records(wire))
        key = key_of(asked)
        self._kept[key] = _Kept(wire, places, now, now + seconds)
        self._kept.move_to_end(key)
        if len(self._kept) > ENTRIES_MAX:
            self._kept.popitem(last=False)

    def get(self, asked: Asked, now: float) -> bytes | None:
        """The answer to send, with TTLs as they are by `now`; None if there is none that fits."""
        key = key_of(asked)
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until <= now:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        opt = opt_record(asked, 0) if asked.edns else b""
        if len(kept.wire) + len(opt) > asked.limit:
            return None
        wire = bytearray(kept.wire)
        wire[0:2] = asked.wire[:2]
        wire[2:4] = (int.from_bytes(wire[2:4], "big") | asked.flags & RD).to_bytes(2, "big")
        wire[HEADER_BYTES : HEADER_BYTES + len(asked.section)] = asked.section
        age = int(now - kept.at)
        for at, ttl in kept.ttls:
            wire[at : at + 4] = max(ttl - age, 0).to_bytes(4, "big")
        if opt:
            wire[10:12] = (int.from_bytes(wire[10:12], "big") + 1).to_bytes(2, "big")
            wire += opt
        return bytes(wire)


def _lifetime(answer: dns.message.Message) -> int:
    """How many seconds an answer may be kept."""
    if answer.flags & dns.flags.TC:
        return 0
    rcode = answer.rcode()
    sections = (*answer.answer, *answer.authority, *answer.additional)
    ttls = [rrset.ttl for rrset in sections if rrset.rdtype != OPT]
    asked = answer.question[0].rdtype
    found = any(rrset.rdtype == asked or asked == dns.rdatatype.ANY for rrset in answer.answer)
    if rcode == dns.rcode.NOERROR and found:
        return min(ttls)
    if rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return 0
    for rrset in answer.authority:
        if rrset.rdtype == dns.rdatatype.SOA:
            return min(*ttls, int(rrset[0].minimum))
    return 0
