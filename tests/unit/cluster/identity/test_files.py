"""What is on disk: whole or refused, with the way out."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agent.cluster.identity import authority as ca
from agent.cluster.identity import files as files_module
from agent.cluster.identity.files import CLUSTER, KEYS, NODE, RECORD, Files, Held
from agent.cluster.identity.founding import found_cluster
from agent.errors import Conflict, Unavailable, VxmeshError

ID = "0123456789abcdef"
DAY = 86_400.0


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "state")


@pytest.fixture
def held(files: Files) -> Held:
    return found_cluster(files, ID, time.time(), DAY)


def test_a_new_cluster_is_read_back_as_it_was_made(files: Files, held: Held) -> None:
    found = files.load()
    assert found is not None and found.issuing is not None
    assert (found.cluster, found.node, found.trust) == (held.cluster, ID, held.trust)
    assert found.certificate == held.certificate
    assert found.record_key == held.record_key
    assert found.credentials() == held.credentials()
    assert ca.belongs(found.issuing.key, found.trust.authorities[0])


def test_nobody_else_can_read_it(files: Files, held: Held) -> None:
    assert files.directory.stat().st_mode & 0o777 == 0o700
    for path in files.directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_a_second_cluster_is_not_made_over_it(files: Files, held: Held) -> None:
    with pytest.raises(Conflict, match=held.cluster):
        found_cluster(files, ID, time.time(), DAY)
    found = files.load()
    assert found and found.cluster == held.cluster


def test_nothing_at_all_is_no_identity(files: Files) -> None:
    assert files.load() is None
    assert files.node() == ""


@pytest.mark.parametrize("name", [NODE, CLUSTER, RECORD, KEYS])
@pytest.mark.parametrize("damage", ["torn", "empty", "garbage"])
def test_a_torn_file_is_refused_with_the_way_out(
    files: Files, held: Held, name: str, damage: str
) -> None:
    path = files.directory / name
    whole = path.read_bytes()
    path.write_bytes(
        {"torn": whole[: len(whole) // 2], "empty": b"", "garbage": os.urandom(300)}[damage]
    )
    with pytest.raises(Unavailable) as caught:
        files.load()
    assert name in caught.value.what
    assert "backup" in caught.value.fix or "--reset-state" in caught.value.fix


@pytest.mark.parametrize("name", [CLUSTER, RECORD])
def test_a_missing_file_is_refused_as_well(files: Files, held: Held, name: str) -> None:
    (files.directory / name).unlink()
    with pytest.raises(VxmeshError, match=name):
        files.load()


def test_files_of_two_identities_do_not_pass_for_one(
    files: Files, held: Held, tmp_path: Path
) -> None:
    other = Files(tmp_path / "other")
    found_cluster(other, ID, time.time(), DAY)
    for name in (NODE, CLUSTER, RECORD):
        mine = (files.directory / name).read_bytes()
        (files.directory / name).write_bytes((other.directory / name).read_bytes())
        with pytest.raises(Unavailable):
            files.load()
        (files.directory / name).write_bytes(mine)
    assert files.load() is not None


def test_a_key_of_no_known_ca_is_left_out(files: Files, held: Held, tmp_path: Path) -> None:
    # As a crash leaves it, between the new CA's key and the statement that names it.
    other = found_cluster(Files(tmp_path / "other"), ID, time.time(), DAY)
    files.save_keys([*held.keys, *other.keys])
    found = files.load()
    assert found is not None and [k.certificate for k in found.keys] == [held.keys[0].certificate]
    files.save_keys(())
    found = files.load()
    assert found is not None and found.issuing is None


@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
@pytest.mark.parametrize("written", [RECORD, KEYS, CLUSTER, NODE])
def test_a_crash_at_any_point_leaves_the_old_identity_or_none(
    files: Files, monkeypatch: pytest.MonkeyPatch, point: str, written: str
) -> None:
    class Crash(Exception):
        pass

    def crash(*args: object, **kwargs: object) -> None:
        raise Crash

    real = Files._write

    def write(self: Files, name: str, data: bytes) -> None:
        if name == written:
            if point == "write":
                monkeypatch.setattr(os, "fdopen", crash)
            elif point == "fsync":
                monkeypatch.setattr(os, "fsync", crash)
            else:
                monkeypatch.setattr(Path, "replace", crash)
        real(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(files_module.Files, "_write", write)
        with pytest.raises(Crash):
            found_cluster(files, ID, time.time(), DAY)
        monkeypatch.undo()
    assert files.load() is None
    made = found_cluster(files, ID, time.time(), DAY)
    found = files.load()
    assert found is not None and found.cluster == made.cluster


def test_what_is_set_aside_stays_readable_under_another_name(files: Files, held: Held) -> None:
    first = files.set_aside()
    found_cluster(files, ID, time.time(), DAY)
    second = files.set_aside()
    assert first and second and first != second
    assert (first / NODE).exists() and (second / NODE).exists()
    assert files.set_aside() is None
