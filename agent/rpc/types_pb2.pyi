from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Node(_message.Message):
    __slots__ = ("id", "name", "address", "vtep", "state", "reason", "version", "endpoints", "rtt_ms", "since", "mtu", "routes", "incarnation", "keeper", "certificate_ends", "trust", "wireguard", "paths")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VTEP_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    RTT_MS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    WIREGUARD_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    address: str
    vtep: str
    state: str
    reason: str
    version: str
    endpoints: int
    rtt_ms: float
    since: str
    mtu: int
    routes: _containers.RepeatedScalarFieldContainer[str]
    incarnation: int
    keeper: bool
    certificate_ends: str
    trust: int
    wireguard: _containers.RepeatedCompositeFieldContainer[WireguardKey]
    paths: _containers.RepeatedCompositeFieldContainer[Path]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., vtep: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., version: _Optional[str] = ..., endpoints: _Optional[int] = ..., rtt_ms: _Optional[float] = ..., since: _Optional[str] = ..., mtu: _Optional[int] = ..., routes: _Optional[_Iterable[str]] = ..., incarnation: _Optional[int] = ..., keeper: _Optional[bool] = ..., certificate_ends: _Optional[str] = ..., trust: _Optional[int] = ..., wireguard: _Optional[_Iterable[_Union[WireguardKey, _Mapping]]] = ..., paths: _Optional[_Iterable[_Union[Path, _Mapping]]] = ...) -> None: ...

class Path(_message.Message):
    __slots__ = ("from_node", "to_node", "mtu", "expected", "state", "tunnel")
    FROM_NODE_FIELD_NUMBER: _ClassVar[int]
    TO_NODE_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_FIELD_NUMBER: _ClassVar[int]
    from_node: str
    to_node: str
    mtu: int
    expected: int
    state: str
    tunnel: str
    def __init__(self, from_node: _Optional[str] = ..., to_node: _Optional[str] = ..., mtu: _Optional[int] = ..., expected: _Optional[int] = ..., state: _Optional[str] = ..., tunnel: _Optional[str] = ...) -> None: ...

class WireguardKey(_message.Message):
    __slots__ = ("public_key", "port", "generation", "address")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    public_key: str
    port: int
    generation: int
    address: str
    def __init__(self, public_key: _Optional[str] = ..., port: _Optional[int] = ..., generation: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class Network(_message.Message):
    __slots__ = ("id", "name", "driver", "subnets", "gateways", "ip_range", "vni", "mtu", "internal", "encrypted", "options", "labels", "created", "creator", "endpoints", "ranges", "conflict", "total", "used", "free", "usage", "without_key", "ipam_driver", "ip_ranges")
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
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    SUBNETS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    IP_RANGE_FIELD_NUMBER: _ClassVar[int]
    VNI_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_KEY_FIELD_NUMBER: _ClassVar[int]
    IPAM_DRIVER_FIELD_NUMBER: _ClassVar[int]
    IP_RANGES_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    driver: str
    subnets: _containers.RepeatedScalarFieldContainer[str]
    gateways: _containers.RepeatedScalarFieldContainer[str]
    ip_range: str
    vni: int
    mtu: int
    internal: bool
    encrypted: bool
    options: _containers.ScalarMap[str, str]
    labels: _containers.ScalarMap[str, str]
    created: str
    creator: str
    endpoints: int
    ranges: _containers.RepeatedCompositeFieldContainer[Ownership]
    conflict: str
    total: int
    used: int
    free: int
    usage: _containers.RepeatedCompositeFieldContainer[AddressUse]
    without_key: _containers.RepeatedScalarFieldContainer[str]
    ipam_driver: str
    ip_ranges: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., driver: _Optional[str] = ..., subnets: _Optional[_Iterable[str]] = ..., gateways: _Optional[_Iterable[str]] = ..., ip_range: _Optional[str] = ..., vni: _Optional[int] = ..., mtu: _Optional[int] = ..., internal: _Optional[bool] = ..., encrypted: _Optional[bool] = ..., options: _Optional[_Mapping[str, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., created: _Optional[str] = ..., creator: _Optional[str] = ..., endpoints: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[Ownership, _Mapping]]] = ..., conflict: _Optional[str] = ..., total: _Optional[int] = ..., used: _Optional[int] = ..., free: _Optional[int] = ..., usage: _Optional[_Iterable[_Union[AddressUse, _Mapping]]] = ..., without_key: _Optional[_Iterable[str]] = ..., ipam_driver: _Optional[str] = ..., ip_ranges: _Optional[_Iterable[str]] = ...) -> None: ...

class AddressUse(_message.Message):
    __slots__ = ("node", "family", "owned", "used")
    NODE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    OWNED_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    node: str
    family: int
    owned: int
    used: int
    def __init__(self, node: _Optional[str] = ..., family: _Optional[int] = ..., owned: _Optional[int] = ..., used: _Optional[int] = ...) -> None: ...

class Ownership(_message.Message):
    __slots__ = ("first", "last", "node")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    first: str
    last: str
    node: str
    def __init__(self, first: _Optional[str] = ..., last: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("id", "name", "aliases", "network", "network_id", "node", "sandbox", "mac", "addresses", "labels", "health", "state", "health_reason", "health_since")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SANDBOX_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HEALTH_REASON_FIELD_NUMBER: _ClassVar[int]
    HEALTH_SINCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    network: str
    network_id: str
    node: str
    sandbox: str
    mac: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    health: str
    state: str
    health_reason: str
    health_since: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., network: _Optional[str] = ..., network_id: _Optional[str] = ..., node: _Optional[str] = ..., sandbox: _Optional[str] = ..., mac: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., health: _Optional[str] = ..., state: _Optional[str] = ..., health_reason: _Optional[str] = ..., health_since: _Optional[str] = ...) -> None: ...

class Publish(_message.Message):
    __slots__ = ("host_address", "host_port", "target_port", "protocol")
    HOST_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_PORT_FIELD_NUMBER: _ClassVar[int]
    TARGET_PORT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    host_address: str
    host_port: int
    target_port: int
    protocol: str
    def __init__(self, host_address: _Optional[str] = ..., host_port: _Optional[int] = ..., target_port: _Optional[int] = ..., protocol: _Optional[str] = ...) -> None: ...

class Sandbox(_message.Message):
    __slots__ = ("id", "name", "node", "netns", "pid", "state", "created", "endpoints", "publishes", "resolv_conf", "log", "stack", "interfaces")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NETNS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHES_FIELD_NUMBER: _ClassVar[int]
    RESOLV_CONF_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    INTERFACES_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    node: str
    netns: str
    pid: int
    state: str
    created: str
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    publishes: _containers.RepeatedCompositeFieldContainer[Publish]
    resolv_conf: str
    log: str
    stack: str
    interfaces: _containers.RepeatedCompositeFieldContainer[Interface]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., node: _Optional[str] = ..., netns: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., created: _Optional[str] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., publishes: _Optional[_Iterable[_Union[Publish, _Mapping]]] = ..., resolv_conf: _Optional[str] = ..., log: _Optional[str] = ..., stack: _Optional[str] = ..., interfaces: _Optional[_Iterable[_Union[Interface, _Mapping]]] = ...) -> None: ...

class Interface(_message.Message):
    __slots__ = ("name", "endpoint", "network", "priority", "default_routes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ROUTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    endpoint: str
    network: str
    priority: int
    default_routes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., endpoint: _Optional[str] = ..., network: _Optional[str] = ..., priority: _Optional[int] = ..., default_routes: _Optional[_Iterable[str]] = ...) -> None: ...

class Service(_message.Message):
    __slots__ = ("id", "name", "network", "network_id", "vips", "mode", "ports", "selector", "affinity", "affinity_timeout", "health", "publish_on", "prefer_local", "all_unhealthy", "drain_timeout", "labels", "backends", "created", "creator", "state", "conflict")
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
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    VIPS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
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
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    network: str
    network_id: str
    vips: _containers.RepeatedScalarFieldContainer[str]
    mode: str
    ports: _containers.RepeatedCompositeFieldContainer[ServicePort]
    selector: _containers.ScalarMap[str, str]
    affinity: str
    affinity_timeout: float
    health: HealthCheck
    publish_on: _containers.RepeatedScalarFieldContainer[str]
    prefer_local: bool
    all_unhealthy: str
    drain_timeout: float
    labels: _containers.ScalarMap[str, str]
    backends: _containers.RepeatedCompositeFieldContainer[Backend]
    created: str
    creator: str
    state: str
    conflict: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., network: _Optional[str] = ..., network_id: _Optional[str] = ..., vips: _Optional[_Iterable[str]] = ..., mode: _Optional[str] = ..., ports: _Optional[_Iterable[_Union[ServicePort, _Mapping]]] = ..., selector: _Optional[_Mapping[str, str]] = ..., affinity: _Optional[str] = ..., affinity_timeout: _Optional[float] = ..., health: _Optional[_Union[HealthCheck, _Mapping]] = ..., publish_on: _Optional[_Iterable[str]] = ..., prefer_local: _Optional[bool] = ..., all_unhealthy: _Optional[str] = ..., drain_timeout: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ..., backends: _Optional[_Iterable[_Union[Backend, _Mapping]]] = ..., created: _Optional[str] = ..., creator: _Optional[str] = ..., state: _Optional[str] = ..., conflict: _Optional[str] = ...) -> None: ...

class ServicePort(_message.Message):
    __slots__ = ("port", "target", "protocol", "published", "published_at")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_AT_FIELD_NUMBER: _ClassVar[int]
    port: int
    target: int
    protocol: str
    published: int
    published_at: str
    def __init__(self, port: _Optional[int] = ..., target: _Optional[int] = ..., protocol: _Optional[str] = ..., published: _Optional[int] = ..., published_at: _Optional[str] = ...) -> None: ...

class HealthCheck(_message.Message):
    __slots__ = ("kind", "path", "port", "interval", "timeout", "rise", "fall")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    RISE_FIELD_NUMBER: _ClassVar[int]
    FALL_FIELD_NUMBER: _ClassVar[int]
    kind: str
    path: str
    port: int
    interval: float
    timeout: float
    rise: int
    fall: int
    def __init__(self, kind: _Optional[str] = ..., path: _Optional[str] = ..., port: _Optional[int] = ..., interval: _Optional[float] = ..., timeout: _Optional[float] = ..., rise: _Optional[int] = ..., fall: _Optional[int] = ...) -> None: ...

class Backend(_message.Message):
    __slots__ = ("endpoint", "endpoint_id", "node", "address", "addresses", "weight", "health", "state", "takes", "reason", "since")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TAKES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    endpoint_id: str
    node: str
    address: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    weight: int
    health: str
    state: str
    takes: bool
    reason: str
    since: str
    def __init__(self, endpoint: _Optional[str] = ..., endpoint_id: _Optional[str] = ..., node: _Optional[str] = ..., address: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., weight: _Optional[int] = ..., health: _Optional[str] = ..., state: _Optional[str] = ..., takes: _Optional[bool] = ..., reason: _Optional[str] = ..., since: _Optional[str] = ...) -> None: ...
