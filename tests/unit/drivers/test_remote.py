"""What a plugin may answer to Join, and what is made of it."""

from __future__ import annotations

import pytest

from agent.drivers.remote import Joined, parse_join, parse_scope
from agent.errors import Invalid


@pytest.mark.parametrize(
    ("answer", "joined"),
    [
        (b"", Joined("", "eth", (), ())),
        (b'{"InterfaceName": null, "StaticRoutes": null}', Joined("", "eth", (), ())),
        (
            b'{"InterfaceName": {"SrcName": "v1", "DstPrefix": "odd", "More": 1}, "More": [],'
            b' "Gateway": "10.1.0.1", "GatewayIPv6": "fd00::1/64", "StaticRoutes":'
            b' [{"Destination": "10.2.0.0/16", "NextHop": "10.1.0.9"},'
            b' {"Destination": "10.3.0.0/16", "RouteType": 1}]}',
            Joined(
                "v1",
                "odd",
                ("10.1.0.1", "fd00::1"),
                (("10.2.0.0/16", "10.1.0.9"), ("10.3.0.0/16", "")),
            ),
        ),
    ],
)
def test_what_is_missing_is_empty_and_what_is_too_much_passed_over(
    answer: bytes, joined: Joined
) -> None:
    assert parse_join(answer, "odd") == joined


@pytest.mark.parametrize(
    "answer",
    [
        b"[]",
        b'{"InterfaceName": "eth0"}',
        b'{"InterfaceName": {"SrcName": "../../sixteen-and-more"}}',
        b'{"InterfaceName": {"SrcName": "v1", "DstPrefix": "twelve-letters"}}',
        b'{"Gateway": "fd00::1"}',
        b'{"Gateway": "here"}',
        b'{"StaticRoutes": [{"Destination": "10.2.0.0/16"}]}',
        b'{"StaticRoutes": [{"Destination": "everywhere", "RouteType": 1}]}',
        b'{"StaticRoutes": [' + b"{}," * 256 + b"{}]}",
    ],
)
def test_what_cannot_be_meant_is_refused(answer: bytes) -> None:
    with pytest.raises(Invalid, match="odd"):
        parse_join(answer, "odd")


def test_a_scope_is_local_or_global() -> None:
    assert parse_scope(b'{"Scope": "Global"}', "odd") == "global"
    with pytest.raises(Invalid, match="neither"):
        parse_scope(b"{}", "odd")
