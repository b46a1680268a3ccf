"""What holds for all tests."""

from __future__ import annotations

import signal

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


def pytest_sessionfinish() -> None:
    directories.remove_all()
