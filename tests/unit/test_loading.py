"""What processes of ours load, and that the collector works again once they have."""

from __future__ import annotations

import gc
import subprocess
import sys

from agent import loading


def loaded(program: str) -> set[str]:
    """The modules of a process that ran this."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_an_agent_loads_nothing_that_only_some_have_a_use_for() -> None:
    """Plugins, the engine and the port for metrics are met by aiohttp, a LAN by zeroconf."""
    found = loaded("import agent.daemon")
    assert "agent.remote.client" in found
    assert found & {"aiohttp", "zeroconf", "yaml", "click", "agent.client"} == set()


def test_the_collector_works_again_once_all_is_loaded() -> None:
    """In the name server, which lives for long; it is loaded as its process does it."""
    found = loaded(
        "import agent.resolver.__main__, gc\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 10_000, gc.get_freeze_count()"
    )
    assert "agent.resolver.process" in found


def test_a_command_that_calls_an_agent_has_its_collector() -> None:
    loaded(
        "import gc\n"
        "from agent import loading\n"
        "loading.begin()\n"
        "from agent.cli import main\n"
        "assert main.run(['--host', 'unix:///nobody/agent.sock', 'node', 'ls']) == 3\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 10_000"
    )


def test_the_collector_rests_while_grpc_is_loaded_for_a_command() -> None:
    """As one needs it that calls an agent elsewhere."""
    found = loaded(
        "import gc\n"
        "from agent import loading\n"
        "loading.begin()\n"
        "from agent.cli import main\n"
        "import importlib.abc, sys\n"
        "class Look(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('grpc', 'asyncio'): assert not gc.isenabled(), name\n"
        "sys.meta_path.insert(0, Look())\n"
        "assert main.run(['--host', 'ipv4:127.0.0.1:1', 'node', 'ls']) == 3\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 10_000"
    )
    assert {"grpc", "asyncio"} <= found


def test_where_nothing_began_nothing_is_frozen() -> None:
    before = gc.get_freeze_count()
    loading.end()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)
