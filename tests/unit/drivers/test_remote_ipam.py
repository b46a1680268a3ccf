"""What a plugin may answer as an IPAM driver, and what is made of it; and that nothing which a
plugin of either kind may answer is anything but taken or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers import remote, remote_ipam
from agent.drivers.remote_ipam import Capabilities, Pool
from agent.errors import Invalid

ASKED = remote_ipam.pool_request("here", "", "", {}, False)
EXACT = remote_ipam.pool_request("here", "10.1.0.0/16", "10.1.2.0/24", {}, False)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({}, Capabilities()),
        ({"RequiresMACAddress": None, "More": []}, Capabilities()),
        ({"requiresmacaddress": True}, Capabilities(needs_mac=True)),
        ({"RequiresRequestReplay": True}, Capabilities(needs_replay=True)),
    ],
)
def test_capabilities(answer: object, found: Capabilities) -> None:
    assert remote_ipam.parse_capabilities(json.dumps(answer).encode(), "odd") == found


@pytest.mark.parametrize(
    ("answer", "asked", "found"),
    [
        ({"PoolID": "p", "Pool": "10.1.0.0/24"}, ASKED, Pool("p", "10.1.0.0/24", "")),
        ({"poolid": "p", "POOL": "10.1.0.0/24", "Data": None, "x": 1}, ASKED,
         Pool("p", "10.1.0.0/24", "")),
        ({"PoolID": "p", "Pool": "10.1.0.0/24",
          "Data": {"com.docker.network.gateway": "10.1.0.9/24", "other": [1]}}, ASKED,
         Pool("p", "10.1.0.0/24", "10.1.0.9")),
        ({"PoolID": "p", "Pool": "10.1.0.0/16"}, EXACT, Pool("p", "10.1.0.0/16", "")),
        # kuryr answers with the part that addresses are of, and Docker takes that for the subnet.
        ({"PoolID": "p", "Pool": "10.1.2.0/24"}, EXACT, Pool("p", "10.1.2.0/24", "")),
    ],
)  # fmt: skip
def test_a_pool_that_is_what_was_asked_for(
    answer: object, asked: dict[str, Any], found: Pool
) -> None:
    assert remote_ipam.parse_pool(json.dumps(answer).encode(), "odd", asked) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [({"Address": "10.1.0.5/24"}, "0a010005"), ({"address": "10.1.0.5"}, "0a010005"),
     ({}, ""), ({"Address": ""}, ""), ({"Address": None}, ""), ({"Address": "0.0.0.0/0"}, ""),
     ({"Address": "::/0"}, "")],
)  # fmt: skip
def test_an_address_or_none(answer: object, found: str) -> None:
    text = json.dumps(answer).encode()
    assert remote_ipam.parse_given(text, "odd", "10.1.0.0/24").hex() == found


DECODERS: list[Callable[[bytes], object]] = [
    lambda answer: remote.parse_scope(answer, "odd"),
    lambda answer: remote.parse_join(answer, "odd"),
    lambda answer: remote_ipam.parse_capabilities(answer, "odd"),
    lambda answer: remote_ipam.parse_space(answer, "odd", True),
    lambda answer: remote_ipam.parse_pool_id(answer, "odd"),
    lambda answer: remote_ipam.parse_pool(answer, "odd", ASKED),
    lambda answer: remote_ipam.parse_pool(answer, "odd", EXACT),
    lambda answer: remote_ipam.parse_given(answer, "odd", "10.1.0.0/24", "10.1.0.7"),
]
KEYS = st.sampled_from([
    "Scope", "InterfaceName", "SrcName", "DstPrefix", "Gateway", "GatewayIPv6", "StaticRoutes",
    "Destination", "RouteType", "NextHop", "PoolID", "Pool", "Data", "Address", "POOL", "data",
    "com.docker.network.gateway", "RequiresMACAddress", "LocalDefaultAddressSpace",
])  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["10.1.0.0/16", "10.1.0.7/24", "fd00::/64", "local", "/", "1.2.3.4/x", ""]),
)  # fmt: skip
ANSWERS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5)
)


@given(ANSWERS | st.binary(max_size=40))
def test_whatever_a_plugin_answers_is_taken_or_refused(answer: object) -> None:
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    for decode in DECODERS:
        try:
            decode(text)
        except Invalid as error:
            assert error.what == "plugin odd"


def test_what_is_nested_without_end_is_refused() -> None:
    for decode in DECODERS:
        with pytest.raises(Invalid, match="odd"):
            decode(b'{"a":' * 100_000)
        with pytest.raises(Invalid, match="odd"):
            decode(b'{"pool":' * 5_000 + b"1" + b"}" * 5_000)
