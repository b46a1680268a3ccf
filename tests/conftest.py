"""What holds for all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from hypothesis import HealthCheck, settings

from tests import directories


def pytest_configure() -> None:
    """Nothing fails for being slow: by itself Hypothesis lets a test fail of which one example
    takes more than 0.2 s, and a busy machine may take as long for any.

    Commands are interrupted in tests: a shell that started us in the background had us ignore
    that, and what we start would.
    """
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("patient", patient)
    settings.load_profile("patient")
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
