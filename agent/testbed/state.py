"""What a testbed remembers between two commands, in /run/vxmesh-testbed/state.json.

The directory is a tmpfs of its own: private, as mount namespaces that are kept in files need
it, and gone in one step. Opposite: bed.py, which changes it under the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from agent import syscalls
from agent.errors import VxmeshError
from agent.testbed import fabric
from agent.testbed.namespaces import STATE_DIR, mount_points

RUN_DIR = "/run/vxmesh-testbed"
DEFAULT_PREFIX = "vxm"
ENGINE_CONFIG = "/etc/docker"  # each host with an engine has its own there


@dataclass
class HostState:
    """A host: where it is, and the agent in it as pid and start time (0: none was started)."""

    name: str
    number: int
    mnt: str = ""  # path of its mount namespace
    holder: int = 0  # process that keeps the mount namespace, where a file cannot
    agent: int = 0
    agent_start: int = 0
    engine: int = 0  # its Docker engine, if the testbed has some
    engine_start: int = 0


@dataclass
class State:
    """A testbed. `cuts` are one-way; `made` is what else up made on the machine."""

    prefix: str
    ipv6: bool
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    hosts: list[HostState] = field(default_factory=list)  # the client last
    agent_options: list[str] = field(default_factory=list)
    unplugged: list[str] = field(default_factory=list)
    cuts: list[tuple[str, str]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    join_token: str = ""  # of the cluster that its agents make
    docker: bool = False  # each host has a Docker engine
    underlay: int = 4  # IP version by which the agents reach each other


def directory_of(prefix: str) -> Path:
    """Where the testbed with that prefix keeps its files."""
    return Path(RUN_DIR if prefix == DEFAULT_PREFIX else f"{RUN_DIR}-{prefix}")


def load(prefix: str) -> State | None:
    """The testbed's state; None if it is not up. VxmeshError if the file is damaged."""
    path = directory_of(prefix) / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise VxmeshError(
            f"file {path}",
            f"is damaged ({error})",
            "End what it tells of by hand (namespaces and agents of that prefix) and remove it",
        ) from None


def save(state: State) -> None:
    """Write the state; a reader sees the old one or the new."""
    file = directory_of(state.prefix) / "state.json"
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(state), indent=1))
    fresh.replace(file)


@contextlib.contextmanager
def locked(prefix: str) -> Iterator[bool]:
    """Hold the testbed against other commands; gives whether its directory exists.

    The lock is on the directory, so it leaves no file.
    """
    directory = directory_of(prefix)
    while True:
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_same(directory, fd):
                yield True
                return
        finally:
            os.close(fd)


def _is_same(directory: Path, fd: int) -> bool:
    """Whether the directory is still the one that was locked: a `down` may have gone before."""
    try:
        return os.path.samestat(directory.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def machine_locked() -> Iterator[None]:
    """Hold what all testbeds of the machine share: what is made and undone but once."""
    fd = os.open("/run", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def create_directory(prefix: str) -> None:
    """Make the directory, with its tmpfs, unless it is there."""
    directory = directory_of(prefix)
    with machine_locked():
        directory.mkdir(mode=0o755, exist_ok=True)
        if str(directory) not in mount_points():
            safe = syscalls.MS_NOSUID | syscalls.MS_NODEV
            syscalls.mount("vxmesh-testbed", str(directory), "tmpfs", safe, "mode=0755")
            syscalls.mount(None, str(directory), flags=syscalls.MS_PRIVATE)


def prepare_machine(state: State) -> None:
    """Make the directories that hosts need and the machine may lack; note and save it."""
    with machine_locked():
        for other in _others(state.prefix):
            state.made += [entry for entry in other.made if entry not in state.made]
        state.made += [e for e in fabric.prepare_netns_dir() if e not in state.made]
        if not Path(STATE_DIR).is_dir():
            Path(STATE_DIR).mkdir(mode=0o700, parents=True)
            state.made.append(f"directory {STATE_DIR}")
        if state.docker and not Path(ENGINE_CONFIG).is_dir():
            Path(ENGINE_CONFIG).mkdir(mode=0o700)
            state.made.append(f"directory {ENGINE_CONFIG}")
        save(state)


def remove(prefix: str, made: list[str]) -> None:
    """Take away the directory and, if no other testbed stands on it, what was `made` for them."""
    directory = directory_of(prefix)
    with machine_locked():
        while str(directory) in mount_points():
            syscalls.umount(str(directory), syscalls.MNT_DETACH)
        if directory.is_dir():
            directory.rmdir()
        others = _others(prefix)
        fabric.undo([entry for entry in made if not any(_needs(o, entry) for o in others)])


def _needs(other: State, entry: str) -> bool:
    """Whether it stands on what somebody made; one that has only begun has yet to look for it."""
    is_config = entry.endswith(f" {ENGINE_CONFIG}")
    return entry in other.made and (other.docker or not is_config)


def _others(prefix: str) -> list[State]:
    """The other testbeds of this machine; what one of them made, the last to go undoes."""
    own = directory_of(prefix)
    prefixes = [
        path.name.removeprefix(Path(RUN_DIR).name).removeprefix("-") or DEFAULT_PREFIX
        for path in Path(RUN_DIR).parent.glob(f"{Path(RUN_DIR).name}*")
        if path != own
    ]
    return [state for other in prefixes if (state := load(other)) is not None]
