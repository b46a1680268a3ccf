"""Directories for unix sockets: short names (107 bytes must do), and gone when the tests end."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path


def run_dir() -> Path:
    """A new one."""
    made = Path(tempfile.mkdtemp(prefix="vxm-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
