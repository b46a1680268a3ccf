"""The session's messages as bytes of proto/peer.proto, and back.

What stands opposite: core/session.py, which knows no wire. Bytes rather than messages cross
gRPC's API, so that a batch that goes to every peer is encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import msgspec
from google.protobuf.message import DecodeError

from agent.core.membership import Rumour, State
from agent.core.plumtree import Graft, Have, Prune
from agent.core.replica import ORIGINS_MAX, VERSION_MAX, Delta, Record
from agent.core.seals import GROUP, RUN, SIGNATURE, Seal
from agent.core.session import BATCH, Applied, Digest, Hello, Message
from agent.core.stability import Reach, Seen
from agent.core.summary import BUCKETS, Summary
from agent.errors import Invalid
from agent.rpc import peer_pb2 as pb

# What a peer may say in one message; past it the peer is broken or hostile.
RECORDS_MAX = 20_000  # of one answer (BEHIND_MAX in server.py and consent.py) ...
BATCH_MAX = 2 * BATCH  # ... and of a stream's message: all of them are taken in at one go
VALUE_BYTES_MAX = 256 * 1024
RUMOURS_MAX = 20_000  # a table of a cluster far larger than is meant, suspicions and all
ID_MAX = 64  # characters of a node's id; ours have 16
KEY_MAX = 2 + ID_MAX  # of a record's key: its kind and an id
TEXT_MAX = 128  # characters of what is only shown
CERTIFICATE_BYTES_MAX = 8 * 1024  # ours have 500
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Record]).decode


class Rumours(tuple[Rumour, ...]):
    """A message that is for failure detection, not for the session."""


def rumours_to_proto(rumours: Iterable[Rumour]) -> list[pb.Rumour]:
    """Rumours as messages."""
    return [
        pb.Rumour(node=node, incarnation=incarnation, state=state, by=by)
        for node, incarnation, state, by in rumours
    ]


def rumours_from_proto(messages: Iterable[pb.Rumour]) -> Rumours:
    """Rumours out of their messages; Invalid if one cannot be one."""
    found = []
    for m in messages:
        names = 0 < len(m.node) <= ID_MAX and len(m.by) <= ID_MAX
        if m.state > State.LEFT or m.incarnation > VERSION_MAX or not names:
            raise Invalid("rumour", f"about {m.node[:40]!r} cannot be", "")
        found.append(Rumour(m.node, m.incarnation, State(m.state), m.by))
    if len(found) > RUMOURS_MAX:
        raise Invalid("rumours", f"are {len(found)}", "")
    return Rumours(found)


def encode_rumours(rumours: Iterable[Rumour]) -> bytes:
    """Rumours as a message of a stream."""
    message = pb.PeerMessage(rumours=pb.Rumours(rumours=rumours_to_proto(rumours)))
    return message.SerializeToString()


def delta_to_proto(delta: Delta) -> pb.Delta:
    """A delta as its message."""
    return pb.Delta(
        origin=delta.origin,
        base=delta.base,
        upto=delta.upto,
        floor=delta.floor,
        reset=delta.reset,
        complete=delta.complete,
        records=_pack(delta.records),
        seals=[
            pb.Seal(first=s.first, last=s.last, leaves=s.leaves, folded=s.folded,
                    signature=s.signature)
            for s in delta.seals
        ],
        certificate=delta.certificate,
    )  # fmt: skip


def delta_from_proto(message: pb.Delta, most: int = RECORDS_MAX) -> Delta:
    """A delta of at most `most` records out of its message; Invalid if it cannot be one."""
    try:
        records = _unpack(message.records) if message.records else []
    except (msgspec.MsgspecError, ValueError) as error:  # the latter of text that is no UTF-8
        raise Invalid("delta", f"has records that cannot be read ({error})", "") from None
    if len(records) > most:
        raise Invalid("delta", f"has {len(records)} records", "")
    last = message.base
    for key, version, value in records:
        fits = last < version <= message.upto and len(value) <= VALUE_BYTES_MAX
        if not fits or key[1:2] != "/" or len(key) > KEY_MAX:
            raise Invalid("delta", f"record {key[:40]!r} does not fit", "")
        last = version
    if len({record.key for record in records}) != len(records):
        # A delta tells the newest of each key: more would be work for nothing.
        raise Invalid("delta", "has a key twice", "")
    if max(message.upto, message.floor) > VERSION_MAX:
        raise Invalid("delta", f"has version {message.upto}", "")
    if not 0 < len(message.origin) <= ID_MAX or message.upto < message.base:
        raise Invalid("delta", "has no origin, or ends before it begins", "")
    if len(message.certificate) > CERTIFICATE_BYTES_MAX:
        raise Invalid("delta", f"has a certificate of {len(message.certificate)} bytes", "")
    return Delta(
        message.origin,
        message.base,
        message.upto,
        records,
        message.floor,
        message.reset,
        message.complete,
        _seals_from_proto(message, len(records)),
        message.certificate,
    )


def _seals_from_proto(message: pb.Delta, records: int) -> tuple[Seal, ...]:
    # Each has to be of use: for a record, for `upto` or for the floor.
    if len(message.seals) > records + 2:
        raise Invalid("delta", f"has {len(message.seals)} seals", "")
    seals = [Seal(s.first, s.last, s.leaves, s.folded, s.signature) for s in message.seals]
    before = 1
    for seal in seals:
        first, last, leaves, folded, signature = seal
        fits = (
            before <= first <= last < first + RUN
            and last <= VERSION_MAX
            and folded < 1 << (last - first) // GROUP + 1
            and len(signature) == SIGNATURE
        )
        if not fits or len(leaves) != seal.size():
            raise Invalid("delta", f"has a seal of {first} to {last} that cannot be", "")
        before = first
    return tuple(seals)


class Encoder:
    """Messages to bytes. The last deltas are kept: every peer is sent the same ones."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int, int, bool, bool, bool], bytes] = {}

    def encode(self, message: Message) -> bytes:
        """One message's bytes."""
        match message:
            case Delta():
                return self._delta(message)
            case Digest():
                entries = [
                    pb.DigestEntry(origin=origin, version=version, floor=floor)
                    for origin, (version, floor) in message.entries.items()
                ]
                digest = pb.Digest(
                    entries=entries,
                    time=message.time,
                    echo=message.echo,
                    held=message.held,
                    buckets=message.buckets,
                )
                return pb.PeerMessage(digest=digest).SerializeToString()
            case Hello():
                hello = pb.Hello(
                    node=message.node,
                    boot=message.boot,
                    version=message.version,
                    name=message.name,
                )
                return pb.PeerMessage(hello=hello).SerializeToString()
            case Applied():
                applied = pb.Applied(version=message.version, withholds=message.withholds)
                return pb.PeerMessage(applied=applied).SerializeToString()
            case Summary():
                summary = pb.Summary(
                    buckets=message.buckets,
                    time=message.time,
                    echo=message.echo,
                    held=message.held,
                )
                return pb.PeerMessage(summary=summary).SerializeToString()
            case Have():
                have = pb.Have(entries=_entries(message.entries))
                return pb.PeerMessage(have=have).SerializeToString()
            case Graft():
                graft = pb.Graft(entries=_entries(message.entries), whole=message.whole)
                return pb.PeerMessage(graft=graft).SerializeToString()
            case Prune():
                prune = pb.Prune(origins=message.origins)
                return pb.PeerMessage(prune=prune).SerializeToString()
            case Seen():
                seen = pb.Seen(
                    entries=[
                        pb.SeenEntry(origin=o, version=r.version, members=r.members)
                        for o, r in message.entries.items()
                    ],
                    whole=message.whole,
                )
                return pb.PeerMessage(seen=seen).SerializeToString()

    def _delta(self, delta: Delta) -> bytes:
        key = (delta.origin, delta.base, delta.upto, delta.floor, delta.reset, delta.complete,
               bool(delta.certificate))  # fmt: skip
        data = self._kept.get(key)
        if data is None:
            data = pb.PeerMessage(delta=delta_to_proto(delta)).SerializeToString()
            self._kept[key] = data
            if len(self._kept) > 64:
                del self._kept[next(iter(self._kept))]
        return data


def decode(data: bytes) -> Message | Rumours:
    """A message out of bytes; Invalid if they are none."""
    try:
        message = pb.PeerMessage.FromString(data)
    except DecodeError as error:
        raise Invalid("peer message", f"cannot be read ({error})", "") from None
    match message.WhichOneof("kind"):
        case "delta":
            return delta_from_proto(message.delta, BATCH_MAX)
        case "digest":
            digest = message.digest
            entries = {e.origin: (e.version, e.floor) for e in digest.entries}
            _check("digest", entries, (max(pair) for pair in entries.values()))
            _check_clocks("digest", digest)
            return Digest(entries, digest.time, digest.echo, digest.held, digest.buckets)
        case "hello":
            hello = message.hello
            texts = max(len(hello.boot), len(hello.version), len(hello.name)) <= TEXT_MAX
            if not 0 < len(hello.node) <= ID_MAX or not texts:
                raise Invalid("hello", "has no node, or more than that", "")
            return Hello(hello.node, hello.boot, hello.version, hello.name)
        case "applied":
            return Applied(message.applied.version, message.applied.withholds)
        case "rumours":
            return rumours_from_proto(message.rumours.rumours)
        case "summary":
            summary = message.summary
            if len(summary.buckets) != BUCKETS:
                raise Invalid("summary", f"has {len(summary.buckets)} buckets", "")
            _check_clocks("summary", summary)
            return Summary(tuple(summary.buckets), summary.time, summary.echo, summary.held)
        case "have":
            return Have(_versions("have", message.have.entries))
        case "graft":
            return Graft(_versions("graft", message.graft.entries), message.graft.whole)
        case "prune":
            _check("prune", message.prune.origins, ())
            return Prune(tuple(message.prune.origins))
        case "seen":
            seen = {e.origin: Reach(e.version, e.members) for e in message.seen.entries}
            _check("seen", seen, (reach.version for reach in seen.values()))
            return Seen(seen, message.seen.whole)
    raise Invalid("peer message", "is of an unknown kind", "")


def _entries(versions: dict[str, int]) -> list[pb.VersionEntry]:
    return [pb.VersionEntry(origin=o, version=v) for o, v in versions.items()]


def _versions(what: str, entries: Collection[pb.VersionEntry]) -> dict[str, int]:
    versions = {e.origin: e.version for e in entries}
    _check(what, versions, versions.values())
    return versions


def _check(what: str, origins: Collection[str], versions: Iterable[int]) -> None:
    if len(origins) > ORIGINS_MAX or not all(0 < len(o) <= ID_MAX for o in origins):
        raise Invalid(what, f"is of {len(origins)} origins, or of one that cannot be", "")
    if max(versions, default=0) > VERSION_MAX:
        raise Invalid(what, "has a version that cannot be", "")


def _check_clocks(what: str, message: pb.Digest | pb.Summary) -> None:
    if not all(map(math.isfinite, (message.time, message.echo, message.held))):
        raise Invalid(what, "has a time that is none", "")
