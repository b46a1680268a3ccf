"""Starts the name server's process in such a way that it outlives the agent.

What stands opposite: __main__.py, which is what runs; client.py, which asks for it.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import agent

LOG = "resolver.log"


def spawn(
    run_dir: Path,
    netns: str | None,
    listen: Sequence[str],
    resolv_conf: str,
    workers: int = 1,
) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, with its log in `run_dir`; that of the last is kept.

    The log is a file, as a pipe would end with the agent. Raises OSError.
    """
    command = [sys.executable, "-m", "agent.resolver", "--run-dir", str(run_dir)]
    command += ["--resolv-conf", resolv_conf, "--workers", str(workers)]
    if netns is not None:
        command += ["--netns", netns]
    for each in listen:
        command += ["--listen", each]
    root = str(Path(agent.__file__).parents[1])
    environment = dict(os.environ)
    if root not in site.getsitepackages():  # the package is not installed: a source tree
        path = (root, environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    log = run_dir / LOG
    if log.exists():
        log.replace(log.with_name(f"{LOG}.1"))
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    finally:
        os.close(fd)


def last_words(run_dir: Path) -> str:
    """The last line of its log; empty if it said nothing."""
    try:
        lines = (run_dir / LOG).read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
