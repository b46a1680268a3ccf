"""Directories for unix sockets: short names (107 bytes must do), and gone when the tests end."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_made: list[Path] = []


def run_dir() -> Path:
    """A new one."""
    _made.append(Path(tempfile.mkdtemp(prefix="vxm-")))
    return _made[-1]


def remove_all() -> None:
    """Called at the end of a session; atexit is not, in the processes that share tests out."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
