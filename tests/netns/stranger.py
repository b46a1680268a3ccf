"""Who does not belong: dials an agent's peer port with whatever identity it is given, tries every
method of the service, and says as JSON what came of it.

    python -m tests.netns.stranger probe HOST:PORT [IDENTITY]   every method, once
    python -m tests.netns.stranger hold HOST:PORT IDENTITY      one call that stands

A process of its own, run in a host of the testbed: gRPC makes its sockets in threads of its own.
IDENTITY is a file that `write_identity` made; without it no certificate is shown.
What stands opposite: test_strangers.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from agent.cluster.codec import delta_to_proto
from agent.cluster.dialer import OPTIONS
from agent.cluster.outside import PEER, find_refusal, find_removal
from agent.cluster.trust import Credentials, Keyring
from agent.core.replica import Delta, Record
from agent.model import Removal, encode
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc

WITHIN = 5.0  # s; for a call


def write_identity(path: Path, credentials: Credentials) -> str:
    """Write a node's identity down for a process of this file; the path."""
    path.write_bytes(msgspec.json.encode(credentials))
    return str(path)


def read_identity(path: str) -> Credentials:
    return msgspec.json.decode(Path(path).read_bytes(), type=Credentials)


def requests(node: str) -> dict[str, Any]:
    """For each method a request that reads or writes something, in the name of `node`."""
    gone = Removal("f" * 16, "gone", node, 1, 0.0)
    record = Record("x/" + gone.node, 1, encode(gone))
    delta = delta_to_proto(Delta(node, 0, 1, [record]))
    return {
        "WhoIs": pb.WhoIsRequest(),
        "RequestSpace": pb.SpaceRequest(network="n", requester=node, family=4),
        "AgreeRemoval": pb.RemovalAsk(remover=node, lost=["f" * 16]),
        "Deliver": pb.Delivery(node=node, delta=delta),
        "Ping": pb.PingRequest(node=node),
        "CheckPorts": pb.PortsRequest(node=node, ports=[pb.HostPort(protocol="tcp", port=9)]),
        "PingFor": pb.PingForRequest(node=node, target=node, seconds=0.1),
        "AwaitApplied": pb.AppliedRequest(origin=node, version=1, seconds=0.1),
        "Sync": [pb.PeerMessage(hello=pb.Hello(node=node)), pb.PeerMessage(delta=delta)],
    }


def channel_to(target: str, credentials: Credentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(target, OPTIONS)
    if not credentials.certificate:
        shown = grpc.ssl_channel_credentials(b"".join(credentials.authorities))
        name = f"member.{credentials.cluster}.vxmesh.internal"
        named = ("grpc.ssl_target_name_override", name)
        return grpc.aio.secure_channel(target, shown, [*OPTIONS, named])
    return Keyring(credentials).channel(target, "", OPTIONS)


async def probe(target: str, credentials: Credentials | None) -> dict[str, str]:
    """Method -> "answered", or why not."""
    node = credentials.node if credentials and credentials.node else "e" * 16
    found = {}
    tried = requests(node)
    assert set(tried) == {m.name for m in pb.DESCRIPTOR.services_by_name["Peer"].methods}
    channel = channel_to(target, credentials)
    for method, request in tried.items():
        # INTERNAL is gRPC's word for a call that the other side ended while we were still
        # sending: no answer, but not in words. It is a matter of chance, so ask again.
        for _ in range(10):
            found[method] = await _try(channel, method, request, node)
            if found[method] != "INTERNAL":
                break
    await channel.close()
    return found


async def _try(channel: grpc.aio.Channel, method: str, request: Any, node: str) -> str:
    try:
        if isinstance(request, list):
            make: Any = channel.stream_stream
            data = [message.SerializeToString() for message in request]
            await make(f"/{PEER}/{method}")(iter(data), timeout=WITHIN).read()
        else:
            stub: Any = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            await getattr(stub, method)(request, timeout=WITHIN)
        return "answered"
    except grpc.aio.AioRpcError as error:
        refusal = find_refusal(error)
        seen = refusal.value if refusal else error.code().name
        return f"{seen}, by whom" if find_removal(error, node) else seen


async def hold(target: str, credentials: Credentials) -> dict[str, Any]:
    """When a call ended (time.monotonic), and how."""
    channel = channel_to(target, credentials)
    stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
    await stub.WhoIs(pb.WhoIsRequest(), timeout=WITHIN)
    print("standing", flush=True)
    request = pb.AppliedRequest(origin=credentials.node, version=1 << 40, seconds=50.0)
    try:
        await stub.AwaitApplied(request, timeout=55.0)
        code = "OK"
    except grpc.aio.AioRpcError as error:
        code = error.code().name
    ended = time.monotonic()
    await channel.close()
    return {"ended": ended, "code": code}


def main() -> None:
    how, target, *rest = sys.argv[1:]
    credentials = read_identity(rest[0]) if rest else None
    run: Any = {"probe": probe, "hold": hold}[how]
    print(json.dumps(asyncio.run(run(target, credentials))))


if __name__ == "__main__":
    main()
