"""How events are asked for and shown."""

from __future__ import annotations

import datetime

import pytest

from agent.cli.events import describe, parse_since
from agent.errors import Invalid
from agent.rpc import control_pb2 as pb
from agent.rpc import types_pb2 as types

NOON = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0.0)),
        ("1761", (1761, 0.0)),
        ("10m", (0, NOON - 600)),
        ("1h30m", (0, NOON - 5400)),
        ("1.5s", (0, NOON - 1.5)),
        ("2d", (0, NOON - 172800)),
        ("2026-05-01T11:00:00Z", (0, NOON - 3600)),
        ("2026-05-01T13:00:00+02:00", (0, NOON - 3600)),
    ],
)
def test_since(text: str, expected: tuple[int, float]) -> None:
    assert parse_since(text, NOON) == expected


@pytest.mark.parametrize("text", ["ten", "-1", "10x", "m", "2026-05-01T11:00:00", "٣"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(Invalid, match="is no duration, time or revision"):
        parse_since(text, NOON)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            pb.Event(action="update", node=types.Node(name="h2", state="suspect", reason="silent")),
            ("node.update", "h2", "suspect (silent)"),
        ),
        (pb.Event(action="remove", node=types.Node(id="ab")), ("node.remove", "ab", "")),
        (
            pb.Event(
                action="create", network=types.Network(name="web", vni=7, subnets=["10.1.0.0/24"])
            ),
            ("network.create", "web", "VNI 7, 10.1.0.0/24"),
        ),
        (
            pb.Event(
                action="remove",
                endpoint=types.Endpoint(
                    name="db", network="web", node="h1", addresses=["10.1.0.2", "fd00::2"]
                ),
            ),
            ("endpoint.remove", "web/db", "10.1.0.2, fd00::2 on h1"),
        ),
        (
            pb.Event(
                action="notice",
                notice=pb.Notice(kind="space.low", message="80 %", fields={"network": "web"}),
            ),
            ("space.low", "web", "80 %"),
        ),
        (pb.Event(notice=pb.Notice(kind="a.b", message="c")), ("a.b", "-", "c")),
    ],
)
def test_an_event_for_people(event: pb.Event, expected: tuple[str, str, str]) -> None:
    assert describe(event) == expected
