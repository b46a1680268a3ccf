from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster.codec import Encoder, decode
from agent.cluster.server import split_address
from agent.core.plumtree import Graft, Have, Prune
from agent.core.replica import Delta, Record
from agent.core.seals import Seal
from agent.core.session import Applied, Digest, Hello, Message
from agent.core.stability import NONE, Reach, Seen
from agent.core.summary import Summary
from agent.errors import Invalid
from agent.rpc import peer_pb2 as pb

SEAL = Seal(1, 4, bytes(range(64)), 0, b"s" * 64)
FOLDED = Seal(1, 9, bytes(range(32)), 1, b"s" * 64)

MESSAGES: list[Message] = [
    Hello("n", "b", "0.1", "host"),
    Digest({"a": (5, 2), "b": (0, 0)}, 1.5, 2.5, 0.25),
    Delta("a", 3, 5, [Record("e/1", 4, b"x"), Record("e/2", 5, b"")], 2, True, True),
    Delta("a", 0, 9, [Record("e/1", 4, b"x")], seals=(SEAL, FOLDED), certificate=b"der"),
    Applied(17),
    Digest({"a": (5, 2)}, buckets=1 << 63),
    Summary((*range(63), (1 << 64) - 1), 1.5, 2.5, 0.25),
    Have({"a": 5, "b": 1}),
    Graft({"a": 0}),
    Graft({"a": 0}, whole=True),
    Prune(("a", "b")),
    Seen({"a": Reach(3, (1 << 64) - 1), "b": NONE}, True),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_come_back_as_they_were(message: Message) -> None:
    assert decode(Encoder().encode(message)) == message


@pytest.mark.parametrize(
    "delta",
    [
        Delta("", 0, 1, []),
        Delta("a", 5, 4, []),
        Delta("a", 0, 5, [Record("e/1", 6, b"")]),
        Delta("a", 3, 5, [Record("e/1", 3, b"")]),
        Delta("a", 0, 5, [Record("e/1", 2, b""), Record("e/2", 2, b"")]),
        Delta("a", 0, 5, [Record("nokind", 2, b"")]),
        Delta("a", 0, 5, [Record("e/1", 2, b"x" * 300_000)]),
        Delta("a", 0, 5, [], seals=(SEAL, SEAL, SEAL)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(first=2, last=5), SEAL)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(first=0),)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(last=0, leaves=b""),)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(last=65, leaves=bytes(65 * 16)),)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(leaves=bytes(63)),)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(folded=1),)),
        Delta("a", 0, 5, [], seals=(FOLDED._replace(folded=4),)),
        Delta("a", 0, 5, [], seals=(SEAL._replace(signature=b"s"),)),
        Delta("a", 0, 5, [], certificate=bytes(9000)),
    ],
)
def test_deltas_that_cannot_be_are_refused(delta: Delta) -> None:
    with pytest.raises(Invalid):
        decode(Encoder().encode(delta))


@pytest.mark.parametrize(
    "message",
    [
        Digest({"a": (1 << 63, 0)}),
        Digest({"": (1, 0)}),
        Summary((1,) * 63),
        Have({"a": 1 << 63}),
        Have({"": 1}),
        Graft({"a": 1 << 63}),
        Prune(("a", "")),
        Prune(("a",) * 100_001),
        Seen({"a": Reach(1 << 63, 1)}),
    ],
)
def test_what_cannot_be_is_refused(message: Message) -> None:
    with pytest.raises(Invalid):
        decode(Encoder().encode(message))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except Invalid:
        pass


def test_empty_messages_are_refused() -> None:
    for message in (pb.PeerMessage(), pb.PeerMessage(hello=pb.Hello())):
        with pytest.raises(Invalid):
            decode(message.SerializeToString())


def test_one_batch_is_encoded_once_for_all() -> None:
    encoder = Encoder()
    delta = Delta("a", 0, 1, [Record("e/1", 1, b"x")])
    assert encoder.encode(delta) is encoder.encode(Delta("a", 0, 1, [Record("e/1", 1, b"x")]))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("h1", "h1:7946"),
        ("10.0.0.1:7000", "10.0.0.1:7000"),
        ("fd00::1", "[fd00::1]:7946"),
        ("[fd00::1]:7", "[fd00::1]:7"),
    ],
)
def test_addresses_get_the_default_port(text: str, target: str) -> None:
    assert split_address(text) == target


@pytest.mark.parametrize("text", ["", ":7946", "h:x", "h:0", "h:70000"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        split_address(text)
