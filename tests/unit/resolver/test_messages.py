"""resolver/messages.py: what may come by the wire, and the bytes that go back."""

from __future__ import annotations

import struct
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.core.names import Kind, Names
from agent.core.nametables import HOLDERS_MAX
from agent.notation import parse_address
from agent.resolver.messages import (
    QUESTION_BYTES_MAX,
    describe,
    read,
    read_upstream,
    relay,
    upstream_query,
)
from agent.resolver.wire import UDP_BYTES_MAX, Asked, build, failure

NET = "d" * 16
MANY = 5000


@pytest.fixture(scope="module")
def names() -> Names:
    made = Names()
    made.put_network(NET, "demo", ("10.1.0.0/16",))
    made.put(NET, "1" * 16, "one", (), (parse_address("10.1.0.2"), parse_address("fd00::2")))
    for number in range(MANY):
        address = parse_address(f"10.1.{number >> 8}.{number & 255}")
        aliases = ("some", "all") if number < 100 else ("all",)
        made.put(NET, f"{number:016x}", f"n{number}", aliases, (address,))
    return made


def ask(text: str, type: str = "A", udp: bool = True, **options: Any) -> Asked:
    query = dns.message.make_query(text, type, **options)
    asked = read(query.to_wire(), udp)
    assert isinstance(asked, Asked)
    return asked


def answered(names: Names, asked: Asked) -> dns.message.Message:
    wire = build(asked, names.answer(asked.question, (NET,)))
    assert len(wire) <= asked.limit
    return dns.message.from_wire(wire)


def test_an_answer(names: Names) -> None:
    asked = ask("OnE.Demo.")
    response = answered(names, asked)
    assert response.id == asked.message.id
    assert response.flags == dns.flags.QR | dns.flags.AA | dns.flags.RD | dns.flags.RA
    assert response.question == asked.message.question
    assert [str(rrset) for rrset in response.answer] == ["OnE.Demo. 5 IN A 10.1.0.2"]
    assert response.edns == -1


def test_any_gives_each_type_a_set_of_its_own(names: Names) -> None:
    response = answered(names, ask("one", "ANY"))
    assert [str(rrset) for rrset in response.answer] == [
        "one. 5 IN A 10.1.0.2",
        "one. 5 IN AAAA fd00::2",
    ]


@pytest.mark.parametrize(
    ("text", "type", "rcode", "zone"),
    [
        ("one.demo", "MX", dns.rcode.NOERROR, "demo."),
        ("none.demo", "A", dns.rcode.NXDOMAIN, "demo."),
        ("none.demo.vxmesh.internal", "A", dns.rcode.NXDOMAIN, "vxmesh.internal."),
        ("none", "A", dns.rcode.NXDOMAIN, "."),
        ("9.9.1.10.in-addr.arpa", "PTR", dns.rcode.NOERROR, None),
    ],
)
def test_negative_answers_have_the_soa(
    names: Names, text: str, type: str, rcode: int, zone: str | None
) -> None:
    response = answered(names, ask(text, type))
    assert response.rcode() == rcode
    assert response.flags & dns.flags.AA
    if zone is not None:
        assert not response.answer
        assert str(response.authority[0]) == (
            f"{zone} 5 IN SOA ns.vxmesh.internal. hostmaster.vxmesh.internal. 1 3600 600 86400 5"
        )


def test_ptr_and_soa_are_answered(names: Names) -> None:
    reverse = answered(names, ask("2.0.1.10.in-addr.arpa", "PTR"))
    assert str(reverse.answer[0]).endswith("PTR n2.demo.vxmesh.internal.")
    assert str(answered(names, ask("vxmesh.internal", "SOA")).answer[0]).startswith(
        "vxmesh.internal. 5 IN SOA"
    )


@pytest.mark.parametrize(
    ("payload", "size"), [(None, 512), (0, 512), (100, 512), (600, 600), (9000, UDP_BYTES_MAX)]
)
def test_truncation_keeps_what_has_room(names: Names, payload: int | None, size: int) -> None:
    options: dict[str, Any] = {} if payload is None else {"use_edns": 0, "payload": payload}
    asked = ask("all.demo", **options)
    assert asked.limit == size
    response = answered(names, asked)
    assert response.flags & dns.flags.TC
    kept = len(response.answer[0])
    assert len(response.to_wire()) <= size < len(response.to_wire()) + 2 * 16
    assert kept >= (size - 60) // 16


def test_tcp_has_room_for_more(names: Names) -> None:
    some = answered(names, ask("some", udp=False))
    assert len(some.answer[0]) == 100
    everything = answered(names, ask("all", udp=False))
    assert not everything.flags & dns.flags.TC  # there is no third way to come again by
    assert len(everything.answer[0]) == HOLDERS_MAX < MANY


def test_records_keep_the_order_of_the_answer(names: Names) -> None:
    asked = ask("some", udp=False)
    for turn in (0, 1, 99):
        answer = names.answer(asked.question, (NET,), turn)
        response = dns.message.from_wire(build(asked, answer))
        got = [parse_address(rdata.to_text()) for rdata in response.answer[0]]
        assert got == [record.data for record in answer.records]


def test_edns_is_answered_with_our_size_and_the_do_bit(names: Names) -> None:
    response = answered(names, ask("one", use_edns=0, ednsflags=dns.flags.DO, payload=4096))
    assert response.edns == 0
    assert response.payload == UDP_BYTES_MAX
    assert response.ednsflags & dns.flags.DO


def test_edns_version_that_nobody_knows() -> None:
    wire = read(dns.message.make_query("one", "A", use_edns=1).to_wire(), udp=True)
    assert isinstance(wire, bytes)
    assert dns.message.from_wire(wire).rcode() == dns.rcode.BADVERS


def _header(flags: int, *counts: int) -> bytes:
    return struct.pack("!HHHHHH", 0x1234, flags, *counts)


_QUESTION = b"\3one\0\0\1\0\1"


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (_header(0x0100, 0, 0, 0, 0), dns.rcode.FORMERR),  # no question
        (_header(0x0100, 2, 0, 0, 0) + _QUESTION * 2, dns.rcode.FORMERR),  # RFC 9619
        (_header(0x0100, 1, 0, 0, 0), dns.rcode.FORMERR),  # a question that is not there
        (_header(0x0100, 1, 0, 0, 0) + _QUESTION[:-1], dns.rcode.FORMERR),
        (_header(0x0100, 1, 0, 0, 0) + _QUESTION + b"x", dns.rcode.FORMERR),
        (_header(0x0100, 1, 1, 0, 0) + _QUESTION * 2, dns.rcode.FORMERR),  # with an answer
        (_header(0x0100, 1, 0, 0, 9) + _QUESTION, dns.rcode.FORMERR),
        (_header(0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR),  # points at itself
        (_header(0x0100, 1, 0, 0, 0) + b"\xc0\xff\0\1\0\1", dns.rcode.FORMERR),
        (_header(0x0100, 1, 0, 0, 0) + b"\x41one\0\0\1\0\1", dns.rcode.FORMERR),
        (_header(0x0100, 1, 0, 0, 0) + _QUESTION + bytes(5000), dns.rcode.FORMERR),
        (_header(0x2100, 1, 0, 0, 0) + _QUESTION, dns.rcode.NOTIMP),  # NOTIFY
        (_header(0x2900, 1, 0, 0, 0) + _QUESTION, dns.rcode.NOTIMP),  # UPDATE
        (_header(0x0100, 1, 0, 0, 0) + b"\3one\0\0\1\0\3", dns.rcode.REFUSED),  # class CH
        (_header(0x0100, 1, 0, 0, 0) + b"\3one\0\0\1\0\xff", dns.rcode.REFUSED),  # class ANY
        (_header(0x0100, 1, 0, 0, 0) + b"\3one\0\0\xfc\0\1", dns.rcode.REFUSED),  # AXFR
        (_header(0x0100, 1, 0, 0, 0) + b"\3one\0\0\x29\0\1", dns.rcode.REFUSED),  # OPT
    ],
)
def test_what_is_no_question_gets_a_reason(wire: bytes, rcode: int) -> None:
    reply = read(wire, udp=True)
    assert isinstance(reply, bytes)
    assert reply[:2] == wire[:2]
    response = dns.message.from_wire(reply)
    assert response.flags & dns.flags.QR
    assert response.rcode() == rcode


@pytest.mark.parametrize("wire", [b"", b"x" * 11, _header(0x8100, 1, 0, 0, 0) + _QUESTION])
def test_silence_to_what_could_be_a_loop(wire: bytes) -> None:
    assert read(wire, udp=True) is None


@given(
    st.binary(max_size=600) | st.binary(max_size=300).map(lambda b: _header(256, 1, 0, 0, 1) + b)
)
@example(_header(0x0100, 1, 0, 0, 0) + b"\xc0\x0e\xc0\x0c\0\1\0\1")
@example(_header(0x0100, 1, 0, 0, 1) + _QUESTION + b"\0\0\x29\0\0\0\0\0\0\0\x04\0\x0a\xff\xff")
def test_garbage_is_never_more_than_a_short_answer(names: Names, wire: bytes) -> None:
    for udp in (True, False):
        reply = read(wire, udp)
        if isinstance(reply, Asked):
            answer = names.answer(reply.question, (NET,))
            reply = failure(reply, 2) if answer.kind is Kind.FORWARD else build(reply, answer)
        if reply is not None:
            response = dns.message.from_wire(reply)
            assert response.flags & dns.flags.QR
            assert response.id == int.from_bytes(wire[:2], "big")


@given(st.data())
def test_a_question_with_bits_turned_over(names: Names, data: st.DataObject) -> None:
    wire = bytearray(dns.message.make_query("one.demo", "A", use_edns=0).to_wire())
    for _ in range(data.draw(st.integers(1, 8))):
        wire[data.draw(st.integers(2, len(wire) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    reply = read(bytes(wire), udp=True)
    if isinstance(reply, Asked):
        answer = names.answer(reply.question, (NET,))
        reply = failure(reply, 2) if answer.kind is Kind.FORWARD else build(reply, answer)
    assert reply is None or len(reply) <= UDP_BYTES_MAX


def test_labels_are_as_in_the_wire() -> None:
    """A dot within a label does not make two of it: `a.b` as one label is not forwarded."""
    wire = _header(0x0100, 1, 0, 0, 0) + b"\7one.com\0\0\1\0\1"
    asked = read(wire, udp=True)
    assert isinstance(asked, Asked)
    assert asked.question.labels == ("one.com",)
    names = Names()
    names.put_network(NET, "demo")
    assert names.answer(asked.question, (NET,)).kind is Kind.NXDOMAIN


def test_what_goes_upstream_has_nothing_of_the_asker_but_the_question() -> None:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    asked = ask(
        "Example.COM", use_edns=0, ednsflags=dns.flags.DO, payload=4096, options=[cookie], id=7
    )
    asked.message.flags |= dns.flags.CD
    query = dns.message.from_wire(upstream_query(asked, 4242).to_wire())
    assert query.id == 4242
    assert query.question == asked.message.question
    assert query.flags == dns.flags.RD | dns.flags.CD
    assert query.ednsflags & dns.flags.DO
    assert query.payload == UDP_BYTES_MAX
    assert not query.options


def _upstream_answer(asked: Asked, id: int, records: int = 1) -> dns.message.Message:
    response = dns.message.make_response(upstream_query(asked, id), recursion_available=True)
    name = asked.message.question[0].name
    addresses = [f"192.0.2.{number}" for number in range(1, records + 1)]
    response.answer.append(dns.rrset.from_text(name, 300, "IN", "A", *addresses))
    return response


def test_only_the_answer_to_the_question_counts() -> None:
    asked = ask("example.com")
    query = upstream_query(asked, 99)
    good = _upstream_answer(asked, 99)
    assert read_upstream(good.to_wire(), query) is not None
    assert read_upstream(_upstream_answer(asked, 98).to_wire(), query) is None
    assert read_upstream(_upstream_answer(ask("example.org"), 99).to_wire(), query) is None
    assert read_upstream(query.to_wire(), query) is None
    assert read_upstream(good.to_wire()[:-3], query) is None
    assert read_upstream(b"", query) is None


def _reader(class_: int, type: int) -> str | None:
    """What dnspython reads a record of these by; None if it has to look for it first."""
    found = dns.rdata.get_rdata_class(class_, type, use_generic=False)  # type: ignore[no-untyped-call]
    return found and str(found.__name__)


@pytest.mark.parametrize("class_", [7, dns.rdataclass.ANY])
def test_no_record_of_a_stranger_changes_how_others_are_read(class_: int) -> None:
    """dnspython would read PX of IN as unknown bytes from then on; found by fuzzing, with SRV."""
    record = b"\0" + struct.pack("!HHIH", dns.rdatatype.PX, class_, 60, 1) + b"x"
    wire = _header(0x0100, 1, 0, 0, 1) + _QUESTION + record
    assert read(wire, udp=True) == failure(ask("one", id=0x1234), dns.rcode.FORMERR)[:4] + bytes(8)

    asked = ask("example.com")
    query = upstream_query(asked, 99)
    good = _upstream_answer(asked, 99).to_wire()
    assert read_upstream(good, query) is not None
    for section in (7, 9, 11):  # the lower byte of each count
        counted = bytearray(good)
        counted[section] += 1
        assert read_upstream(bytes(counted) + record, query) is None

    assert _reader(class_, dns.rdatatype.PX) is None
    assert _reader(dns.rdataclass.IN, dns.rdatatype.PX) == "PX"


def test_a_question_may_be_signed() -> None:
    """RFC 2931, section 3. Nobody looks at the signature."""
    data = bytes(18) + b"\0" + b"signature"
    record = (
        b"\0" + struct.pack("!HHIH", dns.rdatatype.SIG, dns.rdataclass.ANY, 0, len(data)) + data
    )
    assert isinstance(read(_header(0x0100, 1, 0, 0, 1) + _QUESTION + record, udp=True), Asked)


def test_relay_fits_the_answer_to_the_asker() -> None:
    asked = ask("example.com", id=77)
    upstream = _upstream_answer(asked, 99)
    upstream.flags |= dns.flags.AD
    response = dns.message.from_wire(relay(asked, upstream))
    assert response.id == 77
    assert response.edns == -1
    assert response.flags & dns.flags.AD
    assert not response.flags & dns.flags.AA
    assert str(response.answer[0]) == "example.com. 300 IN A 192.0.2.1"
    big = relay(asked, _upstream_answer(asked, 99, records=60))
    assert len(big) <= 512
    assert dns.message.from_wire(big).flags & dns.flags.TC


def test_describe(names: Names) -> None:
    answer = names.answer(ask("one", "ANY").question, (NET,))
    assert describe(answer.records) == ["A 10.1.0.2", "AAAA fd00::2"]


def test_a_question_of_the_largest_size_is_read() -> None:
    query = dns.message.make_query("one", "A", use_edns=0)
    padding = QUESTION_BYTES_MAX - len(query.to_wire()) - 4
    query.use_edns(0, options=[dns.edns.GenericOption(dns.edns.OptionType.PADDING, bytes(padding))])
    wire = query.to_wire(max_size=65535)
    assert len(wire) == QUESTION_BYTES_MAX
    assert isinstance(read(wire, udp=True), Asked)
