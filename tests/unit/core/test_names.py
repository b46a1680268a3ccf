"""core/names.py and core/question.py: who sees which name, and what is said to whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.explaining import explain
from agent.core.names import TTL, ZONE, Kind, Names, Record
from agent.core.nametables import HOLDERS_MAX
from agent.core.question import (
    AAAA,
    ANY,
    PTR,
    SOA,
    A,
    Question,
    parse_question,
    reverse_labels,
    reverse_prefix,
)
from agent.core.resolvconf import resolv_conf
from agent.errors import Invalid
from agent.notation import parse_address

MX, TXT = 15, 16
DEMO, BACK, SHUT = "d" * 16, "b" * 16, "5" * 16
BOTH = (DEMO, BACK)


def addresses(*texts: str) -> tuple[bytes, ...]:
    return tuple(parse_address(text) for text in texts)


@pytest.fixture
def names() -> Names:
    """demo: one, two, old (v4 only), alias web of one and two; back: two, db; shut: safe."""
    made = Names()
    made.put_network(DEMO, "demo", ("10.1.0.0/24", "fd00:1::/64"))
    made.put_network(BACK, "Back", ("10.2.0.0/20",))
    made.put_network(SHUT, "shut", ("10.3.0.0/26",), internal=True)
    made.put(DEMO, "1" * 16, "one", ("web", "first"), addresses("10.1.0.2", "fd00:1::2"))
    made.put(DEMO, "2" * 16, "two", ("web",), addresses("10.1.0.3", "fd00:1::3"))
    made.put(DEMO, "3" * 16, "old", (), addresses("10.1.0.4"))
    made.put(BACK, "4" * 16, "two", (), addresses("10.2.1.7"))
    made.put(BACK, "6" * 16, "db", (), addresses("10.2.15.8"))
    made.put(SHUT, "7" * 16, "safe", (), addresses("10.3.0.5"))
    made.put_view(parse_address("10.1.0.2"), (DEMO,))
    return made


@pytest.mark.parametrize(
    ("text", "type", "view", "kind", "data", "zone"),
    [
        # the three forms of a name, in any case, with and without the last dot
        ("one", A, (DEMO,), Kind.ANSWER, ["10.1.0.2"], None),
        ("ONE.", A, (DEMO,), Kind.ANSWER, ["10.1.0.2"], None),
        ("one.demo", A, (DEMO,), Kind.ANSWER, ["10.1.0.2"], None),
        ("One.Demo.VXmesh.Internal.", A, (DEMO,), Kind.ANSWER, ["10.1.0.2"], None),
        ("db.back", A, BOTH, Kind.ANSWER, ["10.2.15.8"], None),
        ("one", AAAA, (DEMO,), Kind.ANSWER, ["fd00:1::2"], None),
        ("one", ANY, (DEMO,), Kind.ANSWER, ["10.1.0.2", "fd00:1::2"], None),
        # aliases, shared ones too
        ("first.demo", A, (DEMO,), Kind.ANSWER, ["10.1.0.2"], None),
        ("web", A, (DEMO,), Kind.ANSWER, ["10.1.0.2", "10.1.0.3"], None),
        ("web.demo", AAAA, (DEMO,), Kind.ANSWER, ["fd00:1::2", "fd00:1::3"], None),
        # one name in two networks: the first of the view counts, the long form chooses
        ("two", A, BOTH, Kind.ANSWER, ["10.1.0.3"], None),
        ("two", A, (BACK, DEMO), Kind.ANSWER, ["10.2.1.7"], None),
        ("two.back", A, BOTH, Kind.ANSWER, ["10.2.1.7"], None),
        # the name exists, the type does not
        ("old", AAAA, (DEMO,), Kind.NODATA, [], "old"),
        ("old.demo", MX, (DEMO,), Kind.NODATA, [], "demo"),
        (f"old.demo.{ZONE}", TXT, (DEMO,), Kind.NODATA, [], ZONE),
        # what lies between exists (RFC 8020)
        ("demo", A, (DEMO,), Kind.NODATA, [], "demo"),
        (f"demo.{ZONE}", A, (DEMO,), Kind.NODATA, [], ZONE),
        (ZONE, A, (), Kind.NODATA, [], ZONE),
        ("internal", A, (DEMO,), Kind.NODATA, [], "internal"),
        # no such name, and we are the ones to say so
        ("three", A, (DEMO,), Kind.NXDOMAIN, [], ""),
        ("three.demo", A, (DEMO,), Kind.NXDOMAIN, [], "demo"),
        ("www.one.demo", A, (DEMO,), Kind.NXDOMAIN, [], "demo"),
        (f"three.demo.{ZONE}", A, (DEMO,), Kind.NXDOMAIN, [], ZONE),
        (f"www.one.demo.{ZONE}", A, (DEMO,), Kind.NXDOMAIN, [], ZONE),
        (f"one.{ZONE}", A, (DEMO,), Kind.NXDOMAIN, [], ZONE),
        # names of networks that the asker is not in
        ("db", A, (DEMO,), Kind.NXDOMAIN, [], ""),
        (f"db.back.{ZONE}", A, (DEMO,), Kind.NXDOMAIN, [], ZONE),
        (f"back.{ZONE}", A, (DEMO,), Kind.NXDOMAIN, [], ZONE),
        ("db.back", A, (DEMO,), Kind.FORWARD, [], None),
        ("one", A, (), Kind.NXDOMAIN, [], ""),
        (f"one.demo.{ZONE}", A, (), Kind.NXDOMAIN, [], ZONE),
        # not ours
        ("example.com", A, (DEMO,), Kind.FORWARD, [], None),
        ("vxmesh.internal.example.com", A, (DEMO,), Kind.FORWARD, [], None),
        ("notvxmesh.internal", A, (DEMO,), Kind.FORWARD, [], None),
        (".", TXT, (DEMO,), Kind.FORWARD, [], None),
        # not ours, and no way out: strangers, and who is in internal networks only
        ("example.com", A, (), Kind.REFUSED, [], None),
        ("example.com", A, ("f" * 16,), Kind.REFUSED, [], None),
        ("example.com", A, (SHUT,), Kind.REFUSED, [], None),
        ("example.com", A, (SHUT, DEMO), Kind.FORWARD, [], None),
        ("safe", A, (SHUT,), Kind.ANSWER, ["10.3.0.5"], None),
        # localhost is nobody else's, whoever asks
        ("localhost", A, (), Kind.ANSWER, ["127.0.0.1"], None),
        ("a.localhost", AAAA, (DEMO,), Kind.ANSWER, ["::1"], None),
        ("localhost", MX, (DEMO,), Kind.NODATA, [], "localhost"),
    ],
)
def test_answers(
    names: Names,
    text: str,
    type: int,
    view: tuple[str, ...],
    kind: Kind,
    data: list[str],
    zone: str | None,
) -> None:
    answer = names.answer(parse_question(text, type), view)
    assert answer.kind is kind
    assert [record.data for record in answer.records] == [parse_address(each) for each in data]
    if zone is not None:
        assert answer.zone == zone


@pytest.mark.parametrize(
    ("address", "view", "kind", "target", "zone"),
    [
        ("10.1.0.2", (DEMO,), Kind.ANSWER, f"one.demo.{ZONE}", "0.1.10.in-addr.arpa"),
        ("10.2.15.8", BOTH, Kind.ANSWER, f"db.back.{ZONE}", "2.10.in-addr.arpa"),
        ("fd00:1::3", (DEMO,), Kind.ANSWER, f"two.demo.{ZONE}", None),
        # ours, but nobody's; or somebody's whom the asker does not see
        ("10.1.0.99", (DEMO,), Kind.NXDOMAIN, None, "0.1.10.in-addr.arpa"),
        ("10.3.0.5", (DEMO,), Kind.NXDOMAIN, None, "0.3.10.in-addr.arpa"),
        ("10.1.0.2", (), Kind.NXDOMAIN, None, "0.1.10.in-addr.arpa"),
        # the neighbours of our subnets are not ours
        ("10.1.1.2", (DEMO,), Kind.FORWARD, None, None),
        ("10.2.16.1", (DEMO,), Kind.FORWARD, None, None),
        ("10.3.0.64", (DEMO,), Kind.FORWARD, None, None),
        ("fd00:1:0:1::2", (DEMO,), Kind.FORWARD, None, None),
        ("8.8.8.8", (DEMO,), Kind.FORWARD, None, None),
        ("8.8.8.8", (SHUT,), Kind.REFUSED, None, None),
    ],
)
def test_reverse(
    names: Names,
    address: str,
    view: tuple[str, ...],
    kind: Kind,
    target: str | None,
    zone: str | None,
) -> None:
    answer = names.answer(parse_question(address, PTR), view)
    assert answer.kind is kind
    assert list(answer.records) == ([Record(PTR, target)] if target else [])
    if zone is not None:
        assert answer.zone == zone


@pytest.mark.parametrize(
    ("text", "type", "kind"),
    [
        ("2.0.1.10.in-addr.arpa", A, Kind.NODATA),
        ("2.0.1.10.IN-ADDR.ARPA.", PTR, Kind.ANSWER),
        ("2.0.1.10.in-addr.arpa", ANY, Kind.ANSWER),
        ("0.1.10.in-addr.arpa", PTR, Kind.NODATA),  # lies between
        ("1.10.in-addr.arpa", PTR, Kind.FORWARD),  # above our subnet
        ("x.2.0.1.10.in-addr.arpa", PTR, Kind.NXDOMAIN),  # below an address
        ("x.0.1.10.in-addr.arpa", PTR, Kind.NXDOMAIN),
        ("02.0.1.10.in-addr.arpa", PTR, Kind.NXDOMAIN),  # not how 2 is written
        ("256.0.1.10.in-addr.arpa", PTR, Kind.NXDOMAIN),
        ("x.168.192.in-addr.arpa", PTR, Kind.FORWARD),
        ("in-addr.arpa", PTR, Kind.FORWARD),
        ("g.ip6.arpa", PTR, Kind.FORWARD),
        ("e164.arpa", PTR, Kind.FORWARD),
    ],
)
def test_names_of_the_reverse_tree(names: Names, text: str, type: int, kind: Kind) -> None:
    assert names.answer(parse_question(text, type), (DEMO,)).kind is kind


def test_soa_of_the_zone(names: Names) -> None:
    answer = names.answer(parse_question(ZONE, SOA), (DEMO,))
    assert answer.kind is Kind.ANSWER
    assert answer.records == (Record(SOA, ""),)
    assert answer.zone == ZONE
    assert TTL == 5


def test_turns_rotate_and_repeat(names: Names) -> None:
    names.put(DEMO, "9" * 16, "three", ("web",), addresses("10.1.0.9"))
    question = parse_question("web", A)
    seen = [
        [record.data for record in names.answer(question, (DEMO,), turn).records]
        for turn in range(6)
    ]
    one, two, three = addresses("10.1.0.2", "10.1.0.3", "10.1.0.9")
    assert seen[:3] == [[one, two, three], [two, three, one], [three, one, two]]
    assert seen[3:] == seen[:3]


def test_order_does_not_depend_on_who_came_first() -> None:
    rows = [(f"{n:016x}", addresses(f"10.1.0.{n}")) for n in range(2, 12)]
    orders = []
    for order in (rows, rows[::-1]):
        names = Names()
        for id, address in order:
            names.put(DEMO, id, f"n{id}", ("all",), address)
        orders.append(names.answer(parse_question("all", A), (DEMO,)).records)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 10


def test_a_change_replaces_name_aliases_and_addresses(names: Names) -> None:
    names.put(DEMO, "1" * 16, "uno", ("web2",), addresses("10.1.0.20"))
    for gone in ("one", "first", "one.demo"):
        assert names.answer(parse_question(gone, A), (DEMO,)).kind is Kind.NXDOMAIN
    web = names.answer(parse_question("web", A), (DEMO,))
    assert [record.data for record in web.records] == list(addresses("10.1.0.3"))
    assert names.answer(parse_question("uno", A), (DEMO,)).kind is Kind.ANSWER
    assert names.answer(parse_question("10.1.0.2", PTR), (DEMO,)).kind is Kind.NXDOMAIN
    assert names.answer(parse_question("10.1.0.20", PTR), (DEMO,)).kind is Kind.ANSWER


def test_an_address_that_moved_on_survives_the_drop_of_its_first_holder(names: Names) -> None:
    names.put(DEMO, "a" * 16, "new", (), addresses("10.1.0.4"))
    names.drop(DEMO, "3" * 16)
    answer = names.answer(parse_question("10.1.0.4", PTR), (DEMO,))
    assert answer.records == (Record(PTR, f"new.demo.{ZONE}"),)


def test_a_network_that_goes_takes_its_names_and_subnets(names: Names) -> None:
    names.drop_network(DEMO)
    assert names.answer(parse_question("one.demo", A), BOTH).kind is Kind.FORWARD
    assert names.answer(parse_question("one", A), BOTH).kind is Kind.NXDOMAIN
    assert names.answer(parse_question("10.1.0.2", PTR), BOTH).kind is Kind.FORWARD
    assert names.answer(parse_question("two", A), BOTH).records[0].data == addresses("10.2.1.7")[0]
    names.drop_network(DEMO)


def test_a_network_that_is_renamed_or_gets_other_subnets(names: Names) -> None:
    names.put_network(DEMO, "prod", ("10.9.0.0/24",))
    assert names.answer(parse_question("one.prod", A), (DEMO,)).kind is Kind.ANSWER
    assert names.answer(parse_question("one.demo", A), (DEMO,)).kind is Kind.FORWARD
    assert names.answer(parse_question("10.9.0.77", PTR), (DEMO,)).kind is Kind.NXDOMAIN
    assert names.answer(parse_question("10.1.0.77", PTR), (DEMO,)).kind is Kind.FORWARD


def test_an_endpoint_may_come_before_its_network() -> None:
    names = Names()
    names.put(DEMO, "1" * 16, "one", (), addresses("10.1.0.2"))
    assert names.answer(parse_question("one", A), (DEMO,)).kind is Kind.ANSWER
    names.put_network(DEMO, "demo", ("10.1.0.0/24",))
    assert names.answer(parse_question("one.demo", A), (DEMO,)).kind is Kind.ANSWER


def test_the_holder_of_an_endpoint_without_network_goes_with_it() -> None:
    names = Names()
    names.put(DEMO, "1" * 16, "one", (), addresses("10.1.0.2"))
    names.drop(DEMO, "1" * 16)
    names.drop(DEMO, "1" * 16)
    assert names.counts() == {"networks": 0, "endpoints": 0, "services": 0, "views": 0}


def test_views(names: Names) -> None:
    asker = parse_address("10.1.0.2")
    assert names.view(asker) == (DEMO,)
    names.put_view(asker, BOTH)
    assert names.view(asker) == BOTH
    names.drop_view(asker)
    names.drop_view(asker)
    assert names.view(asker) == ()


def test_explain_says_who_asked_what_was_found_and_what_is_hidden(names: Names) -> None:
    found = "\n".join(explain(names, parse_question("web", A), (DEMO,)))
    assert "the asker is in network demo" in found
    assert "endpoint 1111111111111111 in network demo: one (also web, first), 10.1.0.2" in found
    assert "10.1.0.3" in found
    hidden = explain(names, parse_question("db", A), (DEMO,))
    assert "network back has the name db, but the asker is not in it" in hidden
    reverse = "\n".join(explain(names, parse_question("10.1.0.3", PTR), (DEMO,)))
    assert "endpoint 2222222222222222" in reverse
    assert "in no network" in explain(names, parse_question("one", A), ())[0]


_ENDPOINTS = st.tuples(
    st.sampled_from([DEMO, BACK]),
    st.sampled_from(["e1", "e2", "e3", "e4"]),
    st.sampled_from(["one", "two", "three"]),
    st.lists(st.sampled_from(["one", "two", "web", "all"]), max_size=3),
    st.lists(st.sampled_from(addresses("10.1.0.2", "10.1.0.3", "fd00:1::2")), max_size=2),
)


@given(
    st.lists(
        st.one_of(_ENDPOINTS, st.tuples(st.sampled_from([DEMO, BACK]), st.just("e1"))), max_size=30
    )
)
def test_increments_lead_where_a_fresh_start_would(
    steps: list[tuple[str, str, str, list[str], list[bytes]] | tuple[str, str]],
) -> None:
    """Whatever the order of puts and drops, names resolve as the endpoints that are left say."""
    names = Names()
    left: dict[tuple[str, str], tuple[str, list[str], list[bytes]]] = {}
    for step in steps:
        if len(step) == 2:
            names.drop(*step)
            left.pop(step, None)
        else:
            network, id, name, aliases, held = step
            names.put(network, id, name, tuple(aliases), tuple(held))
            left[network, id] = (name, aliases, held)
    for network in (DEMO, BACK):
        for label in ("one", "two", "three", "web", "all"):
            bearers = [
                held
                for (of, _), (name, aliases, held) in sorted(left.items())
                if of == network and label in (name, *aliases)
            ]
            expected = list(dict.fromkeys(address for held in bearers for address in held))
            answer = names.answer(Question((label,), ANY), (network,))
            assert [record.data for record in answer.records] == expected
            assert (answer.kind is Kind.NXDOMAIN) == (not bearers)


@given(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16))
def test_reverse_labels_and_back(address: bytes) -> None:
    prefix = reverse_prefix(reverse_labels(address))
    assert prefix is not None
    assert prefix.address == address
    assert not prefix.excess


@given(st.lists(st.text(min_size=1, max_size=5), max_size=6), st.integers(0, 65535))
def test_any_question_has_an_answer(labels: list[str], type: int) -> None:
    names = Names()
    names.put_network(DEMO, "demo", ("10.1.0.0/24",))
    for tail in ((), ("demo",), ("vxmesh", "internal"), ("in-addr", "arpa"), ("ip6", "arpa")):
        names.answer(Question((*labels, *tail), type), (DEMO,))
        explain(names, Question((*labels, *tail), type), (DEMO,))


@pytest.mark.parametrize("text", ["", "a..b", ".a", "x" * 64, ".".join(["abcdefg"] * 40), "ü.de"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        parse_question(text, A)


def test_resolv_conf() -> None:
    assert resolv_conf(["10.1.0.1", "fd00:1::1"], ["demo", "back"]) == (
        "nameserver 10.1.0.1\n"
        "nameserver fd00:1::1\n"
        "search demo.vxmesh.internal back.vxmesh.internal\n"
        "options ndots:0\n"
    )
    assert resolv_conf([], []) == "options ndots:0\n"


def test_resolv_conf_stays_within_what_c_libraries_take() -> None:
    text = resolv_conf([f"10.0.0.{n}" for n in range(9)], [f"{'n' * 60}{n}" for n in range(9)])
    assert text.count("nameserver") == 3
    assert max(map(len, text.splitlines())) < 256
    search = next(line for line in text.splitlines() if line.startswith("search"))
    assert search.split()[1:] == [f"{'n' * 60}{n}.{ZONE}" for n in range(3)]
    assert resolv_conf([], [f"n{n}" for n in range(9)]).count(ZONE) == 6


def test_of_a_name_that_thousands_share_some_are_told_and_all_of_them_in_turn() -> None:
    names = Names()
    names.put_network("w", "web", ("10.1.0.0/16",))
    for number in range(1000):
        names.put(
            "w", f"{number:04}", f"m{number}", ("all",), (b"\n\1" + number.to_bytes(2, "big"),)
        )
    told: set[object] = set()
    for turn in range(4):
        answer = names.answer(Question(("all",), 1), ("w",), turn)
        assert len(answer.records) == HOLDERS_MAX
        told.update(record.data for record in answer.records)
    assert len(told) == 1000
    for number in range(0, 1000, 2):
        names.drop("w", f"{number:04}")
    for number in range(1, 999, 2):
        names.put("w", f"{number:04}", f"m{number}", (), (b"\n\1\0\1",))
    answer = names.answer(Question(("all",), 1), ("w",), 7)
    assert [record.data for record in answer.records] == [b"\n\1" + (999).to_bytes(2, "big")]
