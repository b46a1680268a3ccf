from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerMessage(_message.Message):
    __slots__ = ("hello", "digest", "delta", "applied", "rumours", "summary", "have", "graft", "prune", "seen")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    RUMOURS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    GRAFT_FIELD_NUMBER: _ClassVar[int]
    PRUNE_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    digest: Digest
    delta: Delta
    applied: Applied
    rumours: Rumours
    summary: Summary
    have: Have
    graft: Graft
    prune: Prune
    seen: Seen
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., digest: _Optional[_Union[Digest, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ..., rumours: _Optional[_Union[Rumours, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., have: _Optional[_Union[Have, _Mapping]] = ..., graft: _Optional[_Union[Graft, _Mapping]] = ..., prune: _Optional[_Union[Prune, _Mapping]] = ..., seen: _Optional[_Union[Seen, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("node", "boot", "version", "name")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    node: str
    boot: str
    version: str
    name: str
    def __init__(self, node: _Optional[str] = ..., boot: _Optional[str] = ..., version: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Digest(_message.Message):
    __slots__ = ("entries", "time", "echo", "held", "buckets")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[DigestEntry]
    time: float
    echo: float
    held: float
    buckets: int
    def __init__(self, entries: _Optional[_Iterable[_Union[DigestEntry, _Mapping]]] = ..., time: _Optional[float] = ..., echo: _Optional[float] = ..., held: _Optional[float] = ..., buckets: _Optional[int] = ...) -> None: ...

class DigestEntry(_message.Message):
    __slots__ = ("origin", "version", "floor")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    origin: str
    version: int
    floor: int
    def __init__(self, origin: _Optional[str] = ..., version: _Optional[int] = ..., floor: _Optional[int] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("origin", "base", "upto", "floor", "reset", "complete", "records", "seals", "certificate")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    UPTO_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    origin: str
    base: int
    upto: int
    floor: int
    reset: bool
    complete: bool
    records: bytes
    seals: _containers.RepeatedCompositeFieldContainer[Seal]
    certificate: bytes
    def __init__(self, origin: _Optional[str] = ..., base: _Optional[int] = ..., upto: _Optional[int] = ..., floor: _Optional[int] = ..., reset: _Optional[bool] = ..., complete: _Optional[bool] = ..., records: _Optional[bytes] = ..., seals: _Optional[_Iterable[_Union[Seal, _Mapping]]] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("first", "last", "leaves", "folded", "signature")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    leaves: bytes
    folded: int
    signature: bytes
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ..., leaves: _Optional[bytes] = ..., folded: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("version", "withholds", "why")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WITHHOLDS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    version: int
    withholds: bool
    why: str
    def __init__(self, version: _Optional[int] = ..., withholds: _Optional[bool] = ..., why: _Optional[str] = ...) -> None: ...

class Rumours(_message.Message):
    __slots__ = ("rumours",)
    RUMOURS_FIELD_NUMBER: _ClassVar[int]
    rumours: _containers.RepeatedCompositeFieldContainer[Rumour]
    def __init__(self, rumours: _Optional[_Iterable[_Union[Rumour, _Mapping]]] = ...) -> None: ...

class Rumour(_message.Message):
    __slots__ = ("node", "incarnation", "state", "by")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    state: int
    by: str
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ..., state: _Optional[int] = ..., by: _Optional[str] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("node", "incarnation", "target", "rumours", "table")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RUMOURS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    target: str
    rumours: _containers.RepeatedCompositeFieldContainer[Rumour]
    table: int
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ..., target: _Optional[str] = ..., rumours: _Optional[_Iterable[_Union[Rumour, _Mapping]]] = ..., table: _Optional[int] = ...) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("node", "incarnation", "rumours", "table")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RUMOURS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    rumours: _containers.RepeatedCompositeFieldContainer[Rumour]
    table: int
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ..., rumours: _Optional[_Iterable[_Union[Rumour, _Mapping]]] = ..., table: _Optional[int] = ...) -> None: ...

class PingForRequest(_message.Message):
    __slots__ = ("node", "target", "seconds")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    node: str
    target: str
    seconds: float
    def __init__(self, node: _Optional[str] = ..., target: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class PingForReply(_message.Message):
    __slots__ = ("outcome", "incarnation")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    outcome: int
    incarnation: int
    def __init__(self, outcome: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class AppliedRequest(_message.Message):
    __slots__ = ("origin", "version", "seconds", "node", "networks")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    origin: str
    version: int
    seconds: float
    node: str
    networks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, origin: _Optional[str] = ..., version: _Optional[int] = ..., seconds: _Optional[float] = ..., node: _Optional[str] = ..., networks: _Optional[_Iterable[str]] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("buckets", "time", "echo", "held")
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    buckets: _containers.RepeatedScalarFieldContainer[int]
    time: float
    echo: float
    held: float
    def __init__(self, buckets: _Optional[_Iterable[int]] = ..., time: _Optional[float] = ..., echo: _Optional[float] = ..., held: _Optional[float] = ...) -> None: ...

class Have(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[VersionEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[VersionEntry, _Mapping]]] = ...) -> None: ...

class Graft(_message.Message):
    __slots__ = ("entries", "whole")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[VersionEntry]
    whole: bool
    def __init__(self, entries: _Optional[_Iterable[_Union[VersionEntry, _Mapping]]] = ..., whole: _Optional[bool] = ...) -> None: ...

class Prune(_message.Message):
    __slots__ = ("origins",)
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    origins: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, origins: _Optional[_Iterable[str]] = ...) -> None: ...

class VersionEntry(_message.Message):
    __slots__ = ("origin", "version")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    origin: str
    version: int
    def __init__(self, origin: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class Seen(_message.Message):
    __slots__ = ("entries", "whole")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[SeenEntry]
    whole: bool
    def __init__(self, entries: _Optional[_Iterable[_Union[SeenEntry, _Mapping]]] = ..., whole: _Optional[bool] = ...) -> None: ...

class SeenEntry(_message.Message):
    __slots__ = ("origin", "version", "members")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    origin: str
    version: int
    members: int
    def __init__(self, origin: _Optional[str] = ..., version: _Optional[int] = ..., members: _Optional[int] = ...) -> None: ...

class SpaceRequest(_message.Message):
    __slots__ = ("network", "requester", "family", "ranges", "known")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    REQUESTER_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    network: str
    requester: str
    family: int
    ranges: _containers.RepeatedCompositeFieldContainer[AddressRange]
    known: int
    def __init__(self, network: _Optional[str] = ..., requester: _Optional[str] = ..., family: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[AddressRange, _Mapping]]] = ..., known: _Optional[int] = ...) -> None: ...

class AddressRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: bytes
    end: bytes
    def __init__(self, start: _Optional[bytes] = ..., end: _Optional[bytes] = ...) -> None: ...

class SpaceReply(_message.Message):
    __slots__ = ("delta", "refused")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    refused: str
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., refused: _Optional[str] = ...) -> None: ...

class RemovalAsk(_message.Message):
    __slots__ = ("remover", "lost", "known", "release", "force", "number", "enquiry")
    REMOVER_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENQUIRY_FIELD_NUMBER: _ClassVar[int]
    remover: str
    lost: _containers.RepeatedScalarFieldContainer[str]
    known: _containers.RepeatedCompositeFieldContainer[DigestEntry]
    release: bool
    force: bool
    number: int
    enquiry: bool
    def __init__(self, remover: _Optional[str] = ..., lost: _Optional[_Iterable[str]] = ..., known: _Optional[_Iterable[_Union[DigestEntry, _Mapping]]] = ..., release: _Optional[bool] = ..., force: _Optional[bool] = ..., number: _Optional[int] = ..., enquiry: _Optional[bool] = ...) -> None: ...

class RemovalAnswer(_message.Message):
    __slots__ = ("verdict", "about", "settled", "versions", "voters", "deltas")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    VOTERS_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    verdict: int
    about: str
    settled: _containers.RepeatedScalarFieldContainer[str]
    versions: _containers.RepeatedCompositeFieldContainer[DigestEntry]
    voters: _containers.RepeatedScalarFieldContainer[str]
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    def __init__(self, verdict: _Optional[int] = ..., about: _Optional[str] = ..., settled: _Optional[_Iterable[str]] = ..., versions: _Optional[_Iterable[_Union[DigestEntry, _Mapping]]] = ..., voters: _Optional[_Iterable[str]] = ..., deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ...) -> None: ...

class Delivery(_message.Message):
    __slots__ = ("node", "delta")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    node: str
    delta: Delta
    def __init__(self, node: _Optional[str] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ...) -> None: ...

class DeliveryReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class AuthoritiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Authorities(_message.Message):
    __slots__ = ("authorities", "retired", "trust")
    AUTHORITIES_FIELD_NUMBER: _ClassVar[int]
    RETIRED_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    authorities: _containers.RepeatedScalarFieldContainer[bytes]
    retired: _containers.RepeatedScalarFieldContainer[bytes]
    trust: bytes
    def __init__(self, authorities: _Optional[_Iterable[bytes]] = ..., retired: _Optional[_Iterable[bytes]] = ..., trust: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("node", "name", "secret", "request", "record_key", "proof", "hops")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RECORD_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    node: str
    name: str
    secret: str
    request: bytes
    record_key: bytes
    proof: bytes
    hops: int
    def __init__(self, node: _Optional[str] = ..., name: _Optional[str] = ..., secret: _Optional[str] = ..., request: _Optional[bytes] = ..., record_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., hops: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("certificate", "request", "proof", "hops")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    request: bytes
    proof: bytes
    hops: int
    def __init__(self, certificate: _Optional[bytes] = ..., request: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., hops: _Optional[int] = ...) -> None: ...

class Issued(_message.Message):
    __slots__ = ("certificate", "trust", "refusal")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    trust: bytes
    refusal: Refusal
    def __init__(self, certificate: _Optional[bytes] = ..., trust: _Optional[bytes] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "what", "why", "fix", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: str
    what: str
    why: str
    fix: str
    reason: str
    def __init__(self, code: _Optional[str] = ..., what: _Optional[str] = ..., why: _Optional[str] = ..., fix: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class KeyParcel(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class KeyTaken(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: str
    def __init__(self, refused: _Optional[str] = ...) -> None: ...

class WhoIsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhoIsReply(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class PortsRequest(_message.Message):
    __slots__ = ("node", "ports")
    NODE_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    node: str
    ports: _containers.RepeatedCompositeFieldContainer[HostPort]
    def __init__(self, node: _Optional[str] = ..., ports: _Optional[_Iterable[_Union[HostPort, _Mapping]]] = ...) -> None: ...

class HostPort(_message.Message):
    __slots__ = ("protocol", "port", "address")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    port: int
    address: str
    def __init__(self, protocol: _Optional[str] = ..., port: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class PortsReply(_message.Message):
    __slots__ = ("taken",)
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    taken: _containers.RepeatedCompositeFieldContainer[PortTaken]
    def __init__(self, taken: _Optional[_Iterable[_Union[PortTaken, _Mapping]]] = ...) -> None: ...

class PortTaken(_message.Message):
    __slots__ = ("port", "why", "foreign")
    PORT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_FIELD_NUMBER: _ClassVar[int]
    port: HostPort
    why: str
    foreign: bool
    def __init__(self, port: _Optional[_Union[HostPort, _Mapping]] = ..., why: _Optional[str] = ..., foreign: _Optional[bool] = ...) -> None: ...
