"""Calls of the command line: their interruption, how their answers are shown, what they load."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from agent.cli import calls, cluster, main
from agent.cli import run as run_module
from agent.cli.calls import to_dict
from agent.model import HOST
from agent.rpc import control_pb2, types_pb2

# The signal is handled by another thread than the one that waits, as when it comes a moment
# before that one waits: nothing but a file that is waited for can end the wait then.
PROGRAM = """
import signal, socket, sys, tempfile, threading, time
from agent.cli import calls
from agent.errors import NoAgent

def interrupt():
    waiting.wait()
    while state() != "S": time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    sent.set()

def state():
    return open(f"/proc/self/task/{main}/stat").read().rpartition(")")[2].split()[0]

main = threading.get_native_id()
waiting, sent = threading.Event(), threading.Event()
if {is_ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=interrupt, daemon=True).start()
"""

# An agent of this host that never answers, until the signal has been sent and ignored.
UNIX = """
def serve():
    sock, _ = listener.accept()
    sock.sendall(bytes.fromhex("000000040000000000"))  # an empty SETTINGS
    said = b""
    while bytes.fromhex("000100000001") not in said: said += sock.recv(9999)  # DATA, END_STREAM
    waiting.set()
    sent.wait()
    if {is_ignored}: sock.close()
    else: time.sleep(3600)

with tempfile.TemporaryDirectory() as directory:
    path = f"{directory}/agent.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    threading.Thread(target=serve, daemon=True).start()
    try:
        calls.call(f"unix://{path}", lambda client: client.info())
    except NoAgent:
        print("went on")
    except KeyboardInterrupt:
        print("interrupted")
    assert "asyncio" not in sys.modules
"""

# Any other, with an event loop.
LOOP = """
import asyncio

class Nobody:
    blocks = False
    def __init__(self, *_, **__): pass
    async def __aenter__(self): return self
    async def __aexit__(self, *_): pass

async def wait(client):
    waiting.set()
    if {is_ignored}:
        while not sent.is_set(): await asyncio.sleep(0.01)
        print("went on")
    else:
        await asyncio.sleep(3600)

calls.Client = Nobody
try:
    calls.call("", wait)
except KeyboardInterrupt:
    print("interrupted")
"""

# What takes long to load, and no command on the socket of its own host has a use for.
HEAVY = {
    "agent.model", "asyncio", "concurrent.futures", "cryptography", "google.protobuf.json_format",
    "google.protobuf.internal.python_message", "google.protobuf.text_format", "grpc",
    "importlib.metadata", "msgspec", "pathlib", "pyroute2", "rich", "ssl", "structlog",
    "tempfile", "yaml", "zeroconf",
}  # fmt: skip


def run(program: str, *arguments: str) -> tuple[str, str, int]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize("way", [UNIX, LOOP], ids=["unix", "loop"])
def test_an_interruption_ends_a_wait_for_nothing(way: str) -> None:
    program = (PROGRAM + way).replace("{is_ignored}", "False")
    assert run(program) == ("interrupted\n", "", 0)


@pytest.mark.parametrize("way", [UNIX, LOOP], ids=["unix", "loop"])
def test_who_was_told_to_ignore_it_goes_on(way: str) -> None:
    program = (PROGRAM + way).replace("{is_ignored}", "True")
    assert run(program) == ("went on\n", "", 0)


@pytest.mark.parametrize(
    "words",
    [
        ("node", "ls"),
        ("network", "create", "web"),
        ("endpoint", "ls"),
        ("service", "ls"),
        ("sandbox", "ls"),
        ("run", "--network", "host", "--", "true"),
        ("exec", "web", "--", "true"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_command_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    heavy = HEAVY - {"pathlib"} if words[0] in ("run", "exec", "endpoint") else HEAVY
    _, said, _ = run(
        "import sys; from agent.cli import main; status = main.run(sys.argv[1:]);"
        "assert status == 3, status; print(*sys.modules, file=sys.stderr)",
        *("--host", "unix:///nobody/agent.sock", *words),
    )
    assert "vxmesh: agent at unix:///nobody/agent.sock: does not answer" in said
    loaded = set(said.splitlines()[-1].split())
    assert "agent.client" in loaded
    assert heavy & loaded == set()


@pytest.mark.parametrize("blocks", [True, False])
def test_a_change_of_the_ca_is_followed_by_one_client(
    monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    made: list[Rotating] = []

    class Rotating:
        def __init__(self, *_: str, blocks: bool) -> None:
            self.blocks = blocks and is_blocking
            self.phases = ["introducing", "replacing", "done"]
            made.append(self)

        async def __aenter__(self) -> Rotating:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def rotate_authority(self, *, force: bool) -> control_pb2.Cluster:
            return await self.cluster()

        async def cluster(self) -> control_pb2.Cluster:
            rotation = control_pb2.Rotation(phase=self.phases.pop(0))
            return control_pb2.Cluster(rotation=rotation)

    is_blocking = blocks
    monkeypatch.setattr(calls, "Client", Rotating)
    monkeypatch.setattr(cluster, "POLL", 0.0)
    assert main.run(["cluster", "rotate-ca", "--wait"]) == 0
    assert [client.phases for client in made] == [[]]


def test_the_word_that_run_has_of_its_own_is_the_models() -> None:
    assert run_module.HOST == HOST


def answers() -> list[type[Any]]:
    """All that the agent answers, and what that is made of."""
    methods = control_pb2.DESCRIPTOR.services_by_name["Control"].methods
    kinds = {method.output_type for method in methods}
    kinds |= set(types_pb2.DESCRIPTOR.message_types_by_name.values())
    return [GetMessageClass(kind) for kind in sorted(kinds, key=lambda kind: kind.full_name)]


def fill(message: Any, chance: random.Random, depth: int = 0) -> None:
    """Set some of the fields of a message to something."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.4 or depth > 3:
            continue
        kind, count = field.message_type, chance.randrange(3)
        if kind and kind.GetOptions().map_entry:
            of = kind.fields_by_name["value"]
            for i in range(count):
                getattr(message, field.name)[f"k{i}"] = scalar(of, chance)
        elif kind and field.is_repeated:
            for _ in range(count):
                fill(getattr(message, field.name).add(), chance, depth + 1)
        elif kind:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name), chance, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, chance) for _ in range(count))
        else:
            setattr(message, field.name, scalar(field, chance))


def scalar(field: Any, chance: random.Random) -> Any:
    if field.type == field.TYPE_BYTES:
        return chance.randbytes(chance.randrange(5))
    if field.cpp_type == field.CPPTYPE_STRING:
        return chance.choice(["", "a", "ä\n\0€"])
    if field.cpp_type == field.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if field.cpp_type == field.CPPTYPE_DOUBLE:
        return chance.choice([0.0, -1.5, 1e300])
    least = 0 if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else -7
    return chance.choice([0, least, 5, (1 << 31) - 1])


@pytest.mark.parametrize("kind", answers(), ids=lambda kind: kind.DESCRIPTOR.name)
def test_an_answer_is_shown_as_protobuf_has_it(kind: type[Any]) -> None:
    chance = random.Random(1)
    for _ in range(30):
        message = kind()
        fill(message, chance)
        wanted = MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        found = to_dict(message)
        assert found == wanted
        assert list(found) == list(wanted)  # in this order an inspection shows them
