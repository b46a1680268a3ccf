"""WireGuard keys on disk: who may read them, and what a restart in the middle of a change finds."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.keys import FILE, WireguardKeys

NODE = "1" * 16


def opened(folder: Path, node: str = NODE, now: float = 5.0) -> WireguardKeys:
    return WireguardKeys(folder, node, 51850, lambda: now)


def test_a_key_is_made_once_and_found_again(tmp_path: Path) -> None:
    keys = opened(tmp_path)
    assert keys.records() == () and keys.current is None
    keys.ensure()
    keys.ensure()
    (record,) = keys.records()
    assert (record.generation, record.port, len(record.public)) == (1, 51851, 32)
    again = opened(tmp_path, now=99.0)
    assert again.records() == (record,)
    assert again.current and again.current.created == 5.0
    (private,) = keys.private().values()
    pair = X25519PrivateKey.from_private_bytes(private)
    assert pair.public_key().public_bytes_raw() == record.public


def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    opened(tmp_path).ensure()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_each_step_of_a_change_is_found_again(tmp_path: Path) -> None:
    keys = opened(tmp_path)
    keys.ensure()
    (old,) = keys.records()
    keys.begin()
    old_again, new = keys.records()
    assert old_again == old and (new.generation, new.port) == (2, 51850)
    for state in (keys, opened(tmp_path)):
        assert state.is_changing and not state.is_flipped
    keys.begin()
    assert keys.records() == (old, new), "one change at a time"
    keys.flip()
    for state in (keys, opened(tmp_path)):
        assert state.is_flipped and state.records() == (new, old)
    keys.flip()
    assert keys.records() == (new, old)
    keys.retire()
    for state in (keys, opened(tmp_path)):
        assert not state.is_changing and state.records() == (new,)
        assert list(state.private()) == [new.public]


@pytest.mark.parametrize("content", [b"", b"{}", b"\0garbage", b'{"node": "1", "keys": [{}]}'])
def test_a_file_that_is_broken_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    keys = opened(tmp_path)
    assert keys.records() == ()
    keys.ensure()
    assert opened(tmp_path).records() == keys.records()


def test_a_node_that_begins_anew_has_a_key_of_its_own(tmp_path: Path) -> None:
    old = opened(tmp_path)
    old.ensure()
    new = opened(tmp_path, "2" * 16)
    assert new.records() == ()
    new.ensure()
    assert new.records()[0].public != old.records()[0].public


def test_a_change_that_cannot_be_kept_is_not_in_force(tmp_path: Path) -> None:
    keys = opened(tmp_path)
    keys.ensure()
    before = keys.records()
    (tmp_path / f"{FILE}.new").mkdir()
    with pytest.raises(OSError):
        keys.begin()
    assert keys.records() == before
