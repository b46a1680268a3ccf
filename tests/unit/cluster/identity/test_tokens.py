"""Join tokens: their form, and what becomes of their secrets."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster.identity import authority as ca
from agent.cluster.identity import statements, tokens
from agent.cluster.identity.tokens import Token
from agent.errors import Invalid
from agent.model import TokenState

CLUSTER = "c" * 16
AUTHORITY = ca.make_authority(CLUSTER, 1_800_000_000.0)


def token(nonce: bytes = b"") -> Token:
    return Token(ca.fingerprint(AUTHORITY.certificate), tokens.derive(AUTHORITY.key, nonce))


def test_what_is_printed_is_read_again_however_it_was_typed() -> None:
    made = token()
    for typed in (str(made), f"  {made}\n", str(made).upper(), str(made).lower()):
        assert tokens.parse(typed) == made
    assert made.secret not in repr(made)


@pytest.mark.parametrize(
    "text", ["", "VXM-1-", "SWMTKN-1-abc-def", str(token())[:-1], str(token()) + "a", "VXM-1-a-b"]
)
def test_what_is_none_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(Invalid, match="vxmesh cluster token"):
        tokens.parse(text)


def test_one_of_a_later_form_is_told_apart() -> None:
    with pytest.raises(Invalid, match="does not know"):
        tokens.parse(str(token()).replace("VXM-1", "VXM-2"))


@given(st.text(max_size=100))
def test_no_text_does_anything_but_be_refused(text: str) -> None:
    with pytest.raises(Invalid):
        tokens.parse(text)


def test_it_is_the_same_until_its_nonce_is_another_one() -> None:
    assert token() == token()
    assert token(b"x") != token()
    other = ca.make_authority(CLUSTER, 1_800_000_000.0)
    assert tokens.derive(other.key, b"") != token().secret


def test_valid_void_and_wrong_are_told_apart() -> None:
    old, nonce = token().secret, os.urandom(16)
    state = TokenState(1, CLUSTER, nonce, (tokens.hashed(old),), "n1", 0.0)
    assert tokens.judge(old, AUTHORITY.key, None) == "valid"
    assert tokens.judge(old, AUTHORITY.key, state) == "void"
    assert tokens.judge(token(nonce).secret, AUTHORITY.key, state) == "valid"
    for wrong in ("", "a" * 26, old[:-1], old + "a", "ä" * 26):
        assert tokens.judge(wrong, AUTHORITY.key, state) == "wrong"


def test_only_who_has_the_cas_key_can_say_which_token_holds() -> None:
    forger = ca.make_authority(CLUSTER, 1_800_000_000.0)
    state = TokenState(1, CLUSTER, b"n", (), "n1", 0.0)
    proper = statements.sign_token(state, AUTHORITY)
    forged = statements.sign_token(TokenState(9, CLUSTER, b"f", (), "n9", 0.0), forger)
    tampered = TokenState(10, CLUSTER, b"t", (), "n1", 0.0, proper.signature)
    elsewhere = statements.sign_token(TokenState(11, "d" * 16, b"e", (), "n1", 0.0), AUTHORITY)
    stated = [forged, proper, tampered, elsewhere, state]
    assert statements.newest_token(stated, CLUSTER, AUTHORITY.certificate) == proper
    later = statements.sign_token(TokenState(2, CLUSTER, b"m", (), "n2", 0.0), AUTHORITY)
    assert statements.newest_token([*stated, later], CLUSTER, AUTHORITY.certificate) == later
