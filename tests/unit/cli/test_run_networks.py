"""What `run` reads of several networks: their names, and which MAC is in which."""

from __future__ import annotations

import pytest

from agent.cli.run import _is_hosts, _parse_macs, _split
from agent.errors import Invalid


def test_networks_are_given_by_flags_commas_or_both() -> None:
    assert _split(["a", "b,c", ",d,"]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("text", ["host", "Host", "HOST,web"])
def test_the_hosts_own_stack_is_meant_in_whatever_letters(text: str) -> None:
    assert _is_hosts(_split([text]))
    assert not _is_hosts(_split([f"web,{text}"])) and not _is_hosts([])


def test_a_mac_is_that_of_the_only_network_or_says_of_which() -> None:
    mac, other = "02:00:5e:00:53:01", "02:00:5e:00:53:02"
    assert _parse_macs([]) == {}
    assert _parse_macs([mac]) == {"": mac}
    assert _parse_macs([f"a={mac}", f"b={other}"]) == {"a": mac, "b": other}


@pytest.mark.parametrize("network", ["", "a="])
def test_two_macs_of_one_network_are_refused(network: str) -> None:
    with pytest.raises(Invalid, match="is the second"):
        _parse_macs([f"{network}02:00:5e:00:53:01", f"{network}02:00:5e:00:53:02"])
