"""Bindings outlive the agent; what they are kept in may be broken, or not be kept at all."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import Mock

import pytest

from agent import wholefile
from agent.api.docker.bindings import FILE, Bindings, Bound


async def test_bindings_outlive_the_agent(tmp_path: Path) -> None:
    bindings = Bindings(tmp_path)
    await bindings.put("a", Bound("1", True))
    await bindings.put("b", Bound("2", False))
    await bindings.drop("a")
    assert Bindings(tmp_path).all() == {"b": Bound("2", False)}


async def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    bindings = Bindings(tmp_path)
    await bindings.put("gone", Bound("x", True))
    every = {f"{n}": Bound(f"{n}{n}", bool(n % 2)) for n in range(20)}
    await asyncio.gather(
        bindings.drop("gone"), *(bindings.put(id, bound) for id, bound in every.items())
    )
    assert bindings.all() == Bindings(tmp_path).all() == every


async def test_what_cannot_be_kept_is_not_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings = Bindings(tmp_path)
    await bindings.put("a", Bound("1", True))

    def full(path: Path, data: bytes) -> None:
        raise OSError("full")

    monkeypatch.setattr(wholefile, "replace", full)
    with pytest.raises(OSError, match="full"):
        await bindings.put("b", Bound("2", True))
    with pytest.raises(OSError, match="full"):
        await bindings.drop("a")
    assert bindings.all() == Bindings(tmp_path).all() == {"a": Bound("1", True)}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": {"network": 5}}', b"\xff\x00"])
async def test_a_broken_file_is_set_aside_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    log = Mock()
    monkeypatch.setattr("agent.api.docker.bindings.log", log)
    (tmp_path / FILE).write_bytes(content)
    bindings = Bindings(tmp_path)
    (call,) = log.method_calls
    line = call.kwargs
    assert call.args == ("docker.bindings_unreadable",) and line["error"] and line["fix"]
    assert line["file"] == str(tmp_path / FILE)
    assert line["set_aside"] == str(tmp_path / f"{FILE}.aside-1")
    assert (tmp_path / f"{FILE}.aside-1").read_bytes() == content
    assert bindings.all() == {}
    await bindings.put("a", Bound("1", True))
    assert Bindings(tmp_path).all() == {"a": Bound("1", True)}


def test_a_directory_in_its_place_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    assert Bindings(tmp_path).all() == {}
    assert not (tmp_path / FILE).exists()
