"""An image to build ours on, made of this machine's files: no registry can be reached by a test.

It has what `python:3.13-slim` and the Dockerfile's first steps bring: a C library, Python with
pip and the agent's dependencies, the programs that the agent runs, and busybox for everything else.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path

from agent.testbed import Host
from agent.testbed.engines import PATH

BASE = "vxmesh-base"  # what engines call it
PROGRAMS = ("nft", "ip", "iptables", "ip6tables", "ping")
PACKAGES = "/packages"  # in the image: what pip would have installed
UNUSED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "tkinter", "lib2to3",
          "ensurepip", "turtledemo", "pydoc_data", "EXTERNALLY-MANAGED"}  # fmt: skip
# Compiled for another level, or written just now by whichever Python, which will rename it.
PASSING = re.compile(r"\.opt-|\.pyc\.\d+$")
TIMEOUT = 120.0  # s
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def give_base(host: Host) -> str:
    """Import it into a host's engine, unless that has it; what it is called."""
    listed = host.run(["docker", "image", "ls", "-q", BASE], check=True, timeout=TIMEOUT)
    if not listed.stdout.strip():
        archive = host.run_dir / "base.tar"
        _make(archive)
        command = ["docker", "import", "-c", f"ENV PYTHONPATH={PACKAGES}"]
        try:
            host.run([*command, f"/run/{archive.name}", BASE], check=True, timeout=TIMEOUT)
        finally:
            archive.unlink()
    return BASE


def _make(archive: Path) -> None:
    files = {**_python(), **_packages(), **_programs()}  # in the image -> here
    files |= _libraries(files.values())
    interpreter = Path(sys.base_prefix) / "bin" / f"python{_VERSION}"
    busybox, applets = _busybox()
    links = {"usr/local/bin/python3": str(interpreter), "usr/bin/env": "/bin/busybox"}
    links |= {f"bin/{a}": "busybox" for a in applets if a not in (*PROGRAMS, "busybox")}
    files |= {"bin/busybox": busybox}
    with tarfile.open(archive, "w") as tar:
        for name in ("etc", "root", "run", "tmp", "var"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        for name, file in files.items():
            tar.add(file.resolve(), name.lstrip("/"), recursive=False)
        for name, target in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(entry)


def _python() -> dict[str, Path]:
    """The interpreter and its standard library, at the paths where they look for each other."""
    prefix = Path(sys.base_prefix)
    found = {prefix / "bin" / f"python{_VERSION}"}
    for folder, within, names in os.walk(sysconfig.get_path("stdlib")):
        within[:] = [n for n in within if n not in UNUSED and not n.startswith("config-")]
        found.update(Path(folder, n) for n in names if n not in UNUSED and not PASSING.search(n))
    return {str(path): path for path in found if path.is_file()}


def _packages() -> dict[str, Path]:
    """pip, and what our own package needs, as it is installed here."""
    found: dict[str, Path] = {}
    done: set[str] = set()
    left = ["vxmesh", "pip"]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system or Python
        left += [
            re.split(r"[^\w.-]", r)[0] for r in distribution.requires or () if "extra ==" not in r
        ]
        for file in (distribution.files or ()) if name != "vxmesh" else ():
            if ".." not in file.parts and (path := Path(str(file.locate()))).is_file():
                found[f"{PACKAGES}/{file}"] = path
    return found


def _programs() -> dict[str, Path]:
    paths = [shutil.which(name, path=PATH) for name in PROGRAMS]
    found = {path: Path(path) for path in paths if path}
    for path in Path("/usr/lib").glob("*/xtables/*.so"):  # what iptables loads
        found[str(path)] = path
    return found


def _busybox() -> tuple[Path, list[str]]:
    path = shutil.which("busybox", path=PATH)
    assert path
    done = subprocess.run([path, "--list"], capture_output=True, text=True, check=True)
    return Path(path), done.stdout.split()


def _libraries(files: Iterable[Path]) -> dict[str, Path]:
    """What ELF files are linked with, as ldd(1) finds it here."""
    programs = [str(f) for f in files if ".so" in f.name or f.parent.name in ("bin", "sbin")]
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True)  # 1: some are none
    found = set(re.findall(r"(/\S+) \(0x", done.stdout))
    return {path: Path(path) for path in found}
