"""A node's identity on disk, in STATE_DIR/tls (0700; files 0600).

    cluster.json   the cluster's id and whom it trusts (model.Trust, certificates as PEM)
    node.pem       this node's certificate and its key: one file, as one is of no use with the
                   key of another
    record.key     the key of its records; never replaced
    ca.key         only on keepers: the keys of CAs

Each is replaced as a whole: written aside, synced, renamed. What does not fit together is
refused with the way out, never mended by guessing. An identity is there when node.pem is, which
is written last. What stands opposite: service.py and the daemon, which hold what is in here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from agent import wholefile
from agent.cluster.identity import authority as ca
from agent.cluster.identity.authority import Authority
from agent.cluster.identity.requests import public_half
from agent.cluster.trust import Bearer, Credentials, read_bearer
from agent.errors import Unavailable, VxmeshError
from agent.model import Trust
from agent.unreadable import UNREADABLE

DIRECTORY = "tls"
CLUSTER, NODE, RECORD, KEYS = "cluster.json", "node.pem", "record.key", "ca.key"
ANEW = "Start with --reset-state, --join and --token, and it joins as a new node"
REJOIN = (
    "Restore it from a backup; or remove it and start with --join and --token, and the node is "
    "what it was"
)


@dataclass(frozen=True, slots=True)
class Held:
    """A node's identity: what is on disk, read and found to fit together."""

    cluster: str
    node: str
    certificate: bytes  # DER
    key: ec.EllipticCurvePrivateKey
    record_key: bytes  # Ed25519, private, 32 bytes
    trust: Trust  # epoch 0 and no signature: the CA that the cluster began with
    keys: tuple[Authority, ...] = ()  # of the CAs that this node can issue with

    @property
    def issuing(self) -> Authority | None:
        """The CA that new certificates are of, if this node is a keeper."""
        return self.authority(self.trust.authorities[0])

    def authority(self, certificate: bytes) -> Authority | None:
        """The CA with that certificate (DER), if its key is here."""
        return next((a for a in self.keys if a.certificate == certificate), None)

    def credentials(self) -> Credentials:
        """What connections need of it."""
        return Credentials(
            self.cluster,
            self.node,
            ca.to_pem(self.certificate),
            _private_pem(self.key),
            tuple(map(ca.to_pem, self.trust.authorities)),
            self.record_key,
            tuple(map(ca.to_pem, self.trust.retired)),
        )


class Files:
    """The directory. Whoever changes it holds the state directory (store.py)."""

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / DIRECTORY

    def exists(self) -> bool:
        """Whether this node has an identity, whole or not."""
        return (self.directory / NODE).exists()

    def load(self) -> Held | None:
        """The identity; None if there is none. Unavailable says what is wrong with it."""
        if not self.exists():
            return None
        certificate, key = self._read_node()
        cluster, trust = self._read_cluster()
        record_key = self.read_record_key()
        bearer = self._bearer(certificate)
        if record_key is None or bearer.record_key != public_half(record_key):
            raise _damaged(self.directory / RECORD, "is not the one in the certificate", ANEW)
        if bearer.cluster != cluster or not ca.belongs(key, certificate):
            raise _damaged(self.directory / NODE, "does not fit to the rest", REJOIN)
        if ca.issuer_of(certificate, (*trust.authorities, *trust.retired)) is None:
            raise _damaged(self.directory / NODE, "is of no CA that is trusted", REJOIN)
        keys = self._read_keys(trust)
        return Held(cluster, bearer.node, certificate, key, record_key, trust, keys)

    def node(self) -> str:
        """The node id in the certificate, whatever else is wrong; empty if there is none."""
        return self._bearer(self._read_node()[0]).node if self.exists() else ""

    # -- writing --

    def save(self, held: Held) -> None:
        """Write all of it, so that it is there only when it is whole."""
        self.save_record_key(held.record_key)
        self.save_keys(held.keys)
        self.save_trust(held.cluster, held.trust)
        self.save_certificate(held.certificate, held.key)

    def save_certificate(self, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> None:
        """Replace this node's certificate (DER), with its key."""
        self._write(NODE, ca.to_pem(certificate) + _private_pem(key))

    def save_trust(self, cluster: str, trust: Trust) -> None:
        """Replace whom this node trusts."""
        told = {
            "cluster": cluster,
            "epoch": trust.epoch,
            "stamp": trust.stamp,
            "by": trust.by,
            "phase": trust.phase,
            "authorities": [ca.to_pem(c).decode() for c in trust.authorities],
            "retired": [ca.to_pem(c).decode() for c in trust.retired],
            "left_behind": list(trust.left_behind),
            "signatures": [s.hex() for s in trust.signatures],
        }
        self._write(CLUSTER, json.dumps(told, indent=1).encode() + b"\n")

    def save_record_key(self, record_key: bytes) -> None:
        """Write the key of this node's records: before anybody is told its public half."""
        key = ed25519.Ed25519PrivateKey.from_private_bytes(record_key)
        self._write(RECORD, _private_pem(key))

    def save_keys(self, keys: Sequence[Authority]) -> None:
        """Replace the keys of CAs; with none, this node is no keeper."""
        if keys:
            self._write(KEYS, b"".join(_private_pem(a.key) for a in keys))
        elif (self.directory / KEYS).exists():
            (self.directory / KEYS).unlink(missing_ok=True)
            wholefile.sync_directory(self.directory)

    def set_aside(self) -> Path | None:
        """Rename what is there, so that the node begins anew; the new path."""
        if not self.directory.exists():
            return None
        number = 1
        while (aside := self.directory.with_name(f"{DIRECTORY}.aside-{number}")).exists():
            number += 1
        self.directory.rename(aside)
        return aside

    def _write(self, name: str, data: bytes) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        wholefile.replace(self.directory / name, data)

    # -- reading --

    def read_record_key(self) -> bytes | None:
        """The key of this node's records; None if there is none yet."""
        path = self.directory / RECORD
        if not path.exists():
            return None
        found = _keys(path, ANEW)
        if len(found) != 1 or not isinstance(found[0], ed25519.Ed25519PrivateKey):
            raise _damaged(path, "has no Ed25519 key", ANEW)
        return found[0].private_bytes_raw()

    def _read_node(self) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
        path = self.directory / NODE
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, *UNREADABLE) as error:
            raise _damaged(path, f"has no certificate ({error})", REJOIN) from None
        keys = [k for k in _keys(path, REJOIN) if isinstance(k, ec.EllipticCurvePrivateKey)]
        if len(keys) != 1:
            raise _damaged(path, "has no key", REJOIN)
        return certificate.public_bytes(serialization.Encoding.DER), keys[0]

    def _bearer(self, certificate: bytes) -> Bearer:
        try:
            return read_bearer(x509.load_der_x509_certificate(certificate))
        except VxmeshError as error:
            why = f"has a certificate that {error.why}"
            raise _damaged(self.directory / NODE, why, REJOIN) from None

    def _read_cluster(self) -> tuple[str, Trust]:
        path = self.directory / CLUSTER
        fix = REJOIN.replace("remove it", f"remove {self.directory / NODE}")
        try:
            told = json.loads(path.read_bytes())
            cluster = str(told["cluster"])
            trust = Trust(
                int(told["epoch"]),
                int(told["stamp"]),
                cluster,
                _certificates(told["authorities"]),
                _certificates(told["retired"]),
                str(told["by"]),
                int(told["phase"]),
                tuple(map(str, told["left_behind"])),
                tuple(map(bytes.fromhex, told["signatures"])),
            )
        except FileNotFoundError:
            raise _damaged(path, "is not there", fix) from None
        except (OSError, KeyError, AttributeError, *UNREADABLE) as error:
            raise _damaged(path, f"is not what was written ({error!r})"[:200], fix) from None
        if not trust.authorities:
            raise _damaged(path, "names no CA", fix)
        return cluster, trust

    def _read_keys(self, trust: Trust) -> tuple[Authority, ...]:
        """The keys of CAs that are trusted; one that a crash left of a CA that was never told
        of is none of them."""
        path = self.directory / KEYS
        fix = "Restore it from a backup, or remove it: then this node cannot issue certificates"
        if not path.exists():
            return ()
        keys = [k for k in _keys(path, fix) if isinstance(k, ec.EllipticCurvePrivateKey)]
        return match(keys, trust)


def match(keys: Sequence[ec.EllipticCurvePrivateKey], trust: Trust) -> tuple[Authority, ...]:
    """Each CA that is trusted and whose key is among `keys`."""
    return tuple(
        Authority(certificate, key)
        for certificate in trust.authorities
        for key in keys
        if ca.belongs(key, certificate)
    )


def with_keys(held: Held, keys: Sequence[ec.EllipticCurvePrivateKey]) -> Held:
    """The same, with those keys of CAs that are trusted, and no others."""
    return replace(held, keys=match(keys, held.trust))


def _keys(path: Path, fix: str) -> list[Any]:
    """All private keys in a file of PEM blocks."""
    try:
        text = path.read_bytes()
        end = b"-----END PRIVATE KEY-----"
        blocks = [b"-----BEGIN" + b.rsplit(b"-----BEGIN", 1)[1] + end for b in _cut(text, end)]
        return [serialization.load_pem_private_key(block, password=None) for block in blocks]
    except (OSError, IndexError, *UNREADABLE) as error:
        raise _damaged(path, f"has no key ({error})"[:200], fix) from None


def _cut(text: bytes, end: bytes) -> list[bytes]:
    found = text.split(end)[:-1]
    if not found:
        raise ValueError("no PEM")
    return found


def _certificates(texts: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(
        x509.load_pem_x509_certificate(text.encode()).public_bytes(serialization.Encoding.DER)
        for text in texts
    )


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _damaged(path: Path, why: str, fix: str) -> VxmeshError:
    return Unavailable(f"identity {path}", why, fix)
