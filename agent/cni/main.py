"""The executable: one call of a runtime, from its environment and stdin to stdout and exit status.

The work is the agent's, which is asked by a line of JSON on a unix socket and answers by one.
What stands opposite: api/cni/server.py.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from agent import cnimodel as cni
from agent.cni import config as given
from agent.cni import results
from agent.cnimodel import CniError

WITHIN = 60.0  # s; another node may have to be asked for an address


def main() -> int:
    """Do what CNI_COMMAND says; 0, or 1 with an error result on stdout."""
    version = cni.CURRENT
    try:
        variables = given.read_environment(os.environ)
        command = variables["CNI_COMMAND"]
        config = _read(command)
        if command == "VERSION":
            asked = config.get("cniVersion") or version
            return _say(results.versions(str(asked)))
        version = given.version_of(config, command)
        found = answer(variables, config, version)
        return _say(found) if found else 0
    except CniError as error:
        _say(error.to_json(version))
        return 1


def _read(command: str) -> dict[str, Any]:
    try:
        text = sys.stdin.buffer.read()
    except (OSError, AttributeError) as error:  # AttributeError: stdin was closed
        raise CniError(cni.IO_FAILURE, f"stdin cannot be read: {error}") from None
    if command == "VERSION" and not text.strip():
        return {}  # who asks by hand
    return given.decode(text)


def _say(found: Mapping[str, Any]) -> int:
    print(json.dumps(found, indent=2))
    return 0


def answer(variables: Mapping[str, str], config: dict[str, Any], version: str) -> dict[str, Any]:
    """The result of one call; empty: it has none. CniError."""
    command = variables["CNI_COMMAND"]
    container, ifname = variables.get("CNI_CONTAINERID", ""), variables.get("CNI_IFNAME", "")
    netns = variables.get("CNI_NETNS", "")
    question: dict[str, Any] = {"command": command, "container": container, "ifname": ifname}
    if command != "DEL":  # that is to be done whatever became of the configuration
        question["config"] = given.name_of(config)
        given.check_fields(config)
        given.check_whole(config)
    if command in ("ADD", "CHECK", "STATUS"):
        question["network"] = given.network_of(config)
    if command in ("ADD", "CHECK"):
        question["netns"] = netns
    if command == "ADD":
        question |= given.wishes(config, variables["CNI_ARGS"])
    elif command == "CHECK":
        question |= results.expected(config, ifname, netns)
    elif command == "GC":
        question["valid"] = given.attachments(config)
    made = ask(given.socket_of(config), question)
    return results.added(version, config, ifname, netns, made) if command == "ADD" else {}


def ask(path: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """What the agent answers; CniError as it says, or that it does not answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(WITHIN)
            sock.connect(path)
            sock.sendall(json.dumps(question).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline(cni.LINE_MAX + 1)
        reply = json.loads(line)
    except (OSError, ValueError) as error:
        code = cni.NOT_AVAILABLE if question["command"] == "STATUS" else cni.TRY_AGAIN
        why = error.strerror if isinstance(error, OSError) else ""
        raise CniError(
            code,
            f"the agent does not answer at {path} ({why or error}): see 'vxmesh node ls' and "
            "its log",
        ) from None
    if "error" in reply:
        raise CniError(reply["error"]["code"], reply["error"]["details"])
    found: dict[str, Any] = reply["found"]
    return found
