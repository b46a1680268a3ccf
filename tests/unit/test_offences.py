"""What operators hear of sandboxes that send what is not theirs, and how often."""

from __future__ import annotations

from agent.model import Network, Sandbox
from agent.offences import TELL_EVERY, Offences
from agent.requests import parse_endpoint
from tests.unit.test_conflicts import Half


def with_sandbox() -> tuple[Half, Network, str]:
    node = Half(1)
    network = node.make()
    sandbox = Sandbox("5" * 16, "box", "/proc/1/ns/net", 1, 1, 1, 0.0)
    endpoint = node.create_endpoint(network.id, parse_endpoint("e"), sandbox.id)
    node.put_sandbox(Sandbox("5" * 16, "box", "/x", 1, 1, 1, 0.0, (endpoint.id,), ("eth0",)))
    return node, network, endpoint.id


def test_the_first_is_told_at_once_and_names_the_sandbox() -> None:
    node, _, endpoint = with_sandbox()
    Offences(node).note(endpoint, 12, 0, ("arp", "gateway"))
    (notice,) = node.notices
    assert notice.kind == "guard.refused"
    assert "sandbox box sent 12 frames in network web" in notice.message
    assert notice.fields == {
        "sandbox": "box",
        "endpoint": endpoint,
        "network": "web",
        "count": "12",
        "reasons": "arp",
    }


def test_of_one_who_goes_on_it_is_told_once_a_minute_with_all_that_came() -> None:
    node, _, endpoint = with_sandbox()
    offences = Offences(node)
    for second in range(0, 121, 5):
        node.now = 1000.0 + second
        offences.note(endpoint, 10, 0, ("mac",))
    counts = [notice.fields["count"] for notice in node.notices]
    assert TELL_EVERY == 60.0 and counts == ["10", "120", "120"]


def test_a_flood_is_a_notice_of_its_own() -> None:
    node, _, endpoint = with_sandbox()
    Offences(node).note(endpoint, 0, 98_000, ("gateway",))
    (notice,) = node.notices
    assert notice.kind == "guard.flood" and notice.fields["count"] == "98000"


def test_broadcast_beyond_the_limit_is_another_one() -> None:
    node, _, endpoint = with_sandbox()
    offences = Offences(node)
    offences.note(endpoint, 0, 0, ("flood",), groups=400)
    node.now += TELL_EVERY
    offences.note(endpoint, 3, 0, ("flood", "mac"))
    told = [(notice.kind, notice.fields["count"]) for notice in node.notices]
    assert told == [("guard.broadcast", "400"), ("guard.refused", "3")]
    assert node.notices[1].fields["reasons"] == "mac"


def test_who_is_gone_is_not_told_of_and_not_remembered() -> None:
    node, _, endpoint = with_sandbox()
    offences = Offences(node)
    offences.note(endpoint, 1, 0, ("mac",))
    node.drop_sandbox("5" * 16)
    node.notices.clear()
    offences.note("e" * 16, 5, 0, ("mac",))
    assert node.notices == [] and endpoint not in offences._records
