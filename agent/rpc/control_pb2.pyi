from agent.rpc import types_pb2 as _types_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Wait(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Info(_message.Message):
    __slots__ = ("node_id", "name", "version", "revision")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    version: str
    revision: int
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("ref", "network")
    REF_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ref: str
    network: str
    def __init__(self, ref: _Optional[str] = ..., network: _Optional[str] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("refs", "network", "wait", "all", "force")
    REFS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    refs: _containers.RepeatedScalarFieldContainer[str]
    network: str
    wait: Wait
    all: bool
    force: bool
    def __init__(self, refs: _Optional[_Iterable[str]] = ..., network: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., all: _Optional[bool] = ..., force: _Optional[bool] = ...) -> None: ...

class RemoveReply(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, removed: _Optional[_Iterable[str]] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesReply(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[_types_pb2.Node]
    def __init__(self, nodes: _Optional[_Iterable[_Union[_types_pb2.Node, _Mapping]]] = ...) -> None: ...

class CreateNetworkRequest(_message.Message):
    __slots__ = ("name", "driver", "subnets", "gateways", "ip_range", "internal", "mtu", "vni", "encrypted", "options", "labels", "wait", "ipv6", "ipv6_only", "ipam_driver", "ipam_options", "ip_ranges")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class IpamOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    SUBNETS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    IP_RANGE_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    VNI_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    IPV6_FIELD_NUMBER: _ClassVar[int]
    IPV6_ONLY_FIELD_NUMBER: _ClassVar[int]
    IPAM_DRIVER_FIELD_NUMBER: _ClassVar[int]
    IPAM_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    IP_RANGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    driver: str
    subnets: _containers.RepeatedScalarFieldContainer[str]
    gateways: _containers.RepeatedScalarFieldContainer[str]
    ip_range: str
    internal: bool
    mtu: int
    vni: int
    encrypted: bool
    options: _containers.ScalarMap[str, str]
    labels: _containers.ScalarMap[str, str]
    wait: Wait
    ipv6: bool
    ipv6_only: bool
    ipam_driver: str
    ipam_options: _containers.ScalarMap[str, str]
    ip_ranges: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., driver: _Optional[str] = ..., subnets: _Optional[_Iterable[str]] = ..., gateways: _Optional[_Iterable[str]] = ..., ip_range: _Optional[str] = ..., internal: _Optional[bool] = ..., mtu: _Optional[int] = ..., vni: _Optional[int] = ..., encrypted: _Optional[bool] = ..., options: _Optional[_Mapping[str, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., ipv6: _Optional[bool] = ..., ipv6_only: _Optional[bool] = ..., ipam_driver: _Optional[str] = ..., ipam_options: _Optional[_Mapping[str, str]] = ..., ip_ranges: _Optional[_Iterable[str]] = ...) -> None: ...

class ListNetworksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNetworksReply(_message.Message):
    __slots__ = ("networks",)
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    networks: _containers.RepeatedCompositeFieldContainer[_types_pb2.Network]
    def __init__(self, networks: _Optional[_Iterable[_Union[_types_pb2.Network, _Mapping]]] = ...) -> None: ...

class PruneNetworksRequest(_message.Message):
    __slots__ = ("wait",)
    WAIT_FIELD_NUMBER: _ClassVar[int]
    wait: Wait
    def __init__(self, wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class CreateEndpointRequest(_message.Message):
    __slots__ = ("network", "name", "addresses", "mac", "aliases", "labels", "netns", "ifname", "wait", "sandbox", "priority")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NETNS_FIELD_NUMBER: _ClassVar[int]
    IFNAME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    SANDBOX_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    network: str
    name: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    mac: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    netns: str
    ifname: str
    wait: Wait
    sandbox: str
    priority: int
    def __init__(self, network: _Optional[str] = ..., name: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., mac: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., netns: _Optional[str] = ..., ifname: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., sandbox: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("header", "lines")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    header: AnnounceHeader
    lines: bytes
    def __init__(self, header: _Optional[_Union[AnnounceHeader, _Mapping]] = ..., lines: _Optional[bytes] = ...) -> None: ...

class AnnounceHeader(_message.Message):
    __slots__ = ("network", "wait")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    network: str
    wait: Wait
    def __init__(self, network: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ("announced",)
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    announced: int
    def __init__(self, announced: _Optional[int] = ...) -> None: ...

class ListEndpointsRequest(_message.Message):
    __slots__ = ("network", "node")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    network: str
    node: str
    def __init__(self, network: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class ListEndpointsReply(_message.Message):
    __slots__ = ("endpoints",)
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedCompositeFieldContainer[_types_pb2.Endpoint]
    def __init__(self, endpoints: _Optional[_Iterable[_Union[_types_pb2.Endpoint, _Mapping]]] = ...) -> None: ...

class CreateSandboxRequest(_message.Message):
    __slots__ = ("name", "networks", "pid", "addresses", "aliases", "labels", "publishes", "log", "wait", "macs", "defaults")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MacsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHES_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    MACS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    networks: _containers.RepeatedScalarFieldContainer[str]
    pid: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    aliases: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    publishes: _containers.RepeatedCompositeFieldContainer[_types_pb2.Publish]
    log: str
    wait: Wait
    macs: _containers.ScalarMap[str, str]
    defaults: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., networks: _Optional[_Iterable[str]] = ..., pid: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., aliases: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., publishes: _Optional[_Iterable[_Union[_types_pb2.Publish, _Mapping]]] = ..., log: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., macs: _Optional[_Mapping[str, str]] = ..., defaults: _Optional[_Iterable[str]] = ...) -> None: ...

class ListSandboxesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSandboxesReply(_message.Message):
    __slots__ = ("sandboxes",)
    SANDBOXES_FIELD_NUMBER: _ClassVar[int]
    sandboxes: _containers.RepeatedCompositeFieldContainer[_types_pb2.Sandbox]
    def __init__(self, sandboxes: _Optional[_Iterable[_Union[_types_pb2.Sandbox, _Mapping]]] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("name", "type", "network")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    network: str
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., network: _Optional[str] = ...) -> None: ...

class ResolveReply(_message.Message):
    __slots__ = ("result", "records", "why")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    result: str
    records: _containers.RepeatedCompositeFieldContainer[DnsRecord]
    why: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, result: _Optional[str] = ..., records: _Optional[_Iterable[_Union[DnsRecord, _Mapping]]] = ..., why: _Optional[_Iterable[str]] = ...) -> None: ...

class DnsRecord(_message.Message):
    __slots__ = ("name", "type", "ttl", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    ttl: int
    data: str
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., ttl: _Optional[int] = ..., data: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("since", "history", "not_before", "end")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    since: int
    history: bool
    not_before: float
    end: bool
    def __init__(self, since: _Optional[int] = ..., history: _Optional[bool] = ..., not_before: _Optional[float] = ..., end: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("revision", "time", "action", "node", "network", "endpoint", "notice", "service")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    revision: int
    time: str
    action: str
    node: _types_pb2.Node
    network: _types_pb2.Network
    endpoint: _types_pb2.Endpoint
    notice: Notice
    service: _types_pb2.Service
    def __init__(self, revision: _Optional[int] = ..., time: _Optional[str] = ..., action: _Optional[str] = ..., node: _Optional[_Union[_types_pb2.Node, _Mapping]] = ..., network: _Optional[_Union[_types_pb2.Network, _Mapping]] = ..., endpoint: _Optional[_Union[_types_pb2.Endpoint, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., service: _Optional[_Union[_types_pb2.Service, _Mapping]] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("kind", "message", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetMetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsReply(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class LeaveNodeRequest(_message.Message):
    __slots__ = ("force", "wait")
    FORCE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    force: bool
    wait: Wait
    def __init__(self, force: _Optional[bool] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class LeaveNodeReply(_message.Message):
    __slots__ = ("handovers",)
    HANDOVERS_FIELD_NUMBER: _ClassVar[int]
    handovers: _containers.RepeatedCompositeFieldContainer[Handover]
    def __init__(self, handovers: _Optional[_Iterable[_Union[Handover, _Mapping]]] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("network", "node", "addresses")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    network: str
    node: str
    addresses: str
    def __init__(self, network: _Optional[str] = ..., node: _Optional[str] = ..., addresses: _Optional[str] = ...) -> None: ...

class GetJoinTokenRequest(_message.Message):
    __slots__ = ("rotate",)
    ROTATE_FIELD_NUMBER: _ClassVar[int]
    rotate: bool
    def __init__(self, rotate: _Optional[bool] = ...) -> None: ...

class JoinToken(_message.Message):
    __slots__ = ("token", "address", "command", "fingerprint")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    token: str
    address: str
    command: str
    fingerprint: str
    def __init__(self, token: _Optional[str] = ..., address: _Optional[str] = ..., command: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class RotateAuthorityRequest(_message.Message):
    __slots__ = ("force",)
    FORCE_FIELD_NUMBER: _ClassVar[int]
    force: bool
    def __init__(self, force: _Optional[bool] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("id", "node", "authorities", "keepers", "trust", "rotation", "certificates")
    ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITIES_FIELD_NUMBER: _ClassVar[int]
    KEEPERS_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    ROTATION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    id: str
    node: str
    authorities: _containers.RepeatedCompositeFieldContainer[Authority]
    keepers: _containers.RepeatedScalarFieldContainer[str]
    trust: int
    rotation: Rotation
    certificates: _containers.RepeatedCompositeFieldContainer[Certificate]
    def __init__(self, id: _Optional[str] = ..., node: _Optional[str] = ..., authorities: _Optional[_Iterable[_Union[Authority, _Mapping]]] = ..., keepers: _Optional[_Iterable[str]] = ..., trust: _Optional[int] = ..., rotation: _Optional[_Union[Rotation, _Mapping]] = ..., certificates: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ...) -> None: ...

class Authority(_message.Message):
    __slots__ = ("fingerprint", "ends", "state")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    ends: str
    state: str
    def __init__(self, fingerprint: _Optional[str] = ..., ends: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("node", "ends", "fingerprint", "trust", "keeper")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    node: str
    ends: str
    fingerprint: str
    trust: int
    keeper: bool
    def __init__(self, node: _Optional[str] = ..., ends: _Optional[str] = ..., fingerprint: _Optional[str] = ..., trust: _Optional[int] = ..., keeper: _Optional[bool] = ...) -> None: ...

class Rotation(_message.Message):
    __slots__ = ("phase", "waiting", "left_behind")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    LEFT_BEHIND_FIELD_NUMBER: _ClassVar[int]
    phase: str
    waiting: _containers.RepeatedScalarFieldContainer[str]
    left_behind: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, phase: _Optional[str] = ..., waiting: _Optional[_Iterable[str]] = ..., left_behind: _Optional[_Iterable[str]] = ...) -> None: ...

class IssueUserRequest(_message.Message):
    __slots__ = ("name", "read", "request")
    NAME_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    read: bool
    request: bytes
    def __init__(self, name: _Optional[str] = ..., read: _Optional[bool] = ..., request: _Optional[bytes] = ...) -> None: ...

class UserCertificate(_message.Message):
    __slots__ = ("name", "right", "ends", "certificate", "authorities")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    right: str
    ends: str
    certificate: bytes
    authorities: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, name: _Optional[str] = ..., right: _Optional[str] = ..., ends: _Optional[str] = ..., certificate: _Optional[bytes] = ..., authorities: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RotateKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServiceSettings(_message.Message):
    __slots__ = ("mode", "vips", "ports", "selector", "affinity", "affinity_timeout", "health", "publish_on", "prefer_local", "all_unhealthy", "drain_timeout", "labels")
    class SelectorEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODE_FIELD_NUMBER: _ClassVar[int]
    VIPS_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_ON_FIELD_NUMBER: _ClassVar[int]
    PREFER_LOCAL_FIELD_NUMBER: _ClassVar[int]
    ALL_UNHEALTHY_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    vips: _containers.RepeatedScalarFieldContainer[str]
    ports: _containers.RepeatedCompositeFieldContainer[_types_pb2.ServicePort]
    selector: _containers.ScalarMap[str, str]
    affinity: str
    affinity_timeout: float
    health: _types_pb2.HealthCheck
    publish_on: _containers.RepeatedScalarFieldContainer[str]
    prefer_local: bool
    all_unhealthy: str
    drain_timeout: float
    labels: _containers.ScalarMap[str, str]
    def __init__(self, mode: _Optional[str] = ..., vips: _Optional[_Iterable[str]] = ..., ports: _Optional[_Iterable[_Union[_types_pb2.ServicePort, _Mapping]]] = ..., selector: _Optional[_Mapping[str, str]] = ..., affinity: _Optional[str] = ..., affinity_timeout: _Optional[float] = ..., health: _Optional[_Union[_types_pb2.HealthCheck, _Mapping]] = ..., publish_on: _Optional[_Iterable[str]] = ..., prefer_local: _Optional[bool] = ..., all_unhealthy: _Optional[str] = ..., drain_timeout: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CreateServiceRequest(_message.Message):
    __slots__ = ("name", "network", "settings", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    network: str
    settings: ServiceSettings
    wait: Wait
    def __init__(self, name: _Optional[str] = ..., network: _Optional[str] = ..., settings: _Optional[_Union[ServiceSettings, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class ListServicesRequest(_message.Message):
    __slots__ = ("network",)
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    network: str
    def __init__(self, network: _Optional[str] = ...) -> None: ...

class ListServicesReply(_message.Message):
    __slots__ = ("services",)
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    services: _containers.RepeatedCompositeFieldContainer[_types_pb2.Service]
    def __init__(self, services: _Optional[_Iterable[_Union[_types_pb2.Service, _Mapping]]] = ...) -> None: ...

class UpdateServiceRequest(_message.Message):
    __slots__ = ("ref", "network", "settings", "mask", "wait")
    REF_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ref: str
    network: str
    settings: ServiceSettings
    mask: _field_mask_pb2.FieldMask
    wait: Wait
    def __init__(self, ref: _Optional[str] = ..., network: _Optional[str] = ..., settings: _Optional[_Union[ServiceSettings, _Mapping]] = ..., mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class BackendRequest(_message.Message):
    __slots__ = ("ref", "network", "endpoint", "weight", "wait")
    REF_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ref: str
    network: str
    endpoint: str
    weight: int
    wait: Wait
    def __init__(self, ref: _Optional[str] = ..., network: _Optional[str] = ..., endpoint: _Optional[str] = ..., weight: _Optional[int] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class SetEndpointHealthRequest(_message.Message):
    __slots__ = ("ref", "network", "state", "reason", "wait")
    REF_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ref: str
    network: str
    state: str
    reason: str
    wait: Wait
    def __init__(self, ref: _Optional[str] = ..., network: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...
