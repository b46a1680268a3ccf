"""vxmesh run and vxmesh exec: a command in a sandbox.

`run` forks before anything heavy is imported: the child takes new namespaces and waits; the
parent, which has loaded the client meanwhile, asks the agent to give them interfaces; then the
child becomes the command. Nothing names these namespaces but the processes in them, so when the
last one ends the kernel takes all of it away, whether an agent is there to see it or not.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from agent import syscalls
from agent.cli import relay
from agent.cli.output import emit_done, host_option, output_option, wait_option
from agent.errors import Invalid, Unsupported, VxmeshError
from agent.workload import cover_resolver, own_resolver

if TYPE_CHECKING:
    from agent.client import Client
    from agent.rpc.types_pb2 import Sandbox

CANNOT_RUN = 126  # as sh and docker have it
NOT_FOUND = 127
HOST = "host"  # as model.py has it, which takes 15 ms to import
LOG_DIR = "/run/vxmesh/logs"
COMMAND = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.command(context_settings=COMMAND)
@click.option(
    "--network",
    "networks",
    required=True,
    multiple=True,
    metavar="NET[,NET2]",
    help="eth0 is in the first …; none: loopback alone; host: this host's own stack, known in NET2",
)
@click.option("--name", default="", help="of the sandbox and its endpoints [made up]")
@click.option("--ip", "addresses", multiple=True, metavar="IP", help="[a free one]")
@click.option(
    "--mac",
    "macs",
    multiple=True,
    metavar="[NET=]MAC",
    help="with several networks: in which [made from the address]",
)
@click.option(
    "--default",
    "defaults",
    multiple=True,
    metavar="NET[,NET2]",
    help="has the default routes; the next if it has none [the first that leads outside]",
)
@click.option("--alias", "aliases", multiple=True, help="a further name; may be shared")
@click.option(
    "--publish",
    "-p",
    "publishes",
    multiple=True,
    metavar="HOST:PORT[/udp]",
    help="open a port, or a range of them",
)
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE")
@click.option("-d", "--detach", is_flag=True, help="in the background; prints its name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@wait_option
@host_option
@output_option
def run(
    networks: tuple[str, ...],
    name: str,
    addresses: tuple[str, ...],
    macs: tuple[str, ...],
    defaults: tuple[str, ...],
    aliases: tuple[str, ...],
    publishes: tuple[str, ...],
    labels: tuple[str, ...],
    detach: bool,
    command: tuple[str, ...],
    wait: float,
    host: str,
    output: str,
) -> None:
    """Run a command in a sandbox of its own, which goes when the command ends."""
    given = _parse_macs(macs)
    ports = [port for text in publishes for port in _parse_publish(text)]
    log = f"{LOG_DIR}/{name or os.urandom(6).hex()}.log" if detach else ""
    child = _Child(command, detach, log, isolated=not _is_hosts(_split(networks)))
    try:
        # Only now: the child takes its namespaces meanwhile.
        from agent.cli.calls import call, pairs, to_dict
        from agent.rpc.types_pb2 import Publish

        child.await_ready()

        async def make(client: Client) -> Sandbox:
            made = await client.create_sandbox(
                child.pid,
                _split(networks),
                name=name,
                addresses=addresses,
                macs=given,
                defaults=_split(defaults),
                aliases=aliases,
                labels=pairs(labels, "--label"),
                publishes=[
                    Publish(host_address=a, host_port=h, target_port=t, protocol=k)
                    for a, h, t, k in ports
                ],
                log=log,
                wait=wait,
            )
            child.start(made.resolv_conf)  # it need not wait until we have disconnected
            return made

        sandbox = call(host, make)
    except BaseException:
        child.kill()
        raise
    if detach:
        emit_done(sandbox.name, to_dict(sandbox, "resolv_conf"), output)
        return
    status = child.wait()
    # The agent sees the end by itself; asking makes sure it is cleaned up before we return.
    with contextlib.suppress(VxmeshError):
        call(host, lambda client: client.remove_sandboxes([sandbox.id]))
    sys.exit(status)


@click.command("exec", context_settings=COMMAND)
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@host_option
def exec_(name: str, command: tuple[str, ...], host: str) -> None:
    """Run a command in a sandbox that exists, with its resolver."""
    from agent.cli.calls import call

    command = command[1:] if command[0] == "--" else command  # click keeps it after a name
    if not command:
        raise click.UsageError("give a command after --")
    sandbox = call(host, lambda client: client.sandbox(name))
    _flush()
    held = relay.hold()
    child = relay.fork()
    if child == 0:
        _enter(sandbox.pid, sandbox.netns, sandbox.resolv_conf, command, held)
    sys.exit(relay.reap(child))


def _enter(
    pid: int, netns: str, resolv_conf: str, command: Sequence[str], held: Collection[int]
) -> NoReturn:
    """Become `command` inside a sandbox; never returns. `held`: see relay.release."""
    try:
        net = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        mnt = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) if pid else -1
        syscalls.setns(net, syscalls.CLONE_NEWNET)
        if mnt >= 0:
            directory = Path.cwd()
            syscalls.setns(mnt, syscalls.CLONE_NEWNS)
            with contextlib.suppress(OSError):
                os.chdir(directory)
        else:
            own_resolver(resolv_conf)
    except OSError as error:
        _die(f"the sandbox: cannot be entered ({error}). It may have ended", CANNOT_RUN)
    _become(command, held)


class _Child:
    """A process in new namespaces (or not `isolated`) that waits to become the command."""

    def __init__(self, command: Sequence[str], detach: bool, log: str, isolated: bool) -> None:
        self._isolated = isolated
        self.pid = 0  # once it is known
        self._is_started = False
        self._is_ready, self._ready = os.pipe()
        self._go, go = os.pipe()
        # A detached child is a grandchild, so that this process leaves no zombie to anyone.
        first = self._first = _fork()
        if first == 0:
            os.close(self._is_ready)
            os.close(go)
            if detach:
                os.setsid()
                if _fork():
                    os._exit(0)
            self._wait_and_become(command, detach, log)
        os.close(self._ready)
        os.close(self._go)
        self._write = go
        if detach:
            os.waitpid(first, 0)
        self._direct = not detach

    def await_ready(self) -> None:
        """Return when it is in its namespaces; Unsupported if it cannot be."""
        said = b""
        while piece := os.read(self._is_ready, 200):
            said += piece
            if said.endswith(b"\n"):
                break
        os.close(self._is_ready)
        text = said.decode().strip()
        if not text.isdigit():
            raise Unsupported(
                "a sandbox", f"cannot be made ({text or 'the child ended'})", "Run it as root"
            )
        self.pid = int(text)

    def _wait_and_become(self, command: Sequence[str], detach: bool, log: str) -> NoReturn:
        try:
            if self._isolated:
                syscalls.unshare(syscalls.CLONE_NEWNET)
            os.write(self._ready, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.write(self._ready, f"{error}\n".encode())
            os._exit(1)
        os.close(self._ready)
        resolver: Path | OSError | None = None
        try:
            resolver = cover_resolver() if self._isolated else None  # while others are busy
        except OSError as error:
            resolver = error  # to be told when somebody waits for the command
        content = b""
        while piece := os.read(self._go, 4096):
            content += piece
        if not content:
            os._exit(1)  # the parent gave up, or was killed
        try:
            if isinstance(resolver, OSError):
                raise resolver
            if resolver:
                resolver.write_text(content.decode())
            if detach:
                _redirect(log)
        except OSError as error:
            _die(f"the sandbox: cannot be prepared ({error}). Run it as root", CANNOT_RUN)
        _become(command, ())

    def start(self, resolv_conf: str) -> None:
        """Let the child become its command."""
        if self._direct:
            relay.hold()  # before the go: a signal behind it would end us and leave the command
        self._is_started = True
        os.write(self._write, resolv_conf.encode() or b"\n")
        os.close(self._write)

    def wait(self) -> int:
        """The command's exit status, 128 + n if signal n ended it."""
        return relay.reap(self.pid)

    def kill(self) -> None:
        """End the child before it became anything; afterwards it goes on."""
        if self._is_started:
            return
        with contextlib.suppress(OSError):
            os.close(self._write)
        if self._direct:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._first, 0)


def _fork() -> int:
    _flush()
    return os.fork()


def _flush() -> None:
    """Before a fork, or it would be written twice. It may have to wait for who reads it."""
    sys.stdout.flush()
    sys.stderr.flush()


def _become(command: Sequence[str], held: Collection[int]) -> NoReturn:
    relay.release(held)
    try:
        os.execvp(command[0], list(command))
    except FileNotFoundError:
        _die(f"{command[0]}: is not there. Give a command that this host has", NOT_FOUND)
    except OSError as error:
        _die(f"{command[0]}: cannot be run ({error.strerror})", CANNOT_RUN)


def _die(text: str, status: int) -> NoReturn:
    os.write(2, f"vxmesh: {text}\n".encode())
    os._exit(status)


def _redirect(log: str) -> None:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _split(values: Sequence[str]) -> list[str]:
    """What is given by one flag with commas, by several, or both."""
    return [part for value in values for part in value.split(",") if part]


def _is_hosts(networks: Sequence[str]) -> bool:
    """Whether a workload in these networks is in the host's own stack."""
    return bool(networks) and networks[0].lower() == HOST


def _parse_macs(values: Sequence[str]) -> dict[str, str]:
    """Network -> MAC of NET=MAC; of a bare MAC by an empty name."""
    macs: dict[str, str] = {}
    for value in values:
        network, _, mac = value.rpartition("=")
        if network in macs:
            raise Invalid(f"--mac {value[:60]}", "is the second", "Write each as NET=MAC")
        macs[network] = mac
    return macs


def _parse_publish(text: str) -> list[tuple[str, int, int, str]]:
    """[ADDRESS:]HOST:PORT[/PROTOCOL], each port one or a range as 8000-8010, as (address, host
    port, target port, protocol) one by one."""
    ports, _, protocol = text.partition("/")
    address, _, rest = ports.rpartition(":")
    address, _, outer = address.rpartition(":")
    hosts, targets = _parse_ports(outer), _parse_ports(rest)
    if not hosts or len(hosts) != len(targets):
        raise Invalid(
            f"--publish {text[:60]!r}",
            "is malformed" if not (hosts and targets) else "has ranges of different lengths",
            "Write it as 8080:80, 8000-8010:80-90 or 10.0.0.5:53:53/udp",
        )
    bare, protocol = address.strip("[]"), protocol or "tcp"
    return [(bare, h, t, protocol) for h, t in zip(hosts, targets, strict=True)]


def _parse_ports(text: str) -> range:
    """A port, or a range with both its ends; empty if `text` is neither."""
    first, dash, last = text.partition("-")
    ends = (first, last if dash else first)
    if not all(end.isascii() and end.isdigit() and len(end) <= 5 for end in ends):
        return range(0)
    return range(int(ends[0]), int(ends[1]) + 1)
