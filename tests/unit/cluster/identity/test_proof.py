"""What only who has the CA's key can show, and since when a node is a member."""

from __future__ import annotations

import time

import msgspec
import pytest

from agent.cluster.identity import authority as ca
from agent.cluster.identity import proof, requests
from agent.errors import Invalid
from agent.model import KEEPER_PROOF_MAX, Node, check_sound

CLUSTER = "c" * 16
OLD, NEW, ROGUE = (ca.make_authority(CLUSTER, time.time()) for _ in range(3))
TRUSTED = (OLD.certificate, NEW.certificate)
ME, OTHER = "1" * 16, "2" * 16


def node(id: str = ME, **fields: object) -> Node:
    made = Node(id, f"n{id[0]}", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    return msgspec.structs.replace(made, **fields)


@pytest.mark.parametrize("authority", [OLD, NEW])
def test_who_has_the_key_of_a_ca_that_is_trusted_shows_it(authority: ca.Authority) -> None:
    made = proof.make(authority, CLUSTER, ME)
    shown = node(keeper=True, keeper_proof=made)
    check_sound(shown, ME)
    assert proof.is_keeper(shown, CLUSTER, TRUSTED)
    assert not proof.is_keeper(msgspec.structs.replace(shown, keeper=False), CLUSTER, TRUSTED)
    assert not proof.is_keeper(shown, CLUSTER, (ROGUE.certificate,)), "not once it is retired"


@pytest.mark.parametrize(
    "shown",
    [
        b"",
        b"x" * 70,
        proof.make(ROGUE, CLUSTER, ME),
        proof.make(OLD, CLUSTER, OTHER),
        proof.make(OLD, "d" * 16, ME),
        proof.make(OLD, CLUSTER + ME[:1], ME[1:]),
        b"x" * (KEEPER_PROOF_MAX + 1),
    ],
    ids=["empty", "garbage", "rogue", "another's", "other-cluster", "shifted", "long"],
)
def test_nothing_else_shows_it(shown: bytes) -> None:
    assert not proof.is_keeper(node(keeper=True, keeper_proof=shown), CLUSTER, TRUSTED)


def test_no_record_has_a_proof_that_is_longer_than_one_can_be() -> None:
    with pytest.raises(Invalid, match="not sound"):
        check_sound(node(keeper_proof=b"x" * (KEEPER_PROOF_MAX + 1)), ME)


def test_a_node_is_a_member_since_its_own_certificate_begins() -> None:
    asked = requests.make(ME, bytes(range(32)))
    public = requests.public_half(bytes(range(32)))
    now = time.time()
    made = ca.issue(OLD, CLUSTER, ME, public, asked.key.public_key(), now, 3600.0)
    since = proof.member_since(ME, made, TRUSTED)
    assert since is not None and abs(since - (now - 180)) <= 1
    assert proof.member_since(OTHER, made, TRUSTED) is None, "it is another node's"
    assert proof.member_since(ME, made, (ROGUE.certificate,)) is None
    assert proof.member_since(ME, b"", TRUSTED) is None
