from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerMessage(_message.Message):
    __slots__ = ("hello", "digest", "delta", "applied")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    digest: Digest
    delta: Delta
    applied: Applied
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., digest: _Optional[_Union[Digest, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("entries", "time", "echo", "held")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[DigestEntry]
    time: float
    echo: float
    held: float
    def __init__(self, entries: _Optional[_Iterable[_Union[DigestEntry, _Mapping]]] = ..., time: _Optional[float] = ..., echo: _Optional[float] = ..., held: _Optional[float] = ...) -> None: ...

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
    __slots__ = ("origin", "base", "upto", "floor", "reset", "complete", "records")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    UPTO_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    origin: str
    base: int
    upto: int
    floor: int
    reset: bool
    complete: bool
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, origin: _Optional[str] = ..., base: _Optional[int] = ..., upto: _Optional[int] = ..., floor: _Optional[int] = ..., reset: _Optional[bool] = ..., complete: _Optional[bool] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("key", "version", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    version: int
    value: bytes
    def __init__(self, key: _Optional[str] = ..., version: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("remover", "lost", "known", "release")
    REMOVER_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    remover: str
    lost: _containers.RepeatedScalarFieldContainer[str]
    known: _containers.RepeatedCompositeFieldContainer[DigestEntry]
    release: bool
    def __init__(self, remover: _Optional[str] = ..., lost: _Optional[_Iterable[str]] = ..., known: _Optional[_Iterable[_Union[DigestEntry, _Mapping]]] = ..., release: _Optional[bool] = ...) -> None: ...

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
    __slots__ = ("node", "boot", "delta", "leaves")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    node: str
    boot: str
    delta: Delta
    leaves: bool
    def __init__(self, node: _Optional[str] = ..., boot: _Optional[str] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., leaves: _Optional[bool] = ...) -> None: ...

class DeliveryReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...
