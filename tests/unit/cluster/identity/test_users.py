"""Certificates for users: who issues them, to whom, and what they are no good for."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from cryptography import x509

from agent.clienttls import make_request, reserve_bundle
from agent.cluster.identity import authority as ca
from agent.cluster.identity.users import USER_LIFE, Users
from agent.cluster.trust import check_issued, read_bearer
from agent.errors import Conflict, Invalid, Unavailable
from agent.model import Node
from agent.node import NodeState
from agent.users import User, read_user

CLUSTER = "c" * 16
ME = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)


def holder(is_keeper: bool = True) -> Any:
    made = ca.make_authority(CLUSTER, time.time())
    held = SimpleNamespace(
        cluster=CLUSTER,
        trust=SimpleNamespace(authorities=(made.certificate,)),
        issuing=made if is_keeper else None,
    )
    return SimpleNamespace(held=held, now=time.time)


@pytest.fixture
def node() -> NodeState:
    made = NodeState(ME, lambda: 1000.0, random.Random(1))
    made.describe(msgspec.structs.replace(ME, keeper=True))
    made.is_keeper = lambda value: value.keeper
    return made


@pytest.mark.parametrize("right", ["read", "change"])
def test_a_user_gets_what_was_asked_for_and_it_is_told(node: NodeState, right: str) -> None:
    told: list[Any] = []
    node.listeners.append(lambda change: told.extend(change.notices))
    key, request = make_request("Alice")
    made = Users(holder(), node).issue("Alice", right, request)
    certificate = x509.load_pem_x509_certificate(made.certificate)
    assert read_user(certificate) == User(CLUSTER, "alice", right)
    check_issued(certificate, list(made.authorities))
    assert abs(certificate.not_valid_after_utc.timestamp() - time.time() - USER_LIFE) < 60
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert [(n.kind, n.fields) for n in told] == [
        ("user.issued", {"user": "alice", "right": right})
    ]


def test_a_users_certificate_makes_no_node(node: NodeState) -> None:
    made = Users(holder(), node).issue("alice", "change", make_request("alice")[1])
    with pytest.raises(Invalid, match="names no node"):
        read_bearer(x509.load_pem_x509_certificate(made.certificate))


def test_a_name_cannot_say_more_than_a_name(node: NodeState) -> None:
    for name in ("", "a/b", "vxmesh:right:change", "a\n", "x" * 64):
        with pytest.raises(Invalid, match="is not a DNS label"):
            Users(holder(), node).issue(name, "read", make_request("x")[1])


def test_a_request_has_to_be_signed_with_its_key(node: NodeState) -> None:
    request = make_request("alice")[1]
    for broken in (b"", b"nonsense", request[:-1] + bytes([request[-1] ^ 1]), b"\0" * 5000):
        with pytest.raises(Invalid, match="request"):
            Users(holder(), node).issue("alice", "read", broken)


def test_who_does_not_keep_the_cas_key_names_who_does(node: NodeState) -> None:
    with pytest.raises(Unavailable, match="Run it on n1"):
        Users(holder(is_keeper=False), node).issue("alice", "read", make_request("alice")[1])


def test_a_file_is_only_the_owners_never_overwritten_and_gone_if_nothing_came(
    tmp_path: Path,
) -> None:
    path = tmp_path / "alice.pem"
    with pytest.raises(Unavailable), reserve_bundle(path):
        raise Unavailable("certificate", "was not issued")
    assert not path.exists()
    with reserve_bundle(path) as write:
        write(b"all of it")
    assert path.read_bytes() == b"all of it" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Conflict, match="exists"), reserve_bundle(path) as write:
        write(b"another")
    assert path.read_bytes() == b"all of it"
    with pytest.raises(Invalid, match="cannot be written"), reserve_bundle(tmp_path / "no/a.pem"):
        pass
