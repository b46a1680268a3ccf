"""core/names.py: what is said about services, and whose answers a change makes stale."""

from __future__ import annotations

import pytest

from agent.core.explaining import explain
from agent.core.names import ZONE, Answer, Kind, Names, Srv
from agent.core.nametables import ServiceBackend, ServicePort
from agent.core.question import AAAA, PTR, SRV, A, parse_question
from agent.notation import format_address, parse_address

DEMO, BACK = "d" * 16, "b" * 16
HTTP, DNS = ServicePort("tcp", 80, 8080, "http"), ServicePort("udp", 53, 5353)
VIPS = (parse_address("10.1.0.100"), parse_address("fd00:1::100"))


def backends(*numbers: int) -> tuple[ServiceBackend, ...]:
    return tuple(ServiceBackend(str(number) * 16, number) for number in numbers)


@pytest.fixture
def names() -> Names:
    """demo: endpoints w1, w2, w3; web by a VIP, all in turn by w1 and w2, none without backends."""
    made = Names()
    made.put_network(DEMO, "demo", ("10.1.0.0/24", "fd00:1::/64"))
    made.put_network(BACK, "back", ("10.2.0.0/24",))
    for n in (1, 2, 3):
        made.put(DEMO, str(n) * 16, f"w{n}", ("all",), (parse_address(f"10.1.0.{n}"),))
    made.put_service(DEMO, "s1", "Web", VIPS, backends(1, 2), (HTTP, DNS))
    made.put_service(DEMO, "s2", "all", (), backends(1, 2), (HTTP,))
    made.put_service(DEMO, "s3", "none", (), (), (HTTP,))
    return made


def ask(names: Names, text: str, type: int = A, turn: int = 0, view: str = DEMO) -> Answer:
    return names.answer(parse_question(text, type), (view,), turn)


def found(answer: Answer) -> list[str]:
    assert answer.kind is Kind.ANSWER, answer
    return [format_address(r.data) for r in answer.records if isinstance(r.data, bytes)]


FORMS = ["", ".demo", f".demo.{ZONE}"]


@pytest.mark.parametrize("form", FORMS)
def test_a_name_leads_to_the_vips_or_to_the_backends_in_turn(names: Names, form: str) -> None:
    assert found(ask(names, f"web{form}")) == ["10.1.0.100"]
    assert found(ask(names, f"web{form}", AAAA)) == ["fd00:1::100"]
    assert found(ask(names, f"all{form}")) == ["10.1.0.1", "10.1.0.2"]  # the alias is hidden
    assert found(ask(names, f"all{form}", turn=1)) == ["10.1.0.2", "10.1.0.1"]
    assert found(ask(names, f"tasks.web{form}", turn=1)) == ["10.1.0.2", "10.1.0.1"]
    assert ask(names, f"none{form}").kind is Kind.NODATA
    assert ask(names, f"tasks.none{form}").kind is Kind.NODATA
    assert ask(names, f"tasks.w1{form}").kind is Kind.NXDOMAIN
    assert ask(names, f"x.web{form or '.demo'}").kind is Kind.NXDOMAIN


@pytest.mark.parametrize("form", FORMS)
def test_srv_says_the_port_and_where_its_targets_are(names: Names, form: str) -> None:
    for label in ("_80", "_http"):
        answer = ask(names, f"{label}._tcp.web{form}", SRV)
        assert [r.data for r in answer.records] == [Srv(0, 1, 80, f"web.demo.{ZONE}")]
        assert [(name, record.data) for name, record in answer.additional] == [
            (f"web.demo.{ZONE}", vip) for vip in VIPS
        ]
    answer = ask(names, f"_80._tcp.all{form}", SRV)
    assert [r.data for r in answer.records] == [
        Srv(0, 1, 8080, f"w1.demo.{ZONE}"),
        Srv(0, 2, 8080, f"w2.demo.{ZONE}"),
    ]
    for name, record in answer.additional:
        assert ask(names, name).records == (record,)
    assert ask(names, f"_53._udp.web{form}", SRV).kind is Kind.ANSWER
    assert ask(names, f"_53._tcp.web{form}", SRV).kind is Kind.NXDOMAIN
    assert ask(names, f"_80._udp.web{form}", SRV).kind is Kind.NXDOMAIN
    assert ask(names, f"_80._tcp.web{form}", A).kind is Kind.NODATA
    assert ask(names, f"_tcp.web{form or '.demo'}", A).kind is Kind.NODATA
    assert ask(names, f"_80._tcp.none{form}", SRV).kind is Kind.NODATA


def test_a_vip_leads_back_to_its_service(names: Names) -> None:
    (record,) = ask(names, "10.1.0.100", PTR).records
    assert record.data == f"web.demo.{ZONE}"
    names.drop_service(DEMO, "s1")
    assert ask(names, "10.1.0.100", PTR).kind is Kind.NXDOMAIN


def test_another_networks_services_are_not_seen(names: Names) -> None:
    assert ask(names, "web", view=BACK).kind is Kind.NXDOMAIN
    assert ask(names, f"tasks.web.demo.{ZONE}", view=BACK).kind is Kind.NXDOMAIN
    assert ask(names, "_80._tcp.web", SRV, view=BACK).kind is Kind.NXDOMAIN
    assert ask(names, "10.1.0.100", PTR, view=BACK).kind is Kind.NXDOMAIN


def test_an_unhealthy_backend_leaves_the_service_and_keeps_its_own_name(names: Names) -> None:
    names.put_service(DEMO, "s2", "all", (), backends(2), (HTTP,))
    assert found(ask(names, "all")) == found(ask(names, "tasks.all")) == ["10.1.0.2"]
    assert found(ask(names, "w1")) == ["10.1.0.1"]


def test_a_backend_whose_node_is_gone_is_in_no_answer(names: Names) -> None:
    names.drop(DEMO, "1" * 16)
    assert found(ask(names, "all")) == found(ask(names, "tasks.web")) == ["10.1.0.2"]
    assert len(ask(names, "_80._tcp.all", SRV).records) == 1


def test_names_of_services_that_are_gone_do_not_leave_the_host(names: Names) -> None:
    names.drop_service(DEMO, "s1")
    assert ask(names, "tasks.web").kind is Kind.NXDOMAIN
    assert ask(names, "tasks.org").kind is Kind.FORWARD  # a public name
    assert ask(names, "_80._tcp.nothing", SRV).kind is Kind.NXDOMAIN
    assert ask(names, "_80._tcp.example.com", SRV).kind is Kind.FORWARD


def test_an_endpoint_called_tasks_and_a_network_called_as_a_service(names: Names) -> None:
    names.put(BACK, "9" * 16, "tasks", (), (parse_address("10.2.0.9"),))
    names.put_service(DEMO, "s4", "back", (), backends(3))
    both = (DEMO, BACK)
    assert found(names.answer(parse_question("tasks.back", A), both)) == ["10.2.0.9"]
    names.drop(BACK, "9" * 16)
    assert found(names.answer(parse_question("tasks.back", A), both)) == ["10.1.0.3"]


def test_order_does_not_matter() -> None:
    made = Names()
    made.put_service(DEMO, "s1", "web", (), backends(1))
    made.put(DEMO, "1" * 16, "w1", (), (parse_address("10.1.0.1"),))
    made.put_network(DEMO, "demo", ("10.1.0.0/24",))
    assert found(ask(made, "web.demo")) == ["10.1.0.1"]
    made.drop_network(DEMO)
    assert made.counts()["services"] == 0


def test_stale_is_what_changed_and_what_is_made_of_it(names: Names) -> None:
    names.watch()
    names.put(DEMO, "9" * 16, "new", ("also",), (parse_address("10.1.0.9"),))
    assert names.take_stale().names == {"new", "also", parse_address("10.1.0.9")}
    names.put(DEMO, "9" * 16, "new", ("also",), (parse_address("10.1.0.9"),))
    assert not any(names.take_stale())
    names.drop(DEMO, "1" * 16)
    assert names.take_stale().names == {"w1", "all", "web", parse_address("10.1.0.1")}
    names.put_service(DEMO, "s2", "each", (), backends(2))
    assert names.take_stale().names == {"all", "each"}
    names.put_network(DEMO, "demo", ("10.1.0.0/24",))
    assert names.take_stale().everything
    names.put_view(parse_address("10.1.0.1"), (DEMO,))
    assert names.take_stale().views
    assert not any(names.take_stale())


def test_explained(names: Names) -> None:
    lines = explain(names, parse_question("all", A), (DEMO,))
    assert "service all in network demo: no VIP, 2 of its backends take connections" in lines
    assert any("w2 (also all), 10.1.0.2" in line for line in lines)
    assert any("10.1.0.100" in line for line in explain(names, parse_question("web", A), (DEMO,)))
    lines = explain(names, parse_question("_80._tcp.web", SRV), (BACK,))
    assert "network demo has the name web, but the asker is not in it" in lines
