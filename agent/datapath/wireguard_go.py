"""WireGuard in a process, where the kernel has none: `wireguard-go`, one for each device.

Like the name server it outlives the agent, so that traffic does; the next agent finds it by its
control socket. When it dies its device goes with it, and what was to pass there is dropped.
What stands opposite: wireguard.py says when. Source: wireguard.com/xplatform, "Cross-platform
Userspace Implementation" (the socket's protocol).
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from agent.datapath.wgconfig import Config, Endpoint, Peer, Update
from agent.errors import Conflict, VxmeshError
from agent.syscalls import in_netns

COMMAND = "wireguard-go"
TUN = Path("/dev/net/tun")
SOCKETS = Path("/var/run/wireguard")  # compiled in
START_WITHIN = 10.0  # s; it takes 20 ms on an idle machine
ANSWER_WITHIN = 5.0  # s
END_WITHIN = 2.0  # s, after SIGKILL
POLL = 0.01  # s
LINE_MAX = 1 << 20  # bytes
EADDRINUSE = 98  # as its answers have it, whatever the machine


class Silent(VxmeshError):
    """Nobody answers at a device's control socket."""


def missing() -> str:
    """Why it cannot be used on this machine, as the rest of a sentence; empty if it can."""
    if shutil.which(COMMAND) is None:
        return "is not installed"
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs {TUN}, which cannot be opened ({error.strerror})"
    return ""


class WireguardGo:
    """The processes of one host."""

    def __init__(self, host_netns: str, run_dir: Path) -> None:
        """Devices are made in the namespace at `host_netns`; logs go to `run_dir`."""
        self._host_netns, self._run_dir = host_netns, run_dir
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    async def create(self, name: str) -> None:
        """Make a device, without keys and down. VxmeshError with its last words if it fails."""
        await self.end(name)
        child = await asyncio.to_thread(self._spawn, name)
        self._children[name] = child
        deadline = asyncio.get_running_loop().time() + START_WITHIN
        while child.poll() is None and asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(Silent):
                await self.get(name)
                return
            await asyncio.sleep(POLL)
        await self.end(name)
        why = _last_words(self._log(name)) or "it says nothing"
        raise VxmeshError(f"{COMMAND} for {name}", f"does not start: {why}", "See its log")

    async def get(self, name: str) -> Config:
        """What a device holds; Silent if its process is gone or hangs."""
        return parse(await self._ask(name, "get=1\n\n"))

    async def set(self, name: str, update: Update) -> None:
        """Change a device. Silent; Conflict if its port is taken."""
        code = status(await self._ask(name, render(update)))
        if abs(code) == EADDRINUSE:
            raise port_taken(update.port or 0)
        if code:
            raise VxmeshError(f"device {name}", f"{COMMAND} refused its settings (errno {code})")

    async def end(self, name: str) -> None:
        """End a device's process, if there is one, whatever state it is in."""
        pid = await asyncio.to_thread(_listener, SOCKETS / f"{name}.sock")
        if pid:
            await asyncio.to_thread(_kill, pid)
        child = self._children.pop(name, None)
        if child:
            child.poll()

    def _log(self, name: str) -> Path:
        return self._run_dir / f"{name}.log"

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        """In a session of its own, with a file for its log, as a pipe would end with the agent.

        Its environment is ours without the descriptors by which it could be given a device.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WG_")}
        environment.setdefault("LOG_LEVEL", "error")
        log = self._log(name)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return in_netns(
                self._host_netns,
                lambda: subprocess.Popen(
                    [COMMAND, "-f", name],
                    stdin=subprocess.DEVNULL,
                    stdout=fd,
                    stderr=fd,
                    cwd="/",
                    env=environment,
                    start_new_session=True,
                ),
            )
        finally:
            os.close(fd)

    async def _ask(self, name: str, text: str) -> str:
        writer = None
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                reader, writer = await asyncio.open_unix_connection(
                    SOCKETS / f"{name}.sock", limit=LINE_MAX
                )
                writer.write(text.encode())
                await writer.drain()
                return (await reader.readuntil(b"\n\n")).decode()
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
            why = str(error) or type(error).__name__
            raise Silent(f"device {name}", f"{COMMAND} does not answer ({why})") from None
        finally:
            if writer:
                writer.close()


def render(update: Update) -> str:
    """A request that makes an update."""
    lines = ["set=1"]
    if update.private_key is not None:
        lines.append(f"private_key={update.private_key.hex()}")
    if update.port is not None:
        lines.append(f"listen_port={update.port}")
    for key in update.gone:
        lines += [f"public_key={key.hex()}", "remove=true"]
    for peer in update.peers:
        lines.append(f"public_key={peer.public_key.hex()}")
        if peer.endpoint:
            address, port = peer.endpoint
            host = f"[{address}]" if ":" in address else address
            lines.append(f"endpoint={host}:{port}")
        lines.append("replace_allowed_ips=true")
        lines += [f"allowed_ip={cidr}" for cidr in sorted(peer.allowed)]
        # Last: it is what begins a session, to which the rest must be known.
        lines.append(f"persistent_keepalive_interval={peer.keepalive}")
    return "\n".join(lines) + "\n\n"


def status(answer: str) -> int:
    """The errno of an answer; 0 if all is well. VxmeshError if it is no answer."""
    for key, value in _pairs(answer):
        if key == "errno":
            return int(value)
    raise VxmeshError(COMMAND, "gave an answer without a status")


def parse(answer: str) -> Config:
    """What a device holds, from the answer to get=1. VxmeshError if it says that it failed."""
    private, port = b"", 0
    peers: dict[bytes, Peer] = {}
    public = b""
    endpoint: Endpoint | None = None
    allowed: set[str] = set()
    keepalive, handshake = 0, 0.0

    def close() -> None:
        if public:
            peers[public] = Peer(public, endpoint, frozenset(allowed), keepalive, handshake)

    try:
        if code := status(answer):
            raise VxmeshError(COMMAND, f"does not tell of its device (errno {code})")
        for key, value in _pairs(answer):
            if key == "private_key":
                private = bytes.fromhex(value)
            elif key == "listen_port":
                port = int(value)
            elif key == "public_key":
                close()
                public, endpoint, keepalive, handshake = bytes.fromhex(value), None, 0, 0.0
                allowed = set()
            elif key == "endpoint":
                host, _, number = value.rpartition(":")
                endpoint = host.strip("[]"), int(number)
            elif key == "allowed_ip":
                allowed.add(value)
            elif key == "persistent_keepalive_interval":
                keepalive = int(value)
            elif key == "last_handshake_time_sec":
                handshake += int(value)
            elif key == "last_handshake_time_nsec":
                handshake += int(value) / 1e9
    except (ValueError, binascii.Error) as error:
        raise VxmeshError(COMMAND, f"gave an answer that makes no sense ({error})") from None
    close()
    return Config(private, port, peers)


def _pairs(answer: str) -> Iterator[tuple[str, str]]:
    for line in answer.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            yield key, value


def port_taken(port: int) -> Conflict:
    """The error of a UDP port that somebody else has."""
    return Conflict(
        f"UDP port {port}",
        "is taken on this host, so WireGuard cannot have it",
        "Free it, or start the agent with another --wireguard-port",
    )


def _listener(path: Path) -> int:
    """The process that listens at a unix socket; 0 if none does. See SO_PEERCRED in unix(7)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return 0
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("=iII", credentials)[0])


def _kill(pid: int) -> None:
    """End a process of ours and wait for that; another program's is left alone."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if Path(f"/proc/{pid}/exe").readlink().name.split(" ")[0] != COMMAND:
                return
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(END_WITHIN * 1000)
        finally:
            os.close(fd)


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
