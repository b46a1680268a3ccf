"""vxmesh-cni as a process: what it says to each thing that can be wrong, in which version, and how
little it loads. The agent is a socket with prepared answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PLAIN = {"cniVersion": "1.1.0", "name": "dbnet", "type": "vxmesh-cni", "network": "demo"}
WHOLE = {
    "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "blue", "CNI_NETNS": "/run/netns/blue",
    "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin",
}  # fmt: skip
MADE = {
    "mac": "02:00:00:00:00:05",
    "mtu": 1450,
    "addresses": ["10.1.0.5/16", "fd00::5/64"],
    "gateways": ["10.1.0.1", "fd00::1"],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}],
    "dns": {"nameservers": ["10.1.0.1"], "search": ["demo.vxmesh.internal"], "options": []},
}


class Agent:
    """Answers each question with `reply`, and keeps the questions."""

    def __init__(self, path: Path) -> None:
        self.path, self.asked = path, list[dict[str, Any]]()
        self.reply: dict[str, Any] = {"found": MADE}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rwb") as stream:
                line = stream.readline()
                if not line:
                    return
                self.asked.append(json.loads(line))
                if self.reply:
                    stream.write(json.dumps(self.reply).encode() + b"\n")

    def stop(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))
        self._thread.join()
        self._socket.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "cni.sock")
    yield made
    made.stop()


def run(stdin: bytes, environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    base = {k: v for k, v in os.environ.items() if not k.startswith("CNI_")}
    done = subprocess.run(
        [sys.executable, "-m", "agent.cni"], input=stdin, env=base | environment, cwd=ROOT,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def call(
    agent: Agent | None, command: str = "ADD", without: str = "", /, **more: Any
) -> tuple[int, dict[str, Any]]:
    """A call with what is needed, changed: in capitals variables, else fields."""
    variables = {k: v for k, v in more.items() if k.isupper()}
    fields = {k: v for k, v in more.items() if not k.isupper()}
    config = PLAIN | {"socket": str(agent.path) if agent else "/nonexistent/cni.sock"} | fields
    environment = WHOLE | {"CNI_COMMAND": command} | variables
    for part in filter(None, without.split()):
        config.pop(part, None)
        environment.pop(part, None)
    return run(json.dumps(config).encode(), environment)


@pytest.mark.parametrize(
    ("code", "command", "without", "changes", "said"),
    [
        (1, "ADD", "", {"cniVersion": "0.2.0"}, "0.2.0"),
        (1, "ADD", "", {"cniVersion": "2.0.0"}, "2.0.0"),
        (1, "ADD", "cniVersion", {}, "cniVersion is missing"),
        (1, "CHECK", "", {"cniVersion": "0.3.1"}, "since 0.4.0"),
        (1, "GC", "", {"cniVersion": "1.0.0"}, "since 1.1.0"),
        (1, "STATUS", "", {"cniVersion": "1.0.0"}, "since 1.1.0"),
        (2, "ADD", "", {"netwrok": "demo"}, 'netwrok is "demo"'),
        (2, "ADD", "", {"ipam": {"type": "host-local"}}, 'ipam is {"type": "host-local"}'),
        (2, "ADD", "", {"ipMasq": False}, "ipMasq is false"),
        (2, "ADD", "", {"capabilities": {"bandwidth": True}}, "capabilities.bandwidth is true"),
        (4, "", "", {}, "CNI_COMMAND is missing"),
        (4, "add", "", {}, "CNI_COMMAND is 'add'"),
        (4, "ADD", "CNI_CONTAINERID", {}, "CNI_CONTAINERID is missing"),
        (4, "ADD", "CNI_NETNS CNI_IFNAME", {}, "CNI_NETNS is missing; CNI_IFNAME is missing"),
        (4, "CHECK", "CNI_NETNS", {}, "CNI_NETNS is missing"),
        (4, "DEL", "CNI_IFNAME", {}, "CNI_IFNAME is missing"),
        (4, "ADD", "", {"CNI_CONTAINERID": "../x"}, "CNI_CONTAINERID is '../x'"),
        (4, "ADD", "", {"CNI_CONTAINERID": "a" * 201}, "CNI_CONTAINERID is"),
        (4, "ADD", "", {"CNI_IFNAME": "sixteen-long-abc"}, "CNI_IFNAME is 'sixteen-long-abc'"),
        (4, "ADD", "", {"CNI_IFNAME": ".."}, "CNI_IFNAME is '..'"),
        (4, "ADD", "", {"CNI_NETNS": "blue"}, "CNI_NETNS is 'blue'"),
        (4, "ADD", "", {"CNI_ARGS": "IP"}, "CNI_ARGS has 'IP'"),
        (6, "ADD", "", {"cniVersion": 1}, "cniVersion is 1"),
        (7, "ADD", "name", {}, "name is missing"),
        (7, "ADD", "", {"name": "-x"}, "name is missing, or is no name"),
        (7, "ADD", "", {"network": ""}, "network is empty"),
        (7, "ADD", "", {"network": ["demo"]}, "network is empty, or is no text"),
        (7, "ADD", "", {"socket": "cni.sock"}, "socket is no whole path"),
        (7, "ADD", "", {"runtimeConfig": []}, "runtimeConfig is no object"),
        (7, "ADD", "", {"runtimeConfig": {"ips": "10.1.0.5"}}, "runtimeConfig.ips is no list"),
        (7, "ADD", "", {"runtimeConfig": {"portMappings": [{"hostPort": 80}]}}, "portMappings"),
        (7, "ADD", "", {"labels": {"a": 1}}, "labels has a value that is no text"),
        (7, "ADD", "", {"dns": {"search": "x"}}, "dns.search is no list"),
        (7, "ADD", "", {"prevResult": {"ips": [1]}}, "prevResult.ips is no list"),
        (7, "CHECK", "", {}, "prevResult is missing"),
        (7, "CHECK", "", {"prevResult": {"interfaces": [{"name": "eth0"}]}}, "no interface eth0"),
        (7, "GC", "", {}, "cni.dev/valid-attachments is no list"),
        (7, "GC", "", {"cni.dev/valid-attachments": [{"ifname": "eth0"}]}, "is no list"),
    ],
)
def test_what_is_wrong_is_said_by_its_code_before_the_agent_is_asked(
    agent: Agent, code: int, command: str, without: str, changes: dict[str, Any], said: str
) -> None:
    status, answer = call(agent, command, without, **changes)
    assert (status, answer["code"]) == (1, code)
    assert said in answer["details"]
    assert set(answer) == {"cniVersion", "code", "msg", "details"}
    if code in (2, 4):
        assert said in answer["msg"]  # the specification wants what it is about in the message
    assert not agent.asked


@pytest.mark.parametrize("stdin", [b"", b"{", b"[]", b"\xff", b'"x"'])
def test_what_is_no_object_cannot_be_decoded(stdin: bytes) -> None:
    status, answer = run(stdin, WHOLE)
    assert (status, answer["code"]) == (1, 6)


def test_a_closed_stdin_is_a_failure_to_read() -> None:
    command = f"exec {sys.executable} -m agent.cni <&-"
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | WHOLE, cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 5)


@pytest.mark.parametrize(
    ("command", "code"), [("ADD", 11), ("DEL", 11), ("GC", 11), ("STATUS", 50)]
)
def test_without_an_agent(command: str, code: int) -> None:
    status, answer = call(None, command, **{"cni.dev/valid-attachments": []})
    assert (status, answer["code"]) == (1, code)
    assert "No such file" in answer["details"]


def test_an_agent_that_dies_before_it_answers(agent: Agent) -> None:
    agent.reply = {}
    assert call(agent)[1]["code"] == 11


@pytest.mark.parametrize("code", [3, 7, 11, 50, 51, 100, 101, 102, 103])
def test_what_the_agent_refuses_is_handed_on(agent: Agent, code: int) -> None:
    agent.reply = {"error": {"code": code, "details": "because"}}
    status, answer = call(agent, cniVersion="0.4.0")
    assert (status, answer["code"], answer["details"]) == (1, code, "because")
    assert answer["cniVersion"] == "0.4.0" and answer["msg"] not in ("", "Error")


@pytest.mark.parametrize("asked", ["0.3.1", "1.1.0", "0.1.0", "9.0.0"])
def test_version(asked: str) -> None:
    stdin = json.dumps({"cniVersion": asked}).encode()
    status, answer = run(stdin, {"CNI_COMMAND": "VERSION"})
    supported = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert (status, answer) == (0, {"cniVersion": asked, "supportedVersions": supported})


@pytest.mark.parametrize(
    ("version", "families", "has_mtu"),
    [("0.3.1", ["4", "6"], False), ("0.4.0", ["4", "6"], False), ("1.0.0", None, False),
     ("1.1.0", None, True)],
)  # fmt: skip
def test_the_result_in_each_version(
    agent: Agent, version: str, families: list[str] | None, has_mtu: bool
) -> None:
    status, result = call(agent, cniVersion=version)
    assert status == 0 and result["cniVersion"] == version
    interface = {"name": "eth0", "mac": MADE["mac"], "sandbox": "/run/netns/blue"}
    assert result["interfaces"] == [interface | ({"mtu": 1450} if has_mtu else {})]
    ips = [
        {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0},
        {"address": "fd00::5/64", "gateway": "fd00::1", "interface": 0},
    ]
    if families:
        ips = [ip | {"version": family} for ip, family in zip(ips, families, strict=True)]
    assert result["ips"] == ips
    assert result["routes"] == [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}]
    assert result["dns"] == {"nameservers": ["10.1.0.1"], "search": ["demo.vxmesh.internal"]}


def test_what_plugins_before_made_is_handed_through(agent: Agent) -> None:
    before = {
        "interfaces": [{"name": "lo", "sandbox": "/run/netns/blue"}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    result = call(agent, prevResult=before)[1]
    assert [i["name"] for i in result["interfaces"]] == ["lo", "eth0"]
    assert [ip["interface"] for ip in result["ips"]] == [0, 1, 1]
    assert [r["dst"] for r in result["routes"]] == ["192.0.2.0/24", "0.0.0.0/0"]
    assert result["dns"]["nameservers"] == ["192.0.2.53"]
    assert result["dns"]["search"] == ["demo.vxmesh.internal"]


def test_what_is_asked_for_a_container(agent: Agent) -> None:
    call(
        agent,
        CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAME=web-0;argA=foo;IP=10.1.0.9;MAC=02:00:00:00:00:09",
        runtimeConfig={
            "ips": ["10.1.0.7/16"],
            "aliases": {"dbnet": ["db"], "other": ["no"]},
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "hostIP": "0.0.0.0"}],
        },
        aliases=["one"],
        labels={"app": "db"},
        **{"example.com/field": 1},
    )
    assert agent.asked == [
        {
            "command": "ADD",
            "config": "dbnet",
            "container": "blue",
            "ifname": "eth0",
            "network": "demo",
            "netns": "/run/netns/blue",
            "addresses": ["10.1.0.7"],
            "mac": "02:00:00:00:00:09",
            "names": ["web-0"],
            "aliases": ["one", "db"],
            "labels": {"app": "db"},
            "ports": [{"host": 8080, "target": 80, "protocol": "tcp", "address": ""}],
        }
    ]


@pytest.mark.parametrize(
    ("more", "addresses"),
    [
        ({}, []),
        ({"args": {"cni": {"ips": ["10.1.0.3"]}}}, ["10.1.0.3"]),
        ({"args": {"cni": {"ips": ["10.1.0.3"]}}, "CNI_ARGS": "IP=10.1.0.9/16"}, ["10.1.0.9"]),
        ({"CNI_ARGS": "IP=10.1.0.9,fd00::9"}, ["10.1.0.9", "fd00::9"]),
    ],
)
def test_where_an_address_is_asked_for(
    agent: Agent, more: dict[str, Any], addresses: list[str]
) -> None:
    call(agent, **more)
    assert agent.asked[0]["addresses"] == addresses


def test_the_network_is_called_as_the_configuration_unless_it_says_otherwise(agent: Agent) -> None:
    call(agent, "ADD", "network")
    assert agent.asked[0]["network"] == "dbnet"


def test_del_is_done_with_whatever_is_left_of_the_configuration(agent: Agent) -> None:
    agent.reply = {"found": {}}
    assert call(agent, "DEL", "name network CNI_NETNS", ipam={"type": "x"}) == (0, {})
    assert agent.asked == [{"command": "DEL", "container": "blue", "ifname": "eth0"}]


def test_check_asks_for_what_the_result_says_of_this_interface(agent: Agent) -> None:
    agent.reply = {"found": {}}
    before = {
        "interfaces": [
            {"name": "veth1"},
            {"name": "eth0", "mac": "02:00:00:00:00:0A", "sandbox": "/run/netns/blue"},
        ],
        "ips": [{"address": "10.2.0.1/16", "interface": 0}, {"address": "10.1.0.5/16",
                                                             "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0"}],
    }  # fmt: skip
    assert call(agent, "CHECK", prevResult=before) == (0, {})
    assert agent.asked[0]["mac"] == "02:00:00:00:00:0a"
    assert agent.asked[0]["addresses"] == ["10.1.0.5/16"]
    assert agent.asked[0]["routes"] == ["0.0.0.0/0"]


def test_gc_hands_the_valid_attachments_on(agent: Agent) -> None:
    agent.reply = {"found": {}}
    valid = [{"containerID": "blue", "ifname": "eth0"}]
    assert call(agent, "GC", **{"cni.dev/valid-attachments": valid}) == (0, {})
    assert agent.asked[0]["valid"] == [["blue", "eth0"]]
    assert agent.asked[0]["config"] == "dbnet"


def test_nothing_but_the_standard_library_is_loaded(agent: Agent) -> None:
    program = (
        "import sys\nfrom agent.cni.main import main\nstatus = main()\n"
        "print(*sys.modules, file=sys.stderr)\nsys.exit(status)"
    )
    # -S: what packages put into every start of an interpreter is not ours.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        input=json.dumps(PLAIN | {"socket": str(agent.path)}).encode(),
        env=os.environ | WHOLE | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    loaded = done.stderr.decode().split()
    own = {m for m in loaded if m.partition(".")[0] == "agent"}
    assert own == {
        "agent", "agent.cnimodel", "agent.cni", "agent.cni.config", "agent.cni.main",
        "agent.cni.results",
    }  # fmt: skip
    others = {m.partition(".")[0] for m in loaded} - {"agent", "__main__"}
    assert others <= sys.stdlib_module_names
    # Each of these takes longer to load than all that is needed.
    assert not others & {"asyncio", "dataclasses", "http", "logging", "inspect", "ipaddress"}
