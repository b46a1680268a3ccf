"""Answers as the benchmark reads them off the wire, against dnspython's."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from tests.bench import lookups


def _answer(rcode: dns.rcode.Rcode, *records: str) -> bytes:
    message = dns.message.make_response(dns.message.from_wire(lookups.question(7, "far.bench")))
    message.set_rcode(rcode)
    for record in records:
        message.answer.append(dns.rrset.from_text("far.bench.", 5, "IN", *record.split(" ", 1)))
    return message.to_wire()


def test_a_question_is_what_it_says() -> None:
    asked = dns.message.from_wire(lookups.question(7, "far.bench"))
    assert (asked.id, asked.question[0].to_text()) == (7, "far.bench. IN A")
    assert asked.flags == dns.flags.RD


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (_answer(dns.rcode.NOERROR, "A 10.64.0.2"), lookups.Answer(7, "10.64.0.2", True)),
        (
            _answer(dns.rcode.NOERROR, "CNAME other.bench.", "A 10.64.0.3"),
            lookups.Answer(7, "10.64.0.3", True),
        ),
        (_answer(dns.rcode.NOERROR), lookups.Answer(7, "", True)),
        (_answer(dns.rcode.NXDOMAIN), lookups.Answer(7, "", True)),
        (_answer(dns.rcode.SERVFAIL), lookups.Answer(7, "", False)),
        (_answer(dns.rcode.REFUSED), lookups.Answer(7, "", False)),
    ],
)
def test_a_name_is_gone_only_if_the_server_says_so(data: bytes, expected: lookups.Answer) -> None:
    assert lookups.read_answer(data) == expected


def test_what_is_no_answer_is_none() -> None:
    whole = _answer(dns.rcode.NOERROR, "A 10.64.0.2")
    assert lookups.read_answer(lookups.question(7, "far")) is None
    for length in range(len(whole)):
        found = lookups.read_answer(whole[:length])
        assert found is None or not found.address
