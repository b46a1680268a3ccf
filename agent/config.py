"""The agent's settings: a flag, else VXMESH_NAME of the environment, else a key of a TOML file.

`vxmesh agent --check-config` prints what holds and from where. What stands opposite:
cli/agent.py has the flags, daemon.py the use.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from agent.errors import Invalid
from agent.model import BARRED_DATA_PORTS, NAMES_PORT
from agent.notation import parse_address, parse_name

DEFAULT_FILE = Path("/etc/vxmesh/agent.toml")
# s; a node renews at two thirds, which must leave it time for more than one try. The CA's own
# certificate holds for ten years.
CERT_LIFE = (10.0, 5 * 365 * 86_400.0)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set. Each field's metadata says what it is, for --help too."""

    name: str = field(default="", metadata={"help": "this node's name [the host's name]"})
    advertise: str = field(
        default="",
        metadata={"help": "address for peers and VXLAN [the one that leads outside]"},
    )
    port: int = field(
        default=7946, metadata={"help": "TCP port for peers, and UDP port to measure paths"}
    )
    data_port: int = field(default=4789, metadata={"help": "UDP port for VXLAN (RFC 7348)"})
    join: tuple[str, ...] = field(
        default=(), metadata={"help": "HOST[:PORT] of a node to join; may be repeated"}
    )
    mdns: bool = field(default=False, metadata={"help": "find peers on the LAN by mDNS"})
    detection: str = field(
        default="lan", metadata={"help": "how soon a silent node counts as gone: lan, wan or local"}
    )
    agent_grace: float = field(
        default=60.0,
        metadata={"help": "s that a host's rows and names outlive its agent, if the host answers"},
    )
    path_interval: float = field(
        default=10.0, metadata={"help": "s between two looks at how large packets get to a node"}
    )
    state_dir: str = field(
        default="/var/lib/vxmesh", metadata={"help": "what must outlive a restart"}
    )
    run_dir: str = field(
        default="/run/vxmesh", metadata={"help": "sockets and the namespace, gone at a reboot"}
    )
    log_level: str = field(default="info", metadata={"help": "debug, info, warning or error"})
    log_format: str = field(default="text", metadata={"help": "text for people, json for machines"})
    wireguard: str = field(
        default="auto",
        metadata={"help": "whose WireGuard: kernel, go (wireguard-go), auto: the kernel's first"},
    )
    wireguard_port: int = field(
        default=51850, metadata={"help": "UDP port of encrypted networks, and the one after it"}
    )
    wireguard_rotate: float = field(
        default=86400.0, metadata={"help": "s between two changes of this node's WireGuard key"}
    )
    socket_balancing: str = field(
        default="auto",
        metadata={"help": "lead TCP to backends as it connects, by eBPF: auto (if it can be), off"},
    )
    shortcuts: str = field(
        default="auto",
        metadata={"help": "frames of sandboxes past the bridge, by eBPF: auto (if it can be), off"},
    )
    metrics_listen: str = field(
        default="", metadata={"help": "ADDRESS:PORT for /metrics, without authentication [none]"}
    )
    change_group: str = field(
        default="vxmesh", metadata={"help": "group (or gid) that may use the agent as root may"}
    )
    read_group: str = field(
        default="vxmesh-read", metadata={"help": "group (or gid) that may look and not change"}
    )
    control_listen: str = field(
        default="",
        metadata={"help": "ADDRESS:PORT for users with a certificate of 'cluster user' [none]"},
    )
    token: str = field(
        default="", metadata={"help": "of the cluster to --join; see 'vxmesh cluster token'"}
    )
    token_file: str = field(default="", metadata={"help": "a file with the token, and no more"})
    cert_life: str = field(
        default="90d", metadata={"help": "of certificates that this agent issues, as 90d, 12h"}
    )
    name_server_workers: int = field(
        default=1, metadata={"help": "processes of the name server, each with all names in memory"}
    )
    plugin_dir: tuple[str, ...] = field(
        default=("/run/docker/plugins", "/etc/docker/plugins", "/usr/lib/docker/plugins"),
        metadata={"help": "where network plugins are looked for; may be repeated"},
    )
    docker: bool = field(
        default=False, metadata={"help": "be a network plugin of this host's Docker engine"}
    )
    docker_socket: str = field(
        default="/run/docker.sock", metadata={"help": "where that engine is asked, with --docker"}
    )


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, and for each where its value came from."""

    settings: Settings
    sources: dict[str, str]


def load(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> Resolved:
    """Put settings together. `flags` has only what was given; `file` must exist if given.

    Invalid names the setting that is wrong and where it came from.
    """
    table = _read(file or DEFAULT_FILE, required=file is not None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    known = {f.name: f for f in fields(Settings)}
    for key in table:
        if key not in known:
            raise Invalid(f"setting {key}", f"is unknown (in {file or DEFAULT_FILE})", "Remove it")
    for name, spec in known.items():
        variable = f"VXMESH_{name.upper()}"
        if name in flags:
            values[name], sources[name] = flags[name], f"--{name.replace('_', '-')}"
        elif variable in environment:
            values[name], sources[name] = environment[variable], variable
        elif name in table:
            values[name], sources[name] = table[name], str(file or DEFAULT_FILE)
        else:
            values[name], sources[name] = spec.default, "default"
        values[name] = _convert(name, values[name], spec.default, sources[name])
    _check(values)
    return Resolved(Settings(**values), sources)


def _read(path: Path, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        if required:
            raise Invalid(f"file {path}", "does not exist", "Give the path of one") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Invalid(f"file {path}", f"cannot be read ({error})", "Mend or remove it") from None


def _convert(name: str, value: Any, default: Any, source: str) -> Any:
    try:
        if isinstance(default, bool):
            if isinstance(value, str):
                return {"1": True, "true": True, "yes": True, "0": False, "false": False,
                        "no": False, "": False}[value.lower()]  # fmt: skip
            return bool(value)
        if isinstance(default, int):
            return int(value)
        if isinstance(default, float):
            return float(value)
        if isinstance(default, tuple):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(str(part).strip() for part in parts if str(part).strip())
        return str(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise Invalid(
            f"setting {name}", f"is malformed: {value!r} (from {source})", "See 'vxmesh agent -h'"
        ) from None


def _check(values: dict[str, Any]) -> None:
    values["name"] = parse_name(
        values["name"] or socket.gethostname().split(".")[0].replace("_", "-"), "node"
    )
    if values["advertise"]:
        parse_address(values["advertise"])
    for port in ("port", "data_port"):
        if not 1 <= values[port] <= 65535:
            raise Invalid(f"setting {port}", f"is out of range: {values[port]}", "Use 1 to 65535")
    if values["data_port"] in BARRED_DATA_PORTS:
        why = f"is {values['data_port']}: VXLAN, open or sealed, would be at {NAMES_PORT}, where "
        why += "name servers are asked"
        raise Invalid("setting data_port", why, "Use 4789, or any other port")
    if not 1 <= values["wireguard_port"] < 65535:
        raise Invalid(
            "setting wireguard_port",
            f"is out of range: {values['wireguard_port']}",
            "Use 1 to 65534: the one after it is used too",
        )
    if not 1 <= values["name_server_workers"] <= 64:
        raise Invalid(
            "setting name_server_workers",
            f"is out of range: {values['name_server_workers']}",
            "Use 1 to 64: no more than there are processors",
        )
    if not 60 <= values["wireguard_rotate"] <= 365 * 86400:
        raise Invalid(
            "setting wireguard_rotate",
            f"is out of range: {values['wireguard_rotate']}",
            "Use 60 s to a year",
        )
    if not 0 <= values["agent_grace"] <= 86400:
        raise Invalid(
            "setting agent_grace", f"is out of range: {values['agent_grace']}", "Use 0 to 86400 s"
        )
    if not 0.1 <= values["path_interval"] <= 86400:
        raise Invalid(
            "setting path_interval",
            f"is out of range: {values['path_interval']}",
            "Use 0.1 s to a day",
        )
    for name, allowed in (
        ("detection", ("lan", "wan", "local")),
        ("wireguard", ("auto", "kernel", "go")),
        ("socket_balancing", ("auto", "off")),
        ("shortcuts", ("auto", "off")),
        ("log_level", ("debug", "info", "warning", "error")),
        ("log_format", ("text", "json")),
    ):
        if values[name] not in allowed:
            raise Invalid(
                f"setting {name}", f"is unknown: {values[name]!r}", f"Use {', '.join(allowed)}"
            )
    for name in ("metrics_listen", "control_listen"):
        if values[name]:
            parse_listen(values[name], name)
    if values["token"] and values["token_file"]:
        raise Invalid("setting token_file", "says what token says as well", "Give one of the two")
    parse_duration("setting cert_life", values["cert_life"], CERT_LIFE)
    for directory in ("state_dir", "run_dir", "docker_socket"):
        if not os.path.isabs(values[directory]):  # noqa: PTH117
            raise Invalid(f"setting {directory}", "is not absolute", "Give a whole path")


def parse_duration(what: str, text: str, within: tuple[float, float]) -> float:
    """Seconds of 90d, 12h, 2h30m or 60s; Invalid if malformed or out of range."""
    parts = re.fullmatch(r"(?:\d{1,9}[dhms])+", text)
    if not parts:
        raise Invalid(f"{what} {text[:20]!r}", "is malformed", "Write it as 90d, 12h, 2h30m or 60s")
    seconds = float(sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([dhms])", text)))
    least, most = within
    if not least <= seconds <= most:
        raise Invalid(f"{what} {text}", "is out of range", f"Use {least:g}s to {most / 86_400:g}d")
    return seconds


def parse_listen(text: str, setting: str) -> tuple[str, int]:
    """Address and port of ADDRESS:PORT, where IPv6 is in brackets; Invalid if malformed."""
    address, colon, port = text.rpartition(":")
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    try:
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        socket.inet_pton(family, bare)
        if not colon or (family == socket.AF_INET6) != (bare != address):
            raise ValueError("brackets are for IPv6")
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise ValueError("the port")
    except (OSError, ValueError):
        raise Invalid(
            f"setting {setting} {text[:60]!r}",
            "is malformed",
            "Write ADDRESS:PORT, as 127.0.0.1:9646 or [::1]:9646",
        ) from None
    return bare, int(port)


def default_address() -> str:
    """The address from which this host would reach the outside; Invalid if there is none.

    Connecting a UDP socket only looks up the route; nothing is sent.
    """
    for family, outside in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((outside, 9))
                return str(sock.getsockname()[0])
            except OSError:
                continue
    raise Invalid("--advertise", "cannot be guessed: no route leads outside", "Give an address")
