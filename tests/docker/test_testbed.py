"""Engines of a testbed: one in each host, apart from the others, and nothing left of them."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from agent.errors import Unsupported
from agent.testbed import engines, take_down, temporary
from agent.testbed.engines import IMAGE, containers
from agent.testbed.namespaces import mount_points
from agent.testbed.state import ENGINE_CONFIG, directory_of
from tests.docker import base
from tests.docker.world import DockerWorld


def test_each_host_has_an_engine_of_its_own_with_an_image(world: DockerWorld) -> None:
    ids = {world.docker(h.name, "info", "-f", "{{.ID}}") for h in world.bed.hosts}
    assert len(ids) == 3
    for host in world.bed.hosts:
        said = world.docker(host.name, "run", "--rm", "--network", "none", IMAGE, "echo", host.name)
        assert said == host.name
    assert [h["engine"] for h in world.bed.status()["hosts"]] == ["running"] * 3


def test_the_command_line_leads_to_a_hosts_engine(world: DockerWorld) -> None:
    world.container("h2", "none", "only-here")
    for host, seen in (("h1", ""), ("h2", "only-here")):
        assert world.docker(host, "ps", "--format", "{{.Names}}") == seen


def test_an_engine_that_was_killed_is_started_again(world: DockerWorld) -> None:
    world.bed.kill("h3", engine=True)
    assert not world.bed.host("h3").is_engine_running
    assert world.try_docker("h3", "ps").returncode
    world.bed.start("h3")
    assert world.docker("h3", "ps", "-q") == ""


def test_an_engine_that_runs_without_an_image_gets_one(world: DockerWorld) -> None:
    # Whoever had started it was ended before it had given it one.
    world.docker("h2", "image", "rm", IMAGE)
    assert world.docker("h2", "image", "ls", "-q", IMAGE) == ""
    others = world.docker("h1", "image", "ls", "-q", IMAGE)
    type(world.bed).up(prefix=world.bed.prefix, docker=True)
    said = world.docker("h2", "run", "--rm", "--network", "none", IMAGE, "echo", "here")
    assert said == "here"
    assert world.docker("h1", "image", "ls", "-q", IMAGE) == others  # not a second time


def test_down_leaves_nothing_of_engines_and_containers() -> None:
    had_config = Path(ENGINE_CONFIG).exists()
    with temporary(hosts=1, docker=True) as bed:
        world = DockerWorld(bed)
        # One that does not heed SIGTERM, and would be started again by its engine.
        world.container("h1", "bridge", "stays", "--restart", "always")
        prefix, find = bed.prefix, containers(bed.prefix)
        assert find()
        bed.kill("h1", engine=True)  # the container goes on without it
        assert find()
    assert not find()
    assert not [p for p in mount_points() if prefix in p] and not directory_of(prefix).exists()
    assert had_config == Path(ENGINE_CONFIG).exists()
    assert not cgroups_called(engines.cgroup_of(prefix))
    take_down(prefix)  # twice is no error


def cgroups_called(name: str) -> list[str]:
    """Wherever there is one of that name. Not by Path.glob, which fails at a cgroup that goes after
    it was listed, as those of other tests' containers do."""
    return [at for at, _, _ in os.walk(engines.CGROUPS) if Path(at).name == name]


def test_a_search_for_cgroups_bears_that_others_go_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("found", "goes/within", "stays/found"):
        (tmp_path / name).mkdir(parents=True)
    real = os.scandir

    def too_late(path: str | Path) -> object:
        if Path(path) == tmp_path / "goes":
            (tmp_path / "goes/within").rmdir()
            (tmp_path / "goes").rmdir()
        return real(path)

    monkeypatch.setattr(engines, "CGROUPS", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", too_late)
        found = cgroups_called("found")
    assert sorted(found) == [str(tmp_path / "found"), str(tmp_path / "stays/found")]
    assert not (tmp_path / "goes").exists()


def test_an_image_is_made_of_no_file_that_is_only_being_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = tmp_path / "__pycache__/abc.cpython-311.pyc"
    compiled.parent.mkdir()
    # As importlib's _write_atomic calls it until it is whole.
    for path in (compiled, compiled.with_name(f"{compiled.name}.140234866")):
        path.touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    names = [path for path in base._python() if path.startswith(str(tmp_path))]
    assert names == [str(compiled)]


def test_a_machine_without_docker_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "PATH", str(tmp_path))
    with pytest.raises(Unsupported, match=r"apt-get install docker\.io"), temporary(1, docker=True):
        pass
