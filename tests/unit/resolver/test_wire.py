"""resolver/wire.py, table.py and cache.py beside dnspython, which says what is right."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.names import Kind, Names, Record, Srv
from agent.core.question import SRV, A, Question
from agent.notation import parse_address
from agent.resolver import table as ready_table
from agent.resolver.cache import ENTRIES_MAX, TTL_MAX, Cache
from agent.resolver.messages import read, relay
from agent.resolver.table import Ready, Table
from agent.resolver.wire import Asked, build, name_wire, read_plain

LABELS = st.lists(st.binary(min_size=1, max_size=63), max_size=5)
NET = "d" * 16


@given(
    labels=LABELS,
    type=st.integers(1, 127),
    flags=st.sampled_from([0, dns.flags.RD, dns.flags.AD | dns.flags.RD, dns.flags.CD]),
    edns=st.sampled_from([None, (512, 0), (4096, dns.flags.DO), (0, 0)]),
)
def test_what_is_read_by_hand_is_what_dnspython_reads(
    labels: list[bytes], type: int, flags: int, edns: tuple[int, int] | None
) -> None:
    message = dns.message.make_query(dns.name.Name([*labels, b""]), dns.rdatatype.RdataType(type))
    message.flags = dns.flags.Flag(flags)
    if edns is not None:
        message.use_edns(0, edns[1], edns[0])
    wire = message.to_wire()
    found = read_plain(wire, udp=True)
    if type == 41:
        assert found is None
        return
    assert found is not None and found.plain
    by_other = dns.message.from_wire(wire)
    name = by_other.question[0].name
    lowered = tuple(label.lower().decode("latin-1") for label in name.labels[:-1])
    assert found.question == Question(lowered, int(by_other.question[0].rdtype))
    end = 12 + len(found.section)
    assert found.section == wire[12:end]
    assert dns.message.from_wire(wire[:10] + b"\0\0" + wire[12:end]).question == by_other.question
    assert (found.edns, found.do) == (by_other.edns == 0, bool(by_other.ednsflags & dns.flags.DO))
    assert found.message == by_other


@given(st.binary(max_size=80))
def test_read_by_hand_never_fails_and_accepts_only_what_dnspython_does(wire: bytes) -> None:
    head = b"\0\7\1\0\0\1" + bytes(6)
    found = read_plain(head + wire, udp=True)
    if found is not None:
        assert len(dns.message.from_wire(head + wire).question) == 1


def ask(name: str, type: str = "A", **options: object) -> Asked:
    asked = read(dns.message.make_query(name, type, **options).to_wire(), udp=True)  # type: ignore[arg-type]
    assert isinstance(asked, Asked)
    return asked


def test_additional_records_without_room_are_left_out_without_tc() -> None:
    targets = [f"{'x' * 60}{n:02}.demo" for n in range(5)]
    records = tuple(Record(SRV, Srv(0, 1, 80, target)) for target in targets)
    more = tuple((target, Record(A, bytes((10, 0, 0, 1)))) for target in targets)
    names = Names().answer(Question(("localhost",), A), ())
    answer = names._replace(kind=Kind.ANSWER, records=records, additional=more)
    response = dns.message.from_wire(build(ask("_80._tcp.x", "SRV"), answer))
    assert len(response.answer[0]) == 5 and len(response.additional) < 5
    assert not response.flags & dns.flags.TC


def test_name_wire_is_dnspythons() -> None:
    for text in ("", "a", "one.demo.vxmesh.internal"):
        assert name_wire(text) == dns.name.from_text(text + ".").to_wire()


SOURCE, VIEW, ONE = b"\x0a\1\0\2", (NET,), Question(("one",), A)


def test_an_answer_of_several_is_ready_when_each_turn_was_made() -> None:
    table = Table()
    for turn in range(3):
        assert table.turn(VIEW, b"key") == (turn or None)
        table.put(SOURCE, VIEW, ONE, b"key", bytes((turn,)) * (turn + 1), 0, 3)
    entry = table.by_source[SOURCE][b"key"]
    assert isinstance(entry, Ready)
    sizes = [int.from_bytes(next(entry.turns)[8:16], "little") for _ in range(5)]
    assert sizes == [1, 2, 3, 1, 2]
    assert table.turn(VIEW, b"key") is None


def test_what_is_stale_is_forgotten_and_nothing_else() -> None:
    table = Table()
    table.put(SOURCE, VIEW, ONE, b"1", b"one", 0, 1)
    table.put(SOURCE, VIEW, Question(("tasks", "web"), A), b"2", b"tasks", 0, 1)
    table.put(SOURCE, VIEW, Question(("_80", "_tcp", "web", "demo"), SRV), b"3", b"srv", 0, 1)
    table.put(
        SOURCE, VIEW, Question(("2", "0", "1", "10", "in-addr", "arpa"), 12), b"4", b"p", 0, 1
    )
    answers = table.by_source[SOURCE]
    table.forget({"other"})
    assert set(answers) == {b"1", b"2", b"3", b"4"}
    table.forget({"web"})
    assert set(answers) == {b"1", b"4"}
    table.forget({parse_address("10.1.0.2")})
    assert set(answers) == {b"1"}


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_table, "ANSWERS_MAX", 10)
    table = Table()
    for n in range(35):
        table.put(SOURCE, VIEW, Question((f"n{n}",), A), f"{n}".encode(), b"x", 0, 1)
        assert len(table.by_source[SOURCE]) <= 10


def upstream(name: str, rcode: int = 0, ttl: int = 60, soa: tuple[int, int] | None = None) -> dns.message.Message:  # fmt: skip  # noqa: E501
    message = dns.message.make_response(dns.message.make_query(name, "A"))
    message.set_rcode(dns.rcode.Rcode(rcode))
    if not rcode and soa is None:
        message.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", "CNAME", "to.test."))
        message.answer.append(dns.rrset.from_text("to.test.", ttl * 2, "IN", "A", "192.0.2.1"))
    if soa is not None:
        text = f"ns.test. root.test. 1 2 3 4 {soa[1]}"
        message.authority.append(dns.rrset.from_text("test.", soa[0], "IN", "SOA", text))
    return message


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (upstream("x.test"), 60),
        (upstream("x.test", ttl=0), 0),
        (upstream("x.test", ttl=1 << 30), TTL_MAX),
        (upstream("x.test", 3, soa=(50, 30)), 30),
        (upstream("x.test", 3, soa=(20, 30)), 20),
        (upstream("x.test", 0, soa=(20, 30)), 20),
        (upstream("x.test", 3), 0),
        (upstream("x.test", 2), 0),
        (upstream("x.test", 5), 0),
    ],
)
def test_an_answer_is_kept_as_long_as_it_may_be(answer: dns.message.Message, seconds: int) -> None:
    cache = Cache()
    asked = ask("X.test")
    cache.put(asked, answer, now=100.0)
    assert len(cache) == (seconds > 0)
    if seconds:
        first = cache.get(asked, 100.0)
        assert first is not None
        assert dns.message.from_wire(first) == dns.message.from_wire(relay(asked, answer))
        late = cache.get(asked, 100.0 + seconds - 0.5)
        assert late is not None
        message = dns.message.from_wire(late)
        assert min(r.ttl for r in (*message.answer, *message.authority)) >= 1
    assert cache.get(asked, 100.0 + seconds) is None
    assert len(cache) == 0


def test_what_is_kept_is_given_as_it_is_asked_for() -> None:
    cache = Cache()
    cache.put(ask("x.test"), upstream("x.test"), 0.0)
    wire = cache.get(ask("X.TEST", use_edns=0, id=77), 10.0)
    assert wire is not None
    message = dns.message.from_wire(wire)
    assert (message.id, message.edns) == (77, 0)
    assert message.question[0].name.to_text() == "X.TEST."
    assert [rrset.ttl for rrset in message.answer] == [50, 110]
    assert cache.get(ask("x.test", want_dnssec=True), 10.0) is None  # its answer has signatures
    assert cache.get(ask("x.test", "AAAA"), 10.0) is None


def test_of_too_many_those_that_nobody_asks_for_go() -> None:
    cache = Cache()
    for n in range(ENTRIES_MAX):
        cache.put(ask(f"{n}.test"), upstream(f"{n}.test"), 0.0)
    assert cache.get(ask("0.test"), 1.0)
    cache.put(ask("more.test"), upstream("more.test"), 1.0)
    assert len(cache) == ENTRIES_MAX
    assert cache.get(ask("0.test"), 1.0) and cache.get(ask("1.test"), 1.0) is None
