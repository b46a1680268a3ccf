"""What holds for all tests."""

from __future__ import annotations

from tests import directories


def pytest_sessionfinish() -> None:
    directories.remove_all()
