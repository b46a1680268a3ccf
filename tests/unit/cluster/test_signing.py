"""Record keys out of certificates, and a relay that forges on a real stream."""

from __future__ import annotations

import asyncio
import datetime
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from agent.cluster.peers import Peers
from agent.cluster.signing import RecordKeys, seal_records
from agent.cluster.trust import RECORD_KEY, Credentials, Keyring, member_name, node_name
from agent.core.replica import Delta
from agent.core.seals import Unproven
from agent.model import Node, encode
from agent.node import NodeState
from agent.requests import parse_network
from tests.identities import authority
from tests.ports import free_port

CLUSTER = "c" * 16
DAY = datetime.timedelta(days=1)


class Authority:
    """A cluster's CA, as the identity of a node rests on it."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
        made = self._sign(self.name, self.key.public_key(), [], True)
        self.pem = made.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, node: str, record_key: bytes, cluster: str = CLUSTER, days: int = 1
    ) -> x509.Certificate:
        public = Ed25519PrivateKey.from_private_bytes(record_key).public_key().public_bytes_raw()
        names: list[x509.GeneralName] = [
            x509.DNSName(node_name(cluster, node)),
            x509.DNSName(member_name(cluster)),
            x509.UniformResourceIdentifier(RECORD_KEY + public.hex()),
        ]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(subject, key.public_key(), names, False, days)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        is_ca: bool,
        days: int = 1,
    ) -> x509.Certificate:
        end = datetime.datetime.now(datetime.UTC) + days * DAY
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - 1000 * DAY)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(is_ca, None), True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return builder.sign(self.key, hashes.SHA256())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def secret_of(node: str) -> bytes:
    return node.encode()[:1] * 32


def keyring(ca: Authority, node: str, *retired: Authority) -> Keyring:
    return Keyring(
        Credentials(
            CLUSTER, node, b"", b"", (ca.pem,), secret_of(node), tuple(r.pem for r in retired)
        )
    )


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority()


def keys(ring: Keyring) -> RecordKeys:
    return RecordKeys(ring, lambda origin: b"")


def test_who_shows_a_certificate_of_the_cluster_is_verified(ca: Authority) -> None:
    a, b = (keys(keyring(ca, name)) for name in ("a", "b"))
    signature = a.sign(b"message")
    assert not b.verify("a", b"message", signature)
    b.meet("a", der(ca.issue("a", secret_of("a"))))
    assert b.verify("a", b"message", signature)
    assert not b.verify("a", b"massage", signature)
    assert not b.verify("a", b"message", b"short")
    assert not b.verify("a", b"message", b.sign(b"message"))


def test_a_certificate_that_shows_nothing_is_none(ca: Authority) -> None:
    b = keys(keyring(ca, "b"))
    for certificate in (
        b"",
        b"garbage",
        der(ca.issue("c", secret_of("a"))),
        der(ca.issue("a", secret_of("a"), cluster="d" * 16)),
        der(Authority().issue("a", secret_of("a"))),
    ):
        b.meet("a", certificate)
        assert not b.knows("a")
        assert b.certificate("a") == b""


def test_a_seal_outlives_certificates_and_the_ca(ca: Authority) -> None:
    expired = der(ca.issue("a", secret_of("a"), days=-10))
    after = Authority()
    b = keys(keyring(after, "b", ca))
    b.meet("a", expired)
    assert b.verify("a", b"m", keys(keyring(ca, "a")).sign(b"m"))
    assert b.certificate("a") == expired


def test_a_certificate_of_a_ca_that_comes_to_be_known_is_read_again(ca: Authority) -> None:
    ring = keyring(Authority(), "b")
    b, certificate = keys(ring), der(ca.issue("a", secret_of("a")))
    b.meet("a", certificate)
    assert not b.knows("a")
    ring.replace(replace(ring.current, authorities=(*ring.current.authorities, ca.pem)))
    b.meet("a", certificate)
    assert b.knows("a")


def test_the_key_stands_in_the_record_of_its_node(ca: Authority) -> None:
    shown = {"a": der(ca.issue("a", secret_of("a")))}
    b = RecordKeys(keyring(ca, "b"), lambda origin: shown.get(origin, b""))
    assert b.verify("a", b"m", keys(keyring(ca, "a")).sign(b"m"))
    assert not b.knows("c")


# -- on real streams --


class Agent:
    """A node with sealed records and its streams."""

    def __init__(self, number: int, seeds: list[str], everybody: int, run_dir: Path) -> None:
        port = free_port()
        id = f"{number:x}" * 16
        ring = authority().keyring(id)
        shown = x509.load_pem_x509_certificate(ring.current.certificate)
        certificate = der(shown)
        self.me = Node(id, f"n{number}", "127.0.0.1", port, "127.0.0.1", 4789, "", 0.0, 1500,
                       certificate=certificate)  # fmt: skip
        self.node = NodeState(self.me, time.time, random.Random(number))
        seal_records(self.node, ring)
        self.node.listeners.append(
            lambda change: self.node.replica.publish(self.node.replica.written())
        )
        self.node.describe(self.me)
        self.seeds = seeds
        self.peers = Peers(self.node, self.me, id, self._durable, ring, run_dir, everybody)
        self.node.listeners.append(lambda change: self.peers.wake())

    async def _durable(self) -> None:
        return None


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture
async def three() -> AsyncIterator[list[Agent]]:
    async with AsyncExitStack() as stack:
        agents: list[Agent] = []
        for number in (1, 2, 3):
            seeds = [f"127.0.0.1:{a.me.port}" for a in agents]
            # Short: the path of a unix socket has 107 bytes at most.
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vxm-"))
            agents.append(Agent(number, seeds, 30, Path(directory)))
            await agents[-1].peers.start(seeds)
            stack.push_async_callback(agents[-1].peers.stop)
        await until(lambda: all(len(a.peers.links) == 2 for a in agents))
        await until(lambda: all(len(a.node.nodes) == 3 for a in agents))
        yield agents


async def test_records_cross_real_streams_with_their_seals(three: list[Agent]) -> None:
    one, two, three_ = three
    one.node.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
    await until(lambda: all(list(a.node.catalogue.all()) for a in (two, three_)))
    made = two.node.delta(one.me.id, 0)  # a relay of what came from its origin
    assert made.seals
    assert made.certificate == one.me.certificate
    assert not +three_.node.refused


async def test_a_forged_delta_ends_the_stream_and_is_told_but_not_each_time(
    three: list[Agent],
) -> None:
    one, relay, target = three
    true = relay.node.delta(one.me.id, 0)
    told: list[dict[str, str]] = []
    target.node.listeners.append(
        lambda change: told.extend(n.fields for n in change.notices if n.kind == "records.refused")
    )
    fake = Node(one.me.id, "fake", "6.6.6.6", 1, "6.6.6.6", 1, "", 0.0, 1500)
    version = target.node.version(one.me.id) + 1
    record = true.records[0]._replace(version=version, value=encode(fake))
    forged = Delta(one.me.id, version - 1, version, [record], seals=true.seals)
    while target.node.refused["unsealed"] < 3:
        await until(lambda: target.me.id in relay.peers.links)
        link = relay.peers.links[target.me.id]  # may be about to give way to another one
        link.post(link._encoder.encode(forged))
        await until(link.ended.is_set)
    assert target.node.nodes[one.me.id].name == "n1"
    assert len(told) == 1
    assert told[0]["sender"] == relay.me.id
    assert told[0]["origin"] == one.me.id
    with pytest.raises(Unproven, match="came without the seals"):
        target.node.merge(forged, relay.me.id)
