"""The control port: who is let in by which certificate, and what the others hear."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.api import rights, tlsfront
from agent.api.front import Limits
from agent.api.server import ControlServer
from agent.client import Client
from agent.clientgrpc import GrpcCalls
from agent.clienttls import make_request
from agent.cluster.identity import authority as ca
from agent.cluster.identity.authority import Authority
from agent.cluster.identity.users import issue_user, read_request
from agent.cluster.trust import Credentials, Keyring, check_issued
from agent.errors import Denied, Invalid, NoAgent
from agent.users import User
from tests.unit.api.test_control_server import Log, Told

CLUSTER, OTHER = "c" * 16, "d" * 16
NODE = "a" * 16
DAY = 86_400.0
WITHIN = 60.0  # s


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def credentials(authority: Authority, *also: Authority, cluster: str = CLUSTER) -> Credentials:
    """A node's, with a certificate of `authority`, who believes that one and `also`."""
    key, record_key = ca.new_key(), secrets.token_bytes(32)
    made = ca.issue(authority, cluster, NODE, record_key, key.public_key(), time.time(), DAY)
    authorities = tuple(ca.to_pem(a.certificate) for a in (authority, *also))
    return Credentials(cluster, NODE, ca.to_pem(made), pem(key), authorities, record_key)


class Port:
    """An agent's control port, and the files of those who come by it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = ca.make_authority(CLUSTER, time.time() - 3 * DAY)
        self.keyring = Keyring(credentials(self.authority))
        self.control = Told()
        self.refused: list[tuple[str, str, str]] = []
        self.server = ControlServer(
            self.control,
            directory,
            ("0", "0"),
            lambda *told: self.refused.append(told),
            Limits(each=2, others=3),
        )

    async def start(self) -> None:
        await self.server.start()
        self.front = await self.server.listen(
            "127.0.0.1",
            0,
            self.keyring.control_context,
            lambda certificate: check_issued(certificate, self.keyring.current.authorities),
        )
        self.keyring.on_change.append(self.front.recheck)

    @property
    def host(self) -> str:
        return f"tcp://127.0.0.1:{self.front.port}"

    def file(
        self,
        name: str = "alice",
        right: str = "change",
        authority: Authority | None = None,
        believes: Authority | None = None,
        begin: float = 0.0,
        life: float = DAY,
    ) -> str:
        """A user's file with a certificate that begins so many s from now."""
        key, request = make_request(name)
        by = authority or self.authority
        user = User(CLUSTER, name, right)
        made = issue_user(by, user, read_request(request), time.time() + begin, life)
        path = self.directory / f"{secrets.token_hex(4)}.pem"
        path.write_bytes(key + ca.to_pem(made) + ca.to_pem((believes or by).certificate))
        return str(path)

    def reasons(self) -> list[str]:
        return [f"{reason}: {text}" for reason, _, text in self.refused]


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="vxm-", dir="/tmp"))  # unix sockets have short names
    yield made
    shutil.rmtree(made)


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is logged of changing calls."""
    log = Log()
    monkeypatch.setattr(rights, "log", log)
    return log.lines


@pytest.fixture
async def port(directory: Path) -> AsyncIterator[Port]:
    made = Port(directory)
    await made.start()
    yield made
    await made.server.stop()


async def test_a_user_does_what_the_certificate_says(
    port: Port, changes: list[dict[str, Any]]
) -> None:
    async with Client(port.host, port.file("alice")) as client:
        assert (await client.info()).name == "n1"
        await client.create_network("web")
        assert [(e["user"], e["method"]) for e in changes] == [("alice", "CreateNetwork")]
    async with Client(port.host, port.file("bob", "read")) as client:
        assert [event.action async for event in client.events()] == ["synced"]
        with pytest.raises(Denied, match="user bob's certificate: lets them look and not change"):
            await client.create_network("web")
    assert port.control.asked == ["GetInfo", "CreateNetwork", "Watch"]
    assert [told[:2] for told in port.refused] == [("right", "user bob")]


async def test_a_nodes_certificate_controls_nothing(port: Port) -> None:
    held = credentials(port.authority)
    path = port.directory / "node.pem"
    path.write_bytes(held.key + held.certificate + b"".join(held.authorities))
    with pytest.raises(Invalid, match="names no user"):
        Client(port.host, str(path))  # the client would not even try
    # Nor does it by a client that does.
    channel = Keyring(held).channel(port.host.removeprefix("tcp://"), "", [])
    async with Client(f"unix://{port.directory}/none") as client:
        client._calls = GrpcCalls(channel)
        with pytest.raises(NoAgent):
            await client.info()
    assert port.control.asked == []
    assert "its certificate names no user that may control agents" in port.reasons()[0]


async def test_who_has_ended_or_not_begun_or_is_of_another_cluster_stays_out(port: Port) -> None:
    other = ca.make_authority(CLUSTER, time.time())
    for file, said, told in (
        (port.file(begin=-2 * DAY), "ended on", "certificate has expired"),
        (port.file(begin=DAY), "begins on", "not yet valid"),
        (port.file(authority=other), "of another cluster", ""),
        (port.file(authority=other, believes=port.authority), "was not believed", "local issuer"),
    ):
        port.refused.clear()
        async with Client(port.host, file) as client:
            with pytest.raises(Denied, match=said):
                await client.info()
        assert any(told in text for text in port.reasons()), port.reasons()
    assert port.control.asked == []


async def test_who_shows_none_or_speaks_no_tls_or_an_older_one_is_told_of(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tlsfront, "HANDSHAKE_WITHIN", WITHIN)
    bare = ssl.create_default_context(cadata=ca.to_pem(port.authority.certificate).decode())
    bare.check_hostname = False
    old = ssl.create_default_context()
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context, data in ((bare, b""), (old, b""), (None, b"GET / HTTP/1.1\r\n\r\n"), (None, b"")):
        before = len(port.refused)
        if context is None and not data:
            monkeypatch.setattr(tlsfront, "HANDSHAKE_WITHIN", 0.2)
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port.front.port, ssl=context
            )
            writer.write(data)
            assert await asyncio.wait_for(reader.read(), WITHIN) == b""
            writer.close()
        except (ssl.SSLError, ConnectionError):
            pass
        async with asyncio.timeout(WITHIN):
            while len(port.refused) == before:
                await asyncio.sleep(0.01)
    told = port.reasons()
    assert "peer did not return a certificate" in told[0]
    assert "unsupported protocol" in told[1]
    assert "http request" in told[2] or "wrong version number" in told[2]
    assert "said nothing" in told[3]
    assert {reason for reason, _, _ in port.refused} == {"certificate"}
    assert {who for _, who, _ in port.refused} == {"127.0.0.1"}
    assert port.control.asked == []


async def test_who_is_in_goes_when_the_certificate_ends(port: Port) -> None:
    async with Client(port.host, port.file("alice")) as alice:
        await alice.info()
        for life in (3.0, 10.0, 30.0):  # s; on a very busy machine it is over before it is shown
            async with Client(port.host, port.file("short", life=life)) as short:
                try:
                    await short.info()
                except (Denied, NoAgent):
                    continue
                assert len(port.front._open) == 2
                async with asyncio.timeout(WITHIN):
                    while len(port.front._open) == 2:
                        port.front.recheck()
                        await asyncio.sleep(0.05)
                with pytest.raises(Denied, match="ended on"):
                    await short.info()
            await alice.info()
            assert len(port.front._open) == 1
            return
    raise AssertionError("no certificate was long enough")


async def test_who_is_in_goes_when_the_ca_is_void(port: Port) -> None:
    new = ca.make_authority(CLUSTER, time.time())
    async with Client(port.host, port.file("alice")) as alice:
        await alice.info()
        port.keyring.replace(credentials(port.authority, new))  # both CAs are trusted
        await alice.info()
        assert len(port.front._open) == 1
        port.keyring.replace(credentials(new))
        async with asyncio.timeout(WITHIN):
            while port.front._open:
                await asyncio.sleep(0.01)
        with pytest.raises(Denied, match="of another cluster than this certificate, or the"):
            await alice.info()
    async with Client(port.host, port.file("alice", authority=new)) as client:
        assert (await client.info()).name == "n1"


async def test_one_user_does_not_take_all_places(port: Port) -> None:
    clients = [Client(port.host, port.file("alice")) for _ in range(3)]
    others = [Client(port.host, port.file(name)) for name in ("bob", "carol")]
    try:
        for client in (*clients[:2], others[0]):
            await client.info()
        for client in (clients[2], others[1]):
            with pytest.raises(Denied):
                await client.info()
        assert {(reason, who) for reason, who, _ in port.refused} == {
            ("busy", "user alice"),
            ("busy", "user carol"),
        }
    finally:
        for client in (*clients, *others):
            await client.close()


async def test_a_port_without_an_agent_is_no_agent_and_no_file_no_certificate(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VXMESH_TLS", raising=False)
    with pytest.raises(Invalid, match="takes a certificate"):
        Client(port.host)
    for text in (b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nnonsense\n"):
        path = port.directory / "broken.pem"
        path.write_bytes(text)
        with pytest.raises(Invalid, match="is not a user's key and certificate"):
            Client(port.host, str(path))
    with pytest.raises(Invalid, match="cannot be read"):
        Client(port.host, str(port.directory / "none.pem"))
    monkeypatch.setenv("VXMESH_TLS", port.file())
    async with Client("tcp://127.0.0.1:9") as client:
        with pytest.raises(NoAgent):
            await client.info()
    async with Client(port.host) as client:
        assert (await client.info()).name == "n1"


def test_a_users_certificate_says_so_and_is_good_for_a_client_only() -> None:
    authority = ca.make_authority(CLUSTER, time.time())
    key = ca.new_key().public_key()
    made = x509.load_der_x509_certificate(
        issue_user(authority, User(CLUSTER, "alice", "read"), key, time.time(), DAY)
    )
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == []  # so it is no node's


async def test_newcomers_at_once_find_no_more_places_than_there_are(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tlsfront, "HANDSHAKES_MOST", 4)
    socks = [socket.create_connection(("127.0.0.1", port.front.port)) for _ in range(20)]
    try:
        async with asyncio.timeout(WITHIN):
            while len(port.refused) < 16:
                await asyncio.sleep(0.01)
        assert {reason for reason, _, _ in port.refused} == {"busy"}
    finally:
        for sock in socks:
            sock.close()
