"""What holds for all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from tests import directories


def pytest_configure() -> None:
    """Commands are interrupted in tests: a shell that started us in the background had us ignore
    that, and what we start would."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() == 0 and "PYTEST_XDIST_WORKER" in os.environ:
        _load_modules()


def _load_modules() -> None:
    """Have the machine as it will be, before any test begins. The first Docker engine loads this
    one: from then on there are settings in every namespace, so also where a test that runs beside
    it counts how many were put right."""
    with contextlib.suppress(FileNotFoundError):  # no modprobe: the kernel has it, or never will
        subprocess.run(["modprobe", "-q", "br_netfilter"], stderr=subprocess.DEVNULL)


def pytest_sessionfinish() -> None:
    directories.remove_all()
