"""The Docker engines of a testbed: one in each host, with nothing shared.

An engine's files are below its host's /run, which is memory and goes with the host; its cgroups
are below one of the testbed's, which down removes. Its containers have neither the testbed's
token nor its mounts, so they are known by that cgroup. No image can be pulled where there is no
way out: each engine gets one named busybox, made of this machine's, if that is static.
Opposite: agents.py, the same for agents; bed.py says which engines there should be.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from agent import syscalls
from agent.errors import Timeout, Unsupported, VxmeshError
from agent.testbed import processes
from agent.testbed.agents import POLL, Started, answers, tail
from agent.testbed.host import BIN, Host
from agent.testbed.namespaces import mount_points
from agent.testbed.state import ENGINE_CONFIG, HostState

# Of the distribution's programs: another `docker` may be too new for its engine.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
SOCKET = "docker.sock"  # below a host's /run
DATA = "/run/docker-data"  # as the host calls it
IMAGE = "busybox"
CGROUPS = Path("/sys/fs/cgroup")
READY_TIMEOUT = 60.0  # seconds until all engines answer
READY_TIMEOUT_EACH = 10.0  # more for each: they share the machine's cores
CONTAINERD_TIMEOUT = 20.0


def programs() -> dict[str, str]:
    """The paths of dockerd and docker; Unsupported says what to type if one is missing."""
    found = {name: shutil.which(name, path=PATH) for name in ("dockerd", "docker")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise Unsupported(
            "--docker",
            f"needs {' and '.join(missing)}, which this machine lacks",
            "Install them with 'apt-get install docker.io'; they need not be running",
        )
    return {name: path for name, path in found.items() if path}


def cgroup_of(prefix: str) -> str:
    """The cgroup of the containers of a testbed, in each hierarchy."""
    return f"{prefix}-docker"


def start(prefix: str, host: Host, of: HostState) -> Started:
    """Start a host's engine; `of` gets its process. It may take a second until it answers."""
    dockerd = programs()["dockerd"]
    host.call(_own_config)
    _link_client(host)
    _wait_for_containerd(host)
    (host.run_dir / SOCKET).unlink(missing_ok=True)
    # Left by one that was killed: it starts no other while a process has that number, which
    # may be anybody's by now.
    (host.run_dir / "docker.pid").unlink(missing_ok=True)
    log = host.directory / "dockerd.log"
    command = [dockerd, "--data-root", DATA, "--pidfile", "/run/docker.pid"]
    command += ["--exec-root", "/run/docker", "-H", f"unix:///run/{SOCKET}"]
    command += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
    command += ["--cgroup-parent", f"/{cgroup_of(prefix)}"]
    offset = log.stat().st_size if log.exists() else 0
    base = {k: v for k, v in os.environ.items() if not k.startswith(("VXMESH_", "DOCKER_"))}
    env = processes.environment(base, host.name, host.token, "")
    env["PATH"] = f"{PATH}:{env['PATH']}"
    pid = processes.spawn(host.namespaces, command, env, "/", log)
    of.engine, of.engine_start = pid, syscalls.start_time(pid)
    return Started(host.name, pid, of.engine_start, host.run_dir / SOCKET, log, offset)


def _link_client(host: Host) -> None:
    """Have the client that belongs to the engine found first."""
    link = host.run_dir / Path(BIN).name / "docker"
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(programs()["docker"])


def _own_config() -> None:
    """Let the calling host have no settings of the machine's engine, and a key of its own."""
    if ENGINE_CONFIG not in mount_points():
        own = Path(f"/run{ENGINE_CONFIG}")
        own.mkdir(parents=True)
        syscalls.mount(str(own), ENGINE_CONFIG, flags=syscalls.MS_BIND)


def wait_ready(engines: Sequence[Started]) -> None:
    """Return when each answers. VxmeshError with its log if one ends before."""
    left = list(engines)
    deadline = time.monotonic() + READY_TIMEOUT + READY_TIMEOUT_EACH * len(left)
    while left:
        for engine in list(left):
            if not processes.is_running(engine.pid, engine.start_time):
                raise VxmeshError(
                    f"the engine of {engine.host}", "ended while it started", tail(engine)
                )
            if answers(engine.socket) and _ping(engine.socket):
                left.remove(engine)
        if left and time.monotonic() > deadline:
            raise Timeout(f"the engine of {left[0].host}", "does not answer", tail(left[0]))
        if left:
            time.sleep(POLL)


def _ping(path: Path) -> bool:
    """Whether the engine there does its work: it listens some time before."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5.0)
        try:
            sock.connect(str(path))
            sock.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return sock.recv(64).split(b" ", 2)[1:2] == [b"200"]
        except OSError:
            return False


def give_image(hosts: Sequence[Host]) -> str:
    """Import this machine's static busybox as an image of that name; what it is called, or
    nothing where there is no such busybox."""
    busybox = shutil.which("busybox", path=PATH)
    if busybox is None or not _is_static(Path(busybox)):
        return ""
    data = _make_image(Path(busybox))
    docker = programs()["docker"]
    for host in hosts:
        archive = host.run_dir / "busybox.tar"
        archive.write_bytes(data)
        try:
            host.run([docker, "import", f"/run/{archive.name}", IMAGE], check=True, timeout=60)
        except subprocess.SubprocessError as error:
            what = f"the engine of {host.name}"
            raise VxmeshError(what, f"takes no image: {_why(error)}", "See its log") from error
        finally:
            archive.unlink()
    return IMAGE


def lacks_image(host: Host) -> bool:
    """Whether a host's engine, which answers, has no such image."""
    words = [programs()["docker"], "image", "ls", "-q", IMAGE]
    return not host.run(words, check=True, timeout=60).stdout.strip()


def _why(error: subprocess.SubprocessError) -> str:
    return str(getattr(error, "stderr", "") or error).strip()


def _is_static(program: Path) -> bool:
    """Whether it runs without libraries: an ELF file that names no interpreter (elf(5))."""
    data = program.read_bytes()
    return data[:4] == b"\x7fELF" and b"/ld-linux" not in data[:4096] and b"/ld-musl" not in data


def _make_image(busybox: Path) -> bytes:
    """An image's files as a tar archive: busybox, and each of its applets as a link to it."""
    listed = subprocess.run(
        [str(busybox), "--list"], capture_output=True, text=True, check=True, timeout=10
    )
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        data = busybox.read_bytes()
        for name in ("bin", "etc", "root", "tmp", "var", "var/www"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(directory)
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(data), 0o755
        tar.addfile(entry, io.BytesIO(data))
        for applet in listed.stdout.split():
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname, link.mode = tarfile.SYMTYPE, "busybox", 0o777
                tar.addfile(link)
    return archive.getvalue()


def _wait_for_containerd(host: Host) -> None:
    """Return when that of the last engine is gone altogether. It ends with the engine, by a signal
    of the kernel's, but a moment later: the next engine would take it for one to go on with, also
    while nobody has reaped it, and give up on it."""
    deadline = time.monotonic() + CONTAINERD_TIMEOUT
    # Without the file there was none, or it is gone; another name: the number is another's now.
    with contextlib.suppress(OSError, ValueError):
        pid = int((host.run_dir / "docker/containerd/containerd.pid").read_text())
        while Path(f"/proc/{pid}/comm").read_text().strip() == "containerd":
            if time.monotonic() > deadline:
                return
            time.sleep(POLL)


def containers(prefix: str) -> Callable[[], list[int]]:
    """A function that finds the processes in containers of the testbed's engines."""

    def find() -> list[int]:
        found: set[int] = set()
        for directory in _cgroups(prefix):
            # A cgroup of threads has none (cgroups(7)), one may go meanwhile.
            with contextlib.suppress(OSError, ValueError):
                found.update(map(int, (directory / "cgroup.procs").read_text().split()))
        return sorted(found)

    return find


def remove_cgroups(prefix: str) -> None:
    """Remove what the engines made below the testbed's cgroup, innermost first."""
    for directory in _cgroups(prefix):
        with contextlib.suppress(OSError):
            directory.rmdir()


def _cgroups(prefix: str) -> list[Path]:
    """The testbed's cgroup and all below it in every hierarchy, of v1 and v2, innermost first."""
    name = cgroup_of(prefix)
    tops = [path for path in (CGROUPS / name, *CGROUPS.glob(f"*/{name}")) if path.is_dir()]
    found = [Path(directory) for top in tops for directory, _, _ in os.walk(top, topdown=False)]
    return list(dict.fromkeys(found))
