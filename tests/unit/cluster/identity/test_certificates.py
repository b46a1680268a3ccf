"""The CA, requests and what is issued; by OpenSSL's verdict where it has one."""

from __future__ import annotations

import os
import ssl
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.cluster.identity import authority as ca
from agent.cluster.identity import renewal, requests
from agent.cluster.identity.files import Held
from agent.cluster.trust import Keyring, member_name, node_name, read_bearer
from agent.errors import Invalid
from agent.model import Trust

CLUSTER, NODE = "c" * 16, "0123456789abcdef"
NOW = 1_800_000_000.0
DAY = 86_400.0


def issue(authority: ca.Authority, life: float = DAY, now: float = NOW) -> bytes:
    public = requests.public_half(b"k" * 32)
    return ca.issue(authority, CLUSTER, NODE, public, ca.new_key().public_key(), now, life)


def test_a_certificate_names_its_node_and_its_record_key_and_is_good_for_both_ends() -> None:
    authority = ca.make_authority(CLUSTER, NOW)
    found = x509.load_der_x509_certificate(issue(authority))
    bearer = read_bearer(found)
    assert (bearer.cluster, bearer.node) == (CLUSTER, NODE)
    assert bearer.record_key == requests.public_half(b"k" * 32)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {
        node_name(CLUSTER, NODE),
        member_name(CLUSTER),
    }
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("life", [10.0, 60.0, DAY, 90 * DAY])
def test_it_holds_for_its_life_and_is_renewed_at_two_thirds_of_it(life: float) -> None:
    made = issue(ca.make_authority(CLUSTER, NOW), life)
    assert ca.ends(made) == pytest.approx(NOW + life, abs=1)
    assert NOW - 300 - 1 <= ca.begins(made) < NOW, "the receiver's clock may be behind"
    assert (renewal.due(made) - NOW) / life == pytest.approx(2 / 3, abs=0.15 if life < 60 else 0.05)


def test_it_does_not_outlive_the_ca() -> None:
    authority = ca.make_authority(CLUSTER, NOW)
    late = NOW + ca.AUTHORITY_LIFE - DAY
    assert ca.ends(issue(authority, 90 * DAY, late)) == ca.ends(authority.certificate)


def test_retries_come_faster_the_nearer_the_end_is() -> None:
    made = issue(ca.make_authority(CLUSTER, NOW), 90 * DAY)
    pauses = [renewal.pause(made, NOW + share * 90 * DAY) for share in (0.7, 0.999, 0.99999, 1.2)]
    assert pauses[0] == 3600.0
    assert sorted(pauses, reverse=True) == pauses
    assert pauses[-1] == 1.0


def test_who_issued_is_told_apart_also_between_two_cas_of_one_cluster() -> None:
    old, new = ca.make_authority(CLUSTER, NOW), ca.make_authority(CLUSTER, NOW)
    made = issue(new)
    assert ca.issuer_of(made, (old.certificate, new.certificate)) == new.certificate
    assert ca.issuer_of(made, (old.certificate,)) is None
    assert ca.issuer_of(b"no certificate", (old.certificate,)) is None
    assert ca.fingerprint(old.certificate) != ca.fingerprint(new.certificate)


def shake_hands(issuer: ca.Authority, trusted: ca.Authority, wanted: str) -> None:
    """TLS in memory: a node with a certificate of `issuer`, and a dialler who wants `wanted`."""
    now = time.time()
    key = ca.new_key()
    public = requests.public_half(b"k" * 32)
    made = ca.issue(issuer, CLUSTER, NODE, public, key.public_key(), now, DAY)
    trust = Trust(0, 0, CLUSTER, (issuer.certificate,), (), NODE)
    server_side = Keyring(
        Held(CLUSTER, NODE, made, key, b"k" * 32, trust).credentials()
    ).server_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.to_pem(trusted.certificate).decode())
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(there, here, server_hostname=wanted)
    server = server_side.wrap_bio(here, there, server_side=True)
    done = 0
    while done < 2:
        done = 0
        for end in (client, server):
            try:
                end.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass


def test_openssl_takes_it_for_its_node_and_for_a_member_and_for_nobody_else() -> None:
    authority, other = (ca.make_authority(CLUSTER, time.time()) for _ in range(2))
    shake_hands(authority, authority, node_name(CLUSTER, NODE))
    shake_hands(authority, authority, member_name(CLUSTER))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(authority, authority, node_name(CLUSTER, "f" * 16))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(authority, other, node_name(CLUSTER, NODE))


def test_a_request_is_signed_with_both_keys() -> None:
    record_key = os.urandom(32)
    asked = requests.make(NODE, record_key)
    public = requests.public_half(record_key)
    assert requests.check(NODE, public, asked.request, asked.proof) == asked.key.public_key()


def test_a_request_of_somebody_else_is_refused() -> None:
    record_key, other = os.urandom(32), os.urandom(32)
    public = requests.public_half(record_key)
    asked, stolen = requests.make(NODE, record_key), requests.make(NODE, other)
    for node, key, request, proof in (
        ("f" * 16, public, asked.request, asked.proof),  # as another node
        (NODE, requests.public_half(other), asked.request, asked.proof),
        (NODE, public, stolen.request, stolen.proof),
        (NODE, public, stolen.request, asked.proof),  # the proof of another request
        (NODE, public, asked.request[:-1], asked.proof),
        (NODE, public, b"", asked.proof),
        (NODE, public, asked.request, b""),
        (NODE, b"short", asked.request, asked.proof),
        (NODE, public, b"\0" * 5000, asked.proof),
    ):
        with pytest.raises(Invalid):
            requests.check(node, key, request, proof)


def test_only_p256_keys_are_certified() -> None:
    record_key = os.urandom(32)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    signer = ed25519.Ed25519PrivateKey.from_private_bytes(record_key)
    proof = signer.sign(requests._signed(NODE, request))
    with pytest.raises(Invalid, match="P-256"):
        requests.check(NODE, requests.public_half(record_key), request, proof)
