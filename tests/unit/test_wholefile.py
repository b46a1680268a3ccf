"""A file is replaced as a whole, and durable when the call returns."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agent import wholefile


def test_what_is_there_is_replaced_and_read_by_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    (tmp_path / "a.json.new").write_bytes(b"of one that was killed")
    for data in (b"one", b"", b"x" * 100_000):
        wholefile.replace(path, data)
        assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_it_is_on_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    done: list[tuple[str, str, object]] = []
    fsync, replace = os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        target = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        done.append(("sync", target, Path(target).is_dir() or Path(target).read_bytes()))
        fsync(descriptor)

    def replacing(source: Path, target: Path) -> Path:
        done.append(("replace", str(source), str(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    wholefile.replace(path, b"x")
    assert done == [
        ("sync", f"{path}.new", b"x"),
        ("replace", f"{path}.new", str(path)),
        ("sync", str(tmp_path), True),
    ]


def test_a_disk_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    wholefile.replace(path, b"old")

    def failing(descriptor: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="full"):
        wholefile.replace(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"


def test_what_is_set_aside_takes_the_place_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for number in (1, 2):
        path.write_text(str(number))
        assert wholefile.set_aside(path).name == f"a.aside-{number}"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "a.aside-1": "1", "a.aside-2": "2",
    }  # fmt: skip
