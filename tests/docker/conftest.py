"""Real Docker engines, one in each host of a testbed. Nothing is installed here: scripts/setup.sh
dev does it. Under CI a missing root or engine is a failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import Unsupported
from agent.testbed import Testbed, engines, temporary
from tests.docker.world import DockerWorld

HERE = Path(__file__).parent


def lacking() -> str:
    """What these tests lack here, and what to type; empty: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        engines.programs()
    except Unsupported as error:
        return str(error)
    if shutil.which("busybox", path=engines.PATH) is None:
        return "needs busybox for images. Install it with 'apt-get install busybox-static'"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    why = lacking() if mine else ""
    if not why:
        return
    if os.environ.get("CI"):
        pytest.exit(f"tests/docker: {why} (and CI is set)", returncode=1)
    for item in mine:
        item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def docker_bed() -> Iterator[Testbed]:
    """Three hosts with agents and engines, for all tests that leave them as they were."""
    with temporary(hosts=3, docker=True) as made:
        yield made


@pytest.fixture
def world(docker_bed: Testbed) -> Iterator[DockerWorld]:
    """The three hosts, and whatever a test makes on them, gone at its end."""
    made = DockerWorld(docker_bed)
    yield made
    made.clean()
