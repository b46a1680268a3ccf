"""Which method takes which right, and names that say who calls."""

from __future__ import annotations

import pytest

from agent.api.rights import CHANGES, READS, Caller, Right, Way, covers, needed
from agent.rpc import control_pb2

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"]


def test_every_method_of_control_is_either_a_look_or_a_change() -> None:
    methods = {f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods}
    assert methods == CHANGES | READS, "a new method goes into the table in agent/api/rights.py"
    assert not CHANGES & READS


def test_what_is_in_no_table_takes_the_right_to_change() -> None:
    assert needed(f"/{SERVICE.full_name}/ListNodes") is Right.READ
    assert needed(f"/{SERVICE.full_name}/New") is Right.CHANGE
    assert needed("/some.Service/Look") is Right.CHANGE
    assert needed("") is needed("nonsense") is Right.CHANGE


def test_a_right_covers_itself_and_less() -> None:
    found = {(a, b) for a in Right for b in Right if covers(a, b)}
    assert found == {
        ("none", "none"),
        ("read", "none"),
        ("read", "read"),
        ("change", "none"),
        ("change", "read"),
        ("change", "change"),
    }


@pytest.mark.parametrize(
    "caller",
    [
        Caller(Right.CHANGE, Way.SOCKET, "0"),
        Caller(Right.NONE, Way.READ_SOCKET, "1000"),
        Caller(Right.READ, Way.TLS, "alice-of-example"),
    ],
)
def test_a_callers_name_can_be_read_again(caller: Caller) -> None:
    assert Caller.parse(caller.name) == caller


@pytest.mark.parametrize("name", ["", "change", "change-uid", "all-uid-0", "change-pid-0"])
def test_any_other_name_is_no_caller(name: str) -> None:
    with pytest.raises(ValueError):
        Caller.parse(name)
