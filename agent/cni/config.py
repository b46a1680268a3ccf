"""What a runtime gives the plugin, parsed: the environment, and the configuration on stdin.

An error of any of it is found here, before the agent is asked. Unknown fields are refused, not
dropped, so that a misspelt one is noticed; whoever wants fields of their own puts a dot or a
slash into the name.
Source: CNI specification 1.1, sections 1 and 2; CONVENTIONS.md for args and runtimeConfig.
What stands opposite: results.py; main.py, which puts the question together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from agent import cnimodel as cni
from agent.cnimodel import CniError

COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
}
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
VALID_ATTACHMENTS = "cni.dev/valid-attachments"
NAME_BYTES_MAX = 200  # of a container's id and of a network's name: they are labels of endpoints
OURS = ("network", "aliases", "labels", "socket")
COMMON = ("cniVersion", "cniVersions", "name", "type", "args", "capabilities", "disableCheck",
          "disableGC", "dns", "ipMasq", "ipam", "prevResult", "runtimeConfig")  # fmt: skip
CAPABILITIES = ("ips", "mac", "aliases", "portMappings")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_IFNAME = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")  # as agent/requests.py has it


def read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The CNI_ variables that the command needs, all of them sound; BAD_ENVIRONMENT."""
    command = environment.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        given = f"is {command[:40]!r}" if command else "is missing"
        raise CniError(
            cni.BAD_ENVIRONMENT, f"CNI_COMMAND {given}; it is one of {', '.join(COMMANDS)}"
        )
    found = {"CNI_COMMAND": command}
    wrong = []
    for name in NEEDED.get(command, ()):
        value = environment.get(name, "")
        why = _fault(name, value)
        if why:
            wrong.append(f"{name} {why}")
        found[name] = value
    if wrong:
        raise CniError(cni.BAD_ENVIRONMENT, "; ".join(wrong))
    if command == "ADD":
        found["CNI_ARGS"] = environment.get("CNI_ARGS", "")
    return found


def _fault(name: str, value: str) -> str:
    if not value:
        return "is missing"
    if name == "CNI_CONTAINERID" and not (_ID.match(value) and len(value) <= NAME_BYTES_MAX):
        return (
            f"is {value[:40]!r}, and may have up to {NAME_BYTES_MAX} letters, digits, underscores, "
            "dots and hyphens, a letter or digit first"
        )
    if name == "CNI_IFNAME" and (not _IFNAME.match(value) or value in (".", "..")):
        return (
            f"is {value[:40]!r}, and may have 1 to 15 letters, digits, dots, hyphens and "
            "underscores"
        )
    if name == "CNI_NETNS" and (value[0] != "/" or "\0" in value):
        return f"is {value[:80]!r}, which is no whole path"
    return ""


def decode(text: bytes) -> dict[str, Any]:
    """The object on stdin; UNDECODABLE."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CniError(cni.UNDECODABLE, f"what is on stdin is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CniError(cni.UNDECODABLE, "what is on stdin is no JSON object")
    return found


def version_of(config: Mapping[str, Any], command: str) -> str:
    """The version that a configuration is written in; INCOMPATIBLE, UNDECODABLE."""
    version = config.get("cniVersion", "")
    if not isinstance(version, str):
        raise CniError(cni.UNDECODABLE, f"cniVersion is {version!r}, which is no text")
    if version not in cni.VERSIONS:
        given = f"cniVersion is {version[:40]!r}" if version else "cniVersion is missing"
        raise CniError(cni.INCOMPATIBLE, f"{given}; supported are {', '.join(cni.VERSIONS)}")
    since = SINCE.get(command, cni.VERSIONS[0])
    if cni.VERSIONS.index(version) < cni.VERSIONS.index(since):
        raise CniError(
            cni.INCOMPATIBLE, f"cniVersion is {version}, and {command} is there since {since}"
        )
    return version


def check_fields(config: Mapping[str, Any]) -> None:
    """UNSUPPORTED_FIELD names the first field that asks for what we do not do."""
    for key, value in config.items():
        if key in OURS or key in COMMON or "." in key or "/" in key:
            continue
        raise _unsupported(key, value, f"the fields of {cni.TYPE} are {', '.join(OURS)}")
    if config.get("ipam"):
        raise _unsupported("ipam", config["ipam"], "addresses are given out by vxmesh itself")
    if config.get("ipMasq") is False:
        raise _unsupported(
            "ipMasq", False, "make the network with --internal if nothing is to lead outside"
        )
    for name, wanted in _object(config, "capabilities").items():
        if wanted and name not in CAPABILITIES:
            raise _unsupported(
                f"capabilities.{name}", wanted, f"those of {cni.TYPE} are {', '.join(CAPABILITIES)}"
            )


def _unsupported(key: str, value: object, why: str) -> CniError:
    return CniError(cni.UNSUPPORTED_FIELD, f"{key} is {json.dumps(value)[:200]}; {why}")


def name_of(config: Mapping[str, Any]) -> str:
    """The name of a network configuration, which is not that of the network; BAD_CONFIG."""
    name = config.get("name", "")
    if not isinstance(name, str) or not _ID.match(name) or len(name) > NAME_BYTES_MAX:
        raise CniError(cni.BAD_CONFIG, "name is missing, or is no name")
    return name


def network_of(config: Mapping[str, Any]) -> str:
    """Which of our networks is meant: the field `network`, or else the one called as the
    configuration; BAD_CONFIG."""
    network = config.get("network", config.get("name"))
    if not isinstance(network, str) or not network:
        raise CniError(cni.BAD_CONFIG, "network is empty, or is no text: name one of 'network ls'")
    return network


def socket_of(config: Mapping[str, Any]) -> str:
    """Where the agent is asked; BAD_CONFIG."""
    path = config.get("socket", cni.SOCKET)
    if not isinstance(path, str) or not path.startswith("/"):
        raise CniError(cni.BAD_CONFIG, "socket is no whole path")
    return path


def wishes(config: Mapping[str, Any], args: str) -> dict[str, Any]:
    """What an ADD asks of the endpoint: addresses, mac, names, aliases, labels, ports.

    runtimeConfig comes before CNI_ARGS, and that before args.cni. BAD_CONFIG, BAD_ENVIRONMENT.
    """
    given = _arguments(args)
    runtime = _object(config, "runtimeConfig")
    old = _object(_object(config, "args"), "cni", "args.cni")
    ips = _texts(runtime, "ips", "runtimeConfig.ips")
    ips = ips or [ip for ip in given.get("IP", "").split(",") if ip] or _texts(old, "ips")
    mac = runtime.get("mac") or given.get("MAC") or old.get("mac") or ""
    if not isinstance(mac, str):
        raise CniError(cni.BAD_CONFIG, f"mac is {mac!r}, which is no text")
    labels = _object(config, "labels")
    if not all(isinstance(value, str) for value in labels.values()):
        raise CniError(cni.BAD_CONFIG, "labels has a value that is no text")
    return {
        "addresses": [ip.partition("/")[0] for ip in ips],
        "mac": mac,
        # Kubernetes' runtimes give the pod's name, podman the container's.
        "names": [name for name in [given.get("K8S_POD_NAME", "")] if name],
        "aliases": _texts(config, "aliases") + _aliases(config, runtime),
        "labels": labels,
        "ports": _ports(runtime),
    }


def _arguments(text: str) -> dict[str, str]:
    """The pairs of CNI_ARGS. Those that we do not know are others'."""
    found = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CniError(
                cni.BAD_ENVIRONMENT, f"CNI_ARGS has {pair[:40]!r}, which is no KEY=VALUE"
            )
        found[key] = value
    return found


def _aliases(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> list[str]:
    """Those that a runtime gives: a list, or one for each network configuration by its name."""
    given = runtime.get("aliases") or []
    if isinstance(given, dict):
        given = given.get(config.get("name")) or []
    return _texts({"aliases": given}, "aliases", "runtimeConfig.aliases")


def _ports(runtime: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for entry in runtime.get("portMappings") or []:
        try:
            host, target = int(entry["hostPort"]), int(entry["containerPort"])
            protocol = str(entry.get("protocol") or "tcp").lower()
            address = str(entry.get("hostIP") or "")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CniError(cni.BAD_CONFIG, f"runtimeConfig.portMappings has {entry!r}") from None
        every = address in ("0.0.0.0", "::")
        found.append(
            {"host": host, "target": target, "protocol": protocol,
             "address": "" if every else address}
        )  # fmt: skip
    return found


def attachments(config: Mapping[str, Any]) -> list[list[str]]:
    """Container id and interface name of each attachment that GC is to leave; BAD_CONFIG.

    It must be there: what is missing is not the same as that none is valid.
    """
    given = config.get(VALID_ATTACHMENTS)
    try:
        if not isinstance(given, list):
            raise TypeError
        return [[_text(each["containerID"]), _text(each["ifname"])] for each in given]
    except (KeyError, TypeError):
        raise CniError(
            cni.BAD_CONFIG, f"{VALID_ATTACHMENTS} is no list of containerID and ifname"
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _object(config: Mapping[str, Any], key: str, path: str = "") -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CniError(cni.BAD_CONFIG, f"{path or key} is no object")
    return value


def _texts(config: Mapping[str, Any], key: str, path: str = "") -> list[str]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise CniError(cni.BAD_CONFIG, f"{path or key} is no list of texts")
    return value


def check_whole(config: Mapping[str, Any]) -> None:
    """BAD_CONFIG if what later goes into a result is not what it should be."""
    dns = _object(config, "dns")
    for key in ("nameservers", "search", "options"):
        _texts(dns, key, f"dns.{key}")
    previous = _object(config, "prevResult")
    for key in ("interfaces", "ips", "routes"):
        value = previous.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise CniError(cni.BAD_CONFIG, f"prevResult.{key} is no list of objects")
    _object(previous, "dns", "prevResult.dns")
