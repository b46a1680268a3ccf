"""What holds for all tests."""

from __future__ import annotations

import signal

from tests import directories


def pytest_configure() -> None:
    """Commands are interrupted in tests: a shell that started us in the background had us ignore
    that, and what we start would."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    directories.remove_all()
