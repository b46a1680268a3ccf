"""What a test needs and this machine lacks: a reason to skip it, and under CI a failure."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacks(why: str) -> NoReturn:
    """End the test that calls: skipped, or failed where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"{why} (and CI is set)")
    pytest.skip(why)
