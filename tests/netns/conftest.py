"""The real kernel, through testbeds of the tests' own. Under CI a missing root is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.testbed import Testbed, temporary
from tests.netns.world import World

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    if os.environ.get("CI"):
        pytest.exit("tests/netns needs root, and CI is set", returncode=1)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session")
def bed() -> Iterator[Testbed]:
    """Three hosts with agents, for all tests that leave them as they were."""
    with temporary(hosts=3, agent_options=["--path-interval", "0.5"]) as made:
        yield made


@pytest.fixture
def world(bed: Testbed, request: pytest.FixtureRequest) -> Iterator[World]:
    """The three hosts, and whatever a test makes on them, gone at its end."""
    made = World(bed)
    yield made
    made.clean()
